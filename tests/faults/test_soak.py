"""A producer at a third of its full rate, for long: what it holds does not grow.

What it holds is looked at each second; a line through all of it, by least squares, says how much
more there is in an hour. ``python -m tests.long soak``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from statistics import linear_regression

import pytest

from mlproducer import Message, MLProducer, Receipt
from mlproducer.testing.audit import open_channel
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.rows import QUEUE, message
from tests.faults.test_leaks import resident
from tests.faults.traffic import FIGURES, LIMIT
from tests.long import GIVEN

pytestmark = [pytest.mark.broker, pytest.mark.slow]

MINUTES = 5.0
WARM = 0.2
"""The part of the run after which it is looked at: caches are full by then."""

GROWN = 10_000_000
"""Bytes of memory by which a run may grow: what the allocator keeps."""

BURST = 20_000
TICKS = 10
"""In a second; so many bursts are sent, of as many messages as make up a third of the rate."""


def test_soak(rabbitmq_vhost: VirtualHost, connect: Connect, store_url: str) -> None:
    """Threads, descriptors and memory stay, and each message has arrived once."""
    producer = connect(store_url=store_url)
    names = (message(f"m{number}") for number in count())
    publish(producer, names, 1000)
    began = time.monotonic()
    publish(producer, names, BURST)
    rate = BURST / (time.monotonic() - began) / 3
    seconds = 60.0 * (GIVEN.minutes or MINUTES)
    held: list[tuple[float, int, int, int]] = []
    never = threading.Event()
    published, found = 1000 + BURST, 0
    began = time.monotonic()
    with open_channel(rabbitmq_vhost.url) as channel:
        for tick in range(int(seconds * TICKS)):
            never.wait(max(0.0, began + tick / TICKS - time.monotonic()))
            publish(producer, names, int(rate / TICKS))
            published += int(rate / TICKS)
            if tick % TICKS == 0:
                found += channel.queue_purge(QUEUE).method.message_count
            if tick % TICKS == 0 and tick > seconds * TICKS * WARM:
                descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
                held.append(
                    (time.monotonic() - began, threading.active_count(), descriptors, resident())
                )
        assert producer.flush(LIMIT) == 0
        found += channel.queue_purge(QUEUE).method.message_count
    moments, *columns = zip(*held, strict=True)
    threads, descriptors, memory = (
        linear_regression(moments, column).slope * 3600 for column in columns
    )
    FIGURES[f"soak for {seconds:g} s"] = (
        f"{published} messages, {rate:.0f}/s, {published - found} lost; in an hour {threads:+.2f} "
        f"threads, {descriptors:+.2f} descriptors, {memory / 1e6:+.2f} MB"
    )
    assert found == published
    assert abs(threads) * seconds < 3600
    assert abs(descriptors) * seconds < 3600
    assert memory * seconds / 3600 < GROWN


def publish(producer: MLProducer, names: Iterator[Message], number: int) -> None:
    """Publish the next messages; all are confirmed."""
    answers = producer.publish_many(islice(names, number), timeout=LIMIT)
    assert all(isinstance(each, Receipt) and each.confirmed for each in answers)
