"""Brokers, and the parser of their URLs.

It follows RabbitMQ's URI specification, query parameters included, but is stricter where a typo
could put a password where a host is shown: an ambiguous URL is refused. No error quotes a part of a
URL.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote

from attrs import evolve, field, frozen

from mlproducer.errors import ConfigurationError

AUTH_MECHANISMS = ("PLAIN", "EXTERNAL")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SEVERAL_BY_SEMICOLON = re.compile(r";\s*[A-Za-z][A-Za-z0-9+.-]*://")
_URL = re.compile(
    r"(?P<scheme>[^:/]+)://(?P<authority>[^/?#]*)(?:/(?P<path>[^?#]*))?"
    r"(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?",
    re.DOTALL,
)
_HOST = re.compile(r"(?:\[(?P<ip>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]*))?")
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENCODE = "; in a user, password or virtual host write , as %2C, / as %2F, @ as %40, ; as %3B"


@frozen(kw_only=True)
class TLSSettings:
    """TLS settings (RabbitMQ guide, *TLS Support*).

    :ivar ca_certs: file with the certificate authorities to trust; ``None``: the system's
    :ivar certfile: file with the client's certificate chain, for mutual TLS
    :ivar keyfile: file with its private key; ``None``: it is in ``certfile``
    :ivar verify_peer: verify the server's certificate and name; if false, a warning is logged
    :ivar server_name: the name in the server's certificate; ``None``: the URL's host
    :ivar key_password: the password of the private key
    :ivar key_password_file: file with that password, read for each connection
    :ivar enforced: use TLS for ``amqp://`` too; otherwise only for ``amqps://``
    """

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify_peer: bool = True
    server_name: str | None = None
    key_password: str | None = field(default=None, repr=False)
    key_password_file: str | None = None
    enforced: bool = True


@frozen
class Broker:
    """The address of one broker, the credentials for it, and the settings of the connection.

    :ivar tls_settings: if ``tls`` is set; the URL's parameters take precedence over the settings
    :ivar hint: a hint for the error if the broker does not know the virtual host; may be empty
    """

    host: str
    port: int
    virtual_host: str = "/"
    user: str = field(default="guest", repr=False)
    password: str = field(default="guest", repr=False)
    tls: bool = False
    tls_settings: TLSSettings | None = None
    heartbeat: int = 60
    connection_timeout: float = 10.0
    auth_mechanism: str = "PLAIN"
    hint: str = field(default="", repr=False)

    @property
    def address(self) -> str:
        """``host:port``, fit for logs and errors."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@frozen(kw_only=True)
class Defaults:
    """Values for what a URL does not set.

    :ivar user_elsewhere: the URL needs no user, since a callable returns the credentials
    """

    tls: TLSSettings | None = None
    heartbeat: int = 60
    connection_timeout: float = 10.0
    auth_mechanism: str = "PLAIN"
    user_elsewhere: bool = False


def redact(urls: str) -> str:
    """Return broker URLs without user information and query, which may have secrets."""
    pieces = _split(urls)
    users = sum("@" in piece for piece in pieces)
    apart = all(map(_SCHEME.match, pieces)) and users in (0, len(pieces))
    return ",".join(map(redact_one, pieces)) if apart else redact_one(urls)


def redact_one(url: str) -> str:
    """Return a URL of any kind without these; only its scheme if it is ambiguous."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "..."
    shown = re.split("[?#]", rest.rpartition("@")[2], maxsplit=1)[0]
    if "@" in rest.partition("?")[2]:  # in a password, or in the query?
        shown = "..."
    return f"{scheme}://{shown}"


def parse(urls: str, defaults: Defaults, name: str = "url") -> tuple[Broker, ...]:
    """Parse ``amqp://`` and ``amqps://`` URLs, separated by commas.

    :param name: the value's name in errors
    :raises ConfigurationError: one of them does not parse; the text quotes nothing of it
    """
    if _SEVERAL_BY_SEMICOLON.search(urls):
        raise ConfigurationError(f"{name}: separate several URLs by a comma, not by ;")
    pieces = _split(urls)
    if not pieces:
        raise ConfigurationError(f"{name} names no broker")
    where = [name if len(pieces) == 1 else f"{name}, URL {n}" for n in range(1, len(pieces) + 1)]
    return tuple(map(_Reader(defaults).read, pieces, where))


def ignored_parameters(urls: str) -> Iterator[str]:
    """Yield the names of the query parameters that are ignored."""
    for url in _split(urls):
        found = _URL.fullmatch(url)
        for key, _ in parse_qsl(found["query"] or "" if found else "", keep_blank_values=True):
            if key not in _PARAMETERS:
                plain = len(key) <= 32 and key.isascii() and key.isidentifier()
                yield key if plain else "(not a word)"


def _split(urls: str) -> list[str]:
    return [url for url in map(str.strip, urls.split(",")) if url]


class _Reader:
    """Parses URLs with the same defaults."""

    def __init__(self, defaults: Defaults) -> None:
        self._defaults = defaults

    def read(self, url: str, where: str) -> Broker:
        found = _URL.fullmatch(url)
        if found is None or found["scheme"].lower() not in ("amqp", "amqps", "pyamqp"):
            raise ConfigurationError(
                f"{where}: accepted are only amqp:// and amqps:// URLs, separated by commas"
                f"{_ENCODE}"
            )
        user_info, _, host_and_port = found["authority"].rpartition("@")
        path, query = found["path"] or "", found["query"] or ""
        if found["fragment"] or "@" in path + query or ";" in host_and_port + path + query:
            raise ConfigurationError(f"{where} has @, ; or # after its host{_ENCODE}")
        if _CONTROL.search(url):
            raise ConfigurationError(f"{where} has a control character")
        host, port = _host(host_and_port, where)
        options = _options(query, where)
        secure = found["scheme"].lower() == "amqps" or (
            self._defaults.tls is not None and self._defaults.tls.enforced
        )
        mechanism = options.pop("auth_mechanism", self._defaults.auth_mechanism)
        if mechanism == "EXTERNAL" and not secure:
            raise ConfigurationError(f"{where}: EXTERNAL needs amqps:// and a client certificate")
        user, password = self._credentials(user_info, host, mechanism, where)
        return Broker(
            host=host,
            port=port or (5671 if secure else 5672),
            virtual_host=_virtual_host(path, where),
            user=user,
            password=password,
            tls=secure,
            heartbeat=options.pop("heartbeat", self._defaults.heartbeat),
            connection_timeout=options.pop("connection_timeout", self._defaults.connection_timeout),
            auth_mechanism=mechanism,
            tls_settings=evolve(self._defaults.tls or TLSSettings(), **options) if secure else None,
            hint=_hint(path),
        )

    def _credentials(
        self, user_info: str, host: str, mechanism: str, where: str
    ) -> tuple[str, str]:
        """Return the URL's user, or ``guest``, which RabbitMQ accepts only from loopback."""
        if user_info:
            user, _, password = user_info.partition(":")
            return _unquoted(user, where), _unquoted(password, where)
        if mechanism == "EXTERNAL" or self._defaults.user_elsewhere:
            return "", ""
        if _LOOPBACK.fullmatch(host):
            return "guest", "guest"
        raise ConfigurationError(f"{where} names no user; accepted is amqp://user:password@host/")


def _host(text: str, where: str) -> tuple[str, int | None]:
    found = _HOST.fullmatch(text)
    if found is None:
        raise ConfigurationError(f"{where}: its host or port is invalid{_ENCODE}")
    port = int(found["port"][:6]) if found["port"] else None
    if port is not None and not 0 < port <= 65_535:
        raise ConfigurationError(f"{where}: its port must be from 1 to 65535")
    host = (found["ip"] or found["name"]).lower()
    try:
        if found["ip"]:
            ipaddress.IPv6Address(host)
        else:
            host.encode("idna")  # as the resolver does it
    except ValueError:
        fits = False
    else:
        fits = bool(found["ip"] or (len(host) <= 253 and re.fullmatch(r"[\w.-]+", host)))
    if not fits:
        raise ConfigurationError(
            f"{where}: its host is not a name that can be resolved; accepted is an address or a "
            "name whose parts between dots have 1 to 63 characters"
        )
    return host, port


def _virtual_host(path: str, where: str) -> str:
    virtual_host = _unquoted(path, where) or "/"
    if len(virtual_host.encode(errors="replace")) > 255:
        raise ConfigurationError(f"{where}: its virtual host has more than 255 bytes")
    return virtual_host


def _hint(path: str) -> str:
    if path.strip("/") and path.endswith("/"):
        return "the URL's path ends in a slash, which is part of the virtual host's name"
    return ""


def _unquoted(text: str, where: str) -> str:
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        plain = "\0"
    if _CONTROL.search(plain):
        raise ConfigurationError(
            f"{where} has %-codes that are not UTF-8 text, or are control characters"
        )
    return plain


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError
    return int(text)


def _heartbeat(text: str) -> int:
    seconds = _whole(text)
    if seconds > 65_535:
        raise ValueError
    return seconds


def _timeout(text: str) -> float:
    milliseconds = _whole(text)
    if not 0 < milliseconds <= 3_600_000:
        raise ValueError
    return milliseconds / 1000


def _mechanism(text: str) -> str:
    if text.upper() not in AUTH_MECHANISMS:
        raise ValueError
    return text.upper()


def _verify(text: str) -> bool:
    return {"verify_peer": True, "verify_none": False}[text]


def _name(text: str) -> str:
    if text == "disable":
        raise ValueError
    return text


_PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "heartbeat": ("heartbeat", _heartbeat, "seconds from 0 to 65535"),
    "connection_timeout": ("connection_timeout", _timeout, "milliseconds from 1 to 3600000"),
    "auth_mechanism": ("auth_mechanism", _mechanism, "plain or external"),
    "server_name_indication": ("server_name", _name, "a host's name"),
    "cacertfile": ("ca_certs", str, "a path"),
    "certfile": ("certfile", str, "a path"),
    "keyfile": ("keyfile", str, "a path"),
    "verify": ("verify_peer", _verify, "verify_peer or verify_none"),
}
"""RabbitMQ's query parameters: the field that each sets, its parser, what is accepted."""


def _options(query: str, where: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in _PARAMETERS or not text:
            continue
        name, read, accepted = _PARAMETERS[key]
        if name in options:
            raise ConfigurationError(f"{where} gives {key} twice")
        try:
            options[name] = read(text)
        except (ValueError, KeyError):
            options.clear()
        if name not in options:
            raise ConfigurationError(f"{where}: {key} must be {accepted}")
    return options
