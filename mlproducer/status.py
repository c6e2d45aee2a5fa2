"""What a producer says of itself, frozen at one moment.

Runs on: any thread.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen

from mlproducer._core.states import CircuitState, ConnectionState


@frozen(kw_only=True)
class Status:
    """A producer's state.

    :ivar reconnect_attempts: attempts that failed since the link was last stable
    :ivar consecutive_failures: what the circuit breaker has counted
    :ivar retry_queue_size: messages that wait for a retry
    :ivar pending_confirms: messages written and not yet confirmed
    :ivar blocked: the broker blocks publishers (memory or disk alarm)
    :ivar dead_letters: dead letters in the store
    :ivar confirming: the broker confirms; false after three confirm timeouts without a confirm
    :ivar broker: ``host:port`` of the broker in use or tried last
    :ivar outbox_rows: rows in a PostgreSQL store that are due and not claimed, as last counted
    :ivar outbox_oldest: seconds since the oldest of them was accepted
    :ivar store: path or host of the durable store, where messages wait in one and it is in use
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
        """Whether the breaker lets nothing through."""
        return self.circuit_state is CircuitState.OPEN

    @property
    def healthy(self) -> bool:
        """Connected, breaker not open, not blocked, and confirming."""
        connected = self.connection_state is ConnectionState.CONNECTED
        return connected and not self.circuit_breaker_open and not self.blocked and self.confirming

    def to_json(self) -> dict[str, Any]:
        """Give the form that ``/health`` answers."""
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
    """What became of the messages that were inside when a producer was closed.

    :ivar confirmed: how many the broker confirmed meanwhile
    :ivar stored: how many wait in a durable store
    :ivar abandoned: ids of those that lived only in memory
    """

    confirmed: int = 0
    stored: int = 0
    abandoned: tuple[str, ...] = ()
