"""Certificates are good or bad exactly as their names say, and a broker serves them."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from pathlib import Path

import pytest

from mlproducer.testing import Certificate, CertificateError, Certificates, RabbitMQNode


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """One set for the module, which no test changes."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


def _strict_client(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates.ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def _serve_once(listener: socket.socket, context: ssl.SSLContext) -> None:
    raw, _ = listener.accept()
    with raw:
        raw.settimeout(60.0)
        try:
            with context.wrap_socket(raw, server_side=True) as link:
                link.sendall(b"!")
        except (ssl.SSLError, ConnectionError):
            return  # the client says why


def _handshake(server: Certificate, ca: Path | None, client: ssl.SSLContext) -> bytes:
    """One TLS connection over loopback; the first byte that the server sends."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_NONE if ca is None else ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60.0)
        thread = threading.Thread(target=_serve_once, args=[listener, context], daemon=True)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=60.0) as raw,
                client.wrap_socket(raw, server_hostname="localhost") as link,
            ):
                return link.recv(1)
        finally:
            thread.join(30.0)


def test_a_good_server_certificate_is_accepted(certificates: Certificates) -> None:
    """The good certificate passes the strictest check that Python has."""
    assert _handshake(certificates.server, None, _strict_client(certificates)) == b"!"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("server_expired", "certificate has expired"),
        ("server_not_yet_valid", "certificate is not yet valid"),
        ("server_wrong_name", "Hostname mismatch"),
        ("server_other_ca", "unable to get local issuer certificate"),
    ],
)
def test_a_bad_server_certificate_is_refused_for_its_reason(
    certificates: Certificates, name: str, reason: str
) -> None:
    """Each bad server certificate is bad in its own way only."""
    with pytest.raises(ssl.SSLCertVerificationError, match=reason):
        _handshake(getattr(certificates, name), None, _strict_client(certificates))


def test_a_good_client_certificate_is_accepted(certificates: Certificates) -> None:
    """The good client certificate satisfies a server that demands one."""
    client = _strict_client(certificates)
    client.load_cert_chain(certificates.client.cert, certificates.client.key)
    assert _handshake(certificates.server, certificates.ca, client) == b"!"


@pytest.mark.parametrize("name", ["client_expired", "client_other_ca", None])
def test_a_bad_client_certificate_is_refused(certificates: Certificates, name: str | None) -> None:
    """An expired, a foreign and a missing client certificate are refused by the server."""
    client = _strict_client(certificates)
    if name is not None:
        shown: Certificate = getattr(certificates, name)
        client.load_cert_chain(shown.cert, shown.key)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _handshake(certificates.server, certificates.ca, client)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trustme the error says what to install."""
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(CertificateError, match="pip install trustme"):
        Certificates(tmp_path / "certificates")


@pytest.mark.broker
def test_a_broker_demands_a_client_certificate(certificates: Certificates, tmp_path: Path) -> None:
    """A node with TLS speaks AMQP only to clients that show a certificate of the CA."""
    with RabbitMQNode(tls=certificates.server_tls(require_client=True), directory=tmp_path) as node:
        assert node.tls_url.startswith("amqps://")
        assert node.tls_port is not None
        client = _strict_client(certificates)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _amqp_greeting(node.tls_port, client)
        client.load_cert_chain(certificates.client.cert, certificates.client.key)
        assert _amqp_greeting(node.tls_port, client) == b"\x01"


def _amqp_greeting(port: int, client: ssl.SSLContext) -> bytes:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60.0) as raw,
        client.wrap_socket(raw, server_hostname="localhost") as link,
    ):
        link.sendall(b"AMQP\x00\x00\x09\x01")
        return link.recv(1)
