"""The brokers of a producer, and what an attempt to connect needs to know of one.

Host names, files and the user's callable may each take their time, so all of it is looked up off
the I/O thread, for each attempt: a name may lead elsewhere by then, a password or certificate may
have been renewed.

Runs on: the resolver thread, and the threads of commands; `Endpoints.known` on any.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Sequence
from typing import Any

from attrs import field, frozen

from mlproducer import _clock as time
from mlproducer._broker_url import Broker, TLSSettings
from mlproducer._core.interfaces import Loss, LossKind
from mlproducer._engine.tls import TLSFiles
from mlproducer._foreign_calls import stopped
from mlproducer.errors import ConfigurationError
from mlproducer.settings import Credentials, Settings, topology_of
from mlproducer.topology import Declaration

Address = tuple[Any, ...]
"""A record of `socket.getaddrinfo`."""


class UnreachableError(Exception):
    """There is no way to a broker; the loss says why."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss.text)
        self.loss = loss


@frozen
class Identity:
    """The user to connect as.

    :ivar ends: when the password ends, in monotonic time; ``None``: not as far as we know
    :ivar lifetime: seconds that it was valid for when it was given
    """

    user: str = field(repr=False)
    password: str = field(repr=False)
    ends: float | None = None
    lifetime: float = 0.0


@frozen
class Endpoint:
    """One broker, how to speak to it, and what to declare there.

    :ivar credentials: the user's callable; ``None``: the broker's URL or a file has them
    :ivar delayed: exchanges that deliver later, and so return what they have taken
    :ivar letters: the exchange for dead letters, which go on a channel of their own
    :ivar added: what is to be declared besides; it grows while the producer runs
    """

    broker: Broker
    declarations: tuple[Declaration, ...]
    credentials: Credentials | None = field(default=None, repr=False)
    tls: TLSFiles | None = None
    connection_name: str | None = None
    delayed: frozenset[str] = frozenset()
    letters: str = ""
    added: Sequence[Declaration] = ()

    def find(self) -> ResolvedEndpoint:
        """Look up everything that an attempt needs.

        :raises UnreachableError: something cannot be found
        """
        return ResolvedEndpoint(
            self,
            self.addresses(),
            self.identity(),
            self.tls.context() if self.tls is not None else None,
        )

    def addresses(self) -> tuple[Address, ...]:
        """Return the records of all addresses that the host's name leads to.

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
        """Return the identity that holds now.

        :raises UnreachableError: the user's callable gives none
        """
        if self.credentials is None:
            return Identity(self.broker.user, self.broker.password)
        given = _called(self.credentials)
        if isinstance(given, Identity):
            return given
        raise UnreachableError(Loss(f"{self.broker.address}: {given}", kind=LossKind.CREDENTIALS))


@frozen
class ResolvedEndpoint:
    """An endpoint with all that an attempt needs to know."""

    endpoint: Endpoint
    addresses: tuple[Address, ...]
    identity: Identity
    context: Any = field(default=None, repr=False)


class Endpoints:
    """The endpoints of a producer, in an order of this process's own, so that a runtime spreads.

    :param added: what is to be declared beside the topology; others may append to it
    :raises ConfigurationError: no URL is set, a file is of no use, or the TLS files are
    """

    def __init__(self, settings: Settings, added: Sequence[Declaration] = ()) -> None:
        self._settings = settings
        self._added = added
        self._random = random.SystemRandom()
        self._ranks: dict[tuple[str, str], float] = {}
        self._tls: dict[TLSSettings, TLSFiles] = {}
        topology = topology_of(settings)
        self._declarations = tuple(topology.declarations(settings.declare_topology))
        delayed = topology.exchange_type == "x-delayed-message"
        self._delayed = frozenset([topology.exchange] if delayed else [])
        self._letters = topology.dead_letter_exchange
        self._endpoints = self._read()

    @property
    def known(self) -> tuple[Endpoint, ...]:
        """The endpoints that are known now; at least one."""
        return self._endpoints

    def find(self, turn: int) -> ResolvedEndpoint:
        """Look up the endpoint whose turn it is.

        :raises UnreachableError: something cannot be found
        """
        if self._settings.url_file is not None or self._settings.password_file is not None:
            self._refresh()
        endpoints = self._endpoints
        return endpoints[turn % len(endpoints)].find()

    def _refresh(self) -> None:
        """Read the files again; one that cannot be used leaves the endpoints as they were."""
        try:
            self._endpoints = self._read()
        except ConfigurationError as error:
            text = f"{self._endpoints[0].broker.address}: {error}"
        else:
            return
        raise UnreachableError(Loss(text, kind=LossKind.CREDENTIALS))

    def _read(self) -> tuple[Endpoint, ...]:
        brokers = sorted(self._settings.brokers, key=self._rank)
        return tuple(self._endpoint(broker) for broker in brokers)

    def _rank(self, broker: Broker) -> float:
        """Give a broker its place, which it keeps when the files are read again."""
        return self._ranks.setdefault((broker.address, broker.virtual_host), self._random.random())

    def _endpoint(self, broker: Broker) -> Endpoint:
        return Endpoint(
            broker=broker,
            declarations=self._declarations,
            credentials=self._settings.credentials,
            tls=self._files(broker),
            connection_name=self._settings.connection_name,
            delayed=self._delayed,
            letters=self._letters,
            added=self._added,
        )

    def _files(self, broker: Broker) -> TLSFiles | None:
        """Return the TLS files of a broker; those that are the same are looked after once."""
        if not broker.tls:
            return None
        settings = broker.tls_settings or TLSSettings()
        if settings not in self._tls:
            self._tls[settings] = TLSFiles(settings)
        return self._tls[settings]


def _called(credentials: Callable[[], Any]) -> Identity | str:
    """Ask the user's callable, or say why there is no identity.

    What it raises may hold a secret, and so only its type is told.
    """
    asked_at = time.monotonic()
    try:
        given = credentials()
    except BaseException as error:  # noqa: BLE001 - it is the user's own, SystemExit included
        stopped(error)
        return f"Settings.credentials raised {type(error).__name__}"
    wanted = "Settings.credentials must give (user, password) or (user, password, seconds)"
    return _identity(given, asked_at) or wanted


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
