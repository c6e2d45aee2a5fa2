"""Read a Redis store's URL, and check the certificate files that it names.

The grammar is in `mlproducer._store_url`. No error or log line here shows a user or a password.

Runs on: the publisher's thread that starts the producer.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from mlproducer._foreign_calls import write
from mlproducer._store_url import NAME, RedisAddress, read_redis
from mlproducer.errors import ConfigurationError, frameless

logger = logging.getLogger(__name__)


@frameless
def parse(url: str) -> RedisAddress:
    """Read a URL, and check its files now, rather than at the first message.

    :raises ConfigurationError: it does not parse, or a file that it names cannot be used
    """
    address = read_redis(url)
    if address.tls:
        _check_files(address)
        if not address.verify:
            write(
                logger,
                logging.WARNING,
                "TLS to the store at %s without certificate check (ssl_cert_reqs=none): "
                "anyone in the network path can read and change stored messages",
                address.name,
            )
    return address


def _check_files(address: RedisAddress) -> None:
    files = {
        "ssl_ca_certs": address.ca_certs,
        "ssl_certfile": address.certfile,
        "ssl_keyfile": address.keyfile,
    }
    for option, path in files.items():
        if path is not None and not Path(path).is_file():
            raise ConfigurationError(f"{option} in {NAME}: there is no such file")
    if address.ca_path is not None and not Path(address.ca_path).is_dir():
        raise ConfigurationError(f"ssl_ca_path in {NAME}: there is no such directory")
    if not _loads(address):
        raise ConfigurationError(
            f"ssl_ca_certs and ssl_certfile in {NAME} must be PEM files of certificates, and "
            "ssl_keyfile the certificate's private key, encrypted with ssl_password or not at all"
        )


def _loads(address: RedisAddress) -> bool:
    try:
        context = ssl.create_default_context(cafile=address.ca_certs, capath=address.ca_path)
        if address.certfile is not None:
            # Never None: OpenSSL would ask for the password on the terminal, and the process hang.
            secret = address.key_password or ""
            context.load_cert_chain(address.certfile, address.keyfile, password=secret)
        if address.ciphers is not None:
            context.set_ciphers(address.ciphers)
    except (ssl.SSLError, OSError):
        return False
    return True
