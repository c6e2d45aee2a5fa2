"""Settings, and how they are read from the environment.

In Python times are seconds and names are in lower case; the environment keeps the names and units
of the system that this library succeeds. Each default is written once, here. An error about a value
has the name under which it was given, and no error or repr shows a password.

Runs on: any thread; everything here is frozen.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import Attribute, evolve, field, fields_dict, frozen

from mlproducer import _broker_url as brokers
from mlproducer._broker_url import AUTH_MECHANISMS, Broker, TLSSettings, redact, redact_one
from mlproducer.errors import ConfigurationError, frameless, frameless_init
from mlproducer.topology import Topology

__all__ = ["Broker", "Settings", "TLSSettings", "redact", "redact_one"]

logger = logging.getLogger(__name__)

DEFAULT_STORE_URL = "memory://"

BACKENDS = ("api", "local")
DECLARE_MODES = ("active", "passive", "off")
BREAKER_MODES = ("consecutive", "adaptive")

Credentials = Callable[[], "tuple[str, str] | tuple[str, str, float]"]
"""Returns user and password, and, where they expire, the seconds after which they do."""

_Validator = Callable[[Any, "Attribute[Any]", Any], None]


def _number(
    minimum: float, maximum: float, *, whole: bool = False, above: bool = False, unit: str = ""
) -> Any:
    """Return a validator of a number's type and range; ``above`` excludes the minimum."""

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
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{attribute.name} must be a str, got {_shown(value)}")


def _check_store_url(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value == DEFAULT_STORE_URL:
        return  # the parser of the other URLs need not be loaded
    from mlproducer._store_url import check  # noqa: PLC0415

    check(value, attribute.name)


def _check_text(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigurationError(f"{attribute.name} must be a non-empty str, got {_shown(value)}")


def _check_tls(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, TLSSettings):
        raise ConfigurationError(
            f"{attribute.name} must be a mlproducer.TLSSettings, got {_shown(value)}"
        )


def _check_prefix(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or len(value.encode(errors="replace")) > 100:
        raise ConfigurationError(f"{attribute.name} must be a str of at most 100 bytes")
    if not value.isprintable():
        raise ConfigurationError(f"{attribute.name} must not contain control characters")


def _check_callable(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise ConfigurationError(f"{attribute.name} must be callable, got {_shown(value)}")


def _check_exchange(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value.encode(errors="replace")) <= 127:
        raise ConfigurationError(f"{attribute.name} must be a str of 1 to 127 bytes")
    if not value.isprintable():
        raise ConfigurationError(f"{attribute.name} must not contain control characters")


def _check_topology(_instance: Any, attribute: Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, Topology):
        raise ConfigurationError(
            f"{attribute.name} must be a mlproducer.Topology, got {_shown(value)}"
        )


_seconds = _number(0, 3600, above=True, unit="seconds")  # larger values are milliseconds by mistake
_seconds_or_none = _number(0, 3600, unit="seconds")


@frozen
class RetryPolicy:
    """How often and how soon one message is retried, in place of the settings for all messages.

    :ivar max_retries: attempts after the first; then the message is dead-lettered
    :ivar base_delay: seconds until the first retry; the delay doubles with each
    :ivar max_delay: the longest delay, in seconds
    :raises ConfigurationError: a number is out of range
    """

    max_retries: int = field(default=3, validator=_number(0, 1_000_000, whole=True))
    base_delay: float = field(default=1.0, validator=_seconds)
    max_delay: float = field(default=10.0, validator=_seconds)


@frameless_init
@frozen(kw_only=True)
class Settings:
    """All settings. Times are in seconds, sizes in bytes.

    ``url`` names one or more brokers, separated by commas; without it the first use of a producer
    raises `ConfigurationError`. With ``tls`` every connection uses TLS, even for ``amqp://``.

    :ivar url_file: file with the value of ``url``, read for each attempt to connect
    :ivar password_file: file with the password of the URL's user, read for each attempt
    :ivar credentials: called for each attempt; returns ``(user, password)``, or ``(user, password,
        seconds)`` where they expire
    :ivar connection_name: the name in the management interface; ``None``: program:pid
    :ivar gave_up_interval: seconds between attempts after ``gave_up``; 0: none
    :ivar circuit_breaker_threshold: failures in a row that open the breaker; 0: it never opens
    :ivar rollout: the share of Celery's tasks that go through the producer, from 0 to 1
    :ivar topology: a `Topology` of your own, in place of that for the machine-learning tasks
    :raises ConfigurationError: a value is out of range; the text names the field
    """

    url: str | None = field(default=None, validator=_check_url, repr=lambda url: redact(url or ""))
    url_file: str | None = field(default=None, validator=_check_text)
    password_file: str | None = field(default=None, validator=_check_text)
    credentials: Credentials | None = field(default=None, validator=_check_callable, repr=False)
    auth_mechanism: Literal["PLAIN", "EXTERNAL"] = field(
        default="PLAIN", validator=_one_of(AUTH_MECHANISMS)
    )
    connection_name: str | None = field(default=None, validator=_check_text)
    tls: TLSSettings | None = field(default=None, validator=_check_tls)
    heartbeat: int = field(default=60, validator=_number(0, 65_535, whole=True))
    connection_timeout: float = field(default=10.0, validator=_seconds)
    prefetch: int = field(default=100, validator=_number(1, 65_535, whole=True))

    preferred_llm_backend: Literal["api", "local"] = field(
        default="api", validator=_one_of(BACKENDS)
    )
    preferred_stt: Literal["api", "local"] = field(default="api", validator=_one_of(BACKENDS))
    preferred_embedding_backend: Literal["api", "local"] = field(
        default="api", validator=_one_of(BACKENDS)
    )

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
    circuit_breaker_mode: Literal["consecutive", "adaptive"] = field(
        default="consecutive", validator=_one_of(BREAKER_MODES)
    )
    health_check_interval: float = field(default=30.0, validator=_seconds)

    reconnect_initial_delay: float = field(default=0.5, validator=_seconds)
    reconnect_max_delay: float = field(default=32.0, validator=_seconds)
    reconnect_jitter: float = field(default=0.3, validator=_number(0, 10))
    max_reconnect_attempts: int = field(default=10, validator=_number(1, 1_000_000, whole=True))
    gave_up_interval: float = field(default=60.0, validator=_seconds_or_none)
    exit_timeout: float = field(default=5.0, validator=_seconds_or_none)

    store_url: str = field(default=DEFAULT_STORE_URL, validator=_check_store_url, repr=redact_one)
    store_lease: float = field(default=30.0, validator=_seconds)
    connections: int = field(default=1, validator=_number(1, 64, whole=True))
    exchange: str = field(default="bookmarkai.ml", validator=_check_exchange)
    declare_topology: Literal["active", "passive", "off"] = field(
        default="active", validator=_one_of(DECLARE_MODES)
    )
    delivery_limit: int = field(default=20, validator=_number(1, 1_000_000, whole=True))
    queue_prefix: str = field(default="", validator=_check_prefix)
    topology: Topology | None = field(default=None, validator=_check_topology)
    rollout: float = field(default=1.0, validator=_number(0, 1))

    def __attrs_post_init__(self) -> None:
        if self.url and self.url_file:
            raise ConfigurationError("url and url_file are both given: give one of them")
        if self.password_file and self.credentials:
            raise ConfigurationError(
                "password_file and credentials are both given: give one of them"
            )
        if self.url:
            self._parse(self.url, "url")
            for key in dict.fromkeys(brokers.ignored_parameters(self.url)):
                logger.warning("url: the query parameter %s is not supported, and is ignored", key)

    @property
    @frameless
    def brokers(self) -> tuple[Broker, ...]:
        """The brokers that ``url`` names, in order, each with its settings.

        Reads ``url_file`` and ``password_file`` where they are set; `credentials` is not called.

        :raises ConfigurationError: no URL is set, or a file cannot be read or holds no URL
        """
        if self.url_file:
            found = self._parse(_contents("url_file", self.url_file).strip(), "url_file")
        elif self.url:
            found = self._parse(self.url, "url")
        else:
            raise ConfigurationError(
                "RABBITMQ_URL (or Settings.url) is not set: set it to amqp://user:password@host/"
                " or amqps://..., several separated by commas"
            )
        if not self.password_file:
            return found
        password = _contents("password_file", self.password_file).rstrip("\r\n")
        return tuple(evolve(broker, password=password) for broker in found)

    def _parse(self, urls: str, name: str) -> tuple[Broker, ...]:
        defaults = brokers.Defaults(
            tls=self.tls,
            heartbeat=self.heartbeat,
            connection_timeout=self.connection_timeout,
            auth_mechanism=self.auth_mechanism,
            user_elsewhere=self.credentials is not None,
        )
        return brokers.parse(urls, defaults, name)

    @classmethod
    @frameless
    def from_mapping(
        cls, given: Mapping[str, Any], environ: Mapping[str, str] = os.environ
    ) -> Settings:
        """Make settings from fields by name, and read all others from the environment.

        :param given: fields and their values; None counts as not given. ``tls`` may be a mapping
        :raises ConfigurationError: there is no such field, or a value does not parse
        """
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in fields_dict(cls):
                from difflib import get_close_matches  # noqa: PLC0415 - for this error alone

                close = get_close_matches(name, fields_dict(cls), 1)
                hint = f": did you mean {close[0]}?" if close else ""
                raise ConfigurationError(f"there is no setting {name}{hint}")
        if isinstance(given.get("tls"), Mapping):
            given["tls"] = _tls_from_mapping(given["tls"])
        shadowed = {VARIABLES[name][0] for name in given if name in VARIABLES}
        for name, variables in _INSTEAD.items():
            if name in given:
                shadowed |= variables
        left = {name: text for name, text in environ.items() if name not in shadowed}
        values = {
            name: _read(left, variable, parse)
            for name, (variable, parse) in VARIABLES.items()
            if left.get(variable, "").strip()
        }
        for name, value in values.items():
            _check_variable(name, value)
        if "tls" not in given:
            given["tls"] = _tls_from_env(left, {**values, "url": _url_of(given, values)})
        url, url_file = values.pop("url", None), values.pop("url_file", None)
        settings = cls(**values, **given)
        if url and url_file:
            raise ConfigurationError(
                "RABBITMQ_URL and RABBITMQ_URL_FILE are both set: set one of them"
            )
        if url:
            settings._parse(url, "RABBITMQ_URL")
        return evolve(settings, url=url, url_file=url_file) if url or url_file else settings

    @classmethod
    @frameless
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables of the README's table.

        :raises ConfigurationError: a value does not parse; the text names the variable
        """
        return cls.from_mapping({}, environ)


def topology_of(settings: Settings) -> Topology:
    """Return the topology of settings, with their prefix and delivery limit applied."""
    chosen = settings.topology or Topology(exchange=settings.exchange)
    return chosen.prefixed(settings.queue_prefix or "", settings.delivery_limit)


def _url_of(given: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    url = given.get("url", values.get("url"))
    return url if isinstance(url, str) else ""


def _contents(name: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib is slow to import
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    raise ConfigurationError(f"{name}: {path} cannot be read: {reason}")


def _shown(value: Any) -> str:
    """Return a number as it is, and only the type of other values, which may be secret."""
    if isinstance(value, (int, float)) and abs(value) < 1e12:
        return repr(value)
    if value == "":
        return "an empty str"
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
"""For each field, its variable, and how the variable's text is parsed."""


def _read(environ: Mapping[str, str], variable: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(environ[variable].strip())
    except (ValueError, KeyError, OverflowError):
        accepted = _ACCEPTED.get(parse, "a number")
        raise ConfigurationError(f"{variable} must be {accepted}") from None


def _check_variable(name: str, value: Any) -> None:
    """Run a field's validator, with the variable and its unit in the error."""
    variable, parse = VARIABLES[name]
    attribute = fields_dict(Settings)[name]
    try:
        if attribute.validator is not None:
            attribute.validator(None, attribute, value)
    except ConfigurationError as error:
        unit = " (seconds; the variable is in milliseconds)" if parse is _milliseconds else ""
        raise ConfigurationError(f"{variable}: {error}{unit}") from None


def _tls_from_env(environ: Mapping[str, str], values: Mapping[str, Any]) -> TLSSettings | None:
    """Return TLS settings if RABBITMQ_USE_SSL or a URL asks for TLS; certificates alone do not."""
    flags = {
        variable: _read(environ, variable, _flag)
        for variable in ("RABBITMQ_USE_SSL", "RABBITMQ_VERIFY_PEER")
        if environ.get(variable, "").strip()
    }
    given = {
        name: environ[variable].strip()
        for name, variable in _TLS_VARIABLES.items()
        if environ.get(variable, "").strip()
    }
    if given.keys() >= {"key_password", "key_password_file"}:
        raise ConfigurationError(
            "RABBITMQ_SSL_KEY_PASSWORD and RABBITMQ_SSL_KEY_PASSWORD_FILE are both set: "
            "set one of them"
        )
    url = values.get("url", "")
    switched = flags.get("RABBITMQ_USE_SSL", False) or "amqps://" in url.lower()
    if not switched and not ("url_file" in values and (given or "RABBITMQ_VERIFY_PEER" in flags)):
        if url and given:
            logger.warning(
                "%s is set, but the connection is not encrypted, since the URL begins with "
                "amqp://: use amqps://, or set RABBITMQ_USE_SSL=true",
                " and ".join(_TLS_VARIABLES[name] for name in given),
            )
        return None
    return TLSSettings(
        **given, verify_peer=flags.get("RABBITMQ_VERIFY_PEER", True), enforced=switched
    )


def _tls_from_mapping(given: Mapping[str, Any]) -> TLSSettings:
    for name in given:
        if name not in fields_dict(TLSSettings):
            raise ConfigurationError(f"tls has no field {name}")
    return TLSSettings(**given)


_TLS_VARIABLES = {
    "ca_certs": "RABBITMQ_SSL_CACERT",
    "certfile": "RABBITMQ_SSL_CERTFILE",
    "keyfile": "RABBITMQ_SSL_KEYFILE",
    "server_name": "RABBITMQ_SSL_SERVER_NAME",
    "key_password": "RABBITMQ_SSL_KEY_PASSWORD",
    "key_password_file": "RABBITMQ_SSL_KEY_PASSWORD_FILE",
}

_INSTEAD: dict[str, set[str]] = {
    "url": {"RABBITMQ_URL_FILE"},
    "url_file": {"RABBITMQ_URL"},
    "credentials": {"RABBITMQ_PASSWORD_FILE"},
    "tls": {"RABBITMQ_USE_SSL", "RABBITMQ_VERIFY_PEER", *_TLS_VARIABLES.values()},
}
"""For a field that is given, the variables that are then not read."""
