"""Certificates for tests: two authorities, and server and client certificates, good and bad.

Owns the files in one directory. ``trustme`` makes them, and is imported only then. Must not know
who uses them.

Runs on: the caller's thread.
"""

from __future__ import annotations

import importlib
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from attrs import frozen

__all__ = ["Certificate", "CertificateError", "Certificates", "ServerTLS"]

_DAY = timedelta(days=1)
_HERE = ("localhost", "127.0.0.1")


class CertificateError(Exception):
    """``trustme`` is not installed."""


@frozen
class Certificate:
    """Paths of a certificate and its private key, both PEM."""

    cert: Path
    key: Path


@frozen
class ServerTLS:
    """What a broker's TLS listener needs (https://www.rabbitmq.com/docs/ssl)."""

    ca: Path
    cert: Path
    key: Path
    verify_peer: bool = False
    fail_if_no_peer_cert: bool = False

    def configuration(self) -> dict[str, str]:
        """The lines of ``rabbitmq.conf``."""
        return {
            "ssl_options.cacertfile": str(self.ca),
            "ssl_options.certfile": str(self.cert),
            "ssl_options.keyfile": str(self.key),
            "ssl_options.verify": "verify_peer" if self.verify_peer else "verify_none",
            "ssl_options.fail_if_no_peer_cert": str(self.fail_if_no_peer_cert).lower(),
        }


class Certificates:
    """Certificates in ``directory``, made in the constructor (about 50 ms).

    Attributes: ``ca`` and ``other_ca`` (paths); ``server``, ``server_expired``,
    ``server_not_yet_valid``, ``server_wrong_name``, ``server_other_ca``, ``client``,
    ``client_expired`` and ``client_other_ca`` (`Certificate`). Server certificates are for
    ``localhost`` and 127.0.0.1, but for the one with the wrong name. A certificate's common name is
    its attribute's name.

    Raises:
        CertificateError: the package ``trustme`` is not installed.

    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc)
        past = (now - 2 * _DAY, now - _DAY)
        future = (now + _DAY, now + 2 * _DAY)

        authority, self.ca = self._authority("ca")
        other, self.other_ca = self._authority("other_ca")
        self.server = self._issue("server", authority)
        self.server_expired = self._issue("server_expired", authority, life=past)
        self.server_not_yet_valid = self._issue("server_not_yet_valid", authority, life=future)
        self.server_wrong_name = self._issue("server_wrong_name", authority, "elsewhere.example")
        self.server_other_ca = self._issue("server_other_ca", other)
        self.client = self._issue("client", authority, "client.example")
        self.client_expired = self._issue("client_expired", authority, "client.example", life=past)
        self.client_other_ca = self._issue("client_other_ca", other, "client.example")

    def server_tls(
        self, certificate: Certificate | None = None, *, require_client: bool = False
    ) -> ServerTLS:
        """Return a listener for `RabbitMQNode` with ``certificate``, by default the good one.

        With ``require_client`` a client must show a certificate that ``ca`` has signed.
        """
        chosen = self.server if certificate is None else certificate
        return ServerTLS(self.ca, chosen.cert, chosen.key, require_client, require_client)

    def _authority(self, name: str) -> tuple[Any, Path]:
        try:
            trustme = importlib.import_module("trustme")
        except ImportError:
            raise CertificateError("trustme is not installed: pip install trustme") from None
        authority = trustme.CA(organization_unit_name=name)
        path = self._directory / f"{name}.pem"
        authority.cert_pem.write_to_path(path)
        return authority, path

    def _issue(
        self,
        name: str,
        authority: Any,
        *names: str,
        life: tuple[datetime, datetime] | tuple[None, None] = (None, None),
    ) -> Certificate:
        """Make a key, and a certificate that ``authority`` signs."""
        made = Certificate(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        issued = authority.issue_cert(
            *(names or _HERE), common_name=name, not_before=life[0], not_after=life[1]
        )
        issued.cert_chain_pems[0].write_to_path(made.cert)
        issued.private_key_pem.write_to_path(made.key)
        return made
