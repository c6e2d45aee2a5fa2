"""The brokers of a producer, and what an attempt to connect needs to know of one.

Host names, files and the user's callable may each take their time, so all of it is looked up off
the I/O thread, for each attempt: a name may lead elsewhere by then, a password or certificate may
have been renewed.

Runs on: the resolver thread, and the threads of commands; `Directory.routes` on any.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from mlproducer.core.ports import Loss, LossKind
from mlproducer.engine.tls import TLSFiles
from mlproducer.errors import ConfigurationError
from mlproducer.settings import Broker, Settings, TLSSettings, parse_brokers
from mlproducer.topology import Declaration, Topology

logger = logging.getLogger(__name__)

Address = tuple[Any, ...]
"""A record of `socket.getaddrinfo`."""


class UnreachableError(Exception):
    """There is no way to a broker; the loss says why."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.text)
        self.loss = loss


@frozen
class Identity:
    """As whom to connect.

    :ivar ends: when the password ends, in monotonic time; ``None``: not as far as we know
    :ivar lifetime: seconds that it was valid for when it was given
    """

    user: str = field(repr=False)
    password: str = field(repr=False)
    ends: float | None = None
    lifetime: float = 0.0


@frozen
class Route:
    """One broker, how to speak to it, and what to declare there.

    :ivar identify: gives the identity for the broker of the URL
    :ivar delayed: exchanges that deliver later, and so return what they have taken
    """

    broker: Broker
    timeout: float
    heartbeat: int
    declarations: tuple[Declaration, ...]
    identify: Callable[[Broker], Identity] = field(repr=False)
    tls: TLSFiles | None = None
    mechanism: str = "PLAIN"
    connection_name: str | None = None
    delayed: frozenset[str] = frozenset()

    def find(self) -> Way:
        """Look up everything that an attempt needs.

        :raises UnreachableError: something cannot be found
        """
        return Way(
            self,
            self.addresses(),
            self.identity(),
            self.tls.context() if self.tls is not None else None,
        )

    def addresses(self) -> tuple[Address, ...]:
        """Give the records of all addresses that the host's name leads to.

        :raises UnreachableError: there is none
        """
        broker = self.broker
        try:
            found = socket.getaddrinfo(
                broker.host, broker.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
        except UnicodeError:
            why = "is no host name: a part of it is empty or longer than 63 characters"
        except OSError:
            why = "host name does not resolve"
        else:
            return tuple(dict.fromkeys(found))
        raise UnreachableError(Loss(f"{broker.address}: {why}", kind=LossKind.UNRESOLVED))

    def identity(self) -> Identity:
        """Give the identity that holds now.

        :raises UnreachableError: a file or the user's callable gives none
        """
        try:
            return self.identify(self.broker)
        except _NoIdentityError as error:
            text = f"{self.broker.address}: {error}"
        raise UnreachableError(Loss(text, kind=LossKind.CREDENTIALS))


@frozen
class Way:
    """A route with all that an attempt needs to know."""

    route: Route
    addresses: tuple[Address, ...]
    identity: Identity
    context: Any = field(default=None, repr=False)


class Directory:
    """The routes of a producer, in an order of this process's own, so that a fleet spreads.

    :raises ConfigurationError: no URL is set, a file is of no use, or the TLS files are
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._random = random.SystemRandom()
        self._tls: TLSFiles | None = None
        self._text = ""
        self._routes: tuple[Route, ...] = ()
        self._take(self._read_urls())

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes that are known now; at least one."""
        return self._routes

    def find(self, turn: int) -> Way:
        """Look up the route whose turn it is.

        :raises UnreachableError: something cannot be found
        """
        if self._settings.url_file is not None:
            self._refresh()
        routes = self._routes
        return routes[turn % len(routes)].find()

    def _refresh(self) -> None:
        """Read the file of URLs; one that cannot be used leaves the routes as they were."""
        try:
            self._take(self._read_urls())
        except ConfigurationError as error:
            address = self._routes[0].broker.address
            raise UnreachableError(Loss(f"{address}: {error}", kind=LossKind.CREDENTIALS)) from None

    def _read_urls(self) -> str:
        settings = self._settings
        if settings.url_file is None:
            return settings.url or ""
        return _read(settings.url_file, "url_file (RABBITMQ_URL_FILE)").strip()

    def _take(self, urls: str) -> None:
        if self._routes and urls == self._text:
            return
        settings = self._settings
        if settings.url_file is None:
            brokers = list(settings.brokers)
        else:
            secure = settings.tls is not None
            brokers = list(parse_brokers(urls, tls=secure, name="url_file (RABBITMQ_URL_FILE)"))
        if not brokers:
            raise ConfigurationError("url (RABBITMQ_URL) names no broker")
        self._random.shuffle(brokers)
        if self._tls is None and any(broker.tls for broker in brokers):
            self._tls = TLSFiles(settings.tls or TLSSettings())
        self._routes = tuple(self._route(broker) for broker in brokers)
        self._text = urls

    def _route(self, broker: Broker) -> Route:
        settings = self._settings
        topology = Topology.of(settings)
        declarations = tuple(topology.declarations(settings.declare_topology))
        return Route(
            broker=broker,
            timeout=settings.connection_timeout,
            heartbeat=settings.heartbeat,
            declarations=declarations,
            identify=self._identify,
            tls=self._tls if broker.tls else None,
            mechanism=settings.auth_mechanism,
            connection_name=settings.connection_name,
            delayed=_delayed(declarations),
        )

    def _identify(self, broker: Broker) -> Identity:
        settings = self._settings
        if settings.credentials is not None:
            return _called(settings.credentials)
        if settings.password_file is not None:
            try:
                password = _read(settings.password_file, "password_file (RABBITMQ_PASSWORD_FILE)")
            except ConfigurationError as error:
                raise _NoIdentityError(str(error)) from None
            return Identity(broker.user, password.rstrip("\r\n"))
        return Identity(broker.user, broker.password)


class _NoIdentityError(Exception):
    """A file or a callable gives no identity; the text says why, without a secret."""


def _called(credentials: Callable[[], Any]) -> Identity:
    """Ask the user's callable; what it raises may hold a secret, and so only its type is told."""
    asked_at = time.monotonic()
    try:
        given = credentials()
    except Exception as error:  # noqa: BLE001 - it is the user's own
        why = f"Settings.credentials raised {type(error).__name__}"
    else:
        identity = _identity(given, asked_at)
        if identity is not None:
            return identity
        why = "Settings.credentials must give (user, password) or (user, password, seconds)"
    raise _NoIdentityError(why)


def _identity(given: Any, asked_at: float) -> Identity | None:
    """Read what the callable gave; ``None`` where that is nothing of use."""
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        return None
    user, password, *rest = given
    if not (isinstance(user, str) and isinstance(password, str)):
        return None
    if not rest or rest[0] is None:
        return Identity(user, password)
    seconds = rest[0]
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        return None
    return Identity(user, password, asked_at + seconds, float(seconds))


def _read(path: str, name: str) -> str:
    """Read a small file of text.

    :raises ConfigurationError: it cannot be read; the text names setting and file
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        why = error.strerror or "cannot be read"
    except UnicodeDecodeError:
        why = "is not UTF-8"
    raise ConfigurationError(f"{name}: {path!r}: {why}")


def _delayed(declarations: Sequence[Declaration]) -> frozenset[str]:
    """Give the exchanges of the delayed message plugin."""
    return frozenset(
        each.target
        for each in declarations
        if each.arguments.get("exchange_type") == "x-delayed-message"
    )
