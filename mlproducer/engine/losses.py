"""What the errors of pika, of TLS and of sockets mean: one table, by the names of their classes.

pika wraps them in layers and takes some for others; here they are unwrapped, and become a `Loss`
whose text may be shown.

Runs on: the I/O thread, and the threads of commands.
"""

from __future__ import annotations

import re
import ssl
from typing import Any

from mlproducer.core.ports import Loss, LossKind
from mlproducer.engine.tls import describe

_REPLY = re.compile(r"\((\d{3})\)\s*(.*)", re.DOTALL)
_TLS_ALERT = re.compile(r"\[SSL: (\w+)\]")

_BY_NAME: dict[str, tuple[LossKind, str]] = {
    "gaierror": (LossKind.UNRESOLVED, "host name does not resolve"),
    "ConnectionRefusedError": (LossKind.REFUSED, "connection refused"),
    "TimeoutError": (LossKind.TIMEOUT, "no answer in time"),
    "timeout": (LossKind.TIMEOUT, "no answer in time"),  # a class of its own in Python 3.10
    "IncompatibleProtocolError": (LossKind.PROTOCOL, "ended without speaking AMQP 0-9-1"),
    "ProtocolVersionMismatch": (LossKind.PROTOCOL, "speaks another version of AMQP"),
    "AMQPHeartbeatTimeout": (LossKind.HEARTBEAT, "no heartbeat"),
    "ConnectionClosedByClient": (LossKind.CLOSED, "closed by us"),
}

_REFUSALS = {
    "AuthenticationError",
    "ProbableAuthenticationError",
    "ProbableAccessDeniedError",
}


def translate(address: str, error: BaseException | str) -> Loss:
    """Say what the end of a connection, or of an attempt, means."""
    cause = _root(error)
    names = [kind.__name__ for kind in type(cause).__mro__]
    alert = _TLS_ALERT.search(str(cause))  # pika keeps only the text of a late one
    if not _REFUSALS.isdisjoint(names):
        return _refused(address, str(cause))
    if isinstance(cause, ssl.SSLError):
        return Loss(f"{address}: {describe(cause)}", kind=LossKind.TLS)
    if alert is not None:
        return Loss(f"{address}: TLS failed: {alert[1]}", kind=LossKind.TLS)
    if "ConnectionClosedByBroker" in names:
        return closed_by_broker(cause, f"{address}: closed by the broker: ")
    unknown = LossKind.LOST, f"connection lost ({names[0]})"
    kind, text = next((_BY_NAME[name] for name in names if name in _BY_NAME), unknown)
    return Loss(f"{address}: {text}", kind=kind)


def closed_by_broker(reason: Any, prefix: str = "") -> Loss:
    """Say why the broker closed a channel or connection, in its own words."""
    text = printable(reason.reply_text)
    shown = f"{prefix}{reason.reply_code} {text}" if prefix else text
    return Loss(shown, reason.reply_code, LossKind.CLOSED_BY_BROKER)


def printable(text: str, limit: int = 200) -> str:
    """Give a broker's words cut short, with control characters escaped."""
    shown = text[:limit]
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()


def _refused(address: str, words: str) -> Loss:
    """Tell a refusal, for which the broker gave a code, from a reset: pika calls both so."""
    reply = _REPLY.search(words)
    if reply is None:
        return Loss(f"{address}: connection lost during the handshake", kind=LossKind.LOST)
    if "limit" in words:
        text = f"{address}: a connection limit is reached"
        return Loss(text, kind=LossKind.CLOSED_BY_BROKER)
    said = reply[2].strip("'\"")  # pika quotes the broker as Python would
    text = f"{address}: refused by the broker: {reply[1]} {printable(said)}"
    return Loss(text, int(reply[1]), LossKind.AUTHENTICATION)


def _root(error: BaseException | str) -> BaseException:
    """Find what pika has wrapped, layer by layer."""
    while isinstance(error, BaseException):
        layers = [getattr(error, "exception", None), *getattr(error, "exceptions", ()), *error.args]
        inner = next((each for each in reversed(layers) if isinstance(each, BaseException)), None)
        if inner is None:
            return error
        error = inner
    return ConnectionError(error)
