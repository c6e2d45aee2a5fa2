"""Settings, and how they are read from the environment.

Python has seconds and names in lower case; the environment keeps the names and units of the system
that this library succeeds. Each default is written once, here. A value that is out of range is
refused by the name under which the user gave it; nothing here ever shows a password.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from attrs import Attribute, field, fields_dict, frozen

from mlproducer.errors import ConfigurationError
from mlproducer.topology import Topology

BACKENDS = ("api", "local")
DECLARE_MODES = ("active", "passive", "off")
BREAKER_MODES = ("consecutive", "adaptive")
AUTH_MECHANISMS = ("PLAIN", "EXTERNAL")
STORE_SCHEMES = ("memory", "sqlite", "postgresql", "redis", "rediss", "redis+sentinel", "unix")

Credentials = Callable[[], "tuple[str, str] | tuple[str, str, float]"]
"""Gives user and password, and where they end, after how many seconds."""

_Validator = Callable[[Any, "Attribute[Any]", Any], None]
_USER_INFO = re.compile(r"(?<=://).*@")
_QUERY = re.compile(r"\?[^,]*")
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")


def redact(urls: str) -> str:
    """Give URLs without user information and query, in which secrets may stand."""
    return ",".join(_QUERY.sub("", _USER_INFO.sub("", url)) for url in _split(urls))


@frozen
class Broker:
    """Where one broker listens, and as whom to connect to it."""

    host: str
    port: int
    virtual_host: str = "/"
    user: str = field(default="guest", repr=False)
    password: str = field(default="guest", repr=False)
    tls: bool = False

    @property
    def address(self) -> str:
        """``host:port``, fit for logs and errors."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@frozen(kw_only=True)
class TLSSettings:
    """How to speak TLS (RabbitMQ guide, *TLS Support*).

    :ivar ca_certs: file with the certificate authorities to trust; ``None``: the system's
    :ivar certfile: file with the client's certificate chain, for mutual TLS
    :ivar keyfile: file with its private key; ``None``: it stands in ``certfile``
    :ivar verify_peer: check the server's certificate and name; switching it off is logged loudly
    :ivar server_name: the name that the server's certificate must bear; ``None``: the URL's host
    :ivar key_password: what the private key is encrypted with
    :ivar key_password_file: file with that password, read for each connection
    """

    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify_peer: bool = True
    server_name: str | None = None
    key_password: str | None = field(default=None, repr=False)
    key_password_file: str | None = None


def _number(
    minimum: float, maximum: float, *, whole: bool = False, above: bool = False, unit: str = ""
) -> Any:
    """Check a number's type and range; ``above`` excludes the minimum itself."""

    def check(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if fits and minimum <= value <= maximum and not (above and value == minimum):
            return
        kind = "a whole number" if whole else f"a number of {unit}" if unit else "a number"
        bound = f"above {minimum:g}" if above else f"from {minimum:g}"
        raise ConfigurationError(
            f"{attribute.name} must be {kind} {bound} to {maximum:g}, got {_shown(value)}"
        )

    return check


def _one_of(choices: tuple[str, ...]) -> _Validator:
    def check(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
        if value not in choices:
            accepted = " or ".join(repr(choice) for choice in choices)
            raise ConfigurationError(f"{attribute.name} must be {accepted}, got {_shown(value)}")

    return check


def _check_url(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None:
        if not isinstance(value, str):
            raise ConfigurationError(f"{attribute.name} must be a str, got {_shown(value)}")
        parse_brokers(value, tls=False, name=attribute.name)


def _check_store_url(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    scheme = value.partition("://")[0] if isinstance(value, str) and "://" in value else ""
    if scheme not in STORE_SCHEMES:
        accepted = ", ".join(f"{each}://" for each in STORE_SCHEMES)
        raise ConfigurationError(f"{attribute.name} must be a URL that starts with {accepted}")


def _check_text(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigurationError(f"{attribute.name} must be a str that is not empty")


def _check_prefix(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or len(value.encode(errors="replace")) > 100:
        raise ConfigurationError(f"{attribute.name} must be a str of at most 100 bytes")
    if not value.isprintable():
        raise ConfigurationError(f"{attribute.name} must hold no control character")


def _check_callable(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise ConfigurationError(f"{attribute.name} must be callable, got {_shown(value)}")


def _check_exchange(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value.encode(errors="replace")) <= 127:
        raise ConfigurationError(f"{attribute.name} must be a name of 1 to 127 bytes")
    if not value.isprintable():
        raise ConfigurationError(f"{attribute.name} must hold no control character")


def _check_topology(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, Topology):
        raise ConfigurationError(
            f"{attribute.name} must be a mlproducer.Topology, got {_shown(value)}"
        )


_seconds = _number(0, 3600, above=True, unit="seconds")  # more was meant as milliseconds
_seconds_or_none = _number(0, 3600, unit="seconds")


@frozen(kw_only=True)
class Settings:
    """All that can be set. Times are seconds, sizes bytes.

    ``url`` names one broker or several, separated by commas; without it the first use of a producer
    raises `ConfigurationError`. With ``tls`` every connection uses TLS, whatever the URL's scheme.

    :ivar url_file: file with what ``url`` would hold, read for each attempt to connect
    :ivar password_file: file with the password of the URL's user, read for each attempt
    :ivar credentials: called for each attempt; gives ``(user, password)``, or with the seconds
        after which they end as a third
    :ivar connection_name: how the management interface calls the connection; ``None``: program:pid
    :ivar gave_up_interval: seconds between attempts after ``gave_up``; 0: none
    :ivar circuit_breaker_threshold: failures in a row that open the breaker; 0: it never opens
    :ivar rollout: the share of Celery's tasks that go through the producer, from 0 to 1
    :ivar topology: a `Topology` of your own instead of the one of the machine-learning tasks
    :raises ConfigurationError: a value is out of range; the text names the field
    """

    url: str | None = field(default=None, validator=_check_url, repr=lambda url: redact(url or ""))
    url_file: str | None = field(default=None, validator=_check_text)
    password_file: str | None = field(default=None, validator=_check_text)
    credentials: Credentials | None = field(default=None, validator=_check_callable, repr=False)
    auth_mechanism: str = field(default="PLAIN", validator=_one_of(AUTH_MECHANISMS))
    connection_name: str | None = field(default=None, validator=_check_text)
    tls: TLSSettings | None = None
    heartbeat: int = field(default=60, validator=_number(0, 65_535, whole=True))
    connection_timeout: float = field(default=10.0, validator=_seconds)
    prefetch: int = field(default=100, validator=_number(1, 65_535, whole=True))

    preferred_llm_backend: str = field(default="api", validator=_one_of(BACKENDS))
    preferred_stt: str = field(default="api", validator=_one_of(BACKENDS))
    preferred_embedding_backend: str = field(default="api", validator=_one_of(BACKENDS))

    publish_timeout: float = field(default=5.0, validator=_seconds)
    max_in_flight: int = field(default=1000, validator=_number(1, 65_535, whole=True))
    max_message_bytes: int = field(
        default=16_777_216, validator=_number(1, 536_870_912, whole=True)
    )
    confirm_give_up: float = field(default=60.0, validator=_seconds)

    max_message_retries: int = field(default=3, validator=_number(0, 1000, whole=True))
    message_retry_base_delay: float = field(default=1.0, validator=_seconds)
    message_retry_max_delay: float = field(default=10.0, validator=_seconds)
    retry_sweep_interval: float = field(default=1.0, validator=_seconds)

    circuit_breaker_threshold: int = field(default=10, validator=_number(0, 1_000_000, whole=True))
    circuit_breaker_cooldown: float = field(default=30.0, validator=_seconds)
    circuit_breaker_mode: str = field(default="consecutive", validator=_one_of(BREAKER_MODES))
    health_check_interval: float = field(default=30.0, validator=_seconds)

    reconnect_initial_delay: float = field(default=0.5, validator=_seconds)
    reconnect_max_delay: float = field(default=32.0, validator=_seconds)
    reconnect_jitter: float = field(default=0.3, validator=_number(0, 10))
    max_reconnect_attempts: int = field(default=10, validator=_number(1, 1_000_000, whole=True))
    gave_up_interval: float = field(default=60.0, validator=_seconds_or_none)
    exit_timeout: float = field(default=5.0, validator=_seconds_or_none)

    store_url: str = field(default="memory://", validator=_check_store_url, repr=redact)
    store_lease: float = field(default=30.0, validator=_seconds)
    connections: int = field(default=1, validator=_number(1, 64, whole=True))
    exchange: str = field(default="bookmarkai.ml", validator=_check_exchange)
    declare_topology: str = field(default="active", validator=_one_of(DECLARE_MODES))
    delivery_limit: int = field(default=20, validator=_number(1, 1_000_000, whole=True))
    queue_prefix: str = field(default="", validator=_check_prefix)
    topology: Topology | None = field(default=None, validator=_check_topology)
    rollout: float = field(default=1.0, validator=_number(0, 1))

    @property
    def brokers(self) -> tuple[Broker, ...]:
        """The brokers that ``url`` names, in its order.

        :raises ConfigurationError: no URL is set
        """
        if not self.url:
            raise ConfigurationError(
                "RABBITMQ_URL (or Settings.url) is not set; accepted is amqp://user:password@host/"
                " or amqps://..., several separated by commas"
            )
        return parse_brokers(self.url, tls=self.tls is not None)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables of the README's table.

        :raises ConfigurationError: a value does not parse; the text names the variable
        """
        values = {
            name: _read(environ, variable, parse)
            for name, (variable, parse) in VARIABLES.items()
            if environ.get(variable, "").strip()
        }
        for name, value in values.items():
            _check_variable(name, value)
        return cls(**values, tls=_tls_from_env(environ, values.get("url")))


def parse_brokers(urls: str, *, tls: bool, name: str = "url") -> tuple[Broker, ...]:
    """Read ``amqp://`` and ``amqps://`` URLs, separated by commas.

    :param tls: use TLS for ``amqp://`` too
    :param name: how an error calls the value
    :raises ConfigurationError: one of them does not parse; its text shows no user information
    """
    return tuple(_parse_broker(url, tls=tls, name=name) for url in _split(urls))


def _parse_broker(url: str, *, tls: bool, name: str) -> Broker:
    where = f"{name} {redact(url)!r}" if "://" in url else name
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"{name} holds a URL whose host or port does not parse") from None
    if parts.scheme not in ("amqp", "amqps"):
        raise ConfigurationError(f"{where}: accepted are only amqp:// and amqps:// URLs")
    if not host:
        raise ConfigurationError(f"{where} names no host")
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"{where} has a query or fragment; accepted are none: use settings"
        )
    secure = tls or parts.scheme == "amqps"
    user, password = _credentials(parts, host, where)
    return Broker(
        host=host,
        port=port or (5671 if secure else 5672),
        virtual_host=unquote(parts.path[1:]) or "/",
        user=user,
        password=password,
        tls=secure,
    )


def _credentials(parts: SplitResult, host: str, where: str) -> tuple[str, str]:
    """Take the URL's user, or RabbitMQ's ``guest``, whom it accepts from loopback only."""
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    if _LOOPBACK.fullmatch(host):
        return "guest", "guest"
    raise ConfigurationError(f"{where} names no user; accepted is amqp://user:password@host/")


def _split(urls: str) -> list[str]:
    return [url for url in map(str.strip, urls.split(",")) if url]


def _shown(value: Any) -> str:
    """Show numbers, which help; give only the type of all else, which might be a secret."""
    if isinstance(value, (int, float)) and abs(value) < 1e12:
        return repr(value)
    return f"a value of type {type(value).__name__}"


def _text(text: str) -> str:
    return text


def _whole(text: str) -> int:
    return int(text)


def _milliseconds(text: str) -> float:
    return float(text) / 1000


def _flag(text: str) -> bool:
    return _FLAGS[text.lower()]


_FLAGS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


_ACCEPTED: dict[Callable[[str], Any], str] = {
    _text: "text",
    _whole: "a whole number",
    _milliseconds: "milliseconds",
    _flag: "true or false",
}

VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "url": ("RABBITMQ_URL", _text),
    "url_file": ("RABBITMQ_URL_FILE", _text),
    "password_file": ("RABBITMQ_PASSWORD_FILE", _text),
    "auth_mechanism": ("RABBITMQ_AUTH_MECHANISM", _text),
    "connection_name": ("RABBITMQ_CONNECTION_NAME", _text),
    "heartbeat": ("RABBITMQ_HEARTBEAT", _whole),
    "connection_timeout": ("RABBITMQ_CONNECTION_TIMEOUT", _milliseconds),
    "prefetch": ("RABBITMQ_PREFETCH", _whole),
    "preferred_llm_backend": ("PREFERRED_LLM_BACKEND", _text),
    "preferred_stt": ("PREFERRED_STT", _text),
    "preferred_embedding_backend": ("PREFERRED_EMBEDDING_BACKEND", _text),
    "publish_timeout": ("ML_PUBLISH_TIMEOUT", _milliseconds),
    "max_in_flight": ("ML_MAX_IN_FLIGHT", _whole),
    "max_message_bytes": ("ML_MAX_MESSAGE_BYTES", _whole),
    "confirm_give_up": ("ML_CONFIRM_GIVE_UP", _milliseconds),
    "max_message_retries": ("ML_MAX_MESSAGE_RETRIES", _whole),
    "message_retry_base_delay": ("ML_MESSAGE_RETRY_BASE_DELAY", _milliseconds),
    "message_retry_max_delay": ("ML_MESSAGE_RETRY_MAX_DELAY", _milliseconds),
    "retry_sweep_interval": ("ML_RETRY_SWEEP_INTERVAL", _milliseconds),
    "circuit_breaker_threshold": ("ML_CIRCUIT_BREAKER_THRESHOLD", _whole),
    "circuit_breaker_cooldown": ("ML_CIRCUIT_BREAKER_COOLDOWN", _milliseconds),
    "circuit_breaker_mode": ("ML_CIRCUIT_BREAKER_MODE", _text),
    "health_check_interval": ("ML_HEALTH_CHECK_INTERVAL", _milliseconds),
    "reconnect_initial_delay": ("ML_RECONNECT_INITIAL_DELAY", _milliseconds),
    "reconnect_max_delay": ("ML_RECONNECT_MAX_DELAY", _milliseconds),
    "reconnect_jitter": ("ML_RECONNECT_JITTER", float),
    "max_reconnect_attempts": ("ML_MAX_RECONNECT_ATTEMPTS", _whole),
    "gave_up_interval": ("ML_GAVE_UP_INTERVAL", _milliseconds),
    "exit_timeout": ("ML_EXIT_TIMEOUT", _milliseconds),
    "store_url": ("ML_STORE_URL", _text),
    "store_lease": ("ML_STORE_LEASE", _milliseconds),
    "connections": ("ML_CONNECTIONS", _whole),
    "exchange": ("ML_EXCHANGE", _text),
    "declare_topology": ("ML_DECLARE_TOPOLOGY", _text),
    "delivery_limit": ("ML_DELIVERY_LIMIT", _whole),
    "queue_prefix": ("ML_QUEUE_PREFIX", _text),
    "rollout": ("ML_ROLLOUT", float),
}
"""Field, its variable, and how the variable's text is read."""


def _read(environ: Mapping[str, str], variable: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(environ[variable].strip())
    except (ValueError, KeyError, OverflowError):
        accepted = _ACCEPTED.get(parse, "a number")
        raise ConfigurationError(f"{variable} does not parse; accepted is {accepted}") from None


def _check_variable(name: str, value: Any) -> None:
    """Run a field's own check, and let its error name the variable and the variable's unit."""
    variable, parse = VARIABLES[name]
    attribute = fields_dict(Settings)[name]
    try:
        if attribute.validator is not None:
            attribute.validator(None, attribute, value)
    except ConfigurationError as error:
        unit = " (seconds; the variable is in milliseconds)" if parse is _milliseconds else ""
        raise ConfigurationError(f"{variable}: {error}{unit}") from None


def _tls_from_env(environ: Mapping[str, str], url: str | None) -> TLSSettings | None:
    """TLS where the switch or a URL asks for it; the certificate variables alone do not."""
    flags = {
        variable: _read(environ, variable, _flag)
        for variable in ("RABBITMQ_USE_SSL", "RABBITMQ_VERIFY_PEER")
        if environ.get(variable, "").strip()
    }
    secure = any(each.startswith("amqps://") for each in _split(url or ""))
    if not (flags.get("RABBITMQ_USE_SSL", False) or secure):
        return None
    return TLSSettings(
        ca_certs=environ.get("RABBITMQ_SSL_CACERT") or None,
        certfile=environ.get("RABBITMQ_SSL_CERTFILE") or None,
        keyfile=environ.get("RABBITMQ_SSL_KEYFILE") or None,
        verify_peer=flags.get("RABBITMQ_VERIFY_PEER", True),
        server_name=environ.get("RABBITMQ_SSL_SERVER_NAME") or None,
        key_password=environ.get("RABBITMQ_SSL_KEY_PASSWORD") or None,
        key_password_file=environ.get("RABBITMQ_SSL_KEY_PASSWORD_FILE") or None,
    )
