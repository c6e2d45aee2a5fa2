"""Has the exchanges of delayed delivery there before a task is sent to them, on each connection.

They are 28 levels with an exchange and a queue each, which most producers never need: so they are
declared when the first task comes that is due later, and from then on whenever a connection is new.
Until the broker has them, such tasks are held here; where they cannot be had, a task goes to its
queue at once and its worker waits for the ``eta``, as without them.

Runs on: the I/O thread, its only owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from mlproducer._core.delivery import Delivery
from mlproducer._core.interfaces import Channel, Loss
from mlproducer._engine.close_reasons import CONNECTION_FORCED
from mlproducer._wire.delay import Delays
from mlproducer.message import Envelope
from mlproducer.topology import Declaration

PATIENCE = 5.0
"""Seconds for the broker to declare them; a cluster takes one or two for 28 quorum queues."""

LIMIT = 3
"""Connections that may be lost without a word while we ask for the same; with one, it is enough."""

OpenChannel = Callable[[Callable[[Any], None], Callable[[Loss], None]], None]
Take = Callable[[Sequence[Delivery]], None]


class DelayedDelivery:
    """The delayed delivery of one I/O thread.

    :param active: declare; otherwise only look whether another program has
    :param call_later: calls a function after so many seconds
    :param fault: told what could not be declared
    :param resume: called when those that were held have been handed on
    :ivar passes: delayed tasks come through, ours or others'
    """

    def __init__(
        self,
        delays: Delays,
        *,
        active: bool,
        call_later: Callable[[float, Callable[[], None]], object],
        fault: Callable[[Declaration, Loss], None],
        resume: Callable[[], None],
    ) -> None:
        self._resume = resume
        self._delays = delays
        self.entry = delays.entry
        self._active = active
        self._call_later = call_later
        self._fault = fault
        self.passes = False
        self._wanted = False  # ours do
        self._usable: bool | None = None  # None: not known on this connection
        self._round: _Round | None = None
        self._cut_off = 0  # of `LIMIT` for each step: connections in a row lost while we asked
        self._held: list[tuple[Take, Delivery]] = []
        self._then: Callable[[], None] | None = None

    # --- tasks on their way to the broker ------------------------------------------------------

    def hold(
        self, deliveries: Sequence[Delivery], take: Take, open_channel: OpenChannel | None
    ) -> Sequence[Delivery]:
        """Hold back those that are delayed, until they can be; give the others.

        :param take: called with those that were held
        :param open_channel: opens a channel on the connection; ``None`` where there is none yet,
            and `prepare` will be called before anything is written on it
        """
        delayed = [each for each in deliveries if each.envelope.exchange == self.entry]
        if not delayed:
            return deliveries
        self.passes = True
        delayed = [each for each in delayed if self._delays.is_ours(each.envelope)]
        if not delayed:
            return deliveries
        self._wanted = True
        if self._usable is not None or open_channel is None:
            return deliveries
        self._held += ((take, delivery) for delivery in delayed)
        if self._round is None:
            self._begin(open_channel)
        return [each for each in deliveries if not self._delays.is_ours(each.envelope)]

    def holds(self, delivery: Delivery) -> bool:
        """Whether a delivery is held back."""
        return any(held is delivery for _, held in self._held)

    def release(self, wanted: Delivery | None = None) -> None:
        """Hand on those that are held, or one of them: its publisher's time is up, or all's."""
        if not self._held:
            return
        released = [each for each in self._held if wanted is None or each[1] is wanted]
        self._held = [each for each in self._held if each not in released]
        for take, delivery in released:
            take([delivery])

    def addressing(self, channel: Channel) -> Channel:
        """Return a channel that sends each delayed task with what is left of its delay."""
        self.passes = True
        return _AddressingChannel(self, channel)

    def address(self, batch: list[tuple[Envelope, int]]) -> list[tuple[Envelope, int]]:
        """Address what is about to be written: it may have waited for a while."""
        now, usable = datetime.now(timezone.utc), self._usable is not False
        return [(self._delays.again(envelope, now, usable=usable), tag) for envelope, tag in batch]

    def plain(self, envelope: Envelope) -> Envelope:
        """Give a message the route that it has without a delay."""
        return self._delays.again(envelope, datetime.now(timezone.utc), usable=False)

    # --- the connection ------------------------------------------------------------------------

    def prepare(self, open_channel: OpenChannel, then: Callable[[], None]) -> None:
        """Go on once it is known whether tasks can be delayed on a new connection, if any are."""
        if not self._wanted or self._usable is not None:
            then()
            return
        self._then = then
        if self._round is None:
            self._begin(open_channel)

    def lost(self, loss: Loss) -> None:
        """Note that the connection is gone, and whether it may be so because of what was asked.

        What was given up on one connection is asked for again on a later one, with less at first.
        """
        if self._round is None:
            self._cut_off = max(0, self._cut_off - LIMIT)
        elif loss.reply_code in (0, CONNECTION_FORCED):
            self._cut_off += loss.reply_code == 0  # without a word, as networks do
        else:
            self._cut_off += LIMIT
        self.forget()

    def forget(self) -> None:
        """Know nothing any more of what is declared: the connection is gone, or an exchange is."""
        self._usable = self._round = self._then = None
        self.release()

    def _begin(self, open_channel: OpenChannel) -> None:
        # Some brokers answer what they do not know by ending the connection: ask for less then.
        if self._active and self._cut_off < LIMIT:
            self._start(open_channel, self._delays.declarations(), last=False)
        elif self._cut_off < (2 * LIMIT if self._active else LIMIT):
            self._start(open_channel, self._delays.passive(), last=True)
        else:
            self._give_up(next(self._delays.passive()), Loss("it costs the connection"))

    def _start(
        self, open_channel: OpenChannel, declarations: Iterable[Declaration], *, last: bool
    ) -> None:
        attempt = _Round(list(declarations))

        def done() -> None:
            if self._round is attempt:
                self._conclude(usable=True)

        def failed(loss: Loss) -> None:
            if self._round is not attempt:
                return
            if last:
                self._give_up(attempt.declarations[0], loss)
            else:  # a worker may have declared them otherwise, or may declare and we may not
                self._start(open_channel, self._delays.passive(), last=True)

        def late() -> None:
            failed(Loss("no answer in time"))

        self._round = attempt
        self._call_later(PATIENCE, late)
        attempt.run(open_channel, done, failed)

    def _give_up(self, declaration: Declaration, loss: Loss) -> None:
        self._fault(declaration, loss)
        self._conclude(usable=False)

    def _conclude(self, *, usable: bool) -> None:
        if usable:
            self._cut_off = 0
        self._usable, self._round = usable, None
        then, self._then = self._then, None
        if then is not None:
            then()
        self.release()
        self._resume()


class _Round:
    """Declarations that are sent in one piece, without an answer to any but the last.

    A hundred answers would take a hundred round trips. The broker answers a declaration that it
    refuses by closing the channel, and then the last is not answered.
    """

    def __init__(self, declarations: list[Declaration]) -> None:
        self.declarations = declarations
        self._done: Callable[[], None]

    def run(
        self, open_channel: OpenChannel, done: Callable[[], None], failed: Callable[[Loss], None]
    ) -> None:
        self._done = done
        open_channel(self._on_open, failed)

    def _on_open(self, channel: Any) -> None:
        *pipelined, last = self.declarations
        for each in pipelined:
            getattr(channel, each.method)(**each.arguments)
        self._channel = channel
        getattr(channel, last.method)(**last.arguments, callback=self._on_last)

    def _on_last(self, _frame: object) -> None:
        if self._channel.is_open:
            self._channel.close()
        self._done()


class _AddressingChannel:
    """A channel that addresses delayed tasks as they are written."""

    def __init__(self, delayed: DelayedDelivery, channel: Channel) -> None:
        self._delayed = delayed
        self._channel = channel
        self.longest_properties = channel.longest_properties

    def room(self) -> int:
        """Bytes that may be written before the channel's buffer is too full."""
        return self._channel.room()

    def publish(self, batch: list[tuple[Envelope, int]]) -> Sequence[int] | None:
        """Write messages, each with its delivery tag."""
        return self._channel.publish(self._delayed.address(batch))
