"""What a failure means for a message. Every nack, return, loss and timeout comes through here.

Runs on: the I/O thread; pure.
"""

from __future__ import annotations

import enum

from mlproducer.errors import AuthenticationError, CircuitOpenError, PublishError

SOFT_ACCUSATIONS = frozenset({403, 404, 406})
"""Channel errors (AMQP 0-9-1, section 1.5.2.5) by which a broker answers one bad message."""

INTERNAL_ERROR = 541
"""The broker has failed over a message, maybe when some queue had it already."""

HARD_ACCUSATIONS = frozenset({501, 502, 503, 505, 540, INTERNAL_ERROR})
"""Connection errors that a message may have caused; CONNECTION_FORCED and the like are not."""


UNBOUNDED = (CircuitOpenError, AuthenticationError)
"""States that may last so long that the memory should not fill with what waits for their end."""


class Decision(enum.Enum):
    """What is to be done with a message whose attempt failed."""

    DEFER = enum.auto()
    FAIL = enum.auto()
    DEAD_LETTER = enum.auto()


def decide(
    error: PublishError, *, retry: bool, owned: bool, exhausted: bool, durable: bool
) -> Decision:
    """Judge one failure.

    :param retry: the library may keep the message; false where the publisher wants it back
    :param owned: its publisher relies on it: a message that is ours never fails, it is
        dead-lettered where no later attempt can succeed
    :param exhausted: the last retry was used up
    :param durable: the store survives the process; only such a one takes messages while the
        breaker is open or the credentials are wrong, since that may last
    """
    if not retry:
        return Decision.FAIL
    if owned:
        return Decision.DEAD_LETTER if exhausted or error.permanent else Decision.DEFER
    if not error.deferrable or (isinstance(error, UNBOUNDED) and not durable):
        return Decision.FAIL
    return Decision.DEAD_LETTER if exhausted else Decision.DEFER


def accuses(reply_code: int) -> bool:
    """Whether a loss with this code may be the fault of one of the messages in flight."""
    return reply_code in SOFT_ACCUSATIONS or reply_code in HARD_ACCUSATIONS
