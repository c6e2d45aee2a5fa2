"""Who the Redis store is, and how it speaks TLS: refused, checked, and never shown.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mlproducer.errors import ConfigurationError, StoreError
from mlproducer.stores.protocol import Depth, Entry, Record
from mlproducer.stores.redis import RedisStore
from mlproducer.testing import Certificate, Certificates
from mlproducer.testing.redis_server import RedisServer
from tests.helpers import make_envelope

PASSWORD = f"canary-{secrets.token_hex(8)}"
USER = f"canary-{secrets.token_hex(8)}"
MESSAGE = f"canary-{secrets.token_hex(8)}"


@pytest.fixture(scope="module")
def locked_redis() -> Iterator[RedisServer]:
    """Yield a Redis with a password."""
    with RedisServer(password=PASSWORD) as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make certificates."""
    return Certificates(tmp_path_factory.mktemp("certificates"))


def complaint(store: RedisStore) -> str:
    """Have the store refused, and return all that can be read of it."""
    with pytest.raises(StoreError) as caught, closing(store):
        store.put([Entry(Record(make_envelope(body=MESSAGE.encode())))], 1.0)
    error = caught.value
    assert error.__context__ is None
    return f"{error}{error!r}{store!r}{''.join(traceback.format_exception(error))}"


def test_the_right_password_opens(locked_redis: RedisServer) -> None:
    """A password in the URL is given to Redis, and a user with it."""
    locked_redis.call("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "+@all")
    for who in ("", USER):
        url = f"redis://{who}:{PASSWORD}@{locked_redis.host}:{locked_redis.port}"
        with closing(RedisStore(url, prefix=f"test-{secrets.token_hex(4)}:")) as store:
            store.put([Entry(Record(make_envelope()))], 1.0)
            assert store.depth() == Depth(1, 0)


@pytest.mark.parametrize(
    "who",
    ["", f":wrong-{PASSWORD}@", f"{USER}:wrong-{PASSWORD}@", f"nobody-{USER}:{PASSWORD}@"],
    ids=["no password", "wrong password", "user's wrong password", "no such user"],
)
def test_who_is_refused_is_told_so_and_shown_nothing(
    locked_redis: RedisServer, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    """The error names host and port; user, password and message are in no text and no log."""
    caplog.set_level(logging.DEBUG)
    store = RedisStore(f"redis://{who}{locked_redis.host}:{locked_redis.port}")
    text = complaint(store) + caplog.text
    assert f"127.0.0.1:{locked_redis.port} refuses the user or the password" in text
    for secret in (PASSWORD, USER, MESSAGE):
        assert secret not in text


def test_a_password_that_redis_quotes_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """A Redis that does not know AUTH repeats what it was sent; the error does not."""
    caplog.set_level(logging.DEBUG)
    with RedisServer(config={"rename-command": 'AUTH ""'}) as server:
        text = complaint(RedisStore(f"redis://:{PASSWORD}@{server.host}:{server.port}"))
        assert f"{server.port} answered ERR" in text
        assert PASSWORD not in text + caplog.text


def test_a_user_who_may_too_little_is_told_so(locked_redis: RedisServer) -> None:
    """A user without a right to scripts is refused in words of ours."""
    name = f"reader-{secrets.token_hex(4)}"
    locked_redis.call("ACL", "SETUSER", name, "on", f">{PASSWORD}", "~*", "+get")
    url = f"redis://{name}:{PASSWORD}@{locked_redis.host}:{locked_redis.port}"
    assert "does not permit this user what the store needs" in complaint(RedisStore(url))


def test_a_database_that_is_not_there(locked_redis: RedisServer) -> None:
    """The database's number in the URL is used, and one too large is said to be none."""
    with closing(RedisStore(f"{locked_redis.url}/3")) as store:
        store.put([Entry(Record(make_envelope()))], 1.0)
        assert store.depth() == Depth(1, 0)
    assert b"db3:keys" in locked_redis.call("INFO", "keyspace")
    assert "has no database of this number" in complaint(RedisStore(f"{locked_redis.url}/99"))


def served(certificates: Certificates, shown: Certificate) -> RedisServer:
    """Make a Redis that shows this certificate."""
    return RedisServer(tls=certificates.server_tls(shown), password=PASSWORD)


def test_tls_with_a_ca_of_ones_own(certificates: Certificates) -> None:
    """The URL names the authority, and nothing goes over the line that could be read."""
    tls = certificates.server_tls(require_client=True)
    client = certificates.client
    with RedisServer(tls=tls, password=PASSWORD) as server:
        options = f"ssl_ca_certs={certificates.ca}"
        mine = f"ssl_certfile={client.cert}&ssl_keyfile={client.key}"
        with closing(RedisStore(f"{server.tls_url}/0?{options}&{mine}")) as store:
            store.put([Entry(Record(make_envelope()))], 1.0)
            assert store.depth() == Depth(1, 0)
        anonymous = complaint(RedisStore(f"{server.tls_url}/0?{options}"))
        assert f"localhost:{server.tls_port} cannot be reached" in anonymous


@pytest.mark.parametrize(
    "shown", ["server_expired", "server_not_yet_valid", "server_wrong_name", "server_other_ca"]
)
def test_a_certificate_that_proves_nothing_is_refused(
    certificates: Certificates, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    """Date, name and authority are checked before the password is sent."""
    caplog.set_level(logging.DEBUG)
    with served(certificates, getattr(certificates, shown)) as server:
        url = f"{server.tls_url}?ssl_ca_certs={certificates.ca}"
        text = complaint(RedisStore(url)) + caplog.text
        assert f"localhost:{server.tls_port} cannot be reached: certificate" in text
        assert PASSWORD not in text
        with closing(RedisStore(f"{server.tls_url}?ssl_cert_reqs=none")) as store:
            assert store.depth() == Depth(0, 0)


def test_the_systems_authorities_are_the_default(certificates: Certificates) -> None:
    """Without ``ssl_ca_certs`` a private authority is not trusted."""
    with served(certificates, certificates.server) as server:
        assert "certificate verification failed" in complaint(RedisStore(server.tls_url))


def test_tls_and_no_tls_do_not_mix(certificates: Certificates) -> None:
    """TLS to a port in the clear fails, and the other way round; there is no way around it."""
    with served(certificates, certificates.server) as server:
        clear = complaint(RedisStore(f"rediss://:{PASSWORD}@127.0.0.1:{server.port}"))
        assert f"127.0.0.1:{server.port} " in clear
        encrypted = complaint(RedisStore(f"redis://:{PASSWORD}@127.0.0.1:{server.tls_port}"))
        assert f"127.0.0.1:{server.tls_port} " in encrypted
        assert PASSWORD not in clear + encrypted


def test_a_key_with_a_password_asks_nobody(certificates: Certificates, tmp_path: Path) -> None:
    """A private key that needs a password is an error, not a prompt at which a server hangs."""
    locked, key = tmp_path / "locked.key", certificates.client.key
    argv = f"openssl pkcs8 -topk8 -passout pass:x -in {key} -out {locked}".split()
    subprocess.run(argv, timeout=30, check=True)
    with pytest.raises(ConfigurationError, match="encrypted with ssl_password"):
        RedisStore(
            f"rediss://localhost?ssl_certfile={certificates.client.cert}&ssl_keyfile={locked}"
        )


def test_files_that_are_no_certificates_are_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    """What the URL names as certificates is looked at when the store is made."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    cert = certificates.client.cert
    for options in (f"ssl_ca_certs={empty}", f"ssl_certfile={cert}&ssl_keyfile={empty}"):
        with pytest.raises(ConfigurationError, match="must be PEM files"):
            RedisStore(f"rediss://localhost?{options}")
