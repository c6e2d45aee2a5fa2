"""The status of a producer, and the report of its end.

Runs on: any thread.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen

from mlproducer._core.states import CircuitState, ConnectionState


@frozen(kw_only=True)
class Status:
    """The state of a producer at one moment.

    :ivar reconnect_attempts: attempts that failed since the connection was last stable
    :ivar consecutive_failures: failures in a row that the circuit breaker has counted
    :ivar retry_queue_size: messages that wait for a retry
    :ivar pending_confirms: messages written and not yet confirmed
    :ivar blocked: the broker blocks publishers (memory or disk alarm)
    :ivar dead_letters: dead letters in the store
    :ivar confirming: false after three confirm timeouts without a confirm
    :ivar broker: ``host:port`` of the broker that is connected or was tried last
    :ivar outbox_rows: rows in a PostgreSQL store that are due and not claimed, as last counted
    :ivar outbox_oldest: seconds since the oldest of these rows was accepted
    :ivar store: path or host of the durable store, if there is one, and it is in use
    """

    connection_state: ConnectionState
    reconnect_attempts: int = 0
    consecutive_failures: int = 0
    circuit_state: CircuitState = CircuitState.CLOSED
    retry_queue_size: int = 0
    pending_confirms: int = 0
    blocked: bool = False
    confirming: bool = True
    dead_letters: int = 0
    broker: str = ""
    store: str = ""
    outbox_rows: int = 0
    outbox_oldest: float = 0.0

    @property
    def circuit_breaker_open(self) -> bool:
        """Whether the circuit breaker is open."""
        return self.circuit_state is CircuitState.OPEN

    @property
    def healthy(self) -> bool:
        """Whether it is connected, the breaker not open, not blocked, and the broker confirms."""
        connected = self.connection_state is ConnectionState.CONNECTED
        return connected and not self.circuit_breaker_open and not self.blocked and self.confirming

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``/health``."""
        return {
            "healthy": self.healthy,
            "rabbitmq": {
                "connectionState": self.connection_state.name,
                "reconnectAttempts": self.reconnect_attempts,
                "consecutiveFailures": self.consecutive_failures,
                "circuitBreakerOpen": self.circuit_breaker_open,
                "retryQueueSize": self.retry_queue_size,
                "pendingConfirms": self.pending_confirms,
                "blocked": self.blocked,
                "confirming": self.confirming,
            },
        }


@frozen
class CloseReport:
    """What became of the messages that a producer still had when it was closed.

    :ivar confirmed: how many the broker confirmed during the close
    :ivar stored: how many wait in a durable store
    :ivar abandoned: ids of those that were only in memory, and are lost
    """

    confirmed: int = 0
    stored: int = 0
    abandoned: tuple[str, ...] = ()
