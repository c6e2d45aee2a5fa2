"""The demo as a user runs it: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlproducer import MLProducer, Settings, SummarizationTask
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from tests.broker.commands import COMMAND, LIMIT, documents, environ_of, run
from tests.leftovers import left_behind, left_in_the_end

pytestmark = pytest.mark.broker


def test_demo_loses_nothing(tmp_path: Path) -> None:
    """A private node is frozen and killed; everything is run, and nothing is left behind."""
    result = run("demo", "--messages", "80", "--json", TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (document,) = documents(result.stdout)
    assert document["faults"] == ["frozen", "killed"]
    assert document["published"] == document["run"] == 80
    assert document["confirmed"] + document["deferred_then_confirmed"] == 80
    assert document["deferred_then_confirmed"] > 0
    assert document["lost"] == document["undelivered"] == document["foreign"] == 0
    assert 1.0 < document["longest_publish"] < 10.0
    assert left_behind(tmp_path) == []


def test_demo_on_a_broker_of_yours(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """With RABBITMQ_URL set that broker is used unharmed, and tasks of others stay where they are.

    The demo's own go to a queue of its own, since others' workers would run them.
    """
    url = rabbitmq_vhost.url
    with MLProducer(Settings(url=url)) as producer:
        other = producer.publish(SummarizationTask("1", {"text": "x"})).message_id
    result = run("demo", "--messages", "50", url=url, TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "without freezing or killing it" in result.stdout
    assert "killing the broker" not in result.stdout
    rows = {line[:26].strip(): line[26:].strip() for line in result.stdout.splitlines()}
    assert (rows["published"], rows["run by the worker"], rows["lost"]) == ("50", "50", "0")
    assert rabbitmq_vhost.node.running
    assert drain(url) == {other: 1}


@pytest.mark.parametrize(
    ("how", "code", "moment"),
    [
        (signal.SIGINT, 130, "starting a private RabbitMQ"),
        (signal.SIGTERM, 143, "freezing the broker"),
    ],
)
def test_demo_ends_at_a_signal(how: signal.Signals, code: int, moment: str, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM give their codes, no traceback, and leave no program and file behind."""
    process = subprocess.Popen(
        [*COMMAND, "demo"],
        env=environ_of(None, {"TMPDIR": str(tmp_path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if moment in line:
                break
        process.send_signal(how)
        _stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert left_in_the_end(tmp_path) == []


@pytest.mark.parametrize(
    ("absence", "command"),
    [
        ("import sys; sys.modules['celery'] = None", "pip install 'mlproducer[celery]'"),
        (
            "import os, mlproducer.testing.erlang as e; e._DIRECTORIES = (); os.environ['PATH']=''",
            "apt-get install -y rabbitmq-server",
        ),
    ],
    ids=["celery", "rabbitmq"],
)
def test_demo_says_what_to_install(absence: str, command: str) -> None:
    """Without Celery or RabbitMQ the demo ends at once, with the command that installs it."""
    program = f"{absence}; import sys; from mlproducer.cli import main; sys.exit(main(['demo']))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environ_of(None, {}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 1
    assert command in result.stderr
    assert "Traceback" not in result.stderr
