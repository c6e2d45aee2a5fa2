"""Certificates for tests: a CA, and server and client certificates, good and bad in each way.

Owns the files in one directory, made with the ``openssl`` command, so that no further Python
package is needed. It must not know who uses them.

Runs on: the caller's thread.
"""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

from attrs import frozen

__all__ = ["Certificate", "CertificateError", "Certificates", "ServerTLS"]

_LIMIT = 30.0
_DAY = timedelta(days=1)
_DATE = "%Y%m%d%H%M%SZ"
_Life = tuple[datetime, datetime]
_HERE = "DNS:localhost,IP:127.0.0.1"
_ELSEWHERE = "DNS:elsewhere.example"

# Only ``openssl ca`` of OpenSSL 1.1 to 3.3 can set the beginning of a certificate's life.
_CONFIGURATION = """
[req]
distinguished_name = nothing
prompt = no
[nothing]
[ca]
default_ca = authority
[authority]
database = index.txt
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = policy
[policy]
commonName = supplied
"""
_AUTHORITY = """
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
"""
_LEAF = """
basicConstraints = CA:FALSE
keyUsage = critical,digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
"""


class CertificateError(Exception):
    """``openssl`` is missing or refused."""


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
    """Certificates in ``directory``, made in the constructor (about 0.3 s).

    Attributes name what there is: ``ca`` and ``other_ca`` (paths); ``server``, ``server_expired``,
    ``server_not_yet_valid``, ``server_wrong_name``, ``server_other_ca``, ``client``,
    ``client_expired`` and ``client_other_ca`` (`Certificate`). Server certificates are for
    ``localhost`` and 127.0.0.1, but for the one with the wrong name.

    Raises:
        CertificateError: the ``openssl`` command is missing or failed; with what it said.

    """

    def __init__(self, directory: str | Path) -> None:
        self._books = Path(directory).resolve() / "authority"
        self._books.mkdir(parents=True)
        (self._books / "openssl.cnf").write_text(_CONFIGURATION)
        (self._books / "index.txt").touch()
        now = datetime.now(timezone.utc)
        good = (now - _DAY, now + 30 * _DAY)
        past = (now - 2 * _DAY, now - _DAY)
        future = (now + _DAY, now + 2 * _DAY)
        whole = (now - 3 * _DAY, now + 60 * _DAY)

        authority = self._issue("ca", None, _AUTHORITY, whole)
        other = self._issue("other_ca", None, _AUTHORITY, whole)
        self.ca = authority.cert
        self.other_ca = other.cert
        self.server = self._server("server", authority, good)
        self.server_expired = self._server("server_expired", authority, past)
        self.server_not_yet_valid = self._server("server_not_yet_valid", authority, future)
        self.server_wrong_name = self._server("server_wrong_name", authority, good, _ELSEWHERE)
        self.server_other_ca = self._server("server_other_ca", other, good)
        self.client = self._client("client", authority, good)
        self.client_expired = self._client("client_expired", authority, past)
        self.client_other_ca = self._client("client_other_ca", other, good)

    def server_tls(
        self, certificate: Certificate | None = None, *, require_client: bool = False
    ) -> ServerTLS:
        """A listener for `RabbitMQNode` with ``certificate``, by default the good one.

        With ``require_client`` a client must show a certificate that ``ca`` has signed.
        """
        chosen = self.server if certificate is None else certificate
        return ServerTLS(self.ca, chosen.cert, chosen.key, require_client, require_client)

    def _server(
        self, name: str, authority: Certificate, life: _Life, names: str = _HERE
    ) -> Certificate:
        usage = f"extendedKeyUsage = serverAuth\nsubjectAltName = {names}\n"
        return self._issue(name, authority, _LEAF + usage, life)

    def _client(self, name: str, authority: Certificate, life: _Life) -> Certificate:
        return self._issue(name, authority, _LEAF + "extendedKeyUsage = clientAuth\n", life)

    def _issue(
        self, name: str, authority: Certificate | None, extensions: str, life: _Life
    ) -> Certificate:
        """Make a key and a certificate, signed by ``authority`` or by itself."""
        directory = self._books.parent
        made = Certificate(directory / f"{name}.pem", directory / f"{name}.key")
        signer = ["-selfsign", "-keyfile", str(made.key)]
        if authority is not None:
            signer = ["-cert", str(authority.cert), "-keyfile", str(authority.key)]
        (self._books / f"{name}.ext").write_text(extensions)
        self._openssl(
            *("req", "-new", "-config", "openssl.cnf", "-subj", f"/CN={name}", "-nodes"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-keyout", str(made.key), "-out", f"{name}.csr"),
        )
        self._openssl(
            *("ca", "-batch", "-notext", "-config", "openssl.cnf", *signer),
            *("-startdate", f"{life[0]:{_DATE}}", "-enddate", f"{life[1]:{_DATE}}"),
            *("-extfile", f"{name}.ext", "-in", f"{name}.csr", "-out", str(made.cert)),
        )
        return made

    def _openssl(self, *arguments: str) -> None:
        program = shutil.which("openssl")
        if program is None:
            raise CertificateError(
                "openssl was not found. On Debian or Ubuntu: apt-get install -y openssl"
            )
        done = subprocess.run(
            [program, *arguments],
            cwd=self._books,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
        if done.returncode:
            raise CertificateError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
