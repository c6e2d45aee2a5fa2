"""What a Redis store takes from its URL, and what it refuses.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlproducer import MLProducer, Settings
from mlproducer.errors import ConfigurationError, StoreError
from mlproducer.stores import open_store
from mlproducer.stores.redis import RedisStore
from mlproducer.stores.redis.address import parse

CANARY = "canary-Zq7"


def test_valkey() -> None:
    """Its URLs are Redis's under another name."""
    assert parse("valkey://u:p@h:7000/3") == parse("redis://u:p@h:7000/3")
    assert parse("valkeys://h") == parse("rediss://h")


def test_everything_in_the_url_is_read() -> None:
    """Host, port, database, user, password and the options, each percent-decoded."""
    url = f"rediss://so%40me:{CANARY}%2F@redis.example:7000/3?write_ahead=1&prefix=a:b:"
    address = parse(url)
    assert (address.nodes, address.database) == ((("redis.example", 7000),), 3)
    assert (address.user, address.password) == ("so@me", f"{CANARY}/")
    assert (address.tls, address.verify) == (True, True)
    assert (address.write_ahead, address.prefix) == (True, "a:b:")


@pytest.mark.parametrize("url", ["redis://h\udc80", "redis://:\ud800@h", "sqlite:///\ud800.db"])
def test_what_cannot_be_encoded_is_refused(url: str) -> None:
    """A lone surrogate is no name of a host, a user or a file."""
    with pytest.raises(ConfigurationError, match="that UTF-8 can encode"):
        Settings(store_url=url)
    assert Settings(store_url="sqlite:///\udcff.db").store_url  # a name that is not UTF-8


def test_what_the_url_does_not_say_has_a_default() -> None:
    """Port 6379, database 0, no user, no TLS; the store's own arguments stand."""
    address = parse("redis://[::1]")
    assert (address.nodes, address.database) == ((("::1", 6379),), 0)
    assert (address.user, address.password, address.tls) == (None, None, False)
    assert address.name == "[::1]:6379"
    assert not RedisStore("redis://localhost").write_ahead
    assert RedisStore("redis://localhost", write_ahead=True).write_ahead
    assert not RedisStore("redis://localhost?write_ahead=0", write_ahead=True).write_ahead


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("host/?socket_timeout=never", "socket_timeout must be seconds, above 0 to 3600"),
        ("host/?socket_timeout=1e9", "socket_timeout must be seconds, above 0 to 3600"),
        ("host/?db=first", "db must be a number"),
        ("host/?socket_timeot=30", "accepted are prefix, write_ahead"),
        ("host/?prefix=a:&prefix=b:", "has an option twice"),
        ("host/?write_ahead", "must be 1 or 0"),
        ("host/?write_ahead=perhaps", "must be 1 or 0"),
        ("host/?prefix=", "1 to 100 letters"),
        ("host/?prefix=%7Bx%7D", "1 to 100 letters"),
        ("host/?ssl_ca_certs=/etc/hostname", "ssl_ options are for rediss://"),
        ("host/names", "a database's number"),
        ("host:http/0", "host or port"),
        ("host:99999/0", "host or port"),
        ("[::1", "host or port"),
        ("a,b/0", "host or port"),
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
    """That the certificate check is off is in the log."""
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
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "pip install 'mlproducer[redis]'" in done.stdout


OPTIONS = (
    "db=2&client_name=web&socket_timeout=2&socket_connect_timeout=1.5&socket_keepalive=True"
    "&health_check_interval=30&max_connections=10&retry_on_timeout=True&decode_responses=True"
    "&protocol=3&encoding=utf-8"
)


def test_options_of_redis_py_are_taken() -> None:
    """A URL that other programs use is good here too; what concerns their pool means nothing."""
    address = parse(f"redis://localhost?{OPTIONS}")
    assert (address.database, address.client_name, address.keepalive) == (2, "web", True)
    assert (address.timeout, address.connect_timeout) == (2.0, 1.5)


@pytest.mark.parametrize(
    ("value", "verify"),
    [
        ("CERT_NONE", False),
        ("none", False),
        ("CERT_REQUIRED", True),
        ("required", True),
        ("CERT_OPTIONAL", True),
        ("optional", True),
    ],
)
def test_certificates_are_checked_by_any_spelling(value: str, verify: bool) -> None:
    """As redis-py spells it, and as Celery and the module ``ssl`` do."""
    assert parse(f"rediss://localhost?ssl_cert_reqs={value}").verify is verify
    assert parse("rediss://localhost?ssl_check_hostname=false").check_hostname is False


def test_a_unix_socket() -> None:
    """Its path is the store's name; the database is an option, as redis-py has it."""
    address = parse("unix://some:p%40w@/run/redis/redis%20a.sock?db=3")
    assert (address.path, address.name) == ("/run/redis/redis a.sock",) * 2
    assert (address.user, address.password, address.database) == ("some", "p@w", 3)
    for url in ("unix://", "unix:///", "unix://host/run/redis.sock"):
        with pytest.raises(ConfigurationError, match="accepted is unix://"):
            parse(url)


def test_sentinels() -> None:
    """Several hosts, the service and its database; Sentinels may have a password of their own."""
    url = f"redis+sentinel://u:{CANARY}@one:1,[::1],three/main/4?sentinel_password={CANARY}&ssl=1"
    address = parse(url)
    assert address.nodes == (("one", 1), ("::1", 26379), ("three", 26379))
    assert (address.service, address.database, address.tls) == ("main", 4, True)
    assert (address.user, address.password, address.sentinel_password) == ("u", CANARY, CANARY)
    assert address.name == "one:1,[::1]:26379,three:26379/main"
    assert CANARY not in repr(address)
    for url in ("redis+sentinel://one", "redis+sentinel://one/", "redis+sentinel:///main"):
        with pytest.raises(ConfigurationError, match="accepted is redis\\+sentinel://"):
            parse(url)
    with pytest.raises(ConfigurationError, match="host or port"):
        parse("redis+sentinel://one,,two/main")


TRICKY = st.lists(st.sampled_from([*",@:/;%?#[]&= ", "%2C", "%40", "1", "é"]), max_size=5)


@settings(deadline=None, max_examples=300)
@given(
    before=TRICKY,
    after=TRICKY,
    encoded=st.booleans(),
    form=st.sampled_from(
        [
            "redis://:{}@h/0",
            "rediss://u:{}@h:1/0",
            "redis+sentinel://u:{}@h,h2:2/main/0",
            "redis+sentinel://h/main?sentinel_password={}",
            "unix://u:{}@/run/redis.sock",
            "redis://h/0?password={}",
            "rediss://h/0?ssl_password={}",
            "redis://:{}@127.0.0.1:1/0",
            "sqlite://u:{}@/a.db",
            "memory://u:{}",
        ]
    ),
)
def test_a_password_is_in_no_text_and_no_frame(
    before: list[str], after: list[str], encoded: bool, form: str
) -> None:
    """Whether it parses, is refused, or the store cannot be reached; encoded, or as it is."""
    secret = "".join((*before, CANARY, *after))
    url = form.format(quote(secret, safe="") if encoded else secret)
    try:
        store = open_store(Settings(store_url=url))
        said = f"{store!r} {store.name}"
        if isinstance(store, RedisStore):
            said += repr(store._address)
            assert not encoded or secret in {
                store._address.password,
                store._address.sentinel_password,
                store._address.key_password,
            }
        if "127.0.0.1" in url:
            store.depth()
    except (ConfigurationError, StoreError) as error:
        said = f"{error} {error!r} {inside(error)}"
    assert CANARY not in said


def inside(error: BaseException) -> str:
    """Return what an error reporter would send: local variables of all frames but this file's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    chained = f"{error.__cause__!r} {error.__context__!r}"
    return chained + repr([each.f_locals for each in frames if each.f_code.co_filename != __file__])


def test_a_relative_path_is_the_directorys_in_which_the_producer_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that changes its directory before the first message keeps its store."""
    inner = tmp_path / "a b%"
    inner.mkdir()
    monkeypatch.chdir(inner)
    made = MLProducer(Settings(store_url="sqlite:///store.db?write_ahead=1"))
    monkeypatch.chdir("/")
    store = open_store(made.settings)
    assert (store.name, store.write_ahead) == (str(inner / "store.db"), True)


def test_a_relative_path_without_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the current directory was removed, an absolute path is asked for."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigurationError, match="use an absolute path"):
        MLProducer(Settings(store_url="sqlite:///store.db"))
