"""What a Redis store takes from its URL, and what it refuses.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from mlproducer.errors import ConfigurationError
from mlproducer.stores.redis import RedisStore
from mlproducer.stores.redis_url import parse

CANARY = "canary-Zq7"


def test_everything_in_the_url_is_read() -> None:
    """Host, port, database, user, password and the options, each percent-decoded."""
    url = f"rediss://so%40me:{CANARY}%2F@redis.example:7000/3?write_ahead=1&prefix=a:b:"
    address = parse(url)
    assert (address.host, address.port, address.database) == ("redis.example", 7000, 3)
    assert (address.user, address.password) == ("so@me", f"{CANARY}/")
    assert (address.tls, address.verify) == (True, True)
    assert (address.write_ahead, address.prefix) == (True, "a:b:")


def test_what_the_url_does_not_say_has_a_default() -> None:
    """Port 6379, database 0, nobody's name, no TLS; the store's own arguments stand."""
    address = parse("redis://[::1]")
    assert (address.host, address.port, address.database) == ("::1", 6379, 0)
    assert (address.user, address.password, address.tls) == (None, None, False)
    assert address.name == "[::1]:6379"
    assert not RedisStore("redis://localhost").write_ahead
    assert RedisStore("redis://localhost", write_ahead=True).write_ahead
    assert not RedisStore("redis://localhost?write_ahead=0", write_ahead=True).write_ahead


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("host/?socket_timeout=30", "write_ahead, prefix, ssl_ca_certs"),
        ("host/?prefix=a:&prefix=b:", "given twice"),
        ("host/?write_ahead", "query does not parse"),
        ("host/?write_ahead=perhaps", "must be 1 or true or 0 or false"),
        ("host/?prefix=", "1 to 100 letters"),
        ("host/?prefix=%7Bx%7D", "1 to 100 letters"),
        ("host/?ssl_ca_certs=/etc/hostname", "for rediss://"),
        ("host/names", "a database's number"),
        ("host:http/0", "host or port"),
        ("host:99999/0", "host or port"),
        ("[::1/0", "host or port"),
        ("", "accepted is redis://"),
        ("host/0#piece", "accepted is redis://"),
    ],
)
def test_a_url_that_does_not_parse_says_what_is_accepted(tail: str, said: str) -> None:
    """The error names what is accepted, and shows no password."""
    with pytest.raises(ConfigurationError, match="store_url") as caught:
        RedisStore(f"redis://user:{CANARY}@{tail}")
    assert said in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_missing_certificate_file_is_named(option: str) -> None:
    """A file that is not there is an error at once, not at the first message."""
    with pytest.raises(ConfigurationError, match=option):
        RedisStore(f"rediss://localhost/?{option}=/nowhere.pem")


def test_tls_without_a_check_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever switches the certificate check off reads so in the log."""
    assert not parse("rediss://localhost/?ssl_cert_reqs=none").verify
    assert [each.levelno for each in caplog.records] == [logging.WARNING]
    assert "without certificate check" in caplog.text


def test_nothing_shows_the_password() -> None:
    """Neither the store nor its address shows who it is, or by which password."""
    store = RedisStore(f"redis://{CANARY}:{CANARY}@localhost")
    assert repr(store) == "<RedisStore localhost:6379>"
    assert store.name == "localhost:6379"
    assert CANARY not in repr(parse(f"redis://{CANARY}:{CANARY}@localhost"))


def test_without_the_extra_the_error_says_what_to_install() -> None:
    """Where redis-py is missing, the configuration is at fault, and the way out is named."""
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "from mlproducer.errors import ConfigurationError\n"
        "try:\n    import mlproducer.stores.redis\n"
        "except ConfigurationError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert "pip install 'mlproducer[redis]'" in done.stdout
