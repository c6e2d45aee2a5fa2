"""TLS contexts, and what a certificate problem is called.

TLS 1.2 or later, system ciphers, certificate and name checked unless that was switched off. There
is no way from here to a connection in the clear.

Runs on: the publisher's thread that starts the producer.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from mlproducer.errors import ConfigurationError
from mlproducer.settings import TLSSettings

logger = logging.getLogger(__name__)


def make_context(settings: TLSSettings) -> ssl.SSLContext:
    """Make a client's context.

    :raises ConfigurationError: a file is missing or unusable; the text names setting and file
    """
    context = _trusting(settings)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certfile is not None:
        _present(context, settings.certfile, settings.keyfile)
    if not settings.verify_peer:
        logger.warning(
            "TLS without certificate check (RABBITMQ_VERIFY_PEER=false): "
            "anyone in the network path can read and change what is published"
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def describe(error: BaseException) -> str:
    """Say what is wrong with a certificate, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error.strerror or 'no reason given'}"
    return f"TLS failed: {error}"


def _trusting(settings: TLSSettings) -> ssl.SSLContext:
    _check_file("tls.ca_certs (RABBITMQ_SSL_CACERT)", settings.ca_certs)
    try:
        return ssl.create_default_context(cafile=settings.ca_certs)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"tls.ca_certs (RABBITMQ_SSL_CACERT): no certificates in {settings.ca_certs!r}"
        ) from error


def _present(context: ssl.SSLContext, certfile: str, keyfile: str | None) -> None:
    _check_file("tls.certfile (RABBITMQ_SSL_CERTFILE)", certfile)
    _check_file("tls.keyfile (RABBITMQ_SSL_KEYFILE)", keyfile)
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            "tls.certfile and tls.keyfile (RABBITMQ_SSL_CERTFILE, RABBITMQ_SSL_KEYFILE): "
            f"{certfile!r} and {keyfile!r} are not a certificate and its private key"
        ) from error


def _no_password() -> str:
    """Answer in place of OpenSSL's prompt, at which a server would hang."""
    raise ConfigurationError(
        "tls.keyfile (RABBITMQ_SSL_KEYFILE): the key needs a password; accepted is one without"
    )


def _check_file(name: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigurationError(f"{name}: there is no file {path!r}")
