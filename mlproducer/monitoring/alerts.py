"""What Prometheus is to alert on, and what somebody woken by it is to do.

The rules are written by hand, so that the library needs no YAML library: names and numbers stand as
they are, texts as JSON strings, which are YAML too (YAML 1.2, 1.3).

Runs on: any thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from attrs import frozen

from mlproducer._core.states import ConnectionState
from mlproducer.monitoring.queries import gauge, grown
from mlproducer.observe import metric_families as catalog

GROUP = "mlproducer"

OUTBOX_LONG = 10_000
"""Rows that are due, above which somebody is told."""

OUTBOX_LATE = 60
"""Seconds for which a row may have been due before somebody is told."""

RETRY_QUEUE_LONG, RETRY_QUEUE_VERY_LONG = 50, 100
"""Messages that wait for a retry, above which somebody is told."""


@frozen(kw_only=True)
class Alert:
    """One alert.

    :ivar minutes: how long ``expr`` has to hold
    :ivar severity: ``critical`` wakes somebody, ``warning`` waits for the morning
    :ivar action: what to do
    """

    name: str
    expr: str
    minutes: int
    severity: str
    summary: str
    description: str
    action: str


_WHO = "{{ $labels.instance }}"
_STATE = (
    f"{{{{ if eq $value {ConnectionState.DISCONNECTED:d}.0 }}}}disconnected"
    f"{{{{ else if eq $value {ConnectionState.CONNECTING:d}.0 }}}}connecting"
    "{{ else }}closed{{ end }}"
)
_KEEP = (
    "Do not restart the process while its store is memory://: what waits there would be lost; "
    "sqlite:// and redis:// stores keep it."
)
_CHECK = "Run 'mlproducer check' on its machine with its RABBITMQ_URL: it says which step fails."

_SUCCESSES = grown(catalog.TASKS_SENT, "1m", "task_type", "status", status='="success"')


ALERTS = (
    Alert(
        name="MLProducerHighRetryQueueSize",
        expr=f"{gauge(catalog.RETRY_QUEUE_SIZE)} > {RETRY_QUEUE_VERY_LONG}",
        minutes=5,
        severity="critical",
        summary=f"{_WHO}: more than {RETRY_QUEUE_VERY_LONG} messages wait for a retry",
        description=(
            f"{{{{ $value }}}} messages of the producer on {_WHO} are not delivered and wait in "
            f"its store, more than {RETRY_QUEUE_VERY_LONG} for 5 minutes. A memory store that is "
            "full (10,000 messages or 64 MiB) refuses further ones with BufferFullError."
        ),
        action=(
            "Look for the cause: MLProducerDisconnected and MLProducerCircuitBreakerOpen say that "
            "the broker is away or fails; else see returns (no queue is bound) and nacks on the "
            f"dashboard. {_CHECK} {_KEEP}"
        ),
    ),
    Alert(
        name="MLProducerRetryQueueHigh",
        expr=f"{gauge(catalog.RETRY_QUEUE_SIZE)} > {RETRY_QUEUE_LONG}",
        minutes=5,
        severity="warning",
        summary=f"{_WHO}: more than {RETRY_QUEUE_LONG} messages wait for a retry",
        description=(
            f"{{{{ $value }}}} messages of the producer on {_WHO} are not delivered and wait in "
            f"its store, more than {RETRY_QUEUE_LONG} for 5 minutes."
        ),
        action=(
            "See on the dashboard whether the queue grows, and whether the connection, the breaker "
            f"or the broker's answers (nacks, returns, timeouts) explain it. {_KEEP}"
        ),
    ),
    Alert(
        name="MLProducerCircuitBreakerOpen",
        # A breaker that stays broken is half-open for a moment after each cooldown, and a scrape
        # that falls into it must not start the two minutes anew.
        expr=f"max_over_time({gauge(catalog.CIRCUIT_BREAKER_OPEN)}[1m]) == 1",
        minutes=2,
        severity="critical",
        summary=f"{_WHO}: the circuit breaker is open",
        description=(
            f"Messages of the producer on {_WHO} failed many times in a row, and so did its "
            "probes: for 2 minutes the breaker has been open, or was within the last minute. "
            "publish() raises CircuitOpenError with a memory store, and defers with another."
        ),
        action=(
            "The broker is connected and fails to confirm, or cannot be reached. See nacks, "
            "confirm timeouts and connection errors on the dashboard, and the broker's log, its "
            f"load and its disk. {_CHECK} The breaker closes by itself with the first confirm."
        ),
    ),
    Alert(
        name="MLProducerConnectionUnhealthy",
        expr=f"{gauge(catalog.CONNECTION_STATE)} != {ConnectionState.CONNECTED:d}",
        minutes=2,
        severity="warning",
        summary=f"{_WHO}: the producer is {_STATE}",
        description=(
            f"For 2 minutes the producer on {_WHO} has not been connected (state {{{{ $value }}}}: "
            "1 disconnected, 2 connecting, 4 closing, 5 closed)."
        ),
        action=(
            "State 5: the application has closed its producer; restart it if it should publish. "
            "State 1 in a process that has published nothing yet: call MLProducer.start() when it "
            f"starts. Else: {_CHECK}"
        ),
    ),
    Alert(
        name="MLProducerDisconnected",
        expr=f"{gauge(catalog.CONNECTION_STATE)} < {ConnectionState.CONNECTED:d}",
        minutes=3,
        severity="critical",
        summary=f"{_WHO}: no connection to RabbitMQ",
        description=(
            f"For 3 minutes the producer on {_WHO} has had no connection: it is {_STATE} now. "
            "Messages wait in its store, or are given back with NotConnectedError."
        ),
        action=(
            f"{_CHECK} Does the broker run, is its address right, are the credentials? After "
            "10 failed attempts (ML_MAX_RECONNECT_ATTEMPTS) the producer has given up until the "
            f"next publish() or MLProducer.reconnect(). {_KEEP}"
        ),
    ),
    Alert(
        name="MLProducerOutboxLate",
        expr=f"{gauge(catalog.OUTBOX_OLDEST)} > {OUTBOX_LATE}",
        minutes=2,
        severity="critical",
        summary=f"{_WHO}: a row of the outbox has been due for more than {OUTBOX_LATE} s",
        description=(
            f"The store that the producer on {_WHO} shares has a row that was accepted "
            "{{ $value }} s ago, is due, and is claimed by no process. Nothing is lost: it waits."
        ),
        action=(
            "Does a process with a producer on this store run, such as 'mlproducer relay', and is "
            f"it connected to the broker? {_CHECK}"
        ),
    ),
    Alert(
        name="MLProducerOutboxLong",
        expr=f"{gauge(catalog.OUTBOX_ROWS)} > {OUTBOX_LONG}",
        minutes=5,
        severity="warning",
        summary=f"{_WHO}: more than {OUTBOX_LONG} rows of the outbox are due",
        description=(
            f"{{{{ $value }}}} rows of the store that the producer on {_WHO} shares are due, more "
            f"than {OUTBOX_LONG} for 5 minutes."
        ),
        action=(
            "See on the dashboard whether rows grow faster than messages are confirmed. Start "
            "another 'mlproducer relay': several share the work."
        ),
    ),
    Alert(
        name="MLProducerNotConfirming",
        # A success ends it within a minute; a message a minute that is not confirmed keeps it up.
        expr=f"{grown(catalog.CONFIRM_TIMEOUTS, '2m')} > 0 unless {_SUCCESSES} > 0",
        minutes=2,
        severity="critical",
        summary=f"{_WHO}: the broker confirms nothing",
        description=(
            f"Publishers of the producer on {_WHO} have waited for confirms in vain for 2 minutes, "
            "and not one message was confirmed. The broker may be connected and answer health "
            "checks all the same: a queue whose leader is gone, or a cluster without a majority, "
            "confirms nothing. /health is 503 and says so."
        ),
        action=(
            "Look at the broker's nodes and at the queues' leaders and members "
            "(rabbitmqctl cluster_status, rabbitmq-queues quorum_status QUEUE), its disk and its "
            f"log. {_CHECK} {_KEEP}"
        ),
    ),
)


def rules() -> str:
    """Give the rule file (Prometheus documentation, *Alerting rules*)."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Written by: mlproducer monitoring export"
    yield "groups:"
    yield f"  - name: {GROUP}"
    yield "    rules:"
    for alert in ALERTS:
        yield f"      - alert: {alert.name}"
        yield f"        expr: {json.dumps(alert.expr)}"
        yield f"        for: {alert.minutes}m"
        yield "        labels:"
        yield f"          severity: {alert.severity}"
        yield "        annotations:"
        for name in ("summary", "description", "action"):
            yield f"          {name}: {json.dumps(getattr(alert, name))}"
