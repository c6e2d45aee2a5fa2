"""``dead-letters``, in processes of their own: no letter is lost, whatever ends a replay."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import reduce
from typing import Any

import pika
import pytest

from mlproducer import CeleryTask, Message, MLProducer, Settings
from mlproducer.cli import main
from mlproducer.cli.output import Console
from mlproducer.errors import RetriesExhaustedError
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.commands import COMMAND, LIMIT, documents, environ_of, run
from tests.broker.conftest import Connect

pytestmark = pytest.mark.broker

EXCHANGE = "bookmarkai.ml"
DEAD = "ml.dead_letter"
FIELDS = ["message_id", "reason", "attempts", "exchange", "routing_key", "first_failed_at", "where"]


def _bury(connect: Connect, messages: Iterable[Message | CeleryTask]) -> None:
    """Make dead letters of messages that no queue is bound for."""
    producer = connect(max_message_retries=0)
    assert producer.wait_connected(LIMIT)
    for future in [producer.submit(each) for each in messages]:
        assert isinstance(future.exception(LIMIT), RetriesExhaustedError)


def _letters(names: Iterable[str], routing_key: str = "later") -> list[Message]:
    return [Message(body=b"PRIVATE", routing_key=routing_key, message_id=each) for each in names]


def _declare(url: str, queue: str, **arguments: Any) -> None:
    with open_channel(url) as channel:
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, EXCHANGE, queue)


def _ids(url: str) -> list[str]:
    return [each["message_id"] for each in documents(_fine(url, "list").stdout)]


def _fine(url: str, *argv: str) -> subprocess.CompletedProcess[str]:
    result = run("dead-letters", *argv, "--json", url=url)
    assert result.returncode == 0, result.stderr
    return result


# --- list and show ---------------------------------------------------------------------------


def test_list(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Every letter is listed, for programs with all its fields; they stay where they are."""
    url = rabbitmq_vhost.url
    _bury(connect, [])
    assert run("dead-letters", "list", url=url).stdout == "no dead letters\n"
    _bury(connect, _letters(["a", "b"]))
    first, second = documents(_fine(url, "list").stdout)
    assert list(first) == FIELDS
    since = first.pop("first_failed_at")
    assert since.startswith("20")
    assert since.endswith("+00:00")
    assert first == {
        "message_id": "a",
        "reason": "UnroutableError: the broker returned the message: 312 NO_ROUTE",
        "attempts": 1,
        "exchange": EXCHANGE,
        "routing_key": "later",
        "where": "queue",
    }
    assert second["message_id"] == "b"
    for_people = run("dead-letters", "list", url=url).stdout.splitlines()
    assert [line.split()[0] for line in for_people] == ["a", "b", "2"]


def test_show(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A letter's fields and sizes are shown, its payload only where it is asked for."""
    url = rabbitmq_vhost.url
    text = Message(
        body=b"\x1b[31mred",
        routing_key="later",
        message_id="text",
        content_type="text/plain",
        headers={"shade": "PRIVATE"},
    )
    _bury(connect, [text, Message(body=b"\xff", routing_key="later", message_id="binary")])
    shown = run("dead-letters", "show", "text", url=url).stdout
    assert "later" in shown
    assert "shade" in shown
    assert "8 bytes" in shown
    assert "red" not in shown
    shown = run("dead-letters", "show", "text", "--body", url=url).stdout
    assert shown.splitlines()[-1] == r"\x1b[31mred"
    (document,) = documents(_fine(url, "show", "text", "--body").stdout)
    assert list(document)[: len(FIELDS)] == FIELDS
    assert (document["body_bytes"], document["headers"]) == (8, ["shade"])
    assert document["body"] == "\x1b[31mred"
    (document,) = documents(_fine(url, "show", "binary", "--body").stdout)
    assert document["body_base64"] == "/w=="


@pytest.mark.parametrize("argv", [["show"], ["replay"], ["purge", "--yes"]], ids=lambda a: a[0])
def test_an_unknown_id(argv: list[str], rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """An id that no letter has is named, and fails the command; other letters are not touched."""
    _bury(connect, _letters(["a"]))
    result = run("dead-letters", *argv, "unknown", url=rabbitmq_vhost.url)
    assert result.returncode == 1
    assert "no dead letter has the id unknown" in result.stderr
    assert _ids(rabbitmq_vhost.url) == ["a"]


# --- replay ----------------------------------------------------------------------------------


def test_replay_sends_what_was_published(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """The copy has the same body, properties and headers, no trace of its death, and its id."""
    url, headers = rabbitmq_vhost.url, {"text": "t", "number": 2**40, "list": [1, {"a": None}]}
    message = Message(
        body=b"PRIVATE \x00",
        routing_key="later",
        headers=headers,
        content_type="text/plain",
        content_encoding="utf-8",
        priority=3,
        message_id="message",
        correlation_id="correlation",
        type="type",
        persistent=False,
    )
    task = CeleryTask("x.y", [1], {"a": "PRIVATE"}, "later", task_id="task")
    _bury(connect, [message, task])
    _declare(url, "later", **{"x-max-priority": 5})
    _declare(url, "live")
    connect().publish(CeleryTask("x.y", [1], {"a": "PRIVATE"}, "live", task_id="task"))
    first, second = documents(_fine(url, "replay").stdout)
    assert [first["message_id"], second["message_id"]] == ["message", "task"]
    assert first["replayed"] is second["replayed"] is True
    assert _ids(url) == []
    with open_channel(url) as channel:
        _, properties, body = channel.basic_get("later")
        assert (body, properties.headers) == (message.body, headers)
        assert (properties.content_type, properties.content_encoding) == ("text/plain", "utf-8")
        assert (properties.priority, properties.delivery_mode) == (3, 1)
        assert (properties.message_id, properties.type) == ("message", "type")
        assert properties.correlation_id == "correlation"
        replayed = channel.basic_get("later")
        published = channel.basic_get("live")
    assert replayed[2] == published[2]
    assert replayed[1].headers == published[1].headers
    assert (replayed[1].message_id, replayed[1].correlation_id) == ("task", "task")


def test_replay_says_which_stay(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """What cannot be delivered stays a dead letter, says why, and fails the command alone."""
    url = rabbitmq_vhost.url
    names = [f"{kind}-{number}" for number in range(3) for kind in ("nowhere", "full", "later")]
    for name in names:
        _bury(connect, _letters([name], name.partition("-")[0]))
    _declare(url, "full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    _declare(url, "later")
    result = run("dead-letters", "replay", "--json", url=url)
    assert result.returncode == 1
    replayed = {each["message_id"]: each["error"] for each in documents(result.stdout)}
    assert {name for name, error in replayed.items() if error is None} == {
        "full-0",
        "later-0",
        "later-1",
        "later-2",
    }
    assert "nowhere-1 stays a dead letter: UnroutableError: " in result.stderr
    assert "full-1 stays a dead letter: NackError: " in result.stderr
    assert Counter(_ids(url)) == Counter(name for name, error in replayed.items() if error)
    assert drain(url, ["later"]).keys() == {"later-0", "later-1", "later-2"}


def test_replay_of_some(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """With ids only those letters are sent."""
    url = rabbitmq_vhost.url
    _bury(connect, _letters(["a", "b", "c", "d"]))
    _declare(url, "later")
    _fine(url, "replay", "b", "d")
    assert _ids(url) == ["a", "c"]
    assert drain(url, ["later"]) == {"b": 1, "d": 1}


def test_letters_that_stay_do_not_stall_the_others(
    rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """More of them than the prefetch, and than open a breaker, before those that can be sent."""
    url = rabbitmq_vhost.url
    _bury(connect, _letters([f"full-{n}" for n in range(40)], "full"))
    _bury(connect, _letters([f"later-{n}" for n in range(40)]))
    _declare(url, "full", **{"x-max-length": 1, "x-overflow": "reject-publish"})
    _declare(url, "later")
    with open_channel(url) as channel:
        channel.basic_publish("", "full", b"")
    result = run("dead-letters", "replay", url=url, RABBITMQ_PREFETCH="7")
    assert result.returncode == 1
    assert "40 replayed, 40 stayed" in result.stdout
    assert drain(url, ["later"]) == {f"later-{n}": 1 for n in range(40)}


def test_letters_of_the_broker(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """What a queue dead-lettered by itself goes back to it, the same as it was."""
    url = rabbitmq_vhost.url
    _bury(connect, [])
    _declare(url, "short", **{"x-dead-letter-exchange": f"{EXCHANGE}.dlx"})
    further = {"reply_to": "somebody", "timestamp": 1_900_000_000, "app_id": "app"}
    with open_channel(url) as channel:
        properties = pika.BasicProperties(message_id="plain", headers={"h": 1}, **further)
        channel.basic_publish("", "short", b"PRIVATE", properties)
        method, _, _ = channel.basic_get("short")
        channel.basic_reject(method.delivery_tag, requeue=False)
    (letter,) = documents(_fine(url, "list").stdout)
    assert (letter["message_id"], letter["reason"]) == ("plain", "rejected")
    assert (letter["exchange"], letter["routing_key"]) == ("", "short")
    assert letter["first_failed_at"].startswith("20")
    _fine(url, "replay")
    with open_channel(url) as channel:
        _, properties, _ = channel.basic_get("short")
    assert (properties.message_id, properties.headers) == ("plain", {"h": 1})
    assert {name: getattr(properties, name) for name in further} == further
    assert _ids(url) == []


def test_a_letter_that_lies_about_its_death(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Headers of any origin neither stop a command nor the other letters."""
    url = rabbitmq_vhost.url
    deaths: list[Any] = [[], "text", [{}], [{"routing-keys": 1, "time": "x", "count": "y"}], [1]]
    lies = [{"x-death": each} for each in deaths]
    lies += [{"x-original-expiration": "soon", "x-attempts": "many"}, {"x-death-reason": 1}]
    _bury(connect, [])
    with open_channel(url) as channel:
        for number, headers in enumerate(lies):
            properties = pika.BasicProperties(message_id=str(number), headers=headers)
            channel.basic_publish("", DEAD, b"PRIVATE", properties)
    assert _ids(url) == [str(number) for number in range(len(lies))]
    assert "7 deleted" in _fine(url, "purge", "--yes").stderr


HOSTILE: dict[str, dict[str, Any]] = {
    "escape": {
        "headers": {"x-first-failed-at": "\x1b]0;PWN\x07\x1b[2J", "x-death-reason": "\x9b2J"}
    },
    "digits": {"headers": {"x-original-expiration": "9" * 5000}},
    "infinite": {"headers": {"x-original-expiration": "9" * 400}},
    "long key": {"headers": {"x-original-routing-key": "k" * 300}},
    "control": {"headers": {"x-original-routing-key": "a\nb"}},
    "bytes": {"headers": {"x-death-reason": b"\xff\xfe", "x-original-routing-key": b"\xff"}},
    "death": {
        "headers": {"x-death": [{"routing-keys": [{"a": 1}], "reason": ["q"], "exchange": 1}]}
    },
    "year": {
        "headers": {
            "x-death": [{"time": datetime(9999, 12, 31, tzinfo=timezone.utc), "queue": None}]
        }
    },
    "type": {"type": "\x1b[31m", "content_type": "\x1b[31m", "headers": {"\x1b[31m": 1}},
    "deep": {"headers": {"d": reduce(lambda inner, _: {"a": inner}, range(60), 1)}},
    "route": {"headers": {"x-original-exchange": "", "x-original-routing-key": DEAD}},
    "exchange": {
        "headers": {"x-original-exchange": f"{EXCHANGE}.dlx", "x-original-routing-key": "k"}
    },
    "no route": {"headers": {"x-death-reason": "r"}},
}


def test_hostile_letters(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Each can be listed, shown and purged; none is replayed, none keeps the others from it."""
    url = rabbitmq_vhost.url
    _bury(connect, _letters(["good"]))
    _declare(url, "later")
    with open_channel(url) as channel:
        for name, properties in HOSTILE.items():
            told = pika.BasicProperties(message_id=name, **properties)
            channel.basic_publish("", DEAD, b"PRIVATE", told)
    _publish_undecodable(rabbitmq_vhost)
    names = ["good", *HOSTILE, ""]
    assert _ids(url) == names
    for argv in (["list"], *(["show", "--body", name] for name in ("escape", "type"))):
        shown = subprocess.run(
            [*COMMAND, "dead-letters", *argv],
            env=environ_of(url, {}),
            capture_output=True,
            check=True,
        ).stdout.decode()
        assert all(each.isprintable() or each in "\n\t" for each in shown)
    result = run("dead-letters", "replay", url=url)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "1 replayed, 14 stayed")
    assert "route stays a dead letter: InvalidMessageError: its route leads back" in result.stderr
    assert "no route stays a dead letter: InvalidMessageError: it does not say" in result.stderr
    assert Counter(_ids(url)) == Counter(names[1:])
    redirected = _fine(url, "replay", "no route", "--exchange", "", "--routing-key", "later")
    assert documents(redirected.stdout)[0]["replayed"]
    assert drain(url, ["later"]) == {"good": 1, "no route": 1}
    assert "13 deleted" in _fine(url, "purge", "--yes").stderr


def _publish_undecodable(vhost: VirtualHost) -> None:
    """Publish a header with a date in a year of ten digits, which no Python can read."""
    with open_channel(vhost.url) as channel:
        late = {"when": datetime(2030, 1, 31, tzinfo=timezone.utc)}
        properties = pika.BasicProperties(headers=late)
        encoded = b"".join(properties.encode())
        broken = encoded.replace(
            b"T" + int(late["when"].timestamp()).to_bytes(8, "big"), b"T" + b"\x7f" * 8
        )
        assert broken != encoded
        properties.encode = lambda: [broken]
        channel.basic_publish("", DEAD, b"PRIVATE", properties)


def test_filters(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """By task, reason and age; what a filter leaves out is not touched."""
    url = rabbitmq_vhost.url
    tasks = [CeleryTask(name, routing_key="later", task_id=name) for name in ("a.x", "a.y", "b.x")]
    _bury(connect, tasks)
    with open_channel(url) as channel:
        old = {"x-death-reason": "NackError: x", "x-first-failed-at": "2020-01-31T12:00:00+00:00"}
        channel.basic_publish("", DEAD, b"", pika.BasicProperties(message_id="old", headers=old))

    def ids(*argv: str) -> list[str]:
        return [each["message_id"] for each in documents(_fine(url, "list", *argv).stdout)]

    assert ids("--task", "a.*") == ["a.x", "a.y"]
    assert ids("--reason", "nackerror") == ["old"]
    assert ids("--since", "1h") == ["a.x", "a.y", "b.x"]
    assert ids("--since", "2020-02-01T00:00:00Z", "--task", "*.x") == ["a.x", "b.x"]
    assert run("dead-letters", "list", "--since", "soon", url=url).returncode == 2
    (line, *_) = run("dead-letters", "list", "--task", "b.*", url=url).stdout.splitlines()
    assert "b.x  attempts 1  UnroutableError: " in line
    _fine(url, "purge", "--yes", "--task", "a.*")
    _declare(url, "later")
    _fine(url, "replay", "--reason", "unroutable")
    assert ids() == ["old"]
    assert drain(url, ["later"]) == {"b.x": 1}


@pytest.mark.parametrize("how", ["silent", "ctrl-c"])
@pytest.mark.parametrize(
    "argv", [["list"], ["replay"], ["purge", "--yes"]], ids=lambda argv: argv[0]
)
def test_a_broker_that_falls_silent(
    argv: list[str], how: str, rabbitmq_vhost: VirtualHost, proxy: Proxy, connect: Connect
) -> None:
    """Each wait has a limit, whatever the heartbeat; Ctrl-C ends the command at once."""
    url = rabbitmq_vhost.url
    names = [str(number) for number in range(300)]
    _bury(connect, _letters(names))
    _declare(url, "later")
    proxy.delay(DELAY, direction="s2c")
    environ = {
        "RABBITMQ_PREFETCH": "20",
        "RABBITMQ_HEARTBEAT": "0",
        "RABBITMQ_CONNECTION_TIMEOUT": "1000",
        "ML_PUBLISH_TIMEOUT": "1000",
    }
    with subprocess.Popen(
        [*COMMAND, "dead-letters", *argv, "--json"],
        env=environ_of(proxy.url(url), environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        proxy.hole()
        if how == "ctrl-c":
            process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == (130 if how == "ctrl-c" else 1)
    assert "Traceback" not in stderr
    if how == "silent":
        assert "no answer in time" in stderr or "no confirm" in stderr
    proxy.heal()
    deadline = time.monotonic() + LIMIT
    while (found := drain(url, ["later", DEAD])).total() < 300 and argv[0] != "purge":
        assert time.monotonic() < deadline, found.total()


PREFETCH, MANY = 20, 1000
DELAY = 0.02
"""Seconds that every answer of the broker takes, so that a batch is long enough to be killed in."""

MOMENTS = [n * DELAY / 2 for n in range(5)]


@contextmanager
def _in_the_middle_of_a_replay(url: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "dead-letters", "replay", "--json"],
        env=environ_of(url, {"RABBITMQ_PREFETCH": str(PREFETCH)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def _check_all_there(url: str, names: list[str], kills: int) -> None:
    copies = drain(url, ["ml.embed", DEAD])
    assert copies.keys() == set(names)
    assert copies.total() - len(copies) <= kills * PREFETCH


def _bury_many(connect: Connect, url: str, many: int = MANY) -> list[str]:
    names = [str(number) for number in range(many)]
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with open_channel(url) as channel:
        channel.queue_unbind("ml.embed", EXCHANGE, "ml.embed")
        _bury(lambda **more: connect(declare_topology="off", **more), _letters(names, "ml.embed"))
        channel.queue_bind("ml.embed", EXCHANGE, "ml.embed")
    return names


def test_a_replay_that_is_killed(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, connect: Connect
) -> None:
    """After kill -9, time and again, each letter is in its queue or a dead letter still.

    At most those that were in hand are both.
    """
    url = rabbitmq_vhost.url
    names = _bury_many(connect, url)
    proxy.delay(DELAY, direction="s2c")
    for moment in MOMENTS:
        with _in_the_middle_of_a_replay(proxy.url(url)) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(moment)
            process.kill()
    assert 0 < rabbitmq_vhost.node.queue_depth(rabbitmq_vhost.name, "ml.embed") < MANY
    _check_all_there(url, names, len(MOMENTS))


def test_a_replay_whose_broker_is_killed(
    rabbitmq_vhost: VirtualHost, mortal_node: RabbitMQNode, connect: Connect
) -> None:
    """The replay fails, says why, and loses no letter."""
    url = rabbitmq_vhost.url
    names = _bury_many(connect, url)
    mortal_node.save_queues()
    with _in_the_middle_of_a_replay(url) as process:
        mortal_node.kill()
        _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert f"mlproducer: {mortal_node.host}:{mortal_node.port}: connection" in stderr
    mortal_node.restart()
    for queue in ("ml.embed", DEAD):
        mortal_node.queue_depth(rabbitmq_vhost.name, queue)  # waits for its leader
    _check_all_there(url, names, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (0, 1)])
def test_a_replay_that_is_ended(
    number: int,
    code: int,
    rabbitmq_vhost: VirtualHost,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Letters whose copies are confirmed are none any more: a next replay sends them not again.

    That also holds where the output is closed, at which the command ends with the first letter.
    """
    url = rabbitmq_vhost.url
    _bury_many(connect, url, 50)
    publish_many = MLProducer.publish_many

    def ended(producer: MLProducer, tasks: Any, **options: Any) -> Any:
        results = publish_many(producer, tasks, **options)
        if number:
            signal.raise_signal(number)
        return results

    def closed(_console: Console, _value: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(MLProducer, "publish_many", ended)
    if not number:
        monkeypatch.setattr(Console, "emit", closed)
    settings = Settings(url=url, prefetch=PREFETCH)
    assert main(["dead-letters", "replay", "--json"], settings=lambda: settings) == code
    if number:
        assert len(documents(capfd.readouterr().out)) == PREFETCH
    assert drain(url, ["ml.embed"]).total() == PREFETCH
    assert drain(url, [DEAD]).total() == 50 - PREFETCH


# --- purge -----------------------------------------------------------------------------------


def test_purge(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """Letters are deleted, those with the ids or all; without a terminal only with --yes."""
    url = rabbitmq_vhost.url
    _bury(connect, _letters(["a", "b", "c"]))
    result = run("dead-letters", "purge", url=url)
    assert result.returncode == 2
    assert "--yes" in result.stderr
    assert _ids(url) == ["a", "b", "c"]
    (document,) = documents(_fine(url, "purge", "b", "--yes").stdout)
    assert document["message_id"] == "b"
    assert _ids(url) == ["a", "c"]
    assert "2 deleted" in _fine(url, "purge", "--yes").stderr
    assert _ids(url) == []


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, []), ("\n", 1, ["a"])])
def test_purge_asks(
    answer: str, code: int, left: list[str], rabbitmq_vhost: VirtualHost, connect: Connect
) -> None:
    """On a terminal it asks first, and anything but yes means no."""
    _bury(connect, _letters(["a"]))
    try:
        ours, theirs = pty.openpty()
    except OSError:
        pytest.skip("this machine gives out no pseudo-terminal, as in a chroot without /dev/pts")
    try:
        os.write(ours, answer.encode())
        result = subprocess.run(
            [*COMMAND, "dead-letters", "purge"],
            env=environ_of(rabbitmq_vhost.url, {}),
            stdin=theirs,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert result.returncode == code
    assert "Delete ALL dead letters for good? [y/N]" in result.stderr
    assert _ids(rabbitmq_vhost.url) == left


# --- without a broker ------------------------------------------------------------------------


def test_why_there_are_no_letters(rabbitmq_vhost: VirtualHost, connect: Connect) -> None:
    """A broker that is away, a wrong password and a missing queue are told apart, with advice.

    Of several brokers the first that answers is asked.
    """
    node, url = rabbitmq_vhost.node, rabbitmq_vhost.url
    away = "amqp://u:password@127.0.0.1:1/"
    for address, reason, advice in (
        (away, "connection refused", "nothing listens"),
        (node.url_for(rabbitmq_vhost.name, password="wrong-one"), "403 ACCESS", "user and pass"),
        (url, f"no queue '{DEAD}'", "virtual host"),
    ):
        result = run("dead-letters", "list", "--json", url=address)
        assert result.returncode == 1
        assert reason in documents(result.stdout)[0]["error"]
        assert "ConnectionClosedByBroker" not in result.stderr
        assert advice in result.stderr
    _bury(connect, _letters(["a"]))
    assert _ids(f"{away},{url}") == ["a"]


def test_what_headers_hold_does_not_stop_the_broker(
    connect: Connect,
) -> None:
    """A queue reads the history of what it dead-letters; over some it crashes, these it survives.

    Where it crashed, that message and all behind it would stay, and the node would take no more:
    so it has a node of its own.
    """
    death = {"count": 2**40, "queue": "ml.embed", "reason": "expired", "routing-keys": 1}
    histories: list[Any] = ["a", {"a": 1}, None, [], [{}], [death], [{**death, "reason": 1}]]
    messages = [
        Message(
            body=b"PRIVATE",
            routing_key="ml.embed",
            message_id=str(number),
            headers={"x-death": deaths, "x-delivery-count": "a", "x-first-death-queue": 1},
            expiration=0.01,
        )
        for number, deaths in enumerate(histories)
    ]
    with RabbitMQNode() as node:
        producer = connect(node.url)
        for message in messages:
            assert producer.publish(message).confirmed
        deadline = time.monotonic() + LIMIT
        with open_channel(node.url) as channel:
            while channel.queue_declare(DEAD, passive=True).method.message_count < len(messages):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert sorted(_ids(node.url)) == sorted(str(message.message_id) for message in messages)
        producer.close(0.0)
