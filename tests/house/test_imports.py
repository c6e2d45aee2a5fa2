"""What an importing application loads: nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mlproducer

NOT_NEEDED = {
    "asyncio",
    "pika",
    "prometheus_client",
    "ssl",
    "sqlite3",
    "redis",
    "psycopg",
    "mlproducer._async_answers",
    "mlproducer._store_url",
    "mlproducer.cli",
    "mlproducer.contrib",
    "mlproducer.monitoring",
    "mlproducer.observe.metrics",
    "mlproducer.outbox",
    "mlproducer.testing",
    "mlproducer.wsgi",
}
"""Modules that only some applications need, or that can wait until the first message."""


def loaded(statement: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_package_itself_loads_no_module() -> None:
    """Each is loaded when one of its names is first used."""
    modules = loaded("import mlproducer")
    assert {name for name in modules if name.startswith("mlproducer.")} == set()
    assert not modules & {"typing", "logging", "attr"}


def test_a_producer_that_is_made_loads_no_more_than_it_needs() -> None:
    """Neither the connection nor metrics are loaded before they are used."""
    modules = loaded(
        "from mlproducer import MLProducer, Settings, SummarizationTask\n"
        "MLProducer(Settings(url='amqp://localhost'))"
    )
    assert "mlproducer.producer" in modules
    assert modules & NOT_NEEDED == set()


@pytest.mark.parametrize("name", mlproducer.__all__)
def test_each_public_name_is_there(name: str) -> None:
    """As an attribute, and in what ``dir()`` shows."""
    assert getattr(mlproducer, name) is not None
    assert name in dir(mlproducer)


def test_other_names_are_not() -> None:
    """The error is that of any module."""
    with pytest.raises(AttributeError, match="'mlproducer' has no attribute 'MLProducers'"):
        mlproducer.MLProducers  # type: ignore[attr-defined] # noqa: B018
