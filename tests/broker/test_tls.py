"""TLS against a real broker: what is trusted; and that all else fails closed, and says why."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from mlproducer import Message, MLProducer, Settings, TLSSettings
from mlproducer.errors import ConfigurationError, NotConnectedError
from mlproducer.testing import Certificate, Certificates, RabbitMQNode
from mlproducer.testing.erlang import free_port
from mlproducer.testing.proxy import Proxy
from tests.stopwatch import in_time

pytestmark = pytest.mark.broker

TLS_RECORD = 0x16  # a handshake, the first octet of a TLS connection (RFC 8446, section 5.1)
MESSAGE = Message(body=b"x", routing_key="ml.embed")


class Tap:
    """Forwards connections to a port of 127.0.0.1, and keeps what the clients sent on each."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listener.accept()
                self.sent.append(bytearray())
                threading.Thread(
                    target=self._forward, args=[client, self.sent[-1]], daemon=True
                ).start()

    def _forward(self, client: socket.socket, sent: bytearray) -> None:
        """Forward one connection; what the server said last arrives even after its reset."""
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            back = threading.Thread(target=_pump, args=[server, client, bytearray()], daemon=True)
            back.start()
            _pump(client, server, sent)
            back.join(30.0)

    def assert_nothing_in_the_clear(self) -> None:
        """Each connection began with a TLS record, and none ever spoke AMQP in the clear."""
        assert self.sent
        for sent in self.sent:
            assert not sent or sent[0] == TLS_RECORD
            assert b"AMQP" not in sent
        assert any(self.sent)


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    with contextlib.suppress(OSError):  # one side is gone
        while data := source.recv(65536):
            kept.extend(data)
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@frozen
class Server:
    """A broker with a TLS listener, and how to give it another certificate."""

    node: RabbitMQNode
    shown: Certificate

    def show(self, certificate: Certificate) -> None:
        """Present this certificate from the next connection on."""
        shutil.copy(certificate.cert, self.shown.cert)
        shutil.copy(certificate.key, self.shown.key)
        assert self.node.eval("ssl:clear_pem_cache()") == "ok"

    @property
    def port(self) -> int:
        """The port of the TLS listener."""
        assert self.node.tls_port is not None
        return self.node.tls_port

    def url(self, port: int, *, scheme: str = "amqps", host: str = "localhost") -> str:
        """The broker's address by way of another port."""
        return f"{scheme}://{self.node.user}:{self.node.password}@{host}:{port}/"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """All certificates, made once."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def servers(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Two brokers, started side by side: one takes any client, one demands a certificate."""
    directory = tmp_path_factory.mktemp("shown")
    shown = Certificate(directory / "server.pem", directory / "server.key")
    shutil.copy(certificates.server.cert, shown.cert)
    shutil.copy(certificates.server.key, shown.key)
    with contextlib.ExitStack() as stack:
        nodes = [
            RabbitMQNode(tls=certificates.server_tls(shown, require_client=demanding))
            for demanding in (False, True)
        ]
        for node in nodes:
            stack.callback(node.close)
            node.launch()
        for node in nodes:
            node.wait_ready()
        yield Server(nodes[0], shown), Server(nodes[1], shown)


@pytest.fixture
def server(servers: tuple[Server, Server], certificates: Certificates) -> Iterator[Server]:
    """The broker that takes any client; it shows its good certificate again afterwards."""
    yield servers[0]
    servers[0].show(certificates.server)


@pytest.fixture
def demanding(servers: tuple[Server, Server]) -> Server:
    """The broker that demands a client certificate."""
    return servers[1]


def _producer(url: str, ca: Path | None, shown: Certificate | None = None) -> MLProducer:
    return MLProducer(Settings(url=url, tls=_tls(ca, shown)))


def _tls(ca: Path | None, shown: Certificate | None = None) -> TLSSettings:
    return TLSSettings(
        ca_certs=None if ca is None else str(ca),
        certfile=None if shown is None else str(shown.cert),
        keyfile=None if shown is None else str(shown.key),
    )


def _assert_refused(
    producer: MLProducer, words: str, caplog: pytest.LogCaptureFixture, limit: float = 3.0
) -> None:
    """It says ``words`` in the error raised, in the receipt and in the log, and soon."""
    with producer, caplog.at_level(logging.WARNING, "mlproducer"):
        with in_time(limit):
            with pytest.raises(NotConnectedError, match=words) as caught:
                producer.publish(MESSAGE, retry=False, timeout=60.0)
            receipt = producer.publish(MESSAGE, timeout=60.0)
        assert not caught.value.possibly_sent
        assert not receipt.confirmed
        assert isinstance(receipt.reason, NotConnectedError)
        assert words in str(receipt.reason)
        assert words in caplog.text
        producer.close(0.0)


def test_own_authority(server: Server, certificates: Certificates) -> None:
    """With the authority's certificate a message is confirmed, and all of it is encrypted."""
    with (
        Tap(server.port) as tap,
        _producer(server.url(tap.port), certificates.ca) as producer,
    ):
        assert producer.publish(MESSAGE).confirmed
    tap.assert_nothing_in_the_clear()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_name_or_address(server: Server, certificates: Certificates, host: str) -> None:
    """The certificate is checked against a name and against an IP address alike."""
    with _producer(server.url(server.port, host=host), certificates.ca) as producer:
        assert producer.publish(MESSAGE).confirmed


def test_switch_in_the_environment(server: Server, certificates: Certificates) -> None:
    """RABBITMQ_USE_SSL=true makes an amqp:// URL a TLS connection."""
    with Tap(server.port) as tap:
        environ = {
            "RABBITMQ_URL": server.url(tap.port, scheme="amqp"),
            "RABBITMQ_USE_SSL": "true",
            "RABBITMQ_SSL_CACERT": str(certificates.ca),
        }
        with MLProducer(Settings.from_env(environ)) as producer:
            assert producer.publish(MESSAGE).confirmed
    tap.assert_nothing_in_the_clear()


def test_mutual(demanding: Server, certificates: Certificates) -> None:
    """A broker that demands a client certificate accepts one of its authority."""
    url = demanding.url(demanding.port)
    with _producer(url, certificates.ca, certificates.client) as producer:
        assert producer.publish(MESSAGE).confirmed


@pytest.mark.parametrize(
    ("shown", "trusted", "words"),
    [
        ("server", "other_ca", "self-signed certificate in certificate chain"),
        ("server", None, "self-signed certificate in certificate chain"),
        ("server_other_ca", "ca", "unable to get local issuer certificate"),
        ("server_expired", "ca", "certificate has expired"),
        ("server_not_yet_valid", "ca", "certificate is not yet valid"),
        ("server_wrong_name", "ca", "certificate is not valid for 'localhost'"),
    ],
)
def test_bad_server_certificate(
    server: Server,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    shown: str,
    trusted: str | None,
    words: str,
) -> None:
    """Each is refused for its reason, in an error, a receipt and the log; never in the clear."""
    server.show(getattr(certificates, shown))
    ca = None if trusted is None else getattr(certificates, trusted)
    with Tap(server.port) as tap:
        _assert_refused(_producer(server.url(tap.port), ca), words, caplog)
    tap.assert_nothing_in_the_clear()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, "CERTIFICATE_REQUIRED"),
        ("client_expired", "CERTIFICATE_EXPIRED"),
        ("client_other_ca", "UNKNOWN_CA"),
    ],
)
def test_bad_client_certificate(
    demanding: Server,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    name: str | None,
    words: str,
) -> None:
    """The broker's alert is named where it wants another client certificate, or any."""
    shown = None if name is None else getattr(certificates, name)
    with Tap(demanding.port) as tap:
        _assert_refused(_producer(demanding.url(tap.port), certificates.ca, shown), words, caplog)
    tap.assert_nothing_in_the_clear()


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"ca_certs": "missing.pem"}, r"RABBITMQ_SSL_CACERT.*no file.*missing\.pem"),
        ({"ca_certs": "empty.pem"}, r"RABBITMQ_SSL_CACERT.*empty\.pem"),
        ({"certfile": "missing.pem"}, r"RABBITMQ_SSL_CERTFILE.*no file.*missing\.pem"),
        ({"keyfile": "missing.key"}, r"RABBITMQ_SSL_KEYFILE.*no file.*missing\.key"),
        ({"keyfile": "other.key"}, r"RABBITMQ_SSL_KEYFILE.*other\.key"),
        ({"keyfile": "locked.key"}, r"RABBITMQ_SSL_KEYFILE.*needs a password"),
    ],
)
def test_unusable_file(
    demanding: Server,
    certificates: Certificates,
    tmp_path: Path,
    broken: dict[str, str],
    words: str,
) -> None:
    """A file that is missing or of no use is named at the first use, and nothing is connected."""
    (tmp_path / "empty.pem").touch()
    shutil.copy(certificates.server.key, tmp_path / "other.key")
    _lock(certificates.client.key, tmp_path / "locked.key")
    files: dict[str, Any] = {
        "ca_certs": str(certificates.ca),
        "certfile": str(certificates.client.cert),
        "keyfile": str(certificates.client.key),
        **{name: str(tmp_path / file) for name, file in broken.items()},
    }
    with Tap(demanding.port) as tap:
        settings = Settings(url=demanding.url(tap.port), tls=TLSSettings(**files))
        with MLProducer(settings) as producer, pytest.raises(ConfigurationError, match=words):
            producer.publish(MESSAGE, timeout=3.0)
    assert not tap.sent


def _lock(key: Path, locked: Path) -> None:
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", locked],
        check=True,
        timeout=10.0,
    )


def test_an_encrypted_key(
    demanding: Server, certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its password comes from the setting or a file; a wrong one is told and not shown."""
    locked, file = tmp_path / "locked.key", tmp_path / "password"
    _lock(certificates.client.key, locked)
    given: list[tuple[dict[str, str], bool]] = [
        ({"RABBITMQ_SSL_KEY_PASSWORD": "secret"}, True),
        ({"RABBITMQ_SSL_KEY_PASSWORD_FILE": str(file)}, True),
        ({"RABBITMQ_SSL_KEY_PASSWORD": "canary-71c4"}, False),
        ({"RABBITMQ_SSL_KEY_PASSWORD": "canary-71c4" * 1000}, False),
        ({"RABBITMQ_SSL_KEY_PASSWORD_FILE": str(tmp_path / "none")}, False),
    ]
    file.write_text("secret\n")
    for variables, right in given:
        environ = {
            "RABBITMQ_URL": demanding.url(demanding.port),
            "RABBITMQ_SSL_CACERT": str(certificates.ca),
            "RABBITMQ_SSL_CERTFILE": str(certificates.client.cert),
            "RABBITMQ_SSL_KEYFILE": str(locked),
            **variables,
        }
        with MLProducer(Settings.from_env(environ)) as producer:
            if right:
                assert producer.publish(MESSAGE, timeout=30.0).confirmed
                continue
            with pytest.raises(ConfigurationError, match="password") as caught:
                producer.publish(MESSAGE)
        assert "canary" not in f"{caught.value!r} {producer!r} {caplog.text}"


def test_renewed_files_are_used(
    demanding: Server, certificates: Certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate that was renewed on disk serves the next attempt; half of it is told once."""
    mine = Certificate(tmp_path / "client.pem", tmp_path / "client.key")
    shutil.copy(certificates.client_expired.cert, mine.cert)
    shutil.copy(certificates.client_expired.key, mine.key)
    with (
        Tap(demanding.port) as tap,  # else the reset may overtake the alert
        MLProducer(
            Settings(
                url=demanding.url(tap.port),
                tls=_tls(certificates.ca, mine),
                reconnect_initial_delay=0.1,
                reconnect_max_delay=0.1,
                max_reconnect_attempts=1000,
            )
        ) as producer,
        caplog.at_level(logging.WARNING, "mlproducer"),
    ):
        with pytest.raises(NotConnectedError, match="TLS failed"):
            producer.publish(MESSAGE, retry=False, timeout=30.0)
        shutil.copy(certificates.client.cert, mine.cert)  # its key comes later
        for _ in range(3):
            with pytest.raises(NotConnectedError, match="TLS failed"):
                producer.publish(MESSAGE, retry=False, timeout=30.0)
            threading.Event().wait(0.2)
        shutil.copy(certificates.client.key, mine.key)
        assert producer.wait_connected(30.0)
        assert producer.publish(MESSAGE, timeout=30.0).confirmed
    told = [each for each in caplog.messages if "TLS files" in each]
    assert [each.partition(":")[0] for each in told] == [
        "the TLS files have changed and do not load",
        "the TLS files load again",
    ]


def test_another_server_name(server: Server, certificates: Certificates) -> None:
    """The name in the certificate may differ from the host's, where that is said."""
    server.show(certificates.server_wrong_name)
    tls = TLSSettings(ca_certs=str(certificates.ca), server_name="elsewhere.example")
    with MLProducer(Settings(url=server.url(server.port), tls=tls)) as producer:
        assert producer.publish(MESSAGE, timeout=30.0).confirmed


@pytest.mark.parametrize("shown", ["server_other_ca", "server_expired", "server_wrong_name"])
def test_check_switched_off(
    server: Server, certificates: Certificates, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    """RABBITMQ_VERIFY_PEER=false accepts any certificate, still encrypted, and warns loudly."""
    server.show(getattr(certificates, shown))
    with Tap(server.port) as tap, caplog.at_level(logging.WARNING, "mlproducer"):
        environ = {"RABBITMQ_URL": server.url(tap.port), "RABBITMQ_VERIFY_PEER": "false"}
        with MLProducer(Settings.from_env(environ)) as producer:
            assert producer.publish(MESSAGE).confirmed
    tap.assert_nothing_in_the_clear()
    assert "without certificate check (RABBITMQ_VERIFY_PEER=false)" in caplog.text


def test_reset_after_the_handshake(certificates: Certificates) -> None:
    """Where a reset has overtaken the broker's alert, the error says what may be the cause."""
    shown = certificates.server
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shown.cert, shown.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30.0)

        def serve() -> None:
            client, _ = listener.accept()
            with context.wrap_socket(client, server_side=True) as stream:
                stream.recv(8)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"amqps://u:p@localhost:{listener.getsockname()[1]}/"
        with (
            _producer(url, certificates.ca) as producer,
            pytest.raises(NotConnectedError, match="refuses the client's certificate"),
        ):
            producer.publish(MESSAGE, retry=False, timeout=30.0)
        thread.join(30.0)
        assert not thread.is_alive()


def test_tls_to_a_plain_port(
    server: Server, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    """A TLS client is told within seconds that the port does not speak TLS."""
    with Tap(server.node.port) as tap:
        producer = _producer(server.url(tap.port), certificates.ca)
        _assert_refused(producer, "WRONG_VERSION_NUMBER", caplog)
    tap.assert_nothing_in_the_clear()


def test_plain_to_a_tls_port(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A plain client is told within seconds that the port does not speak AMQP."""
    producer = MLProducer(Settings(url=server.url(server.port, scheme="amqp")))
    _assert_refused(producer, "without speaking AMQP", caplog)


def test_sliced_and_reset(server: Server, certificates: Certificates) -> None:
    """TLS records in pieces of 3 octets change nothing; after a reset the producer comes back."""
    with (
        Proxy(("127.0.0.1", server.port)) as proxy,
        _producer(server.url(proxy.port), certificates.ca) as producer,
    ):
        proxy.slice(3)
        assert producer.publish(MESSAGE, timeout=30.0).confirmed
        proxy.heal()
        proxy.reset()
        assert producer.publish(MESSAGE, timeout=30.0).result(30.0).confirmed
        assert proxy.accepted == 2


def test_old_protocol_version(certificates: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    """A server that speaks no more than TLS 1.1 is refused."""
    port = free_port()
    shown = certificates.server
    argv = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-tls1_1"]
    argv += ["-cert", str(shown.cert), "-key", str(shown.key), "-cipher", "ALL:@SECLEVEL=0"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            while b"ACCEPT" not in program.stdout.readline():
                assert program.poll() is None
            producer = _producer(f"amqps://u:p@localhost:{port}/", certificates.ca)
            _assert_refused(producer, "TLS failed", caplog)
        finally:
            program.kill()
