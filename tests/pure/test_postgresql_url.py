"""URLs of a PostgreSQL store, judged without I/O."""

from __future__ import annotations

import pytest

from mlproducer import Settings
from mlproducer._store_url import TABLE, read_postgresql
from mlproducer.errors import ConfigurationError
from mlproducer.stores.postgres.rows import read_text, text


def test_what_a_url_says() -> None:
    """Hosts, database, libpq's options and our own; the password in no repr."""
    address = read_postgresql(
        "postgresql://u%40x:PRIVATE@h1:5433,h2/data?sslmode=verify-full&table=ml.rows&write_ahead=1"
        "&connect_timeout=3&sslrootcert=/etc/ca.pem"
    )
    assert address.nodes == (("h1", 5433), ("h2", 5432))
    assert address.name == "h1:5433,h2:5432/data"
    assert (address.table, address.write_ahead, address.connect_timeout) == ("ml.rows", True, 3.0)
    assert address.options == {
        "user": "u@x",
        "password": "PRIVATE",
        "dbname": "data",
        "sslmode": "verify-full",
        "sslrootcert": "/etc/ca.pem",
    }
    assert "PRIVATE" not in repr(address)


def test_what_it_need_not_say() -> None:
    """A socket's directory as an option, and libpq's own defaults."""
    address = read_postgresql("postgresql:///data?host=/run/postgresql&user=app")
    assert (address.nodes, address.name, address.table) == ((), "/run/postgresql/data", TABLE)
    assert address.write_ahead is None
    assert read_postgresql("postgresql://").nodes == ()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:PRIVATE@h:0/d",
        "postgresql://u:PRIVATE@h:x/d",
        "postgresql://u:PRIVATE@h/d/e",
        "postgresql://u:PRI/VATE@h/d",
        "postgresql://u:PRIVATE@h/d#x",
        "postgresql://u:PRIVATE@h/d?nonsense=1",
        "postgresql://u:PRIVATE@h/d?sslmode=perhaps",
        "postgresql://u:PRIVATE@h/d?write_ahead=perhaps",
        "postgresql://u:PRIVATE@h/d?table=Rows",
        "postgresql://u:PRIVATE@h/d?table=a;DROP",
        "postgresql://u:PRIVATE@h/d?table=a.b.c",
        "postgresql://u:PRIVATE@h/d?connect_timeout=0",
        "postgresql://u:PRIVATE@h/d?table=a&table=b",
    ],
)
def test_what_is_refused(url: str) -> None:
    """When settings are made, and nothing of the URL is quoted but names of options."""
    with pytest.raises(ConfigurationError, match="store_url") as caught:
        Settings(store_url=url)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("raw", ["", "id-1", "a\0b", "\\", "\\n", "ä€", "\ud800", "line\nline"])
def test_texts_come_back(raw: str) -> None:
    """Whatever the database's encoding, texts stand there as ASCII."""
    assert text(raw).isascii()
    assert "\0" not in text(raw)
    assert read_text(text(raw)) == raw
