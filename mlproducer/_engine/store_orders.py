"""What the store writer is ordered to do: store a message, note what came of it, delete its row.

Runs on: any thread makes one; the retry thread carries it out.
"""

from __future__ import annotations

from attrs import define, field

from mlproducer._core.delivery import Delivery
from mlproducer._synchronization import Latch
from mlproducer.errors import PublishError
from mlproducer.stores.protocol import Entry, Record


@define(eq=False)
class Put:
    """Store a message.

    :ivar done: opened once it is stored, or refused
    :ivar restores: its row is gone from the store, or could not be written although its publisher
        relies on it
    :ivar refusal: why it is not
    :ivar cut: it failed in other ways than that the store refused it
    """

    delivery: Delivery
    entry: Entry
    done: Latch | None = None
    restores: bool = False
    refusal: PublishError | None = None
    cut: bool = False

    @property
    def wanted(self) -> bool:
        """Whether it is still to be stored; not what has gone back to its publisher."""
        if self.entry.ahead or self.restores:
            return self.delivery.open
        return self.delivery.in_store


@define(eq=False)
class Update:
    """Note in a message's row what came of the last attempt.

    :ivar first: the row did not count among those that wait before
    :ivar told: its publisher waits for the store's word that the row is still there
    """

    delivery: Delivery
    record: Record = field(repr=False)
    delay: float | None
    first: bool
    told: bool = False

    @property
    def dead(self) -> bool:
        """Whether it counts among the dead."""
        return self.record.dead

    @property
    def change(self) -> int:
        """By how much it changes their number."""
        return int(self.first)


@define(eq=False)
class Delete:
    """Delete the row of a message that has found its end, or goes back to its publisher.

    :ivar waited: the message waited for a retry, or is dead
    :ivar told: its publisher waits for the deletion
    :ivar counted: the row was counted among those that wait or are dead when this was ordered
    """

    delivery: Delivery
    dead: bool
    waited: bool
    told: bool = False
    counted: bool = False

    @property
    def change(self) -> int:
        """By how much it changes their number."""
        return -self.counted
