"""As whom a producer connects to a real broker: passwords that change, tokens, and certificates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlproducer import Message, MLProducer, Settings, TLSSettings
from mlproducer._core import events
from mlproducer.errors import AuthenticationError, PublishError
from mlproducer.testing import Certificates, RabbitMQNode
from mlproducer.testing.plugin import VirtualHost
from tests.broker.conftest import Connect
from tests.broker.users import change_password, delete_user, limit_user
from tests.helpers import LIMIT
from tests.threaded.moods import events_of, told

pytestmark = pytest.mark.broker

MESSAGE = Message(body=b"x", routing_key="ml.embed")


class User:
    """A user of a test's own.

    :ivar password: the one that the broker takes now
    """

    def __init__(self, vhost: VirtualHost, name: str) -> None:
        self._vhost = vhost
        self.name = name
        self.password = "first"
        vhost.node.add_user(name, self.password)
        vhost.node.set_permissions(vhost.name, name)

    def rotate(self, password: str) -> None:
        """Set another password, and end all connections."""
        change_password(self._vhost.node, self.name, password)
        self.password = password
        self._vhost.node.close_all_connections()

    def url(self, password: str = "none-of-the-url") -> str:
        """Return the virtual host's URL with this user, and a password that is none."""
        return self._vhost.node.url_for(self._vhost.name, self.name, password)


@pytest.fixture
def user(rabbitmq_vhost: VirtualHost, request: pytest.FixtureRequest) -> Iterator[User]:
    """A user of the test's own."""
    made = User(rabbitmq_vhost, f"user-{abs(hash(request.node.name))}")
    yield made
    delete_user(rabbitmq_vhost.node, made.name)


@pytest.mark.parametrize("way", ["file", "url file", "callable"])
def test_a_rotated_password(user: User, connect: Connect, tmp_path: Path, way: str) -> None:
    """After the rotation the new password is used without a restart, and nothing is lost."""
    password, url = tmp_path / "password", tmp_path / "url"

    def write() -> None:
        password.write_text(f"{user.password}\n")
        url.write_text(user.url(user.password))

    write()
    settings: dict[str, Any] = {
        "file": {"url": user.url(), "password_file": str(password)},
        "url file": {"url_file": str(url)},
        "callable": {"url": user.url(), "credentials": lambda: (user.name, user.password)},
    }[way]
    with MLProducer(Settings(**settings, publish_timeout=LIMIT)) as producer:
        assert producer.publish(MESSAGE).confirmed
        happened = events_of(producer, "disconnected", "connected")
        user.rotate("second")
        write()
        happened.wait_for("disconnected", "connected")
        assert producer.publish(MESSAGE).confirmed
        assert producer.flush(LIMIT) == 0


def test_a_password_that_was_changed_first(user: User, connect: Connect, tmp_path: Path) -> None:
    """Between the rotation and the new file every call raises; afterwards a call gets in."""
    file = tmp_path / "password"
    file.write_text(user.password)
    producer = connect(user.url(), password_file=str(file), reconnect_max_delay=60.0)
    assert producer.publish(MESSAGE).confirmed
    user.rotate("second")
    refused = threading.Event()
    while not refused.is_set():
        try:
            producer.publish(MESSAGE, retry=False)
        except AuthenticationError:
            refused.set()
        except PublishError:
            continue  # lost with the connection, which is not the question here
    file.write_text("second")
    producer.reconnect()
    assert producer.wait_connected(LIMIT)
    assert producer.publish(MESSAGE).confirmed


def test_a_token_is_renewed(user: User, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    """RabbitMQ takes the new secret on the open connection, or ends it: publishing goes on."""
    asked: list[int] = []

    def credentials() -> tuple[str, str, float]:
        asked.append(1)
        return user.name, user.password, 0.5

    producer = connect(user.url(), credentials=credentials)
    happened = events_of(producer, "connected", "disconnected")
    while len(asked) < 4:
        assert producer.publish(MESSAGE, timeout=LIMIT).confirmed
        threading.Event().wait(0.05)
    happened.wait_for("connected")
    assert happened.seen == ["connected"]


def test_one_channel_for_a_user(user: User, connect: Connect, rabbitmq_vhost: VirtualHost) -> None:
    """A limit of one channel: connected and published; the probe is given up after one try."""
    limit_user(rabbitmq_vhost.node, user.name, "max-channels", 1)
    producer = connect(user.url("first"), health_check_interval=0.2)
    producer.start()
    faults = told(producer, events.HealthFault, lambda event: event.loss.text)
    happened = events_of(producer, "disconnected", "connected")
    assert producer.publish(MESSAGE, timeout=LIMIT).result(LIMIT).confirmed
    happened.wait_for("disconnected", "connected")
    before = len(happened.seen)
    for _ in range(20):
        assert producer.publish(MESSAGE, timeout=LIMIT).result(LIMIT).confirmed
        threading.Event().wait(0.05)
    assert len(happened.seen) == before
    assert len(faults.seen) == 1


def test_a_slash_behind_the_virtual_host(rabbitmq_node: RabbitMQNode, connect: Connect) -> None:
    """``amqp://host/prod/`` names another virtual host than ``prod``, which the error says."""
    producer = connect(f"{rabbitmq_node.url_for('prod')}/")
    with pytest.raises(AuthenticationError, match=r"530 .*ends in a slash"):
        producer.publish(MESSAGE)


# --- certificates ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """All certificates, made once."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def certified(certificates: Certificates) -> Iterator[RabbitMQNode]:
    """A broker that takes a client's certificate for its user, and nothing else."""
    config = {"auth_mechanisms.1": "EXTERNAL", "ssl_cert_login_from": "common_name"}
    with RabbitMQNode(
        tls=certificates.server_tls(require_client=True),
        config=config,
        plugins=["rabbitmq_auth_mechanism_ssl"],
    ) as node:
        node.add_user("client", "has-none")
        node.set_permissions("/", "client")
        yield node


def settings_for(node: RabbitMQNode, certificates: Certificates, **more: Any) -> Settings:
    """Return settings without a user, but with a certificate."""
    tls = TLSSettings(
        ca_certs=str(certificates.ca),
        certfile=str(certificates.client.cert),
        keyfile=str(certificates.client.key),
    )
    return Settings(url=f"amqps://localhost:{node.tls_port}/", tls=tls, **more)


def test_external(certified: RabbitMQNode, certificates: Certificates) -> None:
    """The certificate is all that the broker asks for."""
    with MLProducer(settings_for(certified, certificates, auth_mechanism="EXTERNAL")) as producer:
        assert producer.publish(MESSAGE, timeout=LIMIT).confirmed
        assert "client" in certified.ctl("list_connections", "user")


def test_a_broker_that_offers_no_password(
    certified: RabbitMQNode, certificates: Certificates
) -> None:
    """Without the setting it is said what the broker offers."""
    settings = settings_for(certified, certificates, credentials=lambda: ("client", "has-none"))
    with (
        MLProducer(settings) as producer,
        pytest.raises(AuthenticationError, match=r"offers EXTERNAL .*PLAIN"),
    ):
        producer.publish(MESSAGE, timeout=LIMIT)
