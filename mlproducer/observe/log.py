"""State changes as log lines with ``key=value`` fields; nothing per message above DEBUG.

Runs on: the thread on which the event happens.
"""

from __future__ import annotations

import logging

from mlproducer.core.delivery import Delivery
from mlproducer.core.ports import Loss, LossKind
from mlproducer.core.states import CircuitState
from mlproducer.observe.events import EventSink

logger = logging.getLogger("mlproducer")


class LogSink(EventSink):
    """Logs what an operator wants to read."""

    def connected(self, address: str) -> None:
        """Log at INFO."""
        logger.info("connected broker=%s", address)

    def disconnected(self, loss: Loss) -> None:
        """Log at WARNING, since messages wait; at INFO where we closed it ourselves."""
        level = logging.INFO if loss.kind is LossKind.CLOSED else logging.WARNING
        logger.log(level, "disconnected kind=%s reason=%r", loss.kind.value, loss.text)

    def connection_error(self, loss: Loss) -> None:
        """Log at WARNING."""
        logger.warning("cannot connect kind=%s reason=%r", loss.kind.value, loss.text)

    def gave_up(self, attempts: int, loss: Loss) -> None:
        """Log at ERROR, with what to do."""
        logger.error(
            "gave up connecting attempts=%d reason=%r: check the broker; "
            "the next publish() or reconnect() starts over",
            attempts,
            loss.text,
        )

    def channel_lost(self, loss: Loss) -> None:
        """Log at WARNING."""
        logger.warning("channel closed code=%d reason=%r", loss.reply_code, loss.text)

    def flow_changed(self, *, blocked: bool, reason: str) -> None:
        """Log at WARNING when it begins, at INFO when it ends."""
        if blocked:
            logger.warning("blocked by the broker reason=%r", reason)
        else:
            logger.info("unblocked by the broker")

    def topology_fault(self, target: str, loss: Loss) -> None:
        """Log at ERROR: somebody has to mend it."""
        logger.error(
            "cannot declare target=%s code=%d reason=%r", target, loss.reply_code, loss.text
        )

    def circuit_changed(self, state: CircuitState) -> None:
        """Log at WARNING when it opens, else at INFO."""
        level = logging.WARNING if state is CircuitState.OPEN else logging.INFO
        logger.log(level, "circuit breaker state=%s", state.value)

    def dead_lettered(self, delivery: Delivery) -> None:
        """Log at ERROR: somebody has to look at it."""
        logger.error(
            "dead-lettered message_id=%r attempts=%d reason=%s",
            delivery.envelope.message_id,
            delivery.attempts,
            type(delivery.reason).__name__,
        )

    def health_checked(self, *, alive: bool) -> None:
        """Log at WARNING where there was no answer."""
        if not alive:
            logger.warning("no answer to the health check; reconnecting")

    def health_fault(self, target: str, loss: Loss) -> None:
        """Log at ERROR: somebody has to mend it."""
        logger.error("health check target=%s code=%d reason=%r", target, loss.reply_code, loss.text)

    def stray_confirm(self, tag: int) -> None:
        """Log at WARNING: the broker breaks the protocol."""
        logger.warning("confirm for a delivery tag that is not open tag=%d", tag)

    def crashed(self, error: BaseException) -> None:
        """Log at CRITICAL, with the traceback."""
        logger.critical("the I/O loop failed; going on with a new one", exc_info=error)
