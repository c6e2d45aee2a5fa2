"""One connection to one broker, from the first packet to the last, by way of pika.

A `Connection` is used once: it opens at one address, declares the topology, hands a channel in
confirm mode to its owner as often as the broker closes one, and ends. Once it has ended or was
aborted, whatever pika still says for it is dropped. What pika raises is translated by the
table in `close_reasons`.

pika logs callbacks at DEBUG, so it is given bound methods without arguments, never a payload.

Runs on: the I/O thread.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pika import exceptions, spec
from pika.channel import Channel
from pika.connection import Connection as PikaConnection

from mlproducer._core.interfaces import NOT_FOUND, Confirm, Loss, LossKind
from mlproducer._engine.close_reasons import (
    CONNECTION_FORCED,
    NOT_ALLOWED,
    closed_by_broker,
    printable,
    translate,
)
from mlproducer._engine.connection_owner import ConnectionOwner
from mlproducer._engine.dead_letter_channel import Batch, DeadLetterChannel, Tags
from mlproducer._engine.declarer import TopologyDeclarer
from mlproducer._engine.endpoints import Address, ResolvedEndpoint
from mlproducer._engine.io_loop import EventLoop
from mlproducer._engine.pika_adapters import BrokerConnection, IOServices, Traffic, parameters
from mlproducer._wire.amqp import NOT_MANDATORY
from mlproducer._wire.frames import ConfirmReader, FrameWriter
from mlproducer.message import Envelope
from mlproducer.topology import Declaration

HIGH_WATER = 1024 * 1024
"""Bytes in pika's write buffer, which has no limit of its own, above which nothing is added."""

VAIN_CHANNELS = 2
"""Channels in a row that the broker may close before any use, until the connection is given up."""

OnDeclared = Callable[..., None]
"""Takes ``good=``: whether something was done that was asked for."""


class ConfirmChannel:
    """A channel in confirm mode, on which envelopes are written.

    :ivar used: whether anything was written on it
    :ivar letters: where dead letters go instead; ``None``: nowhere else
    :ivar tags: which of the sender's tags are here
    """

    def __init__(self, channel: Channel, connection: BrokerConnection) -> None:
        self._channel = channel
        self.used = False
        self.letters: DeadLetterChannel | None = None
        self.tags = Tags()
        self._frames = FrameWriter(int(channel), connection.params.frame_max)
        self.longest_properties = self._frames.longest_properties
        # pika's own encoder takes half of the time of a publish; where its inside has changed,
        # its public call is used instead.
        private = hasattr(connection, "_output_marshaled_frames")
        self._buffered = getattr(connection, "_get_write_buffer_size", None)
        self._send = connection.send if private and self._buffered is not None else None

    def room(self) -> int:
        """Bytes that may be written before the buffer is too full."""
        return HIGH_WATER - (self._buffered() if self._buffered is not None else 0)

    def publish(self, batch: Batch) -> Sequence[int]:
        """Write messages, each with its delivery tag, and give the tags that went elsewhere."""
        letters: list[tuple[Envelope, int]] = []
        if self.letters is not None and self.letters.usable:
            exchange = self.letters.exchange
            for envelope, _ in batch:
                if envelope.exchange == exchange:
                    letters = [each for each in batch if each[0].exchange == exchange]
                    break
        if self.letters is None or not letters:
            self.used = True
            if self._send is not None:  # as `write` does, without a call
                self._send(self._frames.publish(batch))
            else:
                self.write(batch)
            return ()
        tags = {tag: None for _, tag in letters}
        for tag in tags:
            self.tags.skip(tag)
        if len(letters) < len(batch):
            self.write([each for each in batch if each[1] not in tags])
        self.letters.send(letters)
        return tuple(tags)

    def write(self, batch: Batch) -> None:
        """Write messages, each with its delivery tag, in one piece."""
        self.used = True
        if self._send is None:
            for envelope, tag in batch:
                self._publish_by_pika(envelope, tag)
        else:
            self._send(self._frames.publish(batch))

    def _publish_by_pika(self, envelope: Envelope, tag: int) -> None:
        properties = spec.BasicProperties().decode(self._frames.properties(envelope, tag))
        self._channel.basic_publish(
            envelope.exchange,
            envelope.routing_key,
            envelope.body,
            properties,
            mandatory=not envelope.properties[1] & NOT_MANDATORY,
        )


class Connection:
    """One connection, and on it one channel at a time for publishing.

    :param address: one of the endpoint's
    :param timeouts: seconds until TCP must be connected, and until the first declaration must be
        answered, or all must be ready; each answer gives the next its own time
    :param skipped: declarations that the broker has answered with the end of a connection
    :param probes: whether the broker has a channel for questions beside the one for publishing
    :ivar fatal: the declaration over which this connection ended
    """

    def __init__(
        self,
        loop: EventLoop,
        resolved: ResolvedEndpoint,
        address: Address,
        timeouts: tuple[float, float],
        owner: ConnectionOwner,
        skipped: Iterable[Declaration] = (),
        *,
        probes: bool = True,
    ) -> None:
        self._loop = loop
        self._endpoint = resolved.endpoint
        self._address = resolved.endpoint.broker.address
        self._owner: ConnectionOwner | None = owner
        self._skipped = tuple(skipped)
        self._closing = False
        self._channel: Channel | None = None
        self._confirming: ConfirmChannel | None = None
        self._setup: TopologyDeclarer | None = None
        self._is_set_up = False
        self._declared = 0  # of what was added
        self._adding: TopologyDeclarer | None = None
        self._askers: list[OnDeclared] = []
        self._vain = 0
        self._asking: set[int] = set()
        self._declaring: set[int] = set()
        self.probes = probes
        self.fatal: Declaration | None = None
        self._timer: Any = None
        self._start_timer(timeouts[1])
        self._services = IOServices(loop, address, self._on_beginning_failed)
        self._connection = BrokerConnection(
            parameters(resolved, timeouts),
            self._on_open,
            self._on_open_error,
            self._on_close,
            self._services,
        )
        self._connection.on_settled = self._on_settled

    # --- how it ends ---------------------------------------------------------------------------

    def close(self) -> None:
        """Close in good order; the owner is told by `ConnectionOwner.connection_failed`."""
        self._closing = True
        self._stop_timer()
        if self._connection.is_open:
            self._connection.close()
        else:
            self.cut()

    def mute(self) -> None:
        """Stop calling the owner."""
        self._owner = None

    def abort(self) -> None:
        """End it at once, without a call to the owner."""
        self._owner = None
        self._stop_timer()
        self._answer(good=True)
        self.cut()

    def cut(self) -> None:
        """Drop the connection without a handshake."""
        if self._connection.connection_state == PikaConnection.CONNECTION_INIT:
            self._connection.close()  # no stream yet: pika ends the attempt
        elif not self._connection.is_closed:
            self._services.sever()

    def give_up(self, why: str) -> None:
        """Drop a connection that is of no use although it stands, and tell the owner."""
        self._drop(Loss(f"{self._address}: {why}", kind=LossKind.TIMEOUT))

    def _drop(self, loss: Loss) -> None:
        self._fail(loss)
        self.cut()

    def _on_timeout(self) -> None:
        """Give up on a broker that accepts and does not answer."""
        self._timer = None
        self.give_up("no answer in time")

    def _on_beginning_failed(self, error: Exception) -> None:
        """Give up where pika has failed before it had a socket."""
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
        why = text or type(error).__name__
        self._drop(Loss(f"{self._address}: no connection can be made: {why}"))

    def _on_open_error(self, _connection: PikaConnection, error: BaseException | str) -> None:
        endpoint = self._endpoint
        self._fail(
            translate(self._address, error, endpoint.broker.hint, tls=endpoint.tls is not None)
        )

    def _on_close(self, _connection: PikaConnection, error: BaseException) -> None:
        if self._closing:  # also where the broker did not answer it in time
            error = exceptions.ConnectionClosedByClient(200, "")
        loss = translate(self._address, error)
        by_broker = isinstance(error, exceptions.ConnectionClosedByBroker)
        if by_broker and loss.reply_code != CONNECTION_FORCED:
            self._blame(loss)
        self._fail(loss)

    def _blame(self, loss: Loss) -> None:
        """Find what of ours the broker has answered by closing the connection."""
        if self._owner is None:
            return
        if self._setup is not None and self._setup.asked is not None:
            self.fatal = self._setup.asked
            self._owner.topology_fault(self.fatal, loss)
        elif self._adding is not None and self._adding.asked is not None:
            self.fatal = self._adding.asked
            self._owner.topology_fault(self.fatal, loss)
        elif self._asking or (self._declaring and loss.reply_code == NOT_ALLOWED):
            self._owner.probe_refused(loss)

    def _fail(self, loss: Loss) -> None:
        self._stop_timer()
        if self._confirming is not None and self._confirming.letters is not None:
            self._confirming.letters.mute()
        # Taken out before it is told: of one loss pika may speak twice, and the owner may begin the
        # next connection amid the call. What this one still says is dropped, since it has no owner.
        owner, self._owner = self._owner, None
        self._answer(good=True)  # the next connection begins with it
        if owner is not None:
            owner.connection_failed(loss)

    def traffic(self) -> Traffic:
        """Return what has gone over it so far."""
        taken, waiting = self._services.sent()
        buffered = getattr(self._connection, "_get_write_buffer_size", int)()
        return Traffic(self._connection.bytes_received, taken, waiting + buffered)

    # --- how it begins -------------------------------------------------------------------------

    def _on_open(self, connection: PikaConnection) -> None:
        if self._owner is None:
            self.cut()
            return
        if not (connection.publisher_confirms and connection.basic_nack):
            self._drop(Loss(f"{self._address}: no publisher confirms", kind=LossKind.PROTOCOL))
            return
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        self._declare()

    def _declare(self) -> None:
        """Declare the topology on a new channel, which is then for publishing."""
        self._is_set_up = False
        # Users' threads append to `added` at any time. Its length is read once, so that nothing is
        # left out or declared twice: what comes after that is for `_added`.
        self._declared = len(self._endpoint.added)
        wanted = [*self._endpoint.declarations, *self._endpoint.added[: self._declared]]
        self._setup = self._round(wanted, self._confirm)
        self._open_channel()

    def _round(
        self, wanted: Iterable[Declaration], done: Callable[[Channel], None]
    ) -> TopologyDeclarer:
        left = [each for each in wanted if each not in self._skipped]
        return TopologyDeclarer(left, self._on_fault, self._on_answered, done)

    def _on_answered(self) -> None:
        """Give the next declaration its own time: over a slow link all of them take too long."""
        if self._timer is not None:
            self._start_timer(self._endpoint.broker.connection_timeout)

    def _added(self) -> Sequence[Declaration]:
        """Take what was added since this was asked last."""
        added = self._endpoint.added[self._declared :]
        self._declared += len(added)
        return added

    def _open_channel(self) -> None:
        """Open the channel, for what is left of the set-up or at once for publishing."""
        if not self._connection.is_open or self._owner is None:
            return
        try:
            channel = self._connection.channel(on_open_callback=self._on_channel_open)
        except exceptions.NoFreeChannels:  # ours was the only one, and the broker gives none
            self._drop(Loss(f"{self._address}: no channel is left", kind=LossKind.PROTOCOL))
            return
        channel.add_on_close_callback(self._on_channel_closed)
        self._channel = channel

    def _on_channel_open(self, channel: Channel) -> None:
        if channel is not self._channel:
            return  # the broker has closed that one meanwhile, and another is being opened
        if self._setup is not None:
            self._setup.run(channel)
        else:
            self._confirm(channel)

    def _on_fault(self, declaration: Declaration, loss: Loss) -> None:
        if self._owner is not None:
            self._owner.topology_fault(declaration, loss)

    def _confirm(self, channel: Channel) -> None:
        added = self._added()
        if added:  # meanwhile
            self._setup = self._round(added, self._confirm)
            self._setup.run(channel)
            return
        self._setup = None
        self._is_set_up = True
        channel.add_on_return_callback(self._on_return)
        channel.confirm_delivery(self._on_confirm, callback=self._on_ready)

    def _on_ready(self, _frame: object) -> None:
        self._stop_timer()
        if self._owner is not None and self._channel is not None:
            confirming = ConfirmChannel(self._channel, self._connection)
            if self.probes and self._endpoint.letters:
                confirming.letters = DeadLetterChannel(
                    self._endpoint.letters, self._open_letters, self._write_letters, self._owner
                )
            # All that takes a confirm is in place before the owner is told: it may write at once,
            # and its tags count from 1 on this channel.
            self._confirming = confirming
            self._connection.confirms = ConfirmReader(int(self._channel))
            self._owner.connection_ready(confirming)

    # --- what is added later -------------------------------------------------------------------

    def declare_added(self, answer: OnDeclared) -> None:
        """Declare what was added since this connection was set up, on a channel beside publishing.

        :param answer: told once it is done, or left to the set-up of this connection or the next
        one
        """
        if not self._is_set_up or self._owner is None:
            answer(good=True)
            return
        self._askers.append(answer)
        if self._adding is None:
            self._add()

    def _add(self) -> None:
        added = self._added()
        if not added:
            self._answer(good=True)
            return
        self._adding = self._round(added, self._on_added)
        self.side_channel(self._adding.run, self._on_adding_closed)

    def _on_added(self, channel: Channel) -> None:
        channel.close()
        self._adding = None
        self._add()

    def _on_adding_closed(self, loss: Loss) -> None:
        adding = self._adding
        if adding is None:
            return
        if adding.closed(loss):
            self._soon(functools.partial(self.side_channel, adding.run, self._on_adding_closed))
        else:  # there is no second channel
            self._adding = None
            self._answer(good=False)

    def _answer(self, *, good: bool) -> None:
        askers, self._askers = self._askers, []
        for answer in askers:
            answer(good=good)

    # --- what the broker says ------------------------------------------------------------------

    def _on_confirm(self, frame: Any) -> None:
        """Take a confirm that pika has read, since another frame came before it."""
        method = frame.method
        is_ack = isinstance(method, spec.Basic.Ack)
        self._on_settled(is_ack, [(method.delivery_tag, method.multiple)])

    def _on_settled(self, is_ack: bool, confirms: Sequence[Confirm]) -> None:
        owner, confirming = self._owner, self._confirming
        if owner is None or confirming is None:
            return
        self._vain = 0
        if confirming.tags.skipped:
            confirms = [(confirming.tags.sender(tag), multiple) for tag, multiple in confirms]
        if is_ack:
            owner.acked(confirms)
        else:
            owner.nacked(confirms)

    def _on_return(
        self, channel: Channel, method: Any, properties: spec.BasicProperties, _body: bytes
    ) -> None:
        if method.exchange in self._endpoint.delayed and "x-delay" in (properties.headers or ()):
            return  # the plugin has taken it, and delivers it later; it answers so all the same
        attempt = str(properties.cluster_id)
        letters = self._confirming.letters if self._confirming is not None else None
        known = channel is self._channel or (letters is not None and letters.is_of(channel))
        if self._owner is not None and known and attempt.isdecimal():
            self._owner.returned(int(attempt), method.reply_code, printable(method.reply_text))

    def _on_blocked(self, _connection: PikaConnection, frame: Any) -> None:
        if self._owner is not None:
            self._owner.flow_changed(blocked=True, reason=printable(frame.method.reason))

    def _on_unblocked(self, _connection: PikaConnection, _frame: Any) -> None:
        if self._owner is not None:
            self._owner.flow_changed(blocked=False, reason="")

    def _on_channel_closed(self, channel: Channel, reason: Exception) -> None:
        if self._owner is None or not isinstance(reason, exceptions.ChannelClosedByBroker):
            return  # the end of the connection, which is told on its own, or our own doing
        if channel is not self._channel:
            return
        loss = closed_by_broker(reason)
        confirming, self._confirming = self._confirming, None
        if confirming is not None and confirming.letters is not None:
            confirming.letters.end()
        if self._setup is not None and self._setup.closed(loss):
            self._soon(self._open_channel)
            return
        if confirming is None or not confirming.used:
            self._vain += 1
        self._start_timer(self._endpoint.broker.connection_timeout)
        if confirming is not None:
            self._owner.channel_lost(loss)
        if self._vain >= VAIN_CHANNELS:
            text = f"{self._address}: closes each channel: {loss.reply_code} {loss.text}"
            self._drop(Loss(text, loss.reply_code, LossKind.CLOSED_BY_BROKER))
        elif confirming is not None and loss.reply_code == NOT_FOUND:
            self._soon(self._declare)
        else:
            self._soon(self._open_channel)

    def _soon(self, function: Callable[[], None]) -> None:
        """Go on once pika has released the closed channel's number: there may be no other."""
        self._loop.call_later(0, function)

    # --- questions beside publishing -----------------------------------------------------------

    def declaring_channel(
        self, on_open: Callable[[Channel], None], on_closed: Callable[[Loss], None]
    ) -> None:
        """Open a side channel for declarations: the caller sees to it what they cost."""
        self.side_channel(on_open, on_closed, self._declaring)

    def side_channel(
        self,
        on_open: Callable[[Channel], None],
        on_closed: Callable[[Loss], None],
        among: set[int] | None = None,
    ) -> None:
        """Open a channel for questions; the broker may close it without harm to any other."""
        if not self._connection.is_open:
            return
        if not self.probes:
            self._without_side_channels(on_closed)
            return
        try:
            channel = self._connection.channel(on_open_callback=on_open)
        except exceptions.NoFreeChannels:
            self._without_side_channels(on_closed)
            return
        (self._asking if among is None else among).add(int(channel))
        channel.add_on_close_callback(functools.partial(self._on_side_closed, on_closed))

    def _without_side_channels(self, on_closed: Callable[[Loss], None]) -> None:
        loss = Loss("the broker allows no second channel")
        if self.probes and self._owner is not None:
            self._owner.probe_refused(loss)
        self.probes = False
        on_closed(loss)

    def _on_side_closed(
        self, on_closed: Callable[[Loss], None], channel: Channel, reason: Exception
    ) -> None:
        if not isinstance(reason, exceptions.ConnectionClosed):
            self._asking.discard(int(channel))
            self._declaring.discard(int(channel))
        if isinstance(reason, exceptions.ChannelClosedByBroker):
            on_closed(closed_by_broker(reason))

    def _open_letters(
        self, on_open: Callable[[Channel], None], on_closed: Callable[[Loss], None]
    ) -> None:
        """Open the channel for dead letters, once pika has released one that was closed."""

        def opened(channel: Channel) -> None:
            self._asking.discard(int(channel))  # it stays open: there was no harm in it
            channel.add_on_return_callback(self._on_return)
            on_open(channel)

        self._soon(functools.partial(self.side_channel, opened, on_closed))

    def _write_letters(self, channel: Channel, batch: Batch) -> None:
        ConfirmChannel(channel, self._connection).write(batch)

    def renew(self, password: str) -> None:
        """Tell the broker a new password, or token, on the open connection."""
        if self._connection.is_open:
            self._connection.update_secret(password, "renewed", self._on_renewed)

    def _on_renewed(self, _frame: object) -> None:
        """Go on; a broker that does not take it closes the connection."""

    # --- time ----------------------------------------------------------------------------------

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()  # one that goes on would end a connection that is well by then
        self._timer = self._loop.call_later(seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._loop.remove_timeout(self._timer)
            self._timer = None
