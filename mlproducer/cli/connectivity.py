"""Whether the broker can be reached, and what to do if not: shared by the commands.

Owns the probe and the advice. The probe is an empty, transient message to a routing key of its own,
to which nothing is bound. The broker checks exchange and permission, looks for a queue, finds none
and returns the message (AMQP reply 312), then acknowledges it: so it proves writing, routing and
confirming, and leaves nothing behind for a worker. Only where a queue or an alternate exchange
takes everything does it arrive somewhere, and there it expires.

Runs on: the main thread.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from mlproducer import Message, MLProducer
from mlproducer.errors import (
    AuthenticationError,
    BrokerBlockedError,
    BrokerRejectedError,
    ConfirmTimeoutError,
    ConnectionLostError,
    NackError,
    NotConnectedError,
    PublishError,
    UnroutableError,
)

PROBE_TTL = 60.0
"""Seconds after which a catch-all queue may drop a probe."""

QUICK = 1.0
"""Seconds in which a connection usually succeeds, so that no reason is asked for."""


def probe_message() -> Message:
    """Make a message that leads to no queue."""
    return Message(
        body=b"",
        routing_key=f"mlproducer.check.{uuid.uuid4()}",
        expiration=PROBE_TTL,
        persistent=False,
    )


def probe(producer: MLProducer, timeout: float) -> PublishError | None:
    """Publish a probe; ``None`` where it came back as expected, and was confirmed.

    :param timeout: seconds; without a connection the answer comes as soon as an attempt failed
    """
    try:
        producer.publish(probe_message(), timeout=timeout, retry=False)
    except UnroutableError:
        return None
    except PublishError as error:
        return error
    return None


def wait(producer: MLProducer, patience: float) -> PublishError | None:
    """Wait for a connection; return the reason if there is none after ``patience`` seconds.

    A broker that refuses the credentials will do so again: that reason is returned at once.
    """
    deadline = time.monotonic() + patience
    if producer.wait_connected(min(QUICK, patience)):
        return None
    error = probe(producer, max(0.0, deadline - time.monotonic()))
    if isinstance(error, NotConnectedError):
        connected = producer.wait_connected(max(0.0, deadline - time.monotonic()))
        return None if connected else error
    return error if isinstance(error, AuthenticationError) else None


def may_write(directory: Path) -> bool:
    """Return whether this user may create files in a directory."""
    return os.access(directory, os.W_OK | os.X_OK)


def advise(error: PublishError, *, blocked: bool = False) -> str:
    """Return what an operator can do about a failure.

    :param blocked: the broker is known to block publishers
    """
    if blocked:
        return _BY_CLASS[BrokerBlockedError]
    if isinstance(error, BrokerRejectedError):
        return advise_code(error.reply_code)
    if isinstance(error, AuthenticationError | NotConnectedError):
        if error.kind == "authentication" or isinstance(error, AuthenticationError):
            return _VIRTUAL_HOST if error.reply_code == NOT_ALLOWED else _CREDENTIALS
        if error.reply_code == NOT_FOUND:
            return _NO_QUEUE
        if error.kind in _BY_KIND:
            return _BY_KIND[error.kind]
    return _BY_CLASS.get(type(error), "look at the broker's log")


def advise_code(reply_code: int) -> str:
    """Return what an operator can do about a refusal with this reply code."""
    return _BY_CODE.get(reply_code, "look at the broker's log")


NOT_FOUND, NOT_ALLOWED = 404, 530

_CREDENTIALS = (
    "fix user and password in RABBITMQ_URL, with special characters percent-encoded; "
    "the user guest may connect from the broker's own machine only"
)
_VIRTUAL_HOST = (
    "fix the path of RABBITMQ_URL, which names the virtual host ('/' itself is '/' or '/%2F', and "
    "'/prod/' is not '/prod'); or create it, or grant access: rabbitmqctl add_vhost, rabbitmqctl "
    "set_permissions -p VHOST USER ..."
)
_NO_QUEUE = (
    "the library declares it when it first connects with ML_DECLARE_TOPOLOGY=active: "
    "is this the virtual host that it uses?"
)
_BY_KIND = {
    "refused": (
        "nothing listens there: is the broker running, and the port right (5672, with TLS 5671)?"
    ),
    "dns": "fix the host name in RABBITMQ_URL, or the name service",
    "protocol": "something else listens there, or the port wants TLS: then use amqps://",
    "tls": (
        "does the port speak TLS (5671)? Name the authority in RABBITMQ_SSL_CACERT, and the broker "
        "as its certificate does; an expired certificate has to be renewed. A broker that wants a "
        "client's certificate gets it by RABBITMQ_SSL_CERTFILE and RABBITMQ_SSL_KEYFILE"
    ),
    "timeout": (
        "something accepts connections and says nothing: a wrong port, a firewall, a port that "
        "wants TLS (amqps://), or a broker that hangs"
    ),
    "credentials": "fix the file or callable that provides user and password",
}
_BY_CODE = {
    403: "grant the permission: rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ",
    404: "declare it, let ML_DECLARE_TOPOLOGY=active do so, or fix ML_EXCHANGE",
    406: "it exists with other arguments: mlproducer topology shows how to go on without a loss",
}
_BY_CLASS: dict[type[PublishError], str] = {
    BrokerBlockedError: (
        "the broker is short of memory or disk: rabbitmq-diagnostics alarms tells which; "
        "it goes on by itself once there is room"
    ),
    ConfirmTimeoutError: "the broker takes messages and does not answer: is it overloaded or hung?",
    ConnectionLostError: "look in the broker's log for why it dropped the connection",
    NackError: "look in the broker's log for why it refused the message",
    NotConnectedError: "look at the broker's log and at the network in between",
}
