"""What is used of others although it is not documented: one list, held against the installed pika.

What becomes of a library without a name is tried: with pikas that have it under another name, here,
and of the standard library's names beside the tests of what uses them.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import LIMIT

PACKAGE = Path(__file__).parents[2] / "mlproducer"

NAMES: dict[str, dict[str, str]] = {
    "pika.connection": {
        "_client_properties": "pika adds itself and Python's version to what the broker shows",
        "_frame_buffer": "a frame without end counts as silence; an undecodable letter ends pika",
        "_on_data_available": "confirms are read by pika, in three times as many calls",
        "_on_connection_close_from_broker": "a refusal counts as a lost connection",
        "_opened": "as for _on_connection_close_from_broker",
        "_output_marshaled_frames": "messages are written by basic_publish: twice the time",
        "_read_frame": "as for _frame_buffer",
        "_terminate_stream": "as for _on_connection_close_from_broker",
    },
    "pika.adapters.base_connection": {
        "_nbio": "as for _proto_connection_made",
        "_proto_connection_made": "messages are written by pika's transport, in one turn more",
    },
    "pika.adapters.utils.io_services_utils": {
        "_MAX_CONSUME_BYTES": "a read that fails follows each read",
        "_MAX_RECV_BYTES": "reads are shorter",
    },
    "pika.adapters.select_connection": {
        "_get_write_buffer_size": "pika's write buffer grows without a limit",
    },
    "pika.adapters.utils.selector_ioloop_adapter": {
        "_watchers": "a connection that is given up ends when pika notices",
    },
    "pika.adapters.blocking_connection": {
        "_cleanup": "descriptors are closed when they are collected",
        "_impl": "answers to the commands have pika's limits, and an undecodable letter ends them",
        "_impl_class": "commands say of a refusal that the connection was lost",
        "_transport": "a connection of the commands ends when pika notices",
    },
    "json.encoder": {"c_make_encoder": "the documented encoder: twice the time"},
    "concurrent.futures._base": {
        "_condition": "an interrupt amid a future's call may cost its end"
    },
    "threading": {"_is_owned": "Condition tells whose a lock is, in three times as long"},
}
"""Names by their module, and what happens where one is missing."""

LISTED = frozenset().union(*NAMES.values())

OF_METRICS = {"_multiprocess", "_names_to_collectors", "_lock"}
"""Names of prometheus-client, without which metrics are counted and not shown; see its tests."""

FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not {"testing", "cli", "contrib"} & {*path.relative_to(PACKAGE).parts}
]


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_each_is_there(module: str, name: str) -> None:
    """The installed versions have all; a CI run over the oldest and the newest asks the same."""
    assert name in inspect.getsource(importlib.import_module(module))


def test_messages_are_published_without_each_of_pikas() -> None:
    """And questions asked, and brokers that refuse or babble survived."""
    names = [name for module in NAMES if module.startswith("pika.") for name in NAMES[module]]
    command = [sys.executable, "-m", "tests.house.renamed_pika", *names]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=4 * LIMIT, check=True
    )
    assert json.loads(done.stdout) == {}


def test_there_are_no_others() -> None:
    """What ruff was told to let pass, and what is got at by its name, is in the list."""
    unlisted = [
        f"{path.relative_to(PACKAGE)}:{line} {name}"
        for path in FILES
        for line, name in _foreign(path)
        if name not in LISTED | OF_METRICS
    ]
    assert not unlisted, "\n".join(unlisted)


def _foreign(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the private names that a file has of objects that are not its own."""
    text = path.read_text(encoding="utf-8")
    marked = {n for n, line in enumerate(text.splitlines(), 1) if "noqa: SLF001" in line}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.lineno in marked:
            name = "" if ast.unparse(node.value) == "self" else node.attr
            if name.startswith("_"):
                yield node.lineno, name
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "attrgetter"}:
            for each in node.args:
                name = str(each.value) if isinstance(each, ast.Constant) else ""
                if name.startswith("_") and not name.startswith("__"):
                    yield node.lineno, name


def test_what_pikas_classes_have_of_their_own_is_listed() -> None:
    """Our classes that derive from pika's use no private name of theirs but those in the list."""
    from mlproducer._engine import pika_adapters

    for kind in (pika_adapters.IOServices, pika_adapters.BrokerConnection):
        tree = ast.parse(inspect.getsource(kind))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and ast.unparse(node.value) in {"self", "super()"}
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        }
        bases = [base for base in kind.__mro__ if base.__module__.startswith("pika.")]
        theirs = "".join(inspect.getsource(base) for base in bases)
        assert theirs
        assert {name for name in used if f".{name}" in theirs} <= LISTED, kind
