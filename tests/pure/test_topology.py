"""What is declared on the broker, byte for byte where it is documented."""

from __future__ import annotations

from ast import literal_eval
from textwrap import dedent
from typing import Any

import pytest

from mlproducer import Queue, Settings, Topology
from mlproducer.errors import ConfigurationError
from mlproducer.settings import topology_of
from mlproducer.topology import Declaration
from tests.pages import ROOT

KEYS = ["ml.summarize", "ml.summarize_local", "ml.transcribe", "ml.transcribe_local", "ml.embed"]
QUORUM = {
    "x-queue-type": "quorum",
    "x-delivery-limit": 20,
    "x-dead-letter-exchange": "bookmarkai.ml.dlx",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


def _of(method: str, declared: list[Declaration]) -> list[dict[str, Any]]:
    return [dict(each.arguments) for each in declared if each.method == method]


def test_active() -> None:
    """Exchanges, queues and bindings; a task queue's arguments are exactly the documented ones."""
    declared = list(Topology().declarations("active"))
    assert _of("exchange_declare", declared) == [
        {"exchange": name, "exchange_type": "topic", "durable": True, "passive": False}
        for name in ("bookmarkai.ml", "bookmarkai.ml.dlx")
    ]
    queues = _of("queue_declare", declared)
    assert [each["queue"] for each in queues] == ["ml.dead_letter", *KEYS]
    assert all(each["durable"] for each in queues)
    assert queues[0]["arguments"] == {"x-queue-type": "quorum", "x-delivery-limit": 2**31 - 1}
    assert all(each["arguments"] == QUORUM for each in queues[1:])
    assert _of("queue_bind", declared) == [
        {"queue": "ml.dead_letter", "exchange": "bookmarkai.ml.dlx", "routing_key": "#"},
        *({"queue": key, "exchange": "bookmarkai.ml", "routing_key": key} for key in KEYS),
    ]


def test_a_page_has_them_to_copy() -> None:
    """A worker that is made from the page about Celery declares what the library does."""
    page = (ROOT / "mlproducer/contrib/celery/README.rst").read_text()
    start = page.index("arguments = {") + len("arguments = ")
    assert literal_eval(dedent(page[start : page.index("}", start) + 1])) == QUORUM


def test_nothing_is_bound_before_it_exists() -> None:
    """A binding comes after its exchange and its queue."""
    seen: set[str] = set()
    for declaration in Topology().declarations("active"):
        if declaration.method == "queue_bind":
            assert {declaration.arguments["exchange"], declaration.target} <= seen
        seen.add(declaration.target)


def test_passive() -> None:
    """A look at what exists: nothing is created, and nothing needs configure permission."""
    declared = list(Topology().declarations("passive"))
    assert [each.target for each in declared] == [
        "bookmarkai.ml",
        "bookmarkai.ml.dlx",
        "ml.dead_letter",
        *KEYS,
    ]
    assert all(each.arguments["passive"] for each in declared)
    assert all(set(each.arguments) <= {"exchange", "queue", "passive"} for each in declared)


def test_off() -> None:
    """Nothing at all."""
    assert list(Topology().declarations("off")) == []


def test_named_by_the_settings() -> None:
    """Another exchange has dead letters of its own."""
    topology = topology_of(Settings(exchange="mine"))
    assert (topology.exchange, topology.dead_letter_exchange) == ("mine", "mine.dlx")
    assert [queue.name for queue in topology.queues] == KEYS
    arguments = _of("queue_declare", list(topology.declarations("active")))[1]["arguments"]
    assert arguments == {**QUORUM, "x-dead-letter-exchange": "mine.dlx"}


def test_prefix() -> None:
    """The prefix goes before queues and the dead-letter exchange; routing keys stay."""
    topology = topology_of(Settings(queue_prefix="staging."))
    declared = list(topology.declarations("active"))
    assert {each.target for each in declared} == {
        "bookmarkai.ml",
        "staging.bookmarkai.ml.dlx",
        "staging.ml.dead_letter",
        *(f"staging.{key}" for key in KEYS),
    }
    queues = _of("queue_declare", declared)[1:]
    assert {each["arguments"]["x-dead-letter-exchange"] for each in queues} == {
        "staging.bookmarkai.ml.dlx"
    }
    assert [each["routing_key"] for each in _of("queue_bind", declared)] == ["#", *KEYS]


def test_delivery_limit() -> None:
    """The setting's limit holds for each quorum queue that has none of its own."""
    queues = (Queue("a"), Queue("b", arguments={"x-delivery-limit": 3}), Queue("c", type="classic"))
    topology = topology_of(Settings(delivery_limit=7, topology=Topology(queues=queues)))
    limits = [
        each["arguments"].get("x-delivery-limit")
        for each in _of("queue_declare", list(topology.declarations("active")))
    ]
    assert limits == [2**31 - 1, 7, 3, None]


def test_a_topology_of_ones_own() -> None:
    """Exchange, type, queues, keys and arguments are the user's; the rest comes along."""
    own = Topology(
        "shop",
        "direct",
        queues=[
            Queue("orders", ["order.new", "order.paid"]),
            Queue("mails", type="classic", arguments={"x-max-priority": 5}),
            Queue("theirs", "their.key", None, {"x-expires": 9}),
            Queue("bare", arguments={"x-dead-letter-exchange": None, "x-overflow": "drop-head"}),
        ],
        dead_letter_exchange="graveyard",
        dead_letter_queue="graves",
    )
    declared = list(topology_of(Settings(topology=own)).declarations("active"))
    assert _of("exchange_declare", declared)[0]["exchange_type"] == "direct"
    arguments = {each["queue"]: each["arguments"] for each in _of("queue_declare", declared)}
    assert arguments["orders"] == {**QUORUM, "x-dead-letter-exchange": "graveyard"}
    assert arguments["mails"] == {
        "x-queue-type": "classic",
        "x-dead-letter-exchange": "graveyard",
        "x-max-priority": 5,
    }
    assert arguments["theirs"] == {"x-expires": 9}
    assert "x-dead-letter-exchange" not in arguments["bare"]
    assert arguments["bare"]["x-overflow"] == "drop-head"
    bindings = [(each["queue"], each["routing_key"]) for each in _of("queue_bind", declared)]
    assert bindings == [
        ("graves", "#"),
        ("orders", "order.new"),
        ("orders", "order.paid"),
        ("mails", "mails"),
        ("theirs", "their.key"),
        ("bare", "bare"),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Queue(""),
        lambda: Queue("a" * 256),
        lambda: Queue("a\x1b"),
        lambda: Queue("a", type="lazy"),  # type: ignore[arg-type] - what is refused
        lambda: Queue("a", ["k" * 256]),
        lambda: Topology(exchange_type="topical"),
        lambda: Topology(queues=["a"]),  # type: ignore[list-item] - what is refused
        lambda: Topology(queues=[Queue("a"), Queue("a")]),
        lambda: Settings(topology="a"),  # type: ignore[arg-type] - what is refused
    ],
)
def test_wrong_names_are_refused(make: Any) -> None:
    """What AMQP could not carry, or nothing could be meant by, is refused when it is made."""
    with pytest.raises(ConfigurationError):
        make()
