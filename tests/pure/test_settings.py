"""Settings: every variable with its default and unit, every bad value with the variable's name."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mlproducer import RetryPolicy, Settings, TLSSettings
from mlproducer.errors import ConfigurationError
from mlproducer.settings import redact, redact_one
from tests.pure.refusals import CANARY, refused, tells_nothing
from tests.pure.tables import each_row

URL = "amqp://user:secret@broker.example:5673/prod"

VARIABLES: list[tuple[str, str, object, str, object]] = [
    # variable, field, default, a text, what it means
    ("RABBITMQ_URL", "url", None, URL, URL),
    ("RABBITMQ_URL_FILE", "url_file", None, "/run/url", "/run/url"),
    ("RABBITMQ_PASSWORD_FILE", "password_file", None, "/run/p", "/run/p"),
    ("RABBITMQ_AUTH_MECHANISM", "auth_mechanism", "PLAIN", "EXTERNAL", "EXTERNAL"),
    ("RABBITMQ_CONNECTION_NAME", "connection_name", None, "web", "web"),
    ("RABBITMQ_HEARTBEAT", "heartbeat", 60, "30", 30),
    ("RABBITMQ_CONNECTION_TIMEOUT", "connection_timeout", 10.0, "2500", 2.5),
    ("RABBITMQ_PREFETCH", "prefetch", 100, "7", 7),
    ("PREFERRED_LLM_BACKEND", "preferred_llm_backend", "api", "local", "local"),
    ("PREFERRED_STT", "preferred_stt", "api", "local", "local"),
    ("PREFERRED_EMBEDDING_BACKEND", "preferred_embedding_backend", "api", "local", "local"),
    ("ML_PUBLISH_TIMEOUT", "publish_timeout", 5.0, "250", 0.25),
    ("ML_MAX_MESSAGE_RETRIES", "max_message_retries", 3, "0", 0),
    ("ML_MESSAGE_RETRY_BASE_DELAY", "message_retry_base_delay", 1.0, "500", 0.5),
    ("ML_MESSAGE_RETRY_MAX_DELAY", "message_retry_max_delay", 10.0, "20000", 20.0),
    ("ML_RETRY_SWEEP_INTERVAL", "retry_sweep_interval", 1.0, "100", 0.1),
    ("ML_CIRCUIT_BREAKER_THRESHOLD", "circuit_breaker_threshold", 10, "3", 3),
    ("ML_CIRCUIT_BREAKER_COOLDOWN", "circuit_breaker_cooldown", 30.0, "1500", 1.5),
    ("ML_CIRCUIT_BREAKER_MODE", "circuit_breaker_mode", "consecutive", "adaptive", "adaptive"),
    ("ML_GAVE_UP_INTERVAL", "gave_up_interval", 60.0, "0", 0.0),
    ("ML_EXIT_TIMEOUT", "exit_timeout", 5.0, "0", 0.0),
    ("ML_DELIVERY_LIMIT", "delivery_limit", 20, "7", 7),
    ("ML_QUEUE_PREFIX", "queue_prefix", "", "staging.", "staging."),
    ("ML_ROLLOUT", "rollout", 1.0, "0.25", 0.25),
    ("ML_HEALTH_CHECK_INTERVAL", "health_check_interval", 30.0, "5000", 5.0),
    ("ML_RECONNECT_INITIAL_DELAY", "reconnect_initial_delay", 0.5, "50", 0.05),
    ("ML_RECONNECT_MAX_DELAY", "reconnect_max_delay", 32.0, "1000", 1.0),
    ("ML_RECONNECT_JITTER", "reconnect_jitter", 0.3, "0.5", 0.5),
    ("ML_MAX_RECONNECT_ATTEMPTS", "max_reconnect_attempts", 10, "2", 2),
    ("ML_MAX_IN_FLIGHT", "max_in_flight", 1000, "1", 1),
    ("ML_CONFIRM_GIVE_UP", "confirm_give_up", 60.0, "90000", 90.0),
    ("ML_MAX_MESSAGE_BYTES", "max_message_bytes", 16777216, "1024", 1024),
    ("ML_STORE_URL", "store_url", "memory://", "sqlite:///a.db", "sqlite:///a.db"),
    ("ML_STORE_LEASE", "store_lease", 30.0, "10000", 10.0),
    ("ML_CONNECTIONS", "connections", 1, "4", 4),
    ("ML_EXCHANGE", "exchange", "bookmarkai.ml", "other", "other"),
    ("ML_DECLARE_TOPOLOGY", "declare_topology", "active", "passive", "passive"),
]
"""The documented variables, without TLS, which is a field of its own."""

MAY_BE_ZERO = ("ML_GAVE_UP_INTERVAL", "ML_EXIT_TIMEOUT")
IN_MILLISECONDS = [
    row[0]
    for row in VARIABLES
    if isinstance(row[2], float) and row[0] not in ("ML_RECONNECT_JITTER", "ML_ROLLOUT")
]
WHOLE = [row[0] for row in VARIABLES if isinstance(row[2], int)]
BACKENDS = [row[0] for row in VARIABLES if row[0].startswith("PREFERRED")]

BAD = [
    *(
        (name, text)
        for name in IN_MILLISECONDS
        for text in ("5s", "nan", "inf", "-1", "0", "1e9")
        if text != "0" or name not in MAY_BE_ZERO
    ),
    *((name, text) for name in WHOLE for text in ("ten", "1.5", "-1", "1e3", "9" * 5000)),
    *((name, text) for name in BACKENDS for text in ("cloud", "API")),
    ("ML_MAX_IN_FLIGHT", "0"),
    ("ML_MAX_MESSAGE_BYTES", "0"),
    ("ML_CONNECTIONS", "0"),
    ("ML_MAX_RECONNECT_ATTEMPTS", "0"),
    ("RABBITMQ_HEARTBEAT", "65536"),
    ("RABBITMQ_PREFETCH", "0"),
    ("ML_RECONNECT_JITTER", "-0.1"),
    ("ML_RECONNECT_JITTER", "nan"),
    ("ML_RECONNECT_JITTER", "some"),
    ("ML_EXCHANGE", "x" * 256),
    ("ML_EXCHANGE", "a\nb"),
    ("ML_EXCHANGE", "\udc80"),
    ("ML_DECLARE_TOPOLOGY", "on"),
    ("ML_DELIVERY_LIMIT", "0"),
    ("ML_QUEUE_PREFIX", "x" * 101),
    ("ML_QUEUE_PREFIX", "a\nb"),
    ("ML_CIRCUIT_BREAKER_MODE", "on"),
    ("ML_ROLLOUT", "1.1"),
    ("ML_ROLLOUT", "half"),
    ("RABBITMQ_AUTH_MECHANISM", "plain"),
    ("ML_STORE_URL", "mysql://x"),
    ("ML_STORE_URL", "memory"),
    ("RABBITMQ_USE_SSL", "maybe"),
    ("RABBITMQ_VERIFY_PEER", "maybe"),
]

BAD_URLS = [
    "http://user:{0}@h/",
    "https://user:{0}@h/",
    "redis://user:{0}@h/",
    "AMQP+x://user:{0}@h/",
    "user:{0}@h/",
    "amqp:user:{0}@h",
    "amqp://user:{0}@/",
    "amqp://user:{0}@h:port/",
    "amqp://user:{0}@h:65536/",
    "amqp://user:{0}@[h/",
    "amqp://user:{0}@h/?heartbeat=soon",
    "amqp://user:{0}@h/?heartbeat=65536",
    "amqp://user:{0}@h/?heartbeat=5&heartbeat=6",
    "amqp://user:{0}@h/?connection_timeout=0",
    "amqp://user:{0}@h/?auth_mechanism=gssapi",
    "amqp://user:{0}@h/?auth_mechanism=external",
    "amqp://user:{0}@h/?verify=perhaps",
    "amqps://user:{0}@h/?server_name_indication=disable",
    "amqp://user:{0}@h/?key=a@b",
    "amqp://user:{0}@h:0/",
    "amqp://user:{0}@a..b/",
    "amqp://user:{0}@.a/",
    "amqp://user:{0}@" + "x" * 64 + "/",
    "amqp://user:{0}@" + "x." * 127 + "/",
    "amqp://user:{0}@a b/",
    "amqp://user:{0}@[::x]/",
    "amqp://user:{0}@[h]/",
    "amqp://user:{0}@h/%00",
    "amqp://user:{0}@h/%ff",
    "amqp://user:%ff{0}@h/",
    "amqp://user:{0}@h/" + "v" * 256,
    "amqp://user:{0}@h/a\nb",
    "amqp://user:1/{0}@localhost/",
    "amqp://user:{0},1@h/",
    "amqp://user:1,{0}@h/",
    "amqp://user:1,amqp://{0}@h/",
    "amqp://u:p@h1//;amqp://u:{0}@h2//",
    "amqp://u:p@h1/;u:{0}@h2/",
    "amqp://u:p@h1/,u:{0}@h2/",
    ",",
    " , ,",
    "amqp://user:{0}@h/#part",
    "amqp://broker.example/",
    "amqp://user:{0}@good/,http://user:{0}@bad/",
]


def test_variable() -> None:
    """Each variable sets its field, in its unit, and no other; without it the default stands."""
    each_row(VARIABLES, sets_its_field)


def sets_its_field(variable: str, name: str, default: Any, text: str, value: Any) -> None:
    """Read one variable."""
    assert getattr(Settings.from_env({}), name) == default
    changed = Settings.from_env({variable: text})
    assert getattr(changed, name) == value
    assert type(getattr(changed, name)) is type(value)
    assert attrs.evolve(changed, **{name: default}) == Settings()
    assert Settings.from_env({variable: f"  {text} "}) == changed


def test_every_field_has_its_variable() -> None:
    """No field was forgotten here, or in the environment."""
    fields = {field.name for field in attrs.fields(Settings)}
    assert fields == {row[1] for row in VARIABLES} | {"tls", "credentials", "topology"}


def test_an_empty_variable_is_unset() -> None:
    """Compose files set variables to nothing (``X=${X:-}``); that is no value."""
    names = [row[0] for row in VARIABLES]
    names += ["RABBITMQ_USE_SSL", "RABBITMQ_VERIFY_PEER", "RABBITMQ_SSL_CACERT"]
    assert Settings.from_env(dict.fromkeys(names, "")) == Settings()
    assert Settings.from_env(dict.fromkeys(names, "  ")) == Settings()


def test_a_time_is_in_seconds() -> None:
    """More than an hour was meant as milliseconds; the text says which unit is."""
    with pytest.raises(ConfigurationError, match="seconds"):
        Settings(publish_timeout=5000)


def test_bad_value() -> None:
    """What does not parse, or is out of range, is refused by the variable's name."""
    each_row(BAD, is_refused)


def is_refused(variable: str, text: str) -> None:
    """Read one bad text."""
    refused(lambda: Settings.from_env({variable: text}), ConfigurationError, variable)
    with pytest.raises(ValueError, match=variable):
        Settings.from_env({variable: text})


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_url(url: str) -> None:
    """Only AMQP URLs that name a host and a user are accepted; the error shows no password."""
    text = url.format(CANARY)
    refused(lambda: Settings.from_env({"RABBITMQ_URL": text}), ConfigurationError, "RABBITMQ_URL")
    refused(lambda: Settings(url=text), ConfigurationError, "url")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("publish_timeout", None),
        ("publish_timeout", True),
        ("publish_timeout", float("nan")),
        ("publish_timeout", CANARY),
        ("publish_timeout", 5000 * 1000),
        ("max_in_flight", 1.0),
        ("max_in_flight", CANARY),
        ("heartbeat", None),
        ("url", b"amqp://h"),
        ("url", 5672),
        ("preferred_stt", None),
        ("preferred_stt", CANARY),
        ("exchange", None),
        ("store_url", None),
        ("store_url", f"mysql://{CANARY}@h"),
        ("declare_topology", True),
    ],
)
def test_bad_field(name: str, value: Any) -> None:
    """A wrong field is refused by its name; what might be a secret is given by its type only."""
    refused(lambda: Settings(**{name: value}), ConfigurationError, name)


def test_frozen() -> None:
    """Settings do not change under a running producer."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings().heartbeat = 1  # type: ignore[misc]


# --- brokers -----------------------------------------------------------------------------------


def test_no_url_is_an_error_at_the_first_use() -> None:
    """Settings without a URL can be made anywhere; who needs a broker is told what is missing."""
    settings = Settings.from_env({})
    with pytest.raises(ConfigurationError, match="RABBITMQ_URL"):
        _ = settings.brokers


@pytest.mark.parametrize(
    ("url", "host", "port", "virtual_host", "user", "password", "tls"),
    [
        ("amqp://u:p@h", "h", 5672, "/", "u", "p", False),
        ("amqp://u:p@h/", "h", 5672, "/", "u", "p", False),
        ("amqps://u:p@h/%2F", "h", 5671, "/", "u", "p", True),
        ("amqp://u:p@h:1/a%2Fb", "h", 1, "a/b", "u", "p", False),
        ("amqp://u%40x:p%3A%40%2F@h/v", "h", 5672, "v", "u@x", "p:@/", False),
        ("amqp://u:p@ss:word@h/v", "h", 5672, "v", "u", "p@ss:word", False),
        ("amqp://u:@[::1]:1/", "::1", 1, "/", "u", "", False),
        ("amqp://localhost/", "localhost", 5672, "/", "guest", "guest", False),
        ("amqp://127.0.0.1:5673", "127.0.0.1", 5673, "/", "guest", "guest", False),
    ],
)
def test_url(
    url: str, host: str, port: int, virtual_host: str, user: str, password: str, tls: bool
) -> None:
    """A URL's parts, percent-encoded or not; guest is assumed on loopback only."""
    [broker] = Settings(url=url).brokers
    assert (broker.host, broker.port, broker.virtual_host) == (host, port, virtual_host)
    assert (broker.user, broker.password, broker.tls) == (user, password, tls)


def test_several_brokers() -> None:
    """Commas separate them; spaces and a last comma do no harm."""
    brokers = Settings(url="amqp://u:p@a:1/, amqp://u:p@b:2/v ,").brokers
    assert [broker.address for broker in brokers] == ["a:1", "b:2"]


def test_pyamqp() -> None:
    """Celery's spelling of the scheme is amqp's."""
    assert Settings(url="pyamqp://u:p@h//").brokers == Settings(url="amqp://u:p@h//").brokers
    assert Settings(url="pyamqp://u:p@h//").brokers[0].virtual_host == "/"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("amqp://u:p@h/prod/", "slash"),
        ("amqp://u:p@h/prod%2F", ""),
        ("amqp://u:p@h/prod", ""),
        ("amqp://u:p@h/", ""),
        ("amqp://u:p@h//", ""),
    ],
)
def test_hint(url: str, hint: str) -> None:
    """A slash at the end is a part of the virtual host's name, and most likely a slip."""
    [broker] = Settings(url=url).brokers
    assert hint in broker.hint
    assert bool(hint) == bool(broker.hint)


def test_celerys_separator() -> None:
    """Celery separates URLs by semicolons; the error says what to write."""
    with pytest.raises(ConfigurationError, match="comma"):
        Settings(url="amqp://u:p@h1//;amqp://u:p@h2//")


def test_query() -> None:
    """RabbitMQ's own query parameters come before the settings, for their broker alone."""
    query = "heartbeat=7&connection_timeout=250&auth_mechanism=external&verify=verify_none"
    files = "server_name_indication=name&cacertfile=/ca&certfile=/c&keyfile=/k"
    first, second = Settings(url=f"amqps://h/v?{query}&{files},amqps://u:p@h/?heartbeat=").brokers
    assert (first.heartbeat, first.connection_timeout, first.auth_mechanism) == (
        7,
        0.25,
        "EXTERNAL",
    )
    assert first.virtual_host == "v"
    assert first.tls_settings == TLSSettings(
        ca_certs="/ca", certfile="/c", keyfile="/k", server_name="name", verify_peer=False
    )
    assert (second.heartbeat, second.connection_timeout) == (60, 10.0)
    assert (second.auth_mechanism, second.tls_settings) == ("PLAIN", TLSSettings())


def test_the_settings_hold_where_a_url_says_nothing() -> None:
    """Heartbeat, limit and mechanism of the settings reach each broker."""
    tls = TLSSettings(certfile="/c")
    settings = Settings(
        url="amqp://h", heartbeat=5, connection_timeout=2, auth_mechanism="EXTERNAL", tls=tls
    )
    [broker] = settings.brokers
    assert (broker.heartbeat, broker.connection_timeout) == (5, 2)
    assert (broker.auth_mechanism, broker.tls_settings, broker.user) == ("EXTERNAL", tls, "")


def test_other_parameters_are_ignored_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """A parameter of another client gets one warning, which names it and not its value."""
    url = f"amqp://u:p@h/?frame_max={CANARY}&x%20{CANARY}=1,amqp://u:p@g/?frame_max=1"
    settings = Settings.from_env({"RABBITMQ_URL": url})
    assert [broker.host for broker in settings.brokers] == ["h", "g"]
    named, unnamed = (record.getMessage() for record in caplog.records)
    assert "frame_max" in named
    assert CANARY not in named + unnamed


def test_files(tmp_path: Path) -> None:
    """URL and password may stand in files, which are read each time."""
    url, password = tmp_path / "url", tmp_path / "password"
    url.write_text(" amqps://u@h/v\n")
    password.write_text(f"{CANARY}:@/\n")
    environ = {"RABBITMQ_URL_FILE": str(url), "RABBITMQ_PASSWORD_FILE": str(password)}
    settings = Settings.from_env({**environ, "RABBITMQ_SSL_CACERT": "/ca"})
    [broker] = settings.brokers
    assert (broker.host, broker.user, broker.password) == ("h", "u", f"{CANARY}:@/")
    assert broker.tls_settings == settings.tls == TLSSettings(ca_certs="/ca", enforced=False)
    url.write_text("amqp://u@g/")
    assert [(each.host, each.tls) for each in settings.brokers] == [("g", False)]
    url.write_text(f"http://{CANARY}")
    refused(lambda: settings.brokers, ConfigurationError, "url_file")
    url.write_bytes(b"\xff" + CANARY.encode())
    refused(lambda: settings.brokers, ConfigurationError, "url_file")
    url.unlink()
    refused(lambda: settings.brokers, ConfigurationError, "url_file", str(url))


@pytest.mark.parametrize(
    "values",
    [
        {"url": f"amqp://u:{CANARY}@h", "url_file": "/url"},
        {"password_file": "/p", "credentials": lambda: ("u", CANARY)},
    ],
)
def test_two_sources(values: dict[str, Any]) -> None:
    """Of two places for the same thing, neither is guessed."""
    refused(lambda: Settings(**values), ConfigurationError, *values)


def test_credentials_need_no_user_in_the_url() -> None:
    """Where a callable gives the user, the URL names none."""
    settings = Settings(url="amqp://h/", credentials=lambda: ("u", CANARY))
    assert (settings.brokers[0].user, settings.brokers[0].password) == ("", "")


# --- TLS ---------------------------------------------------------------------------------------

FILES = {
    "RABBITMQ_SSL_CACERT": "/ca.pem",
    "RABBITMQ_SSL_CERTFILE": "/cert.pem",
    "RABBITMQ_SSL_KEYFILE": "/key.pem",
}


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on"])
def test_use_ssl_encrypts_plain_urls(text: str) -> None:
    """RABBITMQ_USE_SSL with an amqp:// URL means TLS on TLS's port, never clear text."""
    settings = Settings.from_env({"RABBITMQ_URL": "amqp://u:p@h/", "RABBITMQ_USE_SSL": text})
    [broker] = settings.brokers
    assert (broker.tls, broker.port) == (True, 5671)
    assert settings.tls == TLSSettings()
    assert settings.tls.verify_peer


@pytest.mark.parametrize("text", ["false", "0", "no", "off"])
def test_use_ssl_off(text: str) -> None:
    """Certificate files alone do not switch TLS on; amqps:// does, whatever the switch says."""
    environ = {"RABBITMQ_URL": "amqp://u:p@h/", "RABBITMQ_USE_SSL": text, **FILES}
    settings = Settings.from_env(environ)
    assert settings.tls is None
    assert not settings.brokers[0].tls
    settings = Settings.from_env({**environ, "RABBITMQ_URL": "amqps://u:p@h/"})
    assert settings.tls == TLSSettings(ca_certs="/ca.pem", certfile="/cert.pem", keyfile="/key.pem")


def test_certificates_without_tls_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Who gave certificates expects TLS; that there is none is said, once."""
    environ = {"RABBITMQ_URL": "amqp://u:p@h/", "RABBITMQ_SSL_CACERT": "/ca.pem"}
    assert not Settings.from_env(environ).brokers[0].tls
    [record] = caplog.records
    assert "RABBITMQ_SSL_CACERT" in record.getMessage()
    assert "amqps://" in record.getMessage()
    caplog.clear()
    Settings.from_env({**environ, "RABBITMQ_USE_SSL": "true"})
    Settings.from_env({**environ, "RABBITMQ_URL": "amqps://u:p@h/"})
    Settings.from_env({"RABBITMQ_SSL_CACERT": "/ca.pem"})
    assert not caplog.records


def test_tls_variables() -> None:
    """Server name and key password have variables; a password has one place."""
    name, password = "RABBITMQ_SSL_SERVER_NAME", "RABBITMQ_SSL_KEY_PASSWORD"
    environ = {"RABBITMQ_USE_SSL": "1", name: "broker", password: CANARY}
    tls = Settings.from_env(environ).tls
    assert tls == TLSSettings(server_name="broker", key_password=CANARY)
    assert CANARY not in repr(tls)
    both = {**environ, f"{password}_FILE": "/p"}
    refused(lambda: Settings.from_env(both), ConfigurationError, password, f"{password}_FILE")
    del both[password]
    tls = Settings.from_env(both).tls
    assert tls == TLSSettings(server_name="broker", key_password_file="/p")


def test_verify_peer_off() -> None:
    """The check of the server's certificate can be switched off, and only by its own variable."""
    environ = {"RABBITMQ_USE_SSL": "true", "RABBITMQ_VERIFY_PEER": "false"}
    assert Settings.from_env(environ).tls == TLSSettings(verify_peer=False)


# --- secrets -----------------------------------------------------------------------------------


@given(
    password=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1),
    encoded=st.booleans(),
    scheme=st.sampled_from(["amqp", "amqps", "redis", "sqlite", "http"]),
    query=st.booleans(),
)
@example(password="a@b:c", encoded=False, scheme="amqp", query=False)
@example(password="p/w?d#x", encoded=True, scheme="amqp", query=True)
@example(password="://@", encoded=False, scheme="amqp", query=False)
@hypothesis_settings(deadline=None, max_examples=50)
def test_redact(password: str, encoded: bool, scheme: str, query: bool) -> None:
    """I34: no password is left of any URL, however it is written; the host is."""
    secret = f"{CANARY}{password}{CANARY}"
    written = quote(secret, safe="") if encoded else secret.replace(",", "")
    url = f"{scheme}://user:{written}@host:1/path" + (f"?password={CANARY}" if query else "")
    for shown in (redact(url), redact_one(url), redact(f"{url},{url}")):
        assert CANARY not in shown
        assert "user" not in shown
        assert "host:1" in shown or not encoded


@pytest.mark.parametrize("password", [CANARY, f"{CANARY}@x", f"x:{CANARY}", f"%40{CANARY}%3A"])
def test_no_password_in_reprs(password: str) -> None:
    """What people log by accident holds no secret."""
    url = f"amqp://user:{password}@h/v"
    settings = Settings(
        url=f"{url}, {url}",
        store_url=f"redis://:{password}@h/0",
        tls=TLSSettings(keyfile="/key.pem"),
    )
    for each in (settings, settings.brokers, settings.brokers[0]):
        assert CANARY not in f"{each} {each!r}"
    assert "h/v" in repr(settings)
    assert pickle.loads(pickle.dumps(settings)) == settings


TRICKY = st.lists(st.sampled_from([*",@:/;%?#[]&= ", "%2C", "%00", "://", "1"]), max_size=4)
SCHEMES = ("amqp", "amqps", "pyamqp", "redis", "rediss", "redis+sentinel", "unix", "postgresql")


@given(
    before=TRICKY,
    after=TRICKY,
    user=st.sampled_from(["user", "", "u@x"]),
    scheme=st.sampled_from(SCHEMES),
    more=st.sampled_from(["", ",{0}", ";{0}", ",amqp://u:p@h2/", "/{0}", "?password={1}"]),
    host=st.sampled_from(["host", "localhost:1", "[::1]", "a..b"]),
)
@hypothesis_settings(deadline=None, max_examples=300)
def test_a_password_is_never_shown(
    before: list[str], after: list[str], user: str, scheme: str, more: str, host: str
) -> None:
    """I34, I37: whatever the password, accepted or refused, nothing shows it: no repr, no frame."""
    password = "".join((*before, CANARY, *after))
    url = f"{scheme}://{user}:{password}@{host}/v"
    url += more.format(url, CANARY)
    name, variable = ("url", "RABBITMQ_URL")
    if "amqp" not in scheme:
        name, variable = ("store_url", "ML_STORE_URL")
    for make in (
        lambda: Settings(**{name: url}),
        lambda: Settings.from_env({variable: url}),
        lambda: Settings(url=url),
        lambda: Settings(store_url=url),
    ):
        try:
            settings = make()
            shown = f"{settings!r} {settings.brokers if settings.url else ''}"
        except ConfigurationError as error:
            tells_nothing(error)
        else:
            assert CANARY not in shown


@given(password=st.text(min_size=1), virtual_host=st.text(), tls=st.booleans())
@hypothesis_settings(deadline=None, max_examples=200)
def test_what_is_encoded_comes_back(password: str, virtual_host: str, tls: bool) -> None:
    """A percent-encoded password and virtual host are read as they were, or refused."""
    url = f"amqp{'s' * tls}://u:{_encoded(password)}@h/{_encoded(virtual_host)}"
    try:
        first, second = Settings(url=f"{url},{url}").brokers
    except ConfigurationError:
        odd = set(map(chr, [*range(32), 127]))
        too_long = len(virtual_host.encode(errors="replace")) > 255
        assert too_long or odd & set(password + virtual_host) or _lone(password + virtual_host)
    else:
        assert first == second
        assert (first.password, first.virtual_host) == (password, virtual_host or "/")


def _encoded(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")


def _lone(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def test_redact_is_linear() -> None:
    """A long text that looks like many URLs costs no more than it is long."""
    start = time.thread_time()
    redact("redis://" * 100_000)
    assert time.thread_time() - start < 1.0


STORES = [
    "sqlite://[/x",
    "sqlite:///a%00b",
    "sqlite:///a.db?write_ahead=1&write_ahead=0",
    "sqlite:///a.db?write_ahead=perhaps",
    "sqlite:///a.db?other=1",
    "sqlite:///",
    "sqlite://a.db",
    "memory://x",
    "memory:///?write_ahead=1",
    "redis://:p@h/0?prefix=a&prefix=b",
    "redis://h/%00",
    "postgresql://u:p@h/a\nb",
]


@pytest.mark.parametrize("url", STORES)
def test_bad_store_url(url: str) -> None:
    """What can be seen without opening a store is refused when settings are made."""
    refused(lambda: Settings.from_env({"ML_STORE_URL": url}), ConfigurationError, "ML_STORE_URL")
    refused(lambda: Settings(store_url=url), ConfigurationError, "store_url")


def test_retry_policy() -> None:
    """It has the settings' own numbers where none are given, and their ranges."""
    settings, policy = Settings(), RetryPolicy()
    assert policy.max_retries == settings.max_message_retries
    assert policy.base_delay == settings.message_retry_base_delay
    assert policy.max_delay == settings.message_retry_max_delay
    assert RetryPolicy(5, 0.5, 8.0) == RetryPolicy(max_retries=5, base_delay=0.5, max_delay=8.0)


@pytest.mark.parametrize("numbers", [(-1,), (1.5,), (True,), (3, 0.0), (3, 1.0, 5000), (3, "1")])
def test_bad_retry_policy(numbers: Any) -> None:
    """It is refused when it is made."""
    with pytest.raises(ConfigurationError):
        RetryPolicy(*numbers)


def test_what_is_given_goes_before_the_environment() -> None:
    """A variable of a given field is not even parsed; what is not given, or None, is read."""
    environ = {
        "RABBITMQ_URL_FILE": "/nowhere",
        "ML_CONNECTIONS": "many",
        "ML_PUBLISH_TIMEOUT": "700",
    }
    given = {"url": "amqp://u:p@h/", "connections": 2, "exchange": None}
    settings = Settings.from_mapping(given, environ)
    assert settings == Settings(url="amqp://u:p@h/", connections=2, publish_timeout=0.7)
    with pytest.raises(ConfigurationError, match="no setting store_ulr: did you mean store_url"):
        Settings.from_mapping({"store_ulr": "memory://"}, {})
    with pytest.raises(ConfigurationError, match=r"^url"):
        Settings.from_mapping({"url": "http://u:p@h/"}, {})


def test_tls_by_mapping_and_by_variables() -> None:
    """A mapping makes `TLSSettings`; the variables hold for an encrypted URL that is given."""
    variables = {"RABBITMQ_SSL_CACERT": "/ca.pem"}
    url = "amqps://u:p@h/"
    tls = Settings.from_mapping({"url": url}, variables).tls
    assert tls == TLSSettings(ca_certs="/ca.pem")
    given = {"url": url, "tls": {"verify_peer": False}}
    assert Settings.from_mapping(given, variables).tls == TLSSettings(verify_peer=False)
    with pytest.raises(ConfigurationError, match="tls has no field cert"):
        Settings.from_mapping({"tls": {"cert": "x"}}, {})
