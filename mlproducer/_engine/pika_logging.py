"""What pika logs of connections of ours: not shown, since the library says once what has happened.

A broker that cannot be reached makes pika log seven lines at ERROR for each attempt, and error
reporters raise alarms for a loss that was dealt with. At level DEBUG pika's lines are shown.

Runs on: any thread; it concerns what is logged on the library's own.
"""

from __future__ import annotations

import logging

from mlproducer._engine.threads import here
from mlproducer._foreign_calls import guarded


class OurThreads(logging.Filter):
    """Lets through what others' threads log; other users of pika in the process see no difference.

    What is shown of our threads is handled here, so that a handler that raises does not raise into
    pika, and through it into the I/O loop.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the logger goes on with a record."""
        if here.owner is None:
            return True
        logger = logging.root.getChild(record.name)
        # Not isEnabledFor, which is false here with Python 3.13.5: this record is in hand.
        if max(logger.getEffectiveLevel(), logger.manager.disable + 1) <= logging.DEBUG:
            rest = logging.Filterer()
            rest.filters = [each for each in logger.filters if each is not self]
            guarded(self._handle, logger, rest, record)
        return False

    def _handle(
        self, logger: logging.Logger, rest: logging.Filterer, record: logging.LogRecord
    ) -> None:
        if rest.filter(record):
            logger.callHandlers(record)


_filter = OurThreads()


def quieten_pika() -> None:
    """Filter all loggers that pika has by now; any number of times."""
    for name in list(logging.root.manager.loggerDict):
        if name == "pika" or name.startswith("pika."):
            logging.root.getChild(name).addFilter(_filter)
