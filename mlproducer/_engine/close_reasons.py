"""What the errors of pika, of TLS and of sockets mean: a table, by their classes.

pika wraps them in layers; here they are unwrapped, and become a `Loss` whose text may be shown. A
refusal is told by the broker's reply code alone, never by its words, which may hold anything that
a user has chosen, such as a virtual host's name.

Runs on: the I/O thread, and the threads of commands.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any

from attrs import evolve
from pika import exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectorStackTimeout

from mlproducer._core.interfaces import NO_PERMISSION, Loss, LossKind
from mlproducer._engine.tls import describe

NOT_ALLOWED = 530
NOT_IMPLEMENTED = 540
CONNECTION_FORCED = 320
"""The broker shuts down, or an operator has closed the connection."""

REFUSALS = frozenset({NO_PERMISSION, NOT_ALLOWED})
"""Reply codes with which a broker refuses user or virtual host during the handshake."""

_UNHEARD = "; with TLS 1.3 so it does where it refuses the client's certificate, or wants one"
"""A reset may overtake the alert, which comes when the client's handshake is over."""

_TLS_ALERT = re.compile(r"\[SSL: (\w+)\]")


class ClosedInWaiterError(exceptions.ConnectionClosed):
    """The broker closed the connection before it was open, with a reply code.

    pika keeps only the text of a ``ConnectionClosedByBroker`` that comes so early; of this class,
    which is none, it keeps the whole.
    """


class NoMechanismError(exceptions.AMQPConnectionError):
    """The broker offers no mechanism to authenticate with that is ours."""

    def __init__(self, wanted: str, offered: str) -> None:
        super().__init__(wanted, offered)
        self.wanted = wanted
        self.offered = offered


class OversizedFrameError(exceptions.AMQPConnectionError):
    """The broker announced a frame that is longer than was agreed."""


_BY_CLASS: tuple[tuple[type[BaseException], LossKind, str], ...] = (
    (socket.gaierror, LossKind.UNRESOLVED, "host name does not resolve"),
    (ConnectionRefusedError, LossKind.REFUSED, "connection refused"),
    (TimeoutError, LossKind.TIMEOUT, "no answer in time"),
    (socket.timeout, LossKind.TIMEOUT, "no answer in time"),  # a class of its own in Python 3.10
    (AMQPConnectorStackTimeout, LossKind.TIMEOUT, "no answer in time"),
    (
        exceptions.IncompatibleProtocolError,
        LossKind.PROTOCOL,
        "ended without speaking AMQP 0-9-1",
    ),
    (exceptions.ProtocolVersionMismatch, LossKind.PROTOCOL, "speaks another version of AMQP"),
    (OversizedFrameError, LossKind.PROTOCOL, "announced a frame longer than was agreed"),
    (exceptions.AMQPHeartbeatTimeout, LossKind.HEARTBEAT, "no heartbeat"),
    (exceptions.ConnectionClosedByClient, LossKind.CLOSED, "closed by us"),
    # pika's guess where the connection ended during the handshake without a word of the broker's
    (
        exceptions.ProbableAuthenticationError,
        LossKind.LOST,
        "connection lost during the handshake",
    ),
    (exceptions.ProbableAccessDeniedError, LossKind.LOST, "connection lost during the handshake"),
)


def translate(
    address: str, error: BaseException | str, hint: str = "", *, tls: bool = False
) -> Loss:
    """Say what the end of a connection, or of an attempt, means.

    :param hint: what to look at where the broker does not let us into the virtual host
    :param tls: the connection is encrypted: what ends it after the handshake may be our certificate
    """
    cause = _root(error)
    loss = _translate(address, cause, hint)
    if tls and isinstance(cause, exceptions.IncompatibleProtocolError):
        loss = evolve(loss, text=f"{loss.text}{_UNHEARD}")
    return evolve(loss, address=address)


def _translate(address: str, cause: BaseException, hint: str) -> Loss:
    if isinstance(cause, ClosedInWaiterError):
        return _closed_in_handshake(address, cause, hint)
    if isinstance(cause, NoMechanismError):
        text = f"offers {printable(cause.offered)} to authenticate with, not {cause.wanted}"
        return Loss(f"{address}: {text}", kind=LossKind.AUTHENTICATION)
    if isinstance(cause, ssl.SSLError):
        return Loss(f"{address}: {describe(cause)}", kind=LossKind.TLS)
    alert = _TLS_ALERT.search(str(cause))  # pika keeps only the text of a late one
    if alert is not None:
        return Loss(f"{address}: TLS failed: {alert[1]}", kind=LossKind.TLS)
    if isinstance(cause, exceptions.ConnectionClosedByBroker):
        return closed_by_broker(cause, f"{address}: closed by the broker: ")
    for kind, meaning, text in _BY_CLASS:
        if isinstance(cause, kind):
            return Loss(f"{address}: {text}", kind=meaning)
    return Loss(f"{address}: connection lost ({type(cause).__name__})")


def closed_by_broker(reason: Any, prefix: str = "") -> Loss:
    """Say why the broker closed a channel or connection, in its own words."""
    text = printable(reason.reply_text)
    shown = f"{prefix}{reason.reply_code} {text}" if prefix else text
    return Loss(shown, reason.reply_code, LossKind.CLOSED_BY_BROKER, text)


def printable(text: str, limit: int = 200) -> str:
    """Return a broker's words cut short, with control characters escaped."""
    shown = text[:limit]
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()


def _closed_in_handshake(address: str, error: ClosedInWaiterError, hint: str) -> Loss:
    """Tell a refusal from all else that a broker may say during the handshake."""
    if error.reply_code not in REFUSALS:
        return closed_by_broker(error, f"{address}: closed by the broker: ")
    words = printable(error.reply_text)
    text = f"{address}: refused by the broker: {error.reply_code} {words}"
    if hint and error.reply_code == NOT_ALLOWED:
        text = f"{text} ({hint})"
    return Loss(text, error.reply_code, LossKind.AUTHENTICATION, words)


def _root(error: BaseException | str) -> BaseException:
    """Find what pika has wrapped, layer by layer."""
    while isinstance(error, BaseException):
        layers = [getattr(error, "exception", None), *getattr(error, "exceptions", ()), *error.args]
        inner = next((each for each in reversed(layers) if isinstance(each, BaseException)), None)
        if inner is None:
            return error
        error = inner
    return ConnectionError(error)
