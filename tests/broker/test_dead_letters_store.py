"""``dead-letters`` on a durable store, from processes other than the producer's."""

from __future__ import annotations

import secrets
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path

import pytest

from mlproducer import CeleryTask, Message, Outcome, Settings
from mlproducer.stores import open_store
from mlproducer.stores.protocol import Depth
from mlproducer.testing import Proxy, RabbitMQNode
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from mlproducer.testing.redis_server import RedisServer
from tests.broker.commands import COMMAND, LIMIT, documents, environ_of, run
from tests.broker.conftest import Connect
from tests.broker.rows import QUEUE

pytestmark = pytest.mark.broker

EXCHANGE = "bookmarkai.ml"
DEAD_EXCHANGE = "bookmarkai.ml.dlx"
DEAD = "ml.dead_letter"
FIELDS = ["message_id", "reason", "attempts", "exchange", "routing_key", "first_failed_at", "where"]
AWAY = "amqp://u:password@127.0.0.1:1/"
SECRET = "store-secret"

Letters = Iterable[Message | CeleryTask]


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Name a store in a file that is not there yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(params=["sqlite", "redis"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Name an empty store of each durable kind."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    server: RedisServer = request.getfixturevalue("redis_server")
    return f"{server.url}?prefix=test-{secrets.token_hex(4)}:"


def _letters(names: Iterable[str], routing_key: str = "later") -> list[Message]:
    return [Message(body=b"PRIVATE", routing_key=routing_key, message_id=each) for each in names]


def _bury_in_the_queue(connect: Connect, messages: Letters) -> None:
    producer = connect(max_message_retries=0)
    assert producer.wait_connected(30.0)
    for future in [producer.submit(each) for each in messages]:
        assert future.exception(30.0) is not None


def _bury(connect: Connect, vhost: VirtualHost, store_url: str, messages: Letters) -> None:
    """Let a producer find no queue for messages, and no exchange for their dead letters."""
    assert connect().wait_connected(30.0)
    with open_channel(vhost.url) as channel:
        channel.exchange_delete(DEAD_EXCHANGE)
        channel.queue_unbind(QUEUE, EXCHANGE, QUEUE)
        producer = connect(store_url=store_url, declare_topology="off", max_message_retries=0)
        assert producer.wait_connected(30.0)
        for receipt in producer.publish_many(messages):
            assert not isinstance(receipt, Exception), receipt
            assert receipt.durable
            assert receipt.outcome is Outcome.DEFERRED
        assert not producer.close(1.0).abandoned
        channel.queue_bind(QUEUE, EXCHANGE, QUEUE)


def _declare(url: str, queue: str, **arguments: object) -> None:
    with open_channel(url) as channel:
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, EXCHANGE, queue)


def _run(
    vhost: VirtualHost | str, store_url: str, *argv: str, prefetch: int = 100
) -> subprocess.CompletedProcess[str]:
    url = vhost if isinstance(vhost, str) else vhost.url
    environ = {"ML_STORE_URL": store_url, "RABBITMQ_PREFETCH": str(prefetch)}
    return run("dead-letters", *argv, "--json", url=url, limit=LIMIT, **environ)


def _fine(vhost: VirtualHost, store_url: str, *argv: str) -> subprocess.CompletedProcess[str]:
    result = _run(vhost, store_url, *argv)
    assert result.returncode == 0, result.stderr
    return result


def _places(vhost: VirtualHost, store_url: str) -> dict[str, str]:
    listed = documents(_fine(vhost, store_url, "list").stdout)
    return {each["message_id"]: each["where"] for each in listed}


def _depth(store_url: str) -> Depth:
    with closing(open_store(Settings(store_url=store_url))) as store:
        return store.depth()


# --- list and show ---------------------------------------------------------------------------


def test_list(rabbitmq_vhost: VirtualHost, connect: Connect, store_url: str) -> None:
    """Letters of both places are listed with the same fields, and stay where they are."""
    _bury_in_the_queue(connect, _letters(["q"]))
    _bury(connect, rabbitmq_vhost, store_url, _letters(["a", "b"]))
    for _ in range(2):
        listed = documents(_fine(rabbitmq_vhost, store_url, "list").stdout)
        assert [each.pop("message_id") for each in listed] == ["a", "b", "q"]
        assert [list(each) for each in listed] == [FIELDS[1:]] * 3
        assert all(each.pop("first_failed_at").startswith("20") for each in listed)
        assert [each.pop("where") for each in listed] == ["store", "store", "queue"]
        assert listed[0] == listed[1] == listed[2]
        assert listed[0]["reason"].startswith("UnroutableError: ")
    for_people = run("dead-letters", "list", url=rabbitmq_vhost.url, ML_STORE_URL=store_url)
    assert for_people.stdout.splitlines()[-1] == "3 dead letters"


def test_show(rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str) -> None:
    """A letter is found in either place, its payload shown only where it is asked for."""
    _bury_in_the_queue(connect, _letters(["q"]))
    text = Message(body=b"red", routing_key="later", message_id="a", headers={"shade": "PRIVATE"})
    _bury(connect, rabbitmq_vhost, sqlite_url, [text])
    shown = run("dead-letters", "show", "a", url=rabbitmq_vhost.url, ML_STORE_URL=sqlite_url)
    assert shown.returncode == 0
    assert "shade" in shown.stdout
    assert "red" not in shown.stdout
    (document,) = documents(_fine(rabbitmq_vhost, sqlite_url, "show", "a", "--body").stdout)
    assert (document["where"], document["body"]) == ("store", "red")
    (document,) = documents(_fine(rabbitmq_vhost, sqlite_url, "show", "q").stdout)
    assert document["where"] == "queue"
    unknown = _run(rabbitmq_vhost, sqlite_url, "show", "unknown")
    assert unknown.returncode == 1
    assert "no dead letter has the id unknown" in unknown.stderr


def test_more_than_a_page(rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str) -> None:
    """Every letter of many is listed, replayed and purged, once."""
    names = [f"m{number}" for number in range(23)]
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(names, QUEUE))
    listed = documents(_run(rabbitmq_vhost, sqlite_url, "list", prefetch=5).stdout)
    assert [each["message_id"] for each in listed] == names
    replayed = _run(rabbitmq_vhost, sqlite_url, "replay", *names[:12], prefetch=5)
    assert "12 replayed, 0 stayed" in replayed.stderr
    assert "11 deleted" in _run(rabbitmq_vhost, sqlite_url, "purge", "--yes", prefetch=5).stderr
    assert drain(rabbitmq_vhost.url, [QUEUE, DEAD]) == dict.fromkeys(names[:12], 1)
    assert _depth(sqlite_url) == Depth()


# --- replay ----------------------------------------------------------------------------------


def test_replay_sends_what_was_published(
    rabbitmq_vhost: VirtualHost, connect: Connect, store_url: str
) -> None:
    """The copy has the same body, properties and headers, no trace of its death, and its id."""
    headers = {"text": "t", "number": 2**40, "list": [1, {"a": None}], "yes": True}
    message = Message(
        body=b"PRIVATE \x00",
        routing_key="later",
        headers=headers,
        content_type="text/plain",
        content_encoding="utf-8",
        priority=3,
        expiration=3600.0,
        message_id="message",
        correlation_id="correlation",
        type="type",
        persistent=False,
    )
    task = CeleryTask("x.y", [1], {"a": "PRIVATE"}, "later", task_id="task")
    _bury(connect, rabbitmq_vhost, store_url, [message, task])
    for queue in ("later", "live"):
        _declare(rabbitmq_vhost.url, queue)
    connect().publish(CeleryTask("x.y", [1], {"a": "PRIVATE"}, "live", task_id="task"))
    first, second = documents(_fine(rabbitmq_vhost, store_url, "replay").stdout)
    assert list(first) == [*FIELDS, "replayed", "error"]
    assert [first["message_id"], second["message_id"]] == ["message", "task"]
    assert (first["replayed"], first["error"]) == (True, None)
    assert _places(rabbitmq_vhost, store_url) == {}
    with open_channel(rabbitmq_vhost.url) as channel:
        _, properties, body = channel.basic_get("later")
        replayed, published = channel.basic_get("later"), channel.basic_get("live")
    assert (body, properties.headers) == (message.body, headers)
    assert (properties.content_type, properties.content_encoding) == ("text/plain", "utf-8")
    assert (properties.priority, properties.delivery_mode) == (3, 1)
    assert (properties.message_id, properties.type) == ("message", "type")
    assert (properties.correlation_id, properties.expiration) == ("correlation", "3600000")
    assert (replayed[2], replayed[1].headers) == (published[2], published[1].headers)
    assert (replayed[1].message_id, replayed[1].correlation_id) == ("task", "task")


def test_replay_says_which_stay(
    rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str
) -> None:
    """What cannot be delivered stays in the store, unclaimed, says why, and fails the command."""
    letters = [*_letters(["a", "c"], "nowhere"), *_letters(["b", "d"], QUEUE)]
    _bury(connect, rabbitmq_vhost, sqlite_url, letters)
    result = _run(rabbitmq_vhost, sqlite_url, "replay")
    assert result.returncode == 1
    assert "2 replayed, 2 stayed" in result.stderr
    assert "a stays a dead letter: UnroutableError: " in result.stderr
    replayed = {each["message_id"]: each["replayed"] for each in documents(result.stdout)}
    assert replayed == {"a": False, "b": True, "c": False, "d": True}
    assert _places(rabbitmq_vhost, sqlite_url) == {"a": "store", "c": "store"}
    _declare(rabbitmq_vhost.url, "nowhere")
    assert "2 replayed" in _fine(rabbitmq_vhost, sqlite_url, "replay").stderr
    assert drain(rabbitmq_vhost.url, ["nowhere", QUEUE]) == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_some_of_both_places(
    rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str
) -> None:
    """With ids only those letters are sent or deleted, wherever they lie."""
    _bury_in_the_queue(connect, _letters(["q1", "q2", "q3"]))
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(["s1", "s2", "s3"]))
    _declare(rabbitmq_vhost.url, "later")
    result = _run(rabbitmq_vhost, sqlite_url, "replay", "s2", "q2", "unknown")
    assert result.returncode == 1
    assert "no dead letter has the id unknown" in result.stderr
    assert "2 replayed, 0 stayed" in result.stderr
    deleted = documents(_fine(rabbitmq_vhost, sqlite_url, "purge", "s3", "q3", "--yes").stdout)
    assert [(list(each), each["message_id"]) for each in deleted] == [
        (FIELDS, "s3"),
        (FIELDS, "q3"),
    ]
    assert _places(rabbitmq_vhost, sqlite_url) == {"s1": "store", "q1": "queue"}
    assert drain(rabbitmq_vhost.url, ["later"]) == {"s2": 1, "q2": 1}


def test_replay_leaves_the_stores_messages_to_their_producers(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy, sqlite_url: str
) -> None:
    """What waits for a retry is not sent by a command, nor a letter that was not asked for."""
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(["a", "b"], QUEUE))
    proxy.refuse()
    away = connect(proxy.url(rabbitmq_vhost.url), store_url=sqlite_url)
    assert away.publish(_letters(["waiting"], QUEUE)[0]).durable
    away.close(1.0)
    _bury_in_the_queue(connect, _letters(["q"], "nowhere"))
    assert _run(rabbitmq_vhost, sqlite_url, "replay", "a", "q").returncode == 1
    assert _depth(sqlite_url) == Depth(waiting=1, dead=1)
    assert drain(rabbitmq_vhost.url, [QUEUE, DEAD]) == {"a": 1, "q": 1}


# --- letters of other owners -----------------------------------------------------------------


def test_a_letter_in_another_process(
    rabbitmq_vhost: VirtualHost, connect: Connect, store_url: str
) -> None:
    """A letter that a producer has claimed is shown, left alone and told; no other is held up."""
    _bury(connect, rabbitmq_vhost, store_url, _letters(["a", "b", "c"], QUEUE))
    with closing(open_store(Settings(store_url=store_url))) as store:
        row = store.seize(store.letters(1)[0])
        assert row is not None
        assert row.record.envelope.message_id == "a"
        assert _places(rabbitmq_vhost, store_url) == dict.fromkeys("abc", "store")
        assert store.renew([row.claim]) == []  # a lease that may be over before long
        result = _run(rabbitmq_vhost, store_url, "replay", "a", "b")
        assert result.returncode == 1
        assert "a stays a dead letter: StoreError: another process has claimed it" in result.stderr
        assert "1 replayed, 1 stayed" in result.stderr
        assert store.renew([row.claim]) == []
        result = _run(rabbitmq_vhost, store_url, "purge", "--yes")
        assert result.returncode == 1
        assert [each["message_id"] for each in documents(result.stdout)] == ["c"]
        assert "a stays a dead letter: StoreError: another process has claimed it" in result.stderr
        assert "1 deleted, 1 stayed" in result.stderr
        assert store.renew([row.claim]) == []
    _fine(rabbitmq_vhost, store_url, "replay")
    assert drain(rabbitmq_vhost.url, [QUEUE]) == {"a": 1, "b": 1}


def test_two_replays_share_the_letters(
    rabbitmq_vhost: VirtualHost, connect: Connect, store_url: str
) -> None:
    """Of two that run at the same time, each letter is sent by one."""
    names = [f"m{number}" for number in range(200)]
    _bury(connect, rabbitmq_vhost, store_url, _letters(names, QUEUE))
    environ = environ_of(rabbitmq_vhost.url, {"ML_STORE_URL": store_url, "RABBITMQ_PREFETCH": "5"})
    command = [*COMMAND, "dead-letters", "replay", "--json"]
    both = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=LIMIT)[0].decode() for process in both]
    replayed = Counter(
        each["message_id"] for text in told for each in documents(text) if each.get("replayed")
    )
    assert replayed == dict.fromkeys(names, 1)
    assert drain(rabbitmq_vhost.url, [QUEUE, DEAD]) == dict.fromkeys(names, 1)
    assert _depth(store_url) == Depth()


# --- one of the two is away ------------------------------------------------------------------


def test_without_a_broker(rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str) -> None:
    """The store's letters are listed, shown and deleted; the reason is told, and fails each."""
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(["a", "b", "c"], QUEUE))
    listed = _run(AWAY, sqlite_url, "list")
    *letters, reason = documents(listed.stdout)
    assert [each["message_id"] for each in letters] == ["a", "b", "c"]
    assert "connection refused" in reason["error"]
    shown = _run(AWAY, sqlite_url, "show", "b")
    assert documents(shown.stdout)[0]["message_id"] == "b"
    replayed = _run(AWAY, sqlite_url, "replay", prefetch=2)
    assert "0 replayed, 2 stayed" in replayed.stderr  # what was not tried is not told
    deleted = _run(AWAY, sqlite_url, "purge", "b", "--yes")
    assert documents(deleted.stdout)[0]["message_id"] == "b"
    for result in (listed, shown, replayed, deleted):
        assert result.returncode == 1
        assert result.stderr.count("mlproducer: 127.0.0.1:1: connection refused") == 1
        assert result.stderr.count("nothing listens there") == 1
    assert _places(rabbitmq_vhost, sqlite_url) == {"a": "store", "c": "store"}


def test_no_broker_is_named(rabbitmq_vhost: VirtualHost, connect: Connect, sqlite_url: str) -> None:
    """Where ``RABBITMQ_URL`` is not set, the store's letters are listed all the same."""
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(["a"]))
    result = run("dead-letters", "list", "--json", ML_STORE_URL=sqlite_url)
    assert result.returncode == 1
    letter, reason = documents(result.stdout)
    assert letter["message_id"] == "a"
    assert "RABBITMQ_URL" in reason["error"]


def test_a_broker_that_was_stopped(
    rabbitmq_vhost: VirtualHost, mortal_node: RabbitMQNode, connect: Connect, sqlite_url: str
) -> None:
    """A producer gives up a message, and the broker stops before it takes the letter."""
    _bury(connect, rabbitmq_vhost, sqlite_url, _letters(["a", "b"], QUEUE))
    mortal_node.stop()
    result = _run(rabbitmq_vhost, sqlite_url, "list")
    assert result.returncode == 1
    assert [each.get("where") for each in documents(result.stdout)] == ["store", "store", None]
    assert f"{mortal_node.host}:{mortal_node.port}: connection refused" in result.stderr
    mortal_node.restart()
    mortal_node.queue_depth(rabbitmq_vhost.name, QUEUE)  # waits for its leader
    _fine(rabbitmq_vhost, sqlite_url, "replay")
    assert drain(rabbitmq_vhost.url, [QUEUE]) == {"a": 1, "b": 1}


@pytest.mark.parametrize("kind", ["no database", "no file", "no directory", "redis away"])
def test_an_unusable_store(
    kind: str, rabbitmq_vhost: VirtualHost, connect: Connect, tmp_path: Path
) -> None:
    """The queue's letters are listed; the store is named, and fails the command; no secret."""
    if kind == "no database":
        (tmp_path / "store.db").write_bytes(b"PRIVATE " * 1000)
        (tmp_path / "store.db").chmod(0o600)
    directory = tmp_path / "absent" if kind == "no directory" else tmp_path
    url, name = f"sqlite:///{directory}/store.db", f"{directory}/store.db"
    if kind == "redis away":
        url, name = f"redis://:{SECRET}@127.0.0.1:1", "127.0.0.1:1"
    before = sorted(tmp_path.iterdir())
    _bury_in_the_queue(connect, _letters(["a"], "nowhere"))
    for argv in (["list"], ["show", "a"], ["replay"], ["purge", "--yes"]):
        result = _run(rabbitmq_vhost, url, *argv)
        assert result.returncode == 1
        assert name in documents(result.stdout)[-1]["error"]
        assert f"mlproducer: the store {'at ' * (kind == 'redis away')}{name} " in result.stderr
        assert documents(result.stdout)[0]["message_id"] == "a"
        assert SECRET not in result.stdout + result.stderr
    assert sorted(tmp_path.iterdir()) == before


# --- whatever ends a replay ------------------------------------------------------------------

PREFETCH, MANY = 10, 400
DELAY = 0.02
"""Seconds that every answer of the broker takes, so that a batch is long enough to be killed in."""

SWALLOWING = 0.3
"""Seconds within which a replay has handed a batch to a connection."""

MOMENTS = [n * DELAY / 2 for n in range(3)]


@contextmanager
def _in_the_middle_of_a_replay(
    url: str, store_url: str
) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    environ = {
        "RABBITMQ_PREFETCH": str(PREFETCH),
        "ML_STORE_URL": store_url,
        "PYTHONUNBUFFERED": "1",  # the first line comes with the first letters
    }
    with subprocess.Popen(
        [*COMMAND, "dead-letters", "replay", "--json"],
        env=environ_of(url, environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # communicate() would leave out what readline() has buffered
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        yield process, first


def test_a_replay_that_is_killed(
    rabbitmq_vhost: VirtualHost, proxy: Proxy, connect: Connect, store_url: str
) -> None:
    """After kill -9, time and again, each letter is in its queue or in the store still.

    At most those that were in hand are both; they stay claimed until the lease ends.
    """
    names = [str(number) for number in range(MANY)]
    _bury(connect, rabbitmq_vhost, store_url, _letters(names, QUEUE))
    for moment, swallowed in product(MOMENTS, (False, True)):
        proxy.delay(DELAY, direction="s2c")
        with _in_the_middle_of_a_replay(proxy.url(rabbitmq_vhost.url), store_url) as (process, _):
            if swallowed:
                proxy.hole("c2s")  # what is in hand does not get through
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(moment + swallowed * SWALLOWING)
            process.kill()
        proxy.reset()
        proxy.heal()
    sent, left = drain(rabbitmq_vhost.url, [QUEUE]), _places(rabbitmq_vhost, store_url)
    assert sent
    assert set(left.values()) == {"store"}
    assert sent.keys() | left.keys() == set(names)
    assert sent.total() + len(left) - MANY <= 2 * len(MOMENTS) * PREFETCH


def test_a_store_that_goes_away_in_a_replay(
    rabbitmq_vhost: VirtualHost, connect: Connect, proxy: Proxy
) -> None:
    """What was sent and could not be deleted is told to stay, and the replay ends."""
    with RedisServer(password=SECRET) as server:
        names = [str(number) for number in range(MANY)]
        _bury(connect, rabbitmq_vhost, server.url, _letters(names, QUEUE))
        proxy.delay(DELAY, direction="s2c")
        url = proxy.url(rabbitmq_vhost.url)
        with _in_the_middle_of_a_replay(url, server.url) as (process, first):
            server.kill()
            stdout, stderr = map(bytes.decode, process.communicate(timeout=LIMIT))
        stdout = first.decode() + stdout
        assert process.returncode == 1
        assert f"mlproducer: the store at {server.host}:{server.port} " in stderr
        assert "Traceback" not in stderr
        assert SECRET not in stdout + stderr
        told = {each["message_id"] for each in documents(stdout) if each.get("replayed")}
        server.restart()
        left = _run(rabbitmq_vhost, server.url, "list")
    kept = {each["message_id"] for each in documents(left.stdout)}
    sent = drain(rabbitmq_vhost.url, [QUEUE])
    assert told
    assert not told & kept
    assert sent.keys() | kept == set(names)
    assert sent.total() + len(kept) - MANY <= PREFETCH
