"""What happens, as frozen data: to messages, to connections, to the store.

The engine emits an event where it happens; logs, metrics, callbacks, spans and the status page are
made from it in `mlproducer.observe`, by tables. Events are tuples with names, since one is made for
each frame of confirms, and a frozen class of attrs takes longer.

Runs on: the thread on which it happens, mostly the I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlproducer._core.delivery import Delivery
from mlproducer._core.interfaces import Loss
from mlproducer._core.states import CircuitState, ConnectionState
from mlproducer.errors import PublishError, StoreError

# --- messages ------------------------------------------------------------------------------------


class Confirmed(NamedTuple):
    """The broker has them; one event for all that one frame has settled."""

    deliveries: Sequence[Delivery]
    now: float


class LateConfirm(NamedTuple):
    """The broker has one whose publisher waits no longer; `Confirmed` follows."""

    delivery: Delivery


class Resumed(NamedTuple):
    """One that was stored, or tried before, is about to be written."""

    delivery: Delivery


class Retried(NamedTuple):
    """It is written again."""

    delivery: Delivery


class AttemptFailed(NamedTuple):
    """An attempt failed; what follows is `Deferred` or `Failed`."""

    delivery: Delivery
    error: PublishError


class DeadLettered(NamedTuple):
    """The broker has its dead letter."""

    delivery: Delivery


class LetterKept(NamedTuple):
    """Its dead letter is not for this broker, and stays in the store."""

    delivery: Delivery
    error: PublishError


class Deferred(NamedTuple):
    """The library goes on without the publisher."""

    delivery: Delivery


class PossibleDuplicate(NamedTuple):
    """It is sent again although an earlier attempt may have reached a queue."""

    delivery: Delivery


class Failed(NamedTuple):
    """Its publisher gets this error, and owns it."""

    delivery: Delivery
    error: PublishError


class Refused(NamedTuple):
    """A task could not be published after a COMMIT, or from the outbox."""

    message_id: str
    error: PublishError


class UnknownTag(NamedTuple):
    """The broker settled a tag that was not open."""

    tag: int


# --- connections ---------------------------------------------------------------------------------


class StateChanged(NamedTuple):
    """The connection changed its state."""

    state: ConnectionState


class Connected(NamedTuple):
    """The connection is ready for messages."""

    address: str


class Disconnected(NamedTuple):
    """The connection was lost, or closed."""

    loss: Loss


class ConnectFailed(NamedTuple):
    """An attempt to connect failed."""

    loss: Loss


class GaveUp(NamedTuple):
    """The attempts to connect are used up."""

    attempts: int
    loss: Loss


class ChannelLost(NamedTuple):
    """The broker closed the channel."""

    loss: Loss


class FlowChanged(NamedTuple):
    """The broker has blocked publishers, or unblocked them."""

    blocked: bool
    reason: str


class TopologyFault(NamedTuple):
    """An exchange, queue or binding could not be declared."""

    target: str
    loss: Loss


# --- the rest ------------------------------------------------------------------------------------


class CircuitChanged(NamedTuple):
    """The circuit breaker moved."""

    state: CircuitState


class HealthChecked(NamedTuple):
    """The broker answered a health check, or did not."""

    alive: bool


class HealthFault(NamedTuple):
    """The broker is alive, but an exchange or queue is missing or forbidden."""

    target: str
    loss: Loss


class QueueDepth(NamedTuple):
    """A health check has read how many messages a queue has."""

    queue: str
    messages: int


class StoreFailed(NamedTuple):
    """The store could not be used."""

    error: StoreError


class LoopFailed(NamedTuple):
    """The I/O loop failed, and another one takes over."""

    error: BaseException


class EventDropped(NamedTuple):
    """A call of a user's callback was dropped."""


Event = (
    Confirmed
    | LateConfirm
    | Resumed
    | Retried
    | AttemptFailed
    | DeadLettered
    | LetterKept
    | Deferred
    | PossibleDuplicate
    | Failed
    | Refused
    | UnknownTag
    | StateChanged
    | Connected
    | Disconnected
    | ConnectFailed
    | GaveUp
    | ChannelLost
    | FlowChanged
    | TopologyFault
    | CircuitChanged
    | HealthChecked
    | HealthFault
    | QueueDepth
    | StoreFailed
    | LoopFailed
    | EventDropped
)

Emit = Callable[[Event], None]
"""Tells observers of an event; it neither blocks nor raises."""
