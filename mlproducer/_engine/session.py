"""A conversation with a broker for commands: questions, each with a limit for its answer.

pika's blocking connection waits for an answer as long as the heartbeat lets it, and without a
heartbeat for good. Here a timer of its loop ends a wait; what is left is dropped without a
handshake, so that neither a silent broker nor Ctrl-C holds a command up.

Runs on: the thread of the command that asks.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import frozen
from pika import exceptions, frame, spec

from mlproducer import _clock as time
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._engine.close_reasons import closed_by_broker, translate
from mlproducer._engine.endpoints import Endpoint
from mlproducer._engine.pika_adapters import blocking_connection
from mlproducer.errors import NotConnectedError

CLOSE_LIMIT = 1.0
"""Seconds that the closing handshake may take."""

_HEADER_FRAME = struct.Struct(">BHLHHQ")


class Unreadable:
    """Stands for properties that pika cannot decode: it has none."""

    headers = content_type = content_encoding = type = message_id = None


class _LateError(Exception):
    """The broker has not answered in time."""


@frozen
class Outcome:
    """What came of a message.

    :ivar reply_code: with which the broker refused it; 0 where it did not
    """

    returned: bool = False
    nacked: bool = False
    reply_code: int = 0
    text: str = ""


class Session:
    """A channel for questions, as a context manager.

    :param endpoints: brokers, the first of which that answers is used
    :param limit: seconds for each answer
    :raises NotConnectedError: none of them answers; by every method: the broker does not in time,
        goes away, or refuses what it is asked
    """

    def __init__(self, endpoints: Sequence[Endpoint], limit: float) -> None:
        self._limit = limit
        self._endpoint, self._connection = _open(endpoints)
        _tolerate(self._connection)
        try:
            self._channel: Any = self._new_channel()
        except BaseException:
            self._drop()
            raise

    @property
    def address(self) -> str:
        """The broker's host and port."""
        return self._endpoint.broker.address

    def __enter__(self) -> Session:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        with contextlib.suppress(Exception):
            if error is None and self._connection.is_open:
                with self._limited(CLOSE_LIMIT):
                    self._connection.close()
                return
        self._drop()

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of pika's channel, and give what it gives."""
        with self._translated(), self._limited(self._limit):
            return getattr(self._channel, method)(*arguments, **options)

    def attempt(self, method: str, *arguments: Any, **options: Any) -> tuple[Any, Loss | None]:
        """Call a method of pika's channel; give what it gives, or the broker's refusal.

        The broker closes a channel over a refusal; another is opened.
        """
        try:
            with self._limited(self._limit):
                return getattr(self._channel, method)(*arguments, **options), None
        except exceptions.ChannelClosedByBroker as error:
            loss = closed_by_broker(error)
        except (exceptions.AMQPError, OSError, _LateError) as error:
            raise self._explained(error) from None
        self._channel = self._new_channel()
        return None, loss

    def refusal(self, method: str, *arguments: Any, **options: Any) -> Loss | None:
        """Call a method of pika's channel, and give the broker's refusal, if it refuses."""
        return self.attempt(method, *arguments, **options)[1]

    def publish(
        self, exchange: str, routing_key: str, body: bytes = b"", **properties: Any
    ) -> Outcome:
        """Publish a mandatory message in confirm mode, and say what came of it."""
        told = spec.BasicProperties(**properties)
        with self._translated(), self._limited(self._limit):
            self._channel.confirm_delivery()
        try:
            with self._limited(self._limit):
                self._channel.basic_publish(exchange, routing_key, body, told, mandatory=True)
        except exceptions.UnroutableError:
            return Outcome(returned=True)
        except exceptions.NackError:
            return Outcome(nacked=True)
        except exceptions.ChannelClosedByBroker as error:
            loss = closed_by_broker(error)
        except (exceptions.AMQPError, OSError, _LateError) as error:
            raise self._explained(error) from None
        else:
            return Outcome()
        self._channel = self._new_channel()
        return Outcome(reply_code=loss.reply_code, text=loss.text)

    def publish_invalid(self, exchange: str) -> Outcome:
        """Publish what the broker refuses with 406, once it has found that it may be published.

        RabbitMQ looks at the permission and at the exchange before it does at the expiration.
        """
        return self.publish(exchange, "", expiration="none")

    def wait(self, ready: Callable[[], bool], limit: float) -> None:
        """Let deliveries come in until there are enough, at most ``limit`` seconds."""
        deadline = time.monotonic() + limit
        with self._translated():
            while not ready() and (left := deadline - time.monotonic()) > 0:
                self._connection.process_data_events(left)

    def _new_channel(self) -> Any:
        with self._translated(), self._limited(self._limit):
            return self._connection.channel()

    @contextlib.contextmanager
    def _limited(self, limit: float) -> Iterator[None]:
        impl: Any = getattr(self._connection, "_impl", None)  # pika has no limit for an answer
        timer = impl and impl.ioloop.call_later(limit, _be_late)
        try:
            yield
        finally:
            if impl is not None:
                impl.ioloop.remove_timeout(timer)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (exceptions.AMQPError, OSError, _LateError) as error:
            raise self._explained(error) from None

    def _explained(self, error: BaseException) -> NotConnectedError:
        if isinstance(error, _LateError):
            loss = Loss(f"{self.address}: no answer in time", kind=LossKind.TIMEOUT)
        elif isinstance(error, exceptions.ChannelClosedByBroker):
            loss = closed_by_broker(error, f"{self.address}: ")
        else:
            loss = translate(self.address, error)
        return NotConnectedError(loss.text, kind=loss.kind.value, reply_code=loss.reply_code)

    def _drop(self) -> None:
        """Drop the connection; unacked letters go back to their queue."""
        connection = self._connection
        with contextlib.suppress(Exception):
            transport = connection._impl._transport  # noqa: SLF001 - no public way to abort
            if transport is not None:
                transport.abort()
                connection._impl.ioloop.process_timeouts()  # noqa: SLF001 - closes the socket
        with contextlib.suppress(Exception):
            connection._cleanup()  # noqa: SLF001 - closes the loop's own descriptors


def _be_late() -> None:
    raise _LateError


def _open(endpoints: Sequence[Endpoint]) -> tuple[Endpoint, Any]:
    errors = []
    for endpoint in endpoints:
        try:
            return endpoint, blocking_connection(endpoint)
        except NotConnectedError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    text = "; ".join(map(str, errors))
    raise NotConnectedError(text, kind=errors[-1].kind, reply_code=errors[-1].reply_code)


def _tolerate(connection: Any) -> None:
    """Have properties that pika cannot decode, such as a date in a year of ten digits, come in.

    pika would end the connection over them, and with it everything behind such a message.
    """
    impl: Any = getattr(connection, "_impl", None)  # decoding is not to be got at otherwise
    if not (hasattr(impl, "_read_frame") and hasattr(impl, "_frame_buffer")):
        return
    read_frame = impl._read_frame  # noqa: SLF001

    def tolerant() -> Any:
        try:
            return read_frame()
        except exceptions.AMQPError:
            raise
        except Exception:
            buffer = impl._frame_buffer  # noqa: SLF001
            kind, channel, size, _, _, body_size = _HEADER_FRAME.unpack_from(buffer)
            if kind != spec.FRAME_HEADER:
                raise
            end = spec.FRAME_HEADER_SIZE + size + spec.FRAME_END_SIZE
            return end, frame.Header(channel, body_size, Unreadable())

    impl._read_frame = tolerant  # noqa: SLF001
