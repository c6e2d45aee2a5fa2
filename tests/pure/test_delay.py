"""Delayed delivery: the names, keys and arguments are those of Celery's workers."""

from __future__ import annotations

from collections import deque
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport.native_delayed_delivery import calculate_routing_key, level_name
from pika import spec

from mlproducer import CeleryTask, Queue, Topology
from mlproducer._wire import celery
from mlproducer._wire.delay import MAX_SECONDS, Delays
from mlproducer.message import Envelope
from mlproducer.tasks import PreferredBackends
from mlproducer.topology import Declaration

EXCHANGE, KEY = "bookmarkai.ml", "ml.embed"
DELAYS = Delays.of(Topology())
NOW = datetime(2030, 1, 31, 12, tzinfo=timezone.utc)
DAY = 86_400


def _encode(exchange: str = EXCHANGE, delays: Delays = DELAYS, **fields: Any) -> Envelope:
    return celery.encode(
        CeleryTask("x.y", routing_key=fields.pop("routing_key", KEY), **fields),
        exchange=exchange,
        preferred=PreferredBackends(),
        trace={},
        now=NOW,
        delays=delays,
    )


def _properties(envelope: Envelope) -> spec.BasicProperties:
    return spec.BasicProperties().decode(envelope.properties + b"\x011")


@given(st.integers(1, MAX_SECONDS))
def test_the_key_is_celerys(seconds: int) -> None:
    """The digits of the seconds, one a level, before the routing key."""
    assert DELAYS.address(EXCHANGE, KEY, seconds) == (
        level_name(27),
        calculate_routing_key(seconds, KEY),
    )


@pytest.mark.parametrize(
    ("seconds", "whole"), [(1, 1), (1.5, 1), (59.95, 60), (3600, 3600), (400 * DAY, 400 * DAY)]
)
def test_delays(seconds: float, whole: int) -> None:
    """The broker waits whole seconds; the header holds the moment itself, for the worker."""
    envelope = _encode(countdown=seconds)
    key = calculate_routing_key(whole, KEY)
    assert (envelope.exchange, envelope.routing_key) == ("celery_delayed_27", key)
    eta = _properties(envelope).headers["eta"]
    assert datetime.fromisoformat(eta) == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"countdown": 0.4},
        {"eta": NOW - timedelta(days=1)},
        {"countdown": 60.0, "exchange": "another"},
        {"countdown": 60.0, "routing_key": "unknown"},
        {"countdown": 60.0, "delays": Delays.of(Topology(queues=(Queue(KEY, type="classic"),)))},
        {"countdown": 60.0, "delays": Delays.of(Topology(exchange_type="direct"))},
    ],
)
def test_not_delayed(fields: dict[str, Any]) -> None:
    """Soon, or not to a quorum queue that is known: the eta alone tells the worker."""
    envelope = _encode(**fields)
    assert envelope.exchange == fields.get("exchange", EXCHANGE)
    assert envelope.routing_key == fields.get("routing_key", KEY)


def test_a_delay_beyond_the_levels_waits_with_the_worker_for_the_rest() -> None:
    """All levels are used."""
    assert _encode(countdown=1e9).routing_key == "1." * 28 + KEY


def test_a_key_that_has_no_room_for_the_levels_goes_as_it_is() -> None:
    """A routing key has 255 bytes at most."""
    key = "k" * 200
    delays = Delays.of(Topology(queues=(Queue("q", key),)))
    assert _encode(countdown=60.0, routing_key=key, delays=delays).routing_key == key


def test_what_was_kept_waits_for_what_is_left_of_its_delay() -> None:
    """A message that was deferred for a while is not late by that while."""
    envelope = _encode(countdown=60.0)
    later = DELAYS.again(envelope, NOW + timedelta(seconds=20), usable=True)
    assert (later.exchange, later.routing_key) == DELAYS.address(EXCHANGE, KEY, 40)
    late = DELAYS.again(envelope, NOW + timedelta(seconds=70), usable=True)
    without = DELAYS.again(envelope, NOW, usable=False)
    for each in (late, without):
        assert (each.exchange, each.routing_key) == (EXCHANGE, KEY)
        assert (each.properties, each.body) == (envelope.properties, envelope.body)
    plain = _encode()
    assert DELAYS.again(plain, NOW, usable=False) is plain


class _Broker:
    """Exchanges and queues as declared, to follow a message through them."""

    def __init__(self, declarations: list[Declaration]) -> None:
        self.bindings: list[tuple[str, str, str]] = []
        self.queues: dict[str, dict[str, Any]] = {}
        self.exchanges: set[str] = {EXCHANGE}
        for each in declarations:
            getattr(self, each.method)(**each.arguments)

    def exchange_declare(self, exchange: str, exchange_type: str, durable: bool) -> None:
        assert (exchange_type, durable) == ("topic", True)
        self.exchanges.add(exchange)

    def queue_declare(self, queue: str, durable: bool, arguments: dict[str, Any]) -> None:
        assert durable
        self.queues[queue] = arguments

    def queue_bind(self, queue: str, exchange: str, routing_key: str) -> None:
        assert exchange in self.exchanges
        self.bindings.append((exchange, routing_key, queue))

    def exchange_bind(self, destination: str, source: str, routing_key: str) -> None:
        assert {destination, source} <= self.exchanges
        self.bindings.append((source, routing_key, destination + " (exchange)"))

    def route(self, exchange: str, key: str) -> set[str]:
        queues, left = set(), deque([exchange])
        while left:
            at = left.popleft()
            for source, pattern, destination in self.bindings:
                if source == at and _matches(pattern.split("."), key.split(".")):
                    name, _, is_exchange = destination.partition(" ")
                    left.append(name) if is_exchange else queues.add(name)
        return queues


def _matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_matches(pattern[1:], words[start:]) for start in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _matches(pattern[1:], words[1:])


@given(st.integers(1, MAX_SECONDS))
def test_a_message_waits_as_long_as_its_key_says(seconds: int) -> None:
    """From level to level, each waits 2 ** level seconds, and it ends in its own queue."""
    broker = _Broker(list(DELAYS.declarations()))
    exchange, key = DELAYS.address(EXCHANGE, KEY, seconds)
    waited = 0
    while (at := broker.route(exchange, key)) != {KEY}:
        (queue,) = at
        arguments = broker.queues[queue]
        waited += arguments["x-message-ttl"] // 1000
        exchange = arguments["x-dead-letter-exchange"]
    assert waited == seconds


def test_a_prefix_keeps_environments_apart() -> None:
    """One that shares a virtual host has levels of its own, named as kombu names them."""
    delays = Delays.of(Topology(), "staging")
    assert delays.entry == level_name(27, "staging")
    own = {each.target for each in delays.declarations()}
    assert not own & {each.target for each in DELAYS.declarations()} - {EXCHANGE, *_queues()}


def _queues() -> set[str]:
    return {queue.name for queue in Topology().queues}


@pytest.mark.parametrize(
    ("expires", "milliseconds"),
    [
        (120, "120000"),
        (NOW + timedelta(seconds=1.5), "1500"),
        (NOW - timedelta(days=1), "0"),
        (400 * DAY, None),
        (None, None),
    ],
)
def test_expires(expires: Any, milliseconds: str | None) -> None:
    """The broker drops it too, as far as AMQP can say when; the header is for the worker."""
    properties = _properties(_encode(expires=expires, priority=3))
    assert properties.expiration == milliseconds
    assert ("expires" not in properties.headers) == (expires is None)
    assert properties.correlation_id == properties.message_id == properties.headers["id"]
    assert (properties.priority, properties.content_type) == (3, "application/json")
