"""TLS contexts, the files that they are made of, and what a certificate problem is called.

TLS 1.2 or later, system ciphers, certificate and name checked unless that was switched off. There
is no way from here to a connection in the clear.

Runs on: the publisher's thread that starts the producer, later the resolver thread.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from mlproducer._broker_url import TLSSettings
from mlproducer._foreign_calls import write
from mlproducer.errors import ConfigurationError

logger = logging.getLogger(__name__)

_STRICT = {
    83: "its issuer has no name",
    84: "it has no name",
    85: "it has no authority key identifier",
    86: "its authority has no subject key identifier",
    87: "its alternative name is empty",
    88: "its alternative name must be critical",
    89: "the authority's basic constraints must be critical",
    90: "its authority key identifier must not be critical",
    91: "its subject key identifier must not be critical",
    92: "the authority has no key usage",
    93: "it is not of version 3",
}
"""OpenSSL's ``X509_V_ERR_*`` that only strict checks raise, as Python makes them from 3.13 on."""

_Stamp = tuple[tuple[int, int, int] | None, ...]


class TLSFiles:
    """A client's context, made again where one of its files has changed.

    Files that do not load leave the context as it was, which is told once: certificate and key are
    mostly renewed one after the other, and do not fit for a moment.

    :raises ConfigurationError: a file is missing or unusable; the text names setting and file
    """

    def __init__(self, settings: TLSSettings) -> None:
        self.settings = settings
        self._stamp = self._look()
        self._failed: _Stamp | None = None
        self._context = make_context(settings)
        if not settings.verify_peer:
            write(
                logger,
                logging.WARNING,
                "TLS without certificate check (RABBITMQ_VERIFY_PEER=false): "
                "anyone in the network path can read and change what is published",
            )

    def context(self) -> ssl.SSLContext:
        """Return the context for the next connection."""
        stamp = self._look()
        if stamp != self._stamp:
            self._reload(stamp)
        return self._context

    def _reload(self, stamp: _Stamp) -> None:
        try:
            self._context = make_context(self.settings)
        except ConfigurationError as error:
            if self._failed is None:
                write(
                    logger,
                    logging.WARNING,
                    "the TLS files have changed and do not load: %s; going on with the old ones",
                    error,
                )
            self._failed = stamp
        else:
            if self._failed is not None:
                write(logger, logging.WARNING, "the TLS files load again")
            self._stamp, self._failed = stamp, None

    def _look(self) -> _Stamp:
        settings = self.settings
        files = (
            settings.ca_certs,
            settings.certfile,
            settings.keyfile,
            settings.key_password_file,
        )
        return tuple(_stamp(path) for path in files)


def _stamp(path: str | None) -> tuple[int, int, int] | None:
    """Return what changes with a file, followed through connections as Kubernetes lays them."""
    try:
        found = Path(path).stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_mtime_ns, found.st_ino, found.st_size)


def make_context(settings: TLSSettings) -> ssl.SSLContext:
    """Make a client's context.

    :raises ConfigurationError: a file is missing or unusable; the text names setting and file
    """
    context = _trusting(settings)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certfile is not None:
        _present(context, settings.certfile, settings.keyfile, _KeyPassword(settings))
    if not settings.verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def describe(error: BaseException) -> str:
    """Say what is wrong with a certificate, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        strict = _STRICT.get(error.verify_code)
        if strict is None:
            return f"certificate verification failed: {error.verify_message}"
        return (
            f"certificate verification failed: {error.verify_message}: {strict}, which Python "
            "accepts no longer from 3.13 on: issue the certificates with the extensions of RFC 5280"
        )
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


def _present(
    context: ssl.SSLContext, certfile: str, keyfile: str | None, password: _KeyPassword
) -> None:
    _check_file("tls.certfile (RABBITMQ_SSL_CERTFILE)", certfile)
    _check_file("tls.keyfile (RABBITMQ_SSL_KEYFILE)", keyfile)
    try:
        context.load_cert_chain(certfile, keyfile, password=password)
    except ConfigurationError:  # the key's password, which has its own words
        raise
    except (OSError, ValueError) as error:  # ssl.SSLError, or a password of over 1024 bytes
        wrong = ", or the key's password is wrong" if password.asked else ""
        raise ConfigurationError(
            "tls.certfile and tls.keyfile (RABBITMQ_SSL_CERTFILE, RABBITMQ_SSL_KEYFILE): "
            f"{certfile!r} and {keyfile!r} are not a certificate and its private key{wrong}"
        ) from error


class _KeyPassword:
    """Answers in place of OpenSSL's prompt, at which a server would hang."""

    def __init__(self, settings: TLSSettings) -> None:
        self._settings = settings
        self.asked = False

    def __call__(self) -> str:
        """Return the key's password.

        :raises ConfigurationError: there is none, or its file cannot be read
        """
        self.asked = True
        path = self._settings.key_password_file
        if self._settings.key_password is not None:
            return self._settings.key_password
        if path is None:
            raise ConfigurationError(
                "tls.keyfile (RABBITMQ_SSL_KEYFILE): the private key needs a password, which is "
                "read from RABBITMQ_SSL_KEY_PASSWORD or RABBITMQ_SSL_KEY_PASSWORD_FILE "
                "(TLSSettings.key_password, key_password_file)"
            )
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            pass  # raised below, so that nothing of the file is in its context
        raise ConfigurationError(
            f"tls.key_password_file (RABBITMQ_SSL_KEY_PASSWORD_FILE): {path!r} cannot be read"
        )


def _check_file(name: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigurationError(f"{name}: there is no file {path!r}")
