"""What a Redis store's URL says: where Redis is, how to speak TLS, and what is the store's own.

It must not know how to connect. Nothing here ever shows a user or a password.

Runs on: the publisher's thread that starts the producer.
"""

from __future__ import annotations

import logging
import re
import ssl
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from attrs import field, frozen

from mlproducer.errors import ConfigurationError
from mlproducer.fence import write

logger = logging.getLogger(__name__)

FORM = "redis://[user:password@]host[:port][/db] or rediss://..."
OPTIONS = (
    "write_ahead",
    "prefix",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
)
_WHERE = "store_url (ML_STORE_URL)"
_PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_CHECKS = {"required": True, "none": False}
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


@frozen(kw_only=True)
class Address:
    """Where Redis listens, as whom to connect to it, and the options that the URL gives.

    :ivar write_ahead: ``None`` where the URL does not say
    :ivar prefix: likewise
    """

    host: str
    port: int
    database: int = 0
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    write_ahead: bool | None = None
    prefix: str | None = None

    @property
    def name(self) -> str:
        """``host:port``, fit for logs and errors."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(url: str) -> Address:
    """Read a ``redis://`` or ``rediss://`` URL.

    :raises ConfigurationError: it does not parse; the text shows nothing of it but names of options
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError(f"{_WHERE}: host or port does not parse") from None
    if parts.scheme not in ("redis", "rediss") or not host or parts.fragment:
        raise ConfigurationError(f"{_WHERE} does not parse; accepted is {FORM}")
    options = _options(parts)
    address = Address(
        host=host,
        port=port or 6379,
        database=_database(parts.path),
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme == "rediss",
        ca_certs=_file(options, "ssl_ca_certs"),
        certfile=_file(options, "ssl_certfile"),
        keyfile=_file(options, "ssl_keyfile"),
        verify=_choice(options, "ssl_cert_reqs", _CHECKS) is not False,
        write_ahead=_choice(options, "write_ahead", _FLAGS),
        prefix=check_prefix(options["prefix"]) if "prefix" in options else None,
    )
    if address.tls:
        _check_tls(address)
    return address


def check_prefix(prefix: str) -> str:
    """Give a prefix that can stand before keys.

    :raises ConfigurationError: it cannot
    """
    if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"prefix in {_WHERE} must be 1 to 100 letters, digits and characters of '._:-'"
        )
    return prefix


def _options(parts: SplitResult) -> dict[str, str]:
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ConfigurationError(f"{_WHERE}: its query does not parse") from None
    options = dict(pairs)
    if len(options) < len(pairs) or not options.keys() <= set(OPTIONS):
        raise ConfigurationError(
            f"{_WHERE} has an option that is unknown or given twice; accepted are "
            + ", ".join(OPTIONS)
        )
    if parts.scheme == "redis" and any(name.startswith("ssl_") for name in options):
        raise ConfigurationError(f"{_WHERE}: ssl_ options are for rediss://, this is redis://")
    return options


def _choice(options: dict[str, str], name: str, choices: dict[str, bool]) -> bool | None:
    if name not in options:
        return None
    if options[name].lower() not in choices:
        raise ConfigurationError(f"{name} in {_WHERE} must be {' or '.join(choices)}")
    return choices[options[name].lower()]


def _file(options: dict[str, str], name: str) -> str | None:
    path = options.get(name)
    if path is not None and not Path(path).is_file():
        raise ConfigurationError(f"{name} in {_WHERE}: there is no such file")
    return path


def _database(path: str) -> int:
    number = path.strip("/") or "0"
    if not re.fullmatch(r"[0-9]{1,5}", number):
        raise ConfigurationError(f"{_WHERE}: after the host comes a database's number, such as /0")
    return int(number)


def _check_tls(address: Address) -> None:
    """Find out now what would fail at the first message, and be loud about a check left out."""
    try:
        context = ssl.create_default_context(cafile=address.ca_certs)
        if address.certfile is not None:
            # The password stands in for OpenSSL's prompt, at which a server would hang.
            context.load_cert_chain(address.certfile, address.keyfile, password="")
    except (ssl.SSLError, OSError):
        raise ConfigurationError(
            f"ssl_ca_certs, ssl_certfile and ssl_keyfile in {_WHERE} must be certificates, and a "
            "certificate with its private key, which needs no password"
        ) from None
    if not address.verify:
        write(
            logger,
            logging.WARNING,
            "TLS to the store at %s without certificate check (ssl_cert_reqs=none): "
            "anyone in the network path can read and change what is stored",
            address.name,
        )
