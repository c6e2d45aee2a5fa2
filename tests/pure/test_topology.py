"""What is declared on the broker, byte for byte where the contract says so."""

from __future__ import annotations

from mlproducer import Settings, Topology

KEYS = ["ml.summarize", "ml.summarize_local", "ml.transcribe", "ml.transcribe_local", "ml.embed"]


def test_active() -> None:
    """Exchanges, queues and bindings; a task queue's arguments are exactly the contract's."""
    declared = list(Topology().declarations("active"))
    exchanges = [each.arguments for each in declared if each.method == "exchange_declare"]
    assert exchanges == [
        {"exchange": name, "exchange_type": "topic", "durable": True, "passive": False}
        for name in ("bookmarkai.ml", "bookmarkai.ml.dlx")
    ]
    queues = [each.arguments for each in declared if each.method == "queue_declare"]
    assert [each["queue"] for each in queues] == [*KEYS, "ml.dead_letter"]
    assert all(each["durable"] for each in queues)
    for queue in queues[:-1]:
        assert queue["arguments"] == {"x-queue-type": "quorum", "x-delivery-limit": 5}
    assert queues[-1]["arguments"]["x-queue-type"] == "quorum"
    bindings = [each.arguments for each in declared if each.method == "queue_bind"]
    assert bindings == [
        {"queue": key, "exchange": "bookmarkai.ml", "routing_key": key} for key in KEYS
    ] + [{"queue": "ml.dead_letter", "exchange": "bookmarkai.ml.dlx", "routing_key": "#"}]


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
        *KEYS,
        "ml.dead_letter",
    ]
    assert all(each.arguments["passive"] for each in declared)
    assert all(set(each.arguments) <= {"exchange", "queue", "passive"} for each in declared)


def test_off() -> None:
    """Nothing at all."""
    assert list(Topology().declarations("off")) == []


def test_named_by_the_settings() -> None:
    """Another exchange has dead letters of its own."""
    topology = Topology.of(Settings(exchange="mine"))
    assert (topology.exchange, topology.dead_letter_exchange) == ("mine", "mine.dlx")
    assert topology.queues == tuple(KEYS)
