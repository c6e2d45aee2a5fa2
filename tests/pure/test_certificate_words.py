"""What a certificate problem is called, and when a TLS context is made again."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import pytest

from mlproducer._broker_url import TLSSettings
from mlproducer._engine.tls import TLSFiles, describe

ROOT = ["-addext", "keyUsage=critical,keyCertSign"]
BARE = "subjectAltName=DNS:localhost\nsubjectKeyIdentifier=none\nauthorityKeyIdentifier=none\n"


def openssl(*argv: str | Path) -> None:
    """Run a command of OpenSSL's."""
    subprocess.run(["openssl", *argv], check=True, capture_output=True, timeout=60.0)


def issue(directory: Path, name: str = "cert", *options: str) -> tuple[Path, Path]:
    """Make a certificate that signs itself, and its key."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key)]
    openssl("req", "-x509", *made, "-subj", "/CN=localhost", "-out", cert, *options)
    return cert, key


def issue_bare(directory: Path) -> tuple[Path, Path, Path]:
    """Make an authority, and a server's certificate without key identifiers, with its key."""
    ca, ca_key = issue(directory, "ca", *ROOT)
    cert, key = issue(directory, "leaf")
    request, extensions = directory / "leaf.csr", directory / "leaf.ext"
    extensions.write_text(BARE)
    openssl("req", "-new", "-key", key, "-subj", "/CN=leaf", "-out", request)
    signed = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", extensions)
    openssl("x509", "-req", "-in", request, *signed, "-out", cert)
    return ca, cert, key


def verify(ca: Path, cert: Path, key: Path) -> None:
    """Have a client check a server's certificate, as strictly as Python 3.13 does by itself."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(cert, key)
    client_context = ssl.create_default_context(cafile=str(ca))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_a_certificate_without_key_identifiers(tmp_path: Path) -> None:
    """Python 3.13 refuses it; the text says what is missing, and what to do."""
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        verify(*issue_bare(tmp_path))
    text = describe(caught.value)
    assert "key identifier" in text
    assert "3.13" in text
    assert "issue the certificates" in text


def test_a_context_is_made_again_only_for_other_files(tmp_path: Path) -> None:
    """The same files give the same context; a connection that leads to others gives another."""
    ones, others = tmp_path / "1", tmp_path / "2"
    for each in (ones, others):
        each.mkdir()
        issue(each)
    current = tmp_path / "current"
    current.symlink_to(ones)
    files = TLSFiles(
        TLSSettings(
            ca_certs=str(current / "cert.pem"),
            certfile=str(current / "cert.pem"),
            keyfile=str(current / "cert.key"),
        )
    )
    first = files.context()
    assert files.context() is first
    swapped = tmp_path / "swapped"  # as Kubernetes renews a secret
    swapped.symlink_to(others)
    os.replace(swapped, current)  # noqa: PTH105 - the connection itself
    second = files.context()
    assert second is not first
    (others / "cert.key").unlink()
    assert files.context() is second
