"""A store's file that is not what it should be, or not where: told, and left as it is.

Runs on: pytest's main thread; another user's processes.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mlproducer import stores
from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Depth, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore
from tests.helpers import LIMIT, make_envelope

NOBODY = 65534
ROWS = 300

Damage = Callable[[Path], object]


def entry(name: str, delay: float | None = 0.0) -> Entry:
    """Give a message of 1 kB."""
    return Entry(Record(make_envelope(name, body=b"secret" * 170)), delay)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file with 300 rows, closed."""
    file = tmp_path / "store.db"
    with closing(SQLiteStore(file)) as store:
        store.put([entry(f"m{number}") for number in range(ROWS)], LIMIT)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """Give all that lies in a folder but SQLite's index of its log, which may come and go."""
    files = (each for each in folder.iterdir() if not each.name.endswith("-shm"))
    return {
        each.name: str(each.readlink()).encode() if each.is_symlink() else each.read_bytes()
        for each in files
        if each.is_symlink() or (each.is_file() and each.stat().st_size)
    }


def write_at(offset: int, data: bytes) -> Damage:
    """Make the damage that writes over a part."""

    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def in_the_middle(path: Path) -> None:
    """Write noise over a page in the middle."""
    write_at(path.stat().st_size // 2 // 4096 * 4096, os.urandom(4096))(path)


def query(statement: str) -> Damage:
    """Make the damage that a statement does."""

    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(statement)

    return damage


def another(path: Path) -> None:
    """Put another program's database there."""
    path.unlink()
    query("CREATE TABLE notes (text)")(path)
    path.chmod(0o600)


def link(path: Path) -> None:
    """Put a link to the store in its place."""
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def dangling(path: Path) -> None:
    """Put a link to nowhere in its place."""
    path.unlink()
    path.symlink_to(path.with_suffix(".real"))


def only_the_log(path: Path) -> None:
    """Take the file away from its log."""
    path.with_name(f"{path.name}-wal").write_bytes(b"x" * 4096)
    path.unlink()


def folder(path: Path) -> None:
    """Put a folder there."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no database": (lambda path: path.write_bytes(b"no database\n" * 1000), "move it away"),
    "no header": (write_at(0, b"\0" * 100), "move it away"),
    "damaged": (in_the_middle, "move it away"),
    "cut in the middle": (lambda path: os.truncate(path, path.stat().st_size // 2), "move it away"),
    "cut in a page": (lambda path: os.truncate(path, 5000), "move it away"),
    "cut in the header": (lambda path: os.truncate(path, 50), "move it away"),
    "empty": (lambda path: os.truncate(path, 0), "is empty"),
    "newer": (query("PRAGMA user_version = 99"), "99"),
    "another program's": (another, "another"),
    "a link": (link, "link"),
    "a link to nowhere": (dangling, "link"),
    "a folder": (folder, "regular file"),
    "only the log": (only_the_log, "log"),
    "readable by all": (lambda path: path.chmod(0o644), "chmod 600"),
}


@pytest.mark.parametrize(("damage", "advice"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_right_is_told_and_left_alone(path: Path, damage: Damage, advice: str) -> None:
    """An error names the path and what to do, at each call; nothing was changed (95, 126)."""
    damage(path)
    before = contents(path.parent)
    store = SQLiteStore(path)
    for call in (store.depth, lambda: store.put([entry("new")], 0.05), lambda: store.claim(10)):
        with pytest.raises(StoreError) as caught:
            call()
        assert str(path) in str(caught.value)
        assert advice in str(caught.value)
        assert "secret" not in str(caught.value)
    store.close()
    assert contents(path.parent) == before


def test_a_mended_file_is_used_at_once(path: Path) -> None:
    """A store that was refused is opened as soon as its file is right, without a restart."""
    good = path.read_bytes()
    path.write_bytes(b"no database")
    with closing(SQLiteStore(path)) as store:
        with pytest.raises(StoreError):
            store.depth()
        path.write_bytes(good)
        assert store.depth() == Depth(waiting=ROWS)


def test_no_directory(tmp_path: Path) -> None:
    """A directory that is not there is named, and not made."""
    path = tmp_path / "gone" / "store.db"
    with pytest.raises(StoreError, match=str(path)):
        SQLiteStore(path).depth()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o1777, False), (0o775, False)])
def test_a_directory_in_which_anyone_may_replace_it(
    tmp_path: Path, mode: int, refused: bool
) -> None:
    """A directory for all is refused, unless it is sticky, as /tmp is (126)."""
    tmp_path.chmod(mode)
    store = SQLiteStore(tmp_path / "store.db")
    with pytest.raises(StoreError, match="directory") if refused else contextlib.nullcontext():
        assert store.depth() == Depth()
    assert (tmp_path / "store.db").exists() is not refused
    store.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes(tmp_path: Path, umask: int) -> None:
    """Whatever the umask, each file is its owner's alone (126)."""
    before = os.umask(umask)
    try:
        store = SQLiteStore(tmp_path / "store.db")
        store.put([entry("m")], LIMIT)
    finally:
        os.umask(before)
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()}
    assert {"store.db", "store.db-wal", "store.db-shm"} <= modes.keys()
    assert set(modes.values()) == {0o600}
    store.close()


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_link_beside_it_is_not_followed(path: Path, tmp_path: Path, suffix: str) -> None:
    """A link that waits in the place of the log changes nothing where it leads (126)."""
    target = tmp_path / "target"
    target.write_bytes(b"")
    path.with_name(path.name + suffix).symlink_to(target)
    with pytest.raises(StoreError, match=str(path)):
        SQLiteStore(path).put([entry("m")], 0.05)
    assert target.read_bytes() == b""


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Give a folder that other users can reach."""
    folder = Path(tempfile.mkdtemp(prefix="mlproducer-sqlite-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


PUT = f"""
import os, sys
from mlproducer.errors import StoreError
from mlproducer.message import Envelope
from mlproducer.stores.protocol import Entry, Record
from mlproducer.stores.sqlite import SQLiteStore
os.setgid({NOBODY})
os.setuid({NOBODY})
try:
    SQLiteStore(sys.argv[1]).put([Entry(Record(Envelope("m", "raw", "x", "k", b"", b"")))], 0.05)
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can be")
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_directory_in_which_it_may_not_write(path: Path, there: bool) -> None:
    """A user who may not write in the directory is told so, and nothing is made (95)."""
    with shared_folder() as folder:
        file = folder / "store.db"
        if there:
            shutil.copy(path, file)
            file.chmod(0o600)
            os.chown(file, NOBODY, NOBODY)
        before = contents(folder)
        script = [sys.executable, "-c", PUT, str(file)]
        told = subprocess.run(script, capture_output=True, check=True, text=True, timeout=LIMIT)
        assert str(file) in told.stdout
        assert "director" in told.stdout
        assert contents(folder) == before
        assert told.stderr == ""


def test_taken_away_while_in_use(path: Path) -> None:
    """A file that was removed takes no message: that is told before anything begins anew."""
    with closing(SQLiteStore(path)) as store:
        assert store.depth() == Depth(waiting=ROWS)
        for each in path.parent.glob("store.db*"):
            each.unlink()
        with pytest.raises(StoreError, match=str(path)):
            store.put([entry("new")], LIMIT)
        store.put([entry("newer")], LIMIT)
    with closing(SQLiteStore(path)) as again:
        assert [row.record.envelope.message_id for row in again.claim(10)] == ["newer"]


CHANGES = {
    "body": "UPDATE messages SET body = zeroblob(length(body)) WHERE message_id = 'm7'",
    "shorter": "UPDATE messages SET body = x'00' WHERE message_id = 'm7'",
    "text": "UPDATE messages SET body = 'text', properties = 5 WHERE message_id = 'm7'",
    "route": "UPDATE messages SET routing_key = 'elsewhere' WHERE message_id = 'm7'",
    "no text": "UPDATE messages SET exchange = x'ff' WHERE message_id = 'm7'",
    "attempts": "UPDATE messages SET attempts = -1 WHERE message_id = 'm7'",
}


@pytest.mark.parametrize("statement", CHANGES.values(), ids=CHANGES)
def test_a_damaged_row_is_put_aside(
    path: Path, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One row that is no message is logged by its key and put aside; all others go on (95)."""
    query(statement)(path)
    with closing(SQLiteStore(path)) as store:
        rows = store.claim(ROWS)
        found = {row.record.envelope.message_id for row in rows}
        assert found == {f"m{number}" for number in range(ROWS)} - {"m7"}
        (told,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert str(path) in told.getMessage()
        assert "8" in told.getMessage()  # its key
        assert "secret" not in told.getMessage()
        assert store.depth() == Depth(waiting=ROWS - 1)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT key FROM quarantine").fetchall() == [(8,)]


def test_a_damaged_letter_does_not_hide_the_others(path: Path) -> None:
    """A list of dead letters goes on past those that cannot be read."""
    with closing(SQLiteStore(path)) as store:
        rows = store.claim(3)
        dead = [Record(row.record.envelope, attempts=4, dead=True) for row in rows]
        store.release([Change(row.claim, each, 60.0) for row, each in zip(rows, dead, strict=True)])
        query("UPDATE messages SET body = x'00' WHERE message_id = 'm0'")(path)
        (letter,) = store.letters(1)
        assert letter.record.envelope.message_id == "m1"
        assert store.depth() == Depth(ROWS - 3, 2)


def test_a_boot_makes_everything_due(path: Path) -> None:
    """Leases and delays of before the machine started anew have ended (106)."""
    with closing(SQLiteStore(path)) as store:
        claimed = store.claim(ROWS)
        assert len(claimed) == ROWS
        store.put([entry("delayed", 50.0), entry("ahead", None)], LIMIT)
        query("UPDATE clock SET boot = 'another'")(path)
        with closing(SQLiteStore(path, clock=lambda: 0.001)) as rebooted:
            rows = rebooted.claim(ROWS + 2)
    assert len(rows) == ROWS + 2
    doubtful = {row.record.envelope.message_id for row in rows if row.record.doubtful}
    assert doubtful == {f"m{number}" for number in range(ROWS)} | {"ahead"}


def test_a_clock_far_ahead_delays_nobody(path: Path) -> None:
    """What another clock has made due beyond the longest delay is due now (106)."""
    with closing(SQLiteStore(path, clock=lambda: 1e6)) as ahead:
        assert len(ahead.claim(ROWS)) == ROWS
    with closing(SQLiteStore(path, lease=1.0, clock=lambda: 10.0)) as store:
        assert len(store.claim(ROWS)) == ROWS


def test_no_wall_clock_is_asked() -> None:
    """Neither the store's code nor its SQL reads the time of day, which may jump (106)."""
    assert stores.__file__ is not None
    for path in Path(stores.__file__).parent.glob("sqlite*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in {"time.time", "time.time_ns"}
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "datetime" not in ast.unparse(node)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.lower()
                for function in ("current_timestamp", "strftime(", "julianday(", "unixepoch("):
                    assert function not in text
