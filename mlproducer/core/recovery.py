"""What a failure means for a message. Every nack, return, loss and timeout comes through here.

Runs on: the I/O thread; pure.
"""

from __future__ import annotations

import enum

from mlproducer.errors import PublishError

SOFT_ACCUSATIONS = frozenset({403, 404, 406})
"""Channel errors (AMQP 0-9-1, section 1.5.2.5) by which a broker answers one bad message."""

HARD_ACCUSATIONS = frozenset({501, 502, 503, 505, 540, 541})
"""Connection errors that a message may have caused; CONNECTION_FORCED and the like are not."""


class Verdict(enum.Enum):
    """What is to be done with a message whose attempt failed."""

    KEEP = enum.auto()
    GIVE_BACK = enum.auto()


def decide(error: PublishError, *, retry: bool, owned: bool) -> Verdict:
    """Judge one failure.

    :param retry: the library may keep the message; false where the publisher wants it back
    :param owned: it has promised to: a message that is ours goes back only where no later attempt
        can succeed
    """
    worth = not error.permanent if owned else error.deferrable
    return Verdict.KEEP if retry and worth else Verdict.GIVE_BACK


def accuses(reply_code: int) -> bool:
    """Whether a loss with this code may be the fault of one of the messages in flight."""
    return reply_code in SOFT_ACCUSATIONS or reply_code in HARD_ACCUSATIONS
