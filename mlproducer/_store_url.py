"""The parser of store URLs: for settings, which check them without I/O, and for the stores.

Ambiguous URLs are refused, and no error quotes them. Errors have no traceback frames that hold a
password.

Runs on: the thread that makes settings or a store.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

from attrs import field, frozen

from mlproducer.errors import ConfigurationError, frameless

T = TypeVar("T")

SCHEMES = (
    "memory",
    "sqlite",
    "postgresql",
    "redis",
    "rediss",
    "redis+sentinel",
    "unix",
    "valkey",
    "valkeys",
)

_ALIASES = {"valkey": "redis", "valkeys": "rediss"}

NAME = "store_url (ML_STORE_URL)"

REDIS_PORT = 6379
SENTINEL_PORT = 26379
POSTGRESQL_PORT = 5432

TABLE = "mlproducer_messages"
"""The table of a PostgreSQL store, unless its URL names another."""

LONGEST = 3600.0
"""Seconds: the longest timeout that a URL may set."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]|%(?:[01][0-9a-f]|7f)", re.IGNORECASE)
_HOST = re.compile(
    r"\[([0-9A-Fa-f:.]+(?:%\w+)?)\](?::(\d{1,5}))?|([^\s:,\[\]@%]{1,253})(?::(\d{1,5}))?"
)
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_TABLE = re.compile(r"(?:[a-z_][a-z0-9_]{0,39}\.)?[a-z_][a-z0-9_]{0,39}")
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

_FORMS = {
    "redis": "redis://[user:password@]host[:port][/db]",
    "rediss": "rediss://[user:password@]host[:port][/db]",
    "redis+sentinel": "redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/db]",
    "unix": "unix://[user:password@]/path/of/redis.sock[?db=0]",
    "postgresql": "postgresql://[user[:password]@][host[:port][,host[:port]...]]/database",
}


@frozen
class LocalAddress:
    """A ``memory://`` or ``sqlite:///path`` URL; a relative path has no leading slash."""

    scheme: str
    path: str
    write_ahead: bool


@frozen(kw_only=True)
class RedisAddress:
    """The address of a Redis, the credentials for it, and the options of the URL.

    :ivar nodes: hosts and ports of the server, or of its Sentinels
    :ivar service: the Sentinels' name of the server; ``None`` without Sentinels
    :ivar path: the server's Unix socket, in place of nodes
    :ivar verify: whether the server's certificate is verified; ``check_hostname``: its name too
    :ivar timeout: seconds without an answer after which the server counts as unreachable; ``None``:
        the store's default
    :ivar write_ahead: ``None`` if the URL does not set it
    :ivar prefix: ``None`` if the URL does not set it
    """

    nodes: tuple[tuple[str, int], ...] = ()
    service: str | None = None
    path: str | None = None
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    sentinel_user: str | None = field(default=None, repr=False)
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_certs: str | None = None
    ca_path: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    key_password: str | None = field(default=None, repr=False)
    ciphers: str | None = None
    verify: bool = True
    check_hostname: bool = True
    connect_timeout: float | None = None
    timeout: float | None = None
    keepalive: bool = False
    client_name: str | None = None
    write_ahead: bool | None = None
    prefix: str | None = None

    @property
    def name(self) -> str:
        """The address, for logs and errors."""
        if self.path is not None:
            return self.path
        shown = ",".join(node_name(*node) for node in self.nodes)
        return shown if self.service is None else f"{shown}/{self.service}"


@frozen(kw_only=True)
class PostgreSQLAddress:
    """The address of a PostgreSQL, and the options of the URL.

    :ivar nodes: hosts and ports, one of which accepts writes; empty if libpq's default, or the
        option ``host`` or ``service``, applies
    :ivar options: libpq's options, user and password included
    :ivar connect_timeout: seconds; ``None``: the store's default
    :ivar table: with its schema, unless that is the first of the role's search path
    :ivar write_ahead: ``None`` if the URL does not set it
    """

    nodes: tuple[tuple[str, int], ...] = ()
    options: dict[str, str] = field(factory=dict, repr=False)
    connect_timeout: float | None = None
    table: str = TABLE
    write_ahead: bool | None = None

    @property
    def name(self) -> str:
        """Hosts and database, for logs and errors."""
        named = [node_name(*node) for node in self.nodes]
        host = self.options.get("host") or self.options.get("service") or "local socket"
        return f"{','.join(named) or host}/{self.options.get('dbname', '')}"


def node_name(host: str, port: int) -> str:
    """Return ``host:port``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@frameless
def check(url: object, name: str = NAME) -> None:
    """Check a store's URL.

    :param name: the URL's name in the error
    :raises ConfigurationError: it is not a store's URL; only names of options are quoted
    """
    _read(url, name)


@frameless
def read_local(url: str) -> LocalAddress:
    """Parse a ``memory://`` or ``sqlite:///`` URL.

    :raises ConfigurationError: it is invalid
    """
    found = _read(url, NAME)
    if not isinstance(found, LocalAddress):
        raise ConfigurationError(f"{NAME} is not the URL of a local store")
    return found


@frameless
def read_redis(url: str) -> RedisAddress:
    """Parse the URL of a Redis.

    :raises ConfigurationError: it is invalid
    """
    found = _read(url, NAME)
    if not isinstance(found, RedisAddress):
        raise ConfigurationError(
            f"{NAME} is not the URL of a Redis; accepted are {', '.join(_FORMS.values())}"
        )
    return found


@frameless
def read_postgresql(url: str) -> PostgreSQLAddress:
    """Parse a ``postgresql://`` URL.

    :raises ConfigurationError: it is invalid
    """
    found = _read(url, NAME)
    if not isinstance(found, PostgreSQLAddress):
        accepted = _FORMS["postgresql"]
        raise ConfigurationError(f"{NAME} is not the URL of a PostgreSQL; accepted is {accepted}")
    return found


@frameless
def check_table(table: object, name: str = NAME) -> str:
    """Return a table's name, with or without a schema, if it needs no quotes.

    :raises ConfigurationError: it needs quotes, or is not a name
    """
    if not isinstance(table, str) or not _TABLE.fullmatch(table):
        raise ConfigurationError(
            f"table in {name} must be a name of up to 40 lower-case letters, digits and _, "
            "with or without a schema before it: schema.table"
        )
    return table


@frameless
def check_prefix(prefix: object, name: str = NAME) -> str:
    """Return a prefix of keys if it is valid.

    :raises ConfigurationError: it is not
    """
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"prefix in {name} must be 1 to 100 letters, digits and characters of '._:-'"
        )
    return prefix


def _read(url: object, name: str) -> LocalAddress | RedisAddress | PostgreSQLAddress:
    scheme, separator, rest = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not separator or scheme not in SCHEMES:
        accepted = ", ".join(f"{each}://" for each in SCHEMES)
        raise ConfigurationError(f"{name} must be a URL that starts with {accepted}")
    scheme = _ALIASES.get(scheme, scheme)
    if _CONTROL.search(rest):
        raise ConfigurationError(f"{name} must not contain control characters")
    if not _can_be_encoded(rest, "surrogateescape" if scheme == "sqlite" else "strict"):
        raise ConfigurationError(f"{name} must be text that UTF-8 can encode")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    local = scheme in ("memory", "sqlite")
    if not local and ("@" in path + query or "[" in path + authority.rpartition("@")[0]):
        raise ConfigurationError(
            f"{name} has @ or [ after its host: in a user or password write @ as %40, / as %2F"
        )
    options = _Options(query, name)
    if local:
        return _local(scheme, authority, path, options)
    if scheme == "postgresql":
        return _postgresql(authority, path, options)
    return _redis(scheme, authority, path, options)


def _can_be_encoded(text: str, errors: str) -> bool:
    try:
        text.encode(errors=errors)
    except UnicodeEncodeError:
        return False
    return True


class _Options:
    """The options in the query of a URL."""

    def __init__(self, query: str, name: str) -> None:
        self.name = name
        pairs = parse_qsl(query, keep_blank_values=True)
        self._values = dict(pairs)
        if len(self._values) < len(pairs):
            raise ConfigurationError(f"{name} has an option twice")

    def __contains__(self, option: str) -> bool:
        return option in self._values

    def names(self) -> set[str]:
        """Return the names of the options."""
        return set(self._values)

    def text(self, option: str) -> str | None:
        """Return an option's value, unparsed."""
        return self._values.get(option)

    def flag(self, option: str) -> bool | None:
        """Return a boolean option."""
        return self._parsed(option, lambda text: _FLAGS[text.lower()], "1 or 0")

    def seconds(self, option: str) -> float | None:
        """Return a duration."""
        return self._parsed(option, _seconds, f"seconds, above 0 to {LONGEST:g}")

    def number(self, option: str) -> int | None:
        """Return an int."""
        return self._parsed(option, _database, "a number from 0 to 99999")

    def choice(self, option: str, choices: dict[str, str]) -> str | None:
        """Return the meaning of one of several words, in any case."""
        accepted = " or ".join(choices)
        return self._parsed(option, lambda text: choices[text.lower()], accepted)

    def _parsed(self, option: str, parse: Callable[[str], T], accepted: str) -> T | None:
        text = self._values.get(option)
        if text is None:
            return None
        try:
            return parse(text)
        except (KeyError, ValueError):
            raise ConfigurationError(f"{self.name}: {option} must be {accepted}") from None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= LONGEST:
        raise ValueError
    return seconds


def _database(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError
    return int(text)


# --- local stores --------------------------------------------------------------------------------


def _local(scheme: str, authority: str, path: str, options: _Options) -> LocalAddress:
    accepted = {"write_ahead"} if scheme == "sqlite" else set()
    wrong = authority or "#" in path or (scheme == "sqlite") != bool(path)
    if wrong or not options.names() <= accepted:
        raise ConfigurationError(
            f"{options.name} is invalid; accepted are memory://, sqlite:///relative.db and "
            "sqlite:////absolute.db, the latter two also with ?write_ahead=1"
        )
    return LocalAddress(scheme, unquote(path), options.flag("write_ahead") is True)


# --- Redis ---------------------------------------------------------------------------------------

_OURS = {"write_ahead", "prefix"}
_TAKEN = {
    "db",
    "username",
    "password",
    "client_name",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
}
_OF_TLS = {
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
    "ssl_ciphers",
}
_OF_SENTINEL = {"sentinel_username", "sentinel_password", "ssl"}
_IGNORED = {
    "decode_responses",
    "encoding",
    "encoding_errors",
    "health_check_interval",
    "lib_name",
    "lib_version",
    "max_connections",
    "protocol",
    "retry_on_error",
    "retry_on_timeout",
    "socket_read_size",
    "timeout",
}
"""Options of redis-py about its pool and its replies, which the store does not use."""

_CERT_REQS = {
    "required": "required",
    "cert_required": "required",
    "optional": "required",  # for a client the two are the same
    "cert_optional": "required",
    "none": "none",
    "cert_none": "none",
}


def _redis(scheme: str, authority: str, path: str, options: _Options) -> RedisAddress:
    name = options.name
    user_part, _, hosts = authority.rpartition("@")
    tls = scheme == "rediss" or options.flag("ssl") is True
    _check_options(scheme, tls, options)
    if "#" in path:
        raise ConfigurationError(f"{name} is invalid; accepted is {_FORMS[scheme]}")
    service, socket, database = None, None, path
    if scheme == "redis+sentinel":
        service, _, database = path.partition("/")
    elif scheme == "unix":
        socket, database = f"/{unquote(path)}", ""
    if (scheme == "unix") == bool(hosts) or service == "" or socket == "/":
        raise ConfigurationError(f"{name} is invalid; accepted is {_FORMS[scheme]}")
    user, _, password = user_part.partition(":")
    verify = options.choice("ssl_cert_reqs", _CERT_REQS) != "none"
    return RedisAddress(
        nodes=_nodes(hosts, scheme, name),
        service=service and unquote(service),
        path=socket,
        database=_number(database, options),
        user=unquote(user) or options.text("username"),
        password=unquote(password) or options.text("password"),
        sentinel_user=options.text("sentinel_username"),
        sentinel_password=options.text("sentinel_password"),
        tls=tls,
        ca_certs=options.text("ssl_ca_certs"),
        ca_path=options.text("ssl_ca_path"),
        certfile=options.text("ssl_certfile"),
        keyfile=options.text("ssl_keyfile"),
        key_password=options.text("ssl_password"),
        ciphers=options.text("ssl_ciphers"),
        verify=verify,
        check_hostname=verify and options.flag("ssl_check_hostname") is not False,
        connect_timeout=options.seconds("socket_connect_timeout"),
        timeout=options.seconds("socket_timeout"),
        keepalive=options.flag("socket_keepalive") is True,
        client_name=options.text("client_name"),
        write_ahead=options.flag("write_ahead"),
        prefix=check_prefix(options.text("prefix"), name) if "prefix" in options else None,
    )


def _check_options(scheme: str, tls: bool, options: _Options) -> None:
    accepted = _OURS | _TAKEN | _OF_TLS | _IGNORED
    if scheme == "redis+sentinel":
        accepted |= _OF_SENTINEL
    if not options.names() <= accepted:
        shown = sorted(_OURS) + sorted(accepted - _OURS - _IGNORED)
        raise ConfigurationError(
            f"{options.name} has an unknown option; accepted are {', '.join(shown)}"
        )
    if not tls and options.names() & _OF_TLS:
        raise ConfigurationError(f"{options.name}: ssl_ options are for rediss://")


_USUAL = {"redis+sentinel": SENTINEL_PORT, "postgresql": POSTGRESQL_PORT}
_SEVERAL = ("redis+sentinel", "postgresql")


def _nodes(hosts: str, scheme: str, name: str) -> tuple[tuple[str, int], ...]:
    if not hosts:
        return ()
    given = hosts.split(",") if scheme in _SEVERAL else [hosts]
    usual = _USUAL.get(scheme, REDIS_PORT)
    return tuple(_node(unquote(each), usual, name) for each in given)


def _node(text: str, usual: int, name: str) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = int((match[2] or match[4] or usual) if match else 0)
    if match is None or not 0 < port < 65_536:
        raise ConfigurationError(f"{name}: its host or port is invalid")
    return (match[1] or match[3]).lower(), port


def _number(path: str, options: _Options) -> int:
    text = path.strip("/")
    if not text:
        return options.number("db") or 0
    try:
        return _database(text)
    except ValueError:
        raise ConfigurationError(
            f"{options.name}: its path must be a database's number, such as /0"
        ) from None


# --- PostgreSQL ----------------------------------------------------------------------------------

_OF_LIBPQ = {
    "application_name",
    "channel_binding",
    "fallback_application_name",
    "gssdelegation",
    "gssencmode",
    "gsslib",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "options",
    "passfile",
    "password",
    "port",
    "require_auth",
    "requirepeer",
    "service",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "sslsni",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
}
"""Options that are passed to libpq (PostgreSQL documentation, *Parameter Key Words*)."""

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _postgresql(authority: str, path: str, options: _Options) -> PostgreSQLAddress:
    name = options.name
    accepted = {"write_ahead", "table", "connect_timeout", "dbname"}
    if not options.names() <= accepted | _OF_LIBPQ:
        raise ConfigurationError(
            f"{name} has an unknown option; accepted are write_ahead, table, "
            "connect_timeout, and libpq's, such as sslmode and sslrootcert"
        )
    if "#" in path or "/" in path:
        raise ConfigurationError(f"{name} is invalid; accepted is {_FORMS['postgresql']}")
    options.choice("sslmode", {each: each for each in _SSL_MODES})
    user_part, _, hosts = authority.rpartition("@")
    user, _, password = user_part.partition(":")
    given = {option: options.text(option) for option in sorted(options.names() & _OF_LIBPQ)}
    own = {
        "user": unquote(user) or given.get("user"),
        "password": unquote(password) or given.get("password"),
        "dbname": unquote(path) or options.text("dbname"),
    }
    return PostgreSQLAddress(
        nodes=_nodes(hosts, "postgresql", name),
        options={key: value for key, value in {**given, **own}.items() if value},
        connect_timeout=options.seconds("connect_timeout"),
        table=check_table(options.text("table"), name) if "table" in options else TABLE,
        write_ahead=options.flag("write_ahead"),
    )
