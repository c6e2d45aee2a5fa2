"""What the dashboard shows: its rows, their panels and the queries behind these.

Pure data. How Grafana wants it is for `mlproducer.monitoring.dashboard` to know.

Runs on: any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from mlproducer._core.states import ConnectionState
from mlproducer.monitoring.alerts import OUTBOX_LATE, RETRY_QUEUE_LONG, RETRY_QUEUE_VERY_LONG
from mlproducer.monitoring.queries import (
    gauge,
    greatest,
    increase,
    quantile,
    rate,
    share,
    total_rate,
)
from mlproducer.observe import metric_families as catalog

EACH = "{{instance}}"
"""Legend of a reading that every scraped process has."""


@frozen
class Query:
    """A query in PromQL, and the name of its lines; ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str


@frozen(kw_only=True)
class Panel:
    """One panel.

    :ivar unit: Grafana's word for the unit of the values
    :ivar words: names and colours of values, where these are numbers of states
    :ivar limits: colours from values on, in ascending order; the rest is green
    :ivar width: of the 24 columns that a dashboard has
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    words: Mapping[int, tuple[str, str]] | None = None
    limits: tuple[tuple[float, str], ...] = ()
    width: int = 8


@frozen
class Row:
    """A headline, and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


def _percentiles(family: catalog.Family, status: str = "") -> tuple[Query, ...]:
    return tuple(
        Query(quantile(part, family, status=status), f"p{part * 100:g}")
        for part in (0.5, 0.9, 0.95, 0.99)
    )


CONNECTION_WORDS = {
    ConnectionState.DISCONNECTED.value: ("disconnected", "red"),
    ConnectionState.CONNECTING.value: ("connecting", "orange"),
    ConnectionState.CONNECTED.value: ("connected", "green"),
    ConnectionState.CLOSING.value: ("closing", "purple"),
    ConnectionState.CLOSED.value: ("closed", "text"),
}
CIRCUIT_WORDS = {0: ("closed", "green"), 1: ("open", "red"), 2: ("half-open", "orange")}
BLOCKED_WORDS = {0: ("flowing", "green"), 1: ("blocked", "red")}

CONNECTION = Row(
    "Connection",
    (
        Panel(
            title="Connection state",
            description="State of each process's connection; of several producers in a process, "
            "the least healthy one that is open.",
            queries=(Query(gauge(catalog.CONNECTION_STATE), EACH),),
            words=CONNECTION_WORDS,
            width=12,
        ),
        Panel(
            title="Reconnect attempts",
            description="Attempts that failed since the connection was last stable. After 10 "
            "(ML_MAX_RECONNECT_ATTEMPTS) a producer gives up until somebody publishes.",
            queries=(Query(gauge(catalog.RECONNECT_ATTEMPTS), EACH),),
            limits=((1, "orange"), (10, "red")),
            width=12,
        ),
        Panel(
            title="Connection errors",
            description="Connections that were lost and attempts that failed, per second, by kind.",
            queries=(Query(rate(catalog.CONNECTION_ERRORS, "error_type"), "{{error_type}}"),),
            unit="ops",
            width=6,
        ),
        Panel(
            title="State changes",
            description="Moves of the connections by the state that they moved to.",
            queries=(Query(increase(catalog.CONNECTION_STATE_CHANGES, "state"), "{{state}}"),),
            width=6,
        ),
        Panel(
            title="Time to reconnect",
            description="Seconds from the loss of a connection to the next one.",
            queries=_percentiles(catalog.RECONNECT_DURATION),
            unit="s",
            width=6,
        ),
        Panel(
            title="Health check failures",
            description="Health checks that the broker did not answer, per second.",
            queries=(Query(rate(catalog.HEALTH_CHECK_FAILURES), "failures"),),
            unit="ops",
            width=6,
        ),
    ),
)

DELIVERY = Row(
    "Delivery",
    (
        Panel(
            title="Messages by outcome",
            description="Each message once, when its fate is known: confirmed (success), "
            "dead-lettered (failure), or given back to its publisher.",
            queries=(Query(rate(catalog.TASKS_SENT, "status"), "{{status}}"),),
            unit="ops",
        ),
        Panel(
            title="Messages by task type",
            description="All outcomes together.",
            queries=(Query(rate(catalog.TASKS_SENT, "task_type"), "{{task_type}}"),),
            unit="ops",
        ),
        Panel(
            title="Share not confirmed",
            description="Of the messages whose fate is known, those that were dead-lettered or "
            "given back. 0 where there was no message.",
            queries=(
                Query(
                    share(rate(catalog.TASKS_SENT, status='!="success"'), rate(catalog.TASKS_SENT)),
                    "not confirmed",
                ),
            ),
            unit="percentunit",
            limits=((0.01, "orange"), (0.1, "red")),
        ),
        Panel(
            title="What the broker answers",
            description="Nacks; returns, for which no queue is bound; confirms that did not come "
            "within the publisher's timeout, and those of them that came later.",
            queries=(
                Query(rate(catalog.NACKS), "nacks"),
                Query(rate(catalog.RETURNS), "returns"),
                Query(rate(catalog.CONFIRM_TIMEOUTS), "confirm timeouts"),
                Query(rate(catalog.LATE_CONFIRMS), "late confirms"),
            ),
            unit="ops",
        ),
        Panel(
            title="Message size",
            description="Sizes of confirmed bodies.",
            queries=_percentiles(catalog.MESSAGE_SIZE),
            unit="bytes",
        ),
        Panel(
            title="Throughput",
            description="Confirmed bytes per second, without headers.",
            queries=(Query(total_rate(catalog.MESSAGE_SIZE), "confirmed"),),
            unit="Bps",
        ),
    ),
)

LATENCY = Row(
    "Latency percentiles",
    (
        Panel(
            title="Time to confirm",
            description="From the publisher's call to the confirm, retries included.",
            queries=_percentiles(catalog.TASK_PUBLISH_DURATION, status='="success"'),
            unit="s",
            width=12,
        ),
        Panel(
            title="Time to confirm, 95 % by task type",
            description="95 % of the confirmed messages of a type took less.",
            queries=(
                Query(
                    quantile(0.95, catalog.TASK_PUBLISH_DURATION, "task_type", status='="success"'),
                    "{{task_type}}",
                ),
            ),
            unit="s",
            width=12,
        ),
    ),
)

RETRIES = Row(
    "Retries and dead letters",
    (
        Panel(
            title="Retry queue",
            description="Messages that wait for a retry. Processes that share a store each show "
            f"the whole of it. Alerts above {RETRY_QUEUE_LONG} and {RETRY_QUEUE_VERY_LONG}.",
            queries=(Query(gauge(catalog.RETRY_QUEUE_SIZE), EACH),),
            limits=((RETRY_QUEUE_LONG, "orange"), (RETRY_QUEUE_VERY_LONG, "red")),
        ),
        Panel(
            title="Retries",
            description="Messages written again, per second.",
            queries=(Query(rate(catalog.TASK_RETRIES, "task_type"), "{{task_type}}"),),
            unit="ops",
        ),
        Panel(
            title="Possible duplicates",
            description="Messages written again whose earlier fate is unknown, per second. "
            "Consumers can tell them by the message id.",
            queries=(Query(rate(catalog.POSSIBLE_DUPLICATES), "written again"),),
            unit="ops",
        ),
        Panel(
            title="Dead-lettered",
            description="Messages that failed at every retry and lie in the queue ml.dead_letter "
            "now, per second. See: mlproducer dead-letters list.",
            queries=(Query(rate(catalog.DEAD_LETTERED), "dead-lettered"),),
            unit="ops",
        ),
        Panel(
            title="Dead letters in the store",
            description="Dead letters that the broker has not taken; they are tried again.",
            queries=(Query(gauge(catalog.DEAD_LETTERS), EACH),),
            limits=((1, "red"),),
        ),
        Panel(
            title="Outbox",
            description="Rows of a PostgreSQL store that are due and that no process has claimed.",
            queries=(Query(gauge(catalog.OUTBOX_ROWS), EACH),),
        ),
        Panel(
            title="Oldest row of the outbox",
            description="Seconds since it was accepted; it grows while no process delivers.",
            queries=(Query(gauge(catalog.OUTBOX_OLDEST), EACH),),
            unit="s",
            limits=((OUTBOX_LATE, "red"),),
        ),
        Panel(
            title="Store errors",
            description="Times that the store could not be used, per second.",
            queries=(Query(rate(catalog.STORE_ERRORS), "errors"),),
            unit="ops",
        ),
    ),
)

BREAKER = Row(
    "Circuit breaker",
    (
        Panel(
            title="Breaker state",
            description="Half-open: the next message is a probe, whose confirm closes the breaker.",
            queries=(Query(gauge(catalog.CIRCUIT_BREAKER_STATE), EACH),),
            words=CIRCUIT_WORDS,
            width=12,
        ),
        Panel(
            title="Consecutive failures",
            description="What the breaker has counted; it opens at 10 "
            "(ML_CIRCUIT_BREAKER_THRESHOLD).",
            queries=(Query(gauge(catalog.CIRCUIT_BREAKER_FAILURES), EACH),),
            width=4,
        ),
        Panel(
            title="Trips",
            description="How often a breaker opened.",
            queries=(Query(increase(catalog.CIRCUIT_BREAKER_TRIPS), "trips"),),
            width=4,
        ),
        Panel(
            title="Open breakers",
            description="1 while a process's breaker lets nothing through.",
            queries=(Query(gauge(catalog.CIRCUIT_BREAKER_OPEN), EACH),),
            limits=((1, "red"),),
            width=4,
        ),
    ),
)

PRESSURE = Row(
    "Back-pressure",
    (
        Panel(
            title="Blocked by the broker",
            description="The broker blocks publishers while it is short of memory or disk.",
            queries=(Query(gauge(catalog.CONNECTION_BLOCKED), EACH),),
            words=BLOCKED_WORDS,
        ),
        Panel(
            title="In flight",
            description="Messages written and not yet confirmed. At 1,000 (ML_MAX_IN_FLIGHT) "
            "publishers wait.",
            queries=(Query(gauge(catalog.PENDING_CONFIRMS), EACH),),
        ),
        Panel(
            title="Queues of the workers",
            description="Messages in each queue, as the last health check read it.",
            queries=(Query(greatest(catalog.QUEUE_DEPTH, "queue_name"), "{{queue_name}}"),),
        ),
        Panel(
            title="Dropped events",
            description="Calls of on() callbacks, per second, that were left out because the "
            "callbacks are too slow. Futures' callbacks are never left out.",
            queries=(Query(rate(catalog.EVENTS_DROPPED), "dropped"),),
            unit="ops",
        ),
        Panel(
            title="Celery's tasks",
            description="Tasks per second of apps with mlproducer.contrib.celery: through the "
            "producer, or by Celery's own way where the rollout is below 1.",
            queries=(Query(rate(catalog.CELERY_TASKS, "way"), "{{way}}"),),
            unit="ops",
        ),
    ),
)

ROWS = (CONNECTION, DELIVERY, LATENCY, RETRIES, BREAKER, PRESSURE)
