"""A store's file that is not what it should be, or not where: told, and left as it is.

Runs on: pytest's main thread; another user's processes.
"""

from __future__ import annotations

import ast
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mlproducer import stores
from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Depth, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore, file, owners, path_checks
from mlproducer.stores.sqlite.owners import Owner, boot_id
from tests.helpers import LIMIT, make_envelope

NOBODY = 65534
ROWS = 300

Damage = Callable[[Path], object]


def entry(name: str, delay: float | None = 0.0) -> Entry:
    """Return a message of 1 kB."""
    return Entry(Record(make_envelope(name, body=b"secret" * 170)), delay)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file with 300 rows, closed."""
    file = tmp_path / "store.db"
    with closing(SQLiteStore(file)) as store:
        store.put([entry(f"m{number}") for number in range(ROWS)], LIMIT)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """Return all that lies in a folder but SQLite's index of its log, which may come and go."""
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


def ask(path: Path, question: str) -> list[object]:
    """Return the first column of what SQLite answers."""
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute(question)]


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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can be")
@pytest.mark.parametrize(
    ("mode", "owner", "advice"),
    [
        (0o777, 0, "chmod o-w"),
        (0o777, 0, "mkdir -m 700"),
        (0o777, NOBODY, ""),
        (0o1777, 0, ""),
    ],
)
def test_a_directory_in_which_anyone_may_replace_it(mode: int, owner: int, advice: str) -> None:
    """One for all is refused, but for one's own, or a sticky one as /tmp is (126)."""
    with shared_folder() as folder:
        folder.chmod(mode)
        os.chown(folder, owner, owner)
        file = folder / "store.db"
        told = as_nobody(file)
        assert advice in told
        assert bool(told) is bool(advice)
        assert file.exists() is not bool(advice)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can be")
def test_a_directory_for_all_that_only_one_user_can_reach() -> None:
    """One above it, which keeps all others out, is enough."""
    with shared_folder() as folder:
        os.chown(folder, NOBODY, NOBODY)
        folder.chmod(0o700)
        inner = folder / "inner"
        inner.mkdir()
        inner.chmod(0o777)
        assert as_nobody(inner / "store.db") == ""


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
    """Yield a folder that other users can reach."""
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
from mlproducer.stores.sqlite.owners import Owner, boot_id
os.setgid({NOBODY})
os.setuid({NOBODY})
try:
    SQLiteStore(sys.argv[1]).put([Entry(Record(Envelope("m", "raw", "x", "k", b"", b"")))], 0.05)
except StoreError as error:
    print(error)
"""


def as_nobody(file: Path) -> str:
    """Put a message as another user, and return the error's text."""
    script = [sys.executable, "-c", PUT, str(file)]
    told = subprocess.run(script, capture_output=True, check=True, text=True, timeout=LIMIT)
    assert told.stderr == ""
    return told.stdout


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
        told = as_nobody(file)
        assert str(file) in told
        assert "director" in told
        assert contents(folder) == before


def test_taken_away_while_in_use(path: Path) -> None:
    """A file that was removed takes no message: that is reported before anything starts over."""
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
    "attempts below": "UPDATE messages SET attempts = -1 WHERE message_id = 'm7'",
    "attempts beyond": "UPDATE messages SET attempts = 1 << 31 WHERE message_id = 'm7'",
    "token": f"UPDATE messages SET token = {2**63 - 1} WHERE message_id = 'm7'",
    "negative token": "UPDATE messages SET token = -9 << 50 WHERE message_id = 'm7'",
    "first failure": "UPDATE messages SET first_failed_at = -1 << 62 WHERE message_id = 'm7'",
    "late failure": "UPDATE messages SET first_failed_at = 1 << 62 WHERE message_id = 'm7'",
    "acceptance": "UPDATE messages SET accepted_at = 1 << 62 WHERE message_id = 'm7'",
}


@pytest.mark.parametrize("statement", CHANGES.values(), ids=CHANGES)
def test_a_damaged_row_is_put_aside(
    path: Path, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One row that is no message is logged by its key and put aside; all others go on (95)."""
    query(statement)(path)
    (key,) = ask(path, "SELECT key FROM messages WHERE message_id = 'm7'")
    with closing(SQLiteStore(path)) as store:
        rows = store.claim(ROWS)
        found = {row.record.envelope.message_id for row in rows}
        assert found == {f"m{number}" for number in range(ROWS)} - {"m7"}
        (told,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert str(path) in told.getMessage()
        assert f"row {key} " in told.getMessage()
        assert "secret" not in told.getMessage()
        assert store.depth() == Depth(waiting=ROWS - 1)
    assert ask(path, "SELECT key FROM quarantine") == [key]


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
    """Leases and delays of before the machine was restarted have ended (106)."""
    with closing(SQLiteStore(path)) as store:
        claimed = store.claim(ROWS)
        assert len(claimed) == ROWS
        store.put([entry("delayed", 50.0), entry("ahead", None)], LIMIT)
        query("UPDATE clock SET boot = 'another'")(path)
        store._database.owner.leave()  # its lock did not outlive the boot
        with closing(SQLiteStore(path, clock=lambda: 0.001)) as rebooted:
            rows = rebooted.claim(ROWS + 2)
    assert len(rows) == ROWS + 2
    doubtful = {row.record.envelope.message_id for row in rows if row.record.doubtful}
    assert doubtful == {f"m{number}" for number in range(ROWS)} | {"ahead"}


def test_containers_with_boot_ids_of_their_own_share_a_clock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that opens the file takes nothing from one that is at it, and the other way round."""
    with closing(SQLiteStore(path)) as store:
        assert len(store.claim(ROWS)) == ROWS
        for module in (file, owners):
            monkeypatch.setattr(module, "boot_id", lambda: "of a container")
        with closing(SQLiteStore(path)) as other:
            assert other.claim(ROWS) == []
            other.put([entry("ahead", None)], LIMIT)
            assert store.claim(ROWS) == []


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


# --- names and companions ----------------------------------------------------------------------


def test_a_hard_link_is_refused(path: Path) -> None:
    """A file with two names has two logs, and loses messages; that is told at opening."""
    other = path.with_name("other.db")
    os.link(path, other)
    for name in (path, other):
        with pytest.raises(StoreError, match="second name"):
            SQLiteStore(name).put([entry("m")], 0.05)
    other.unlink()
    with closing(SQLiteStore(path)) as store:
        assert store.depth() == Depth(waiting=ROWS)


def test_a_copy_that_is_a_link_to_a_draft_is_cleaned_up(path: Path) -> None:
    """A process that was killed between linking its draft and removing it shuts no one out."""
    draft = path.with_name(f"{path.name}.{1:016x}.new")
    os.link(path, draft)
    with closing(SQLiteStore(path)) as store:
        assert store.depth() == Depth(waiting=ROWS)
    assert not draft.exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_drafts_of_the_dead_are_removed(tmp_path: Path, there: bool) -> None:
    """Those of the living, and what only looks like a draft, stay."""
    path = tmp_path / "store.db"
    if there:
        with closing(SQLiteStore(path)) as store:
            store.depth()
    living, dead = Owner(f"{path}-owners"), Owner(f"{path}-owners")
    living.enter()
    drafts = [path.with_name(f"{path.name}.{each.number:016x}.new") for each in (living, dead)]
    other = path.with_name(f"{path.name}.notes.new")
    left = path.with_name(f"{drafts[1].name}-journal")
    for each in (*drafts, other, left):
        each.touch()
    with closing(SQLiteStore(path)) as store:
        store.depth()
    assert (drafts[0].exists(), other.exists()) == (True, True)
    assert (drafts[1].exists(), left.exists()) == (False, False)
    living.leave()


def test_a_file_mounted_by_itself_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log would lie in the container's own layer, and be lost with it."""
    name = str(path).replace(" ", "\\040")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"22 1 0:1 / / rw - ext4 /dev/a rw\n23 22 0:1 /x {name} rw - ext4 /dev/a rw\n"
    )
    monkeypatch.setattr(path_checks, "_MOUNTS", mounts)
    with pytest.raises(StoreError, match="mount its directory instead"):
        SQLiteStore(path).put([entry("m")], 0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_real_bind_mount_of_one_file_is_refused(path: Path, tmp_path: Path) -> None:
    """As ``docker run -v /host/store.db:/data/store.db`` makes it."""
    inner = tmp_path / "container" / "a b.db"
    inner.parent.mkdir()
    inner.touch(0o600)
    mounted = subprocess.run(["mount", "--bind", path, inner], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount")
    try:
        with pytest.raises(StoreError, match="mount its directory instead"):
            SQLiteStore(inner).depth()
    finally:
        subprocess.run(["umount", inner], check=True)


def test_a_file_system_of_the_network_is_told_once(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may work for one process; what is at stake is said in one line."""
    mounts = tmp_path / "mountinfo"
    lines = [
        "22 1 0:1 / / rw - ext4 /dev/a rw",
        f"23 22 0:2 / {tmp_path} rw shared:1 - nfs4 server:/x rw",
    ]
    mounts.write_text("\n".join(lines))
    monkeypatch.setattr(path_checks, "_MOUNTS", mounts)
    for _ in range(2):
        with closing(SQLiteStore(path)) as store:
            assert store.depth() == Depth(waiting=ROWS)
    (told,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert str(path) in told
    assert "nfs4" in told


COMPANIONS = ["-wal", "-shm", "-journal", "-reserve", "-owners"]


@pytest.mark.parametrize("suffix", COMPANIONS)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_companion_that_others_can_read_is_refused(path: Path, suffix: str, there: bool) -> None:
    """What is stored would be in it."""
    if not there:
        path.unlink()
    companion = Path(f"{path}{suffix}")
    companion.touch()
    companion.chmod(0o666)
    with pytest.raises(StoreError, match="accessible to all users"):
        SQLiteStore(path).put([entry("m")], 0.05)
    assert stat.S_IMODE(companion.stat().st_mode) == 0o666
    assert path.exists() is there


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, whom only root can be")
@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_companion_of_another_user_is_refused(suffix: str) -> None:
    """In a sticky directory another may have laid it first, to read what is stored."""
    with shared_folder() as folder:
        folder.chmod(0o1777)
        companion = folder / f"store.db{suffix}"
        companion.touch(0o600)
        os.chown(companion, NOBODY - 1, NOBODY - 1)
        assert "belongs to another user" in as_nobody(folder / "store.db")
        assert companion.stat().st_size == 0


# --- files of the version before ----------------------------------------------------------------


def test_a_file_of_the_version_before_is_brought_up(tmp_path: Path) -> None:
    """Its rows, letters and what was put aside are there; what was claimed waits for its lease."""
    path = tmp_path / "store.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(SCHEMA_1)
        rows = [
            ("free", 0, 0.0, 1, 2),
            ("letter", 0, 0.0, 2, 4),
            ("claimed", 1, 50.0, 0, 0),
        ]
        for name, claimed, due, state, attempts in rows:
            checksum = zlib.crc32(
                b"body", zlib.crc32(b"p", zlib.crc32(f"{name}\0t\0x\0k".encode()))
            )
            connection.execute(
                "INSERT INTO messages VALUES"
                " (NULL, 2, ?, ?, ?, ?, 1, 'why', 7000000, ?, 't', 'x', 'k', ?, ?, ?)",
                (claimed, due, state, attempts, name, checksum, b"p", b"body"),
            )
        connection.execute("INSERT INTO quarantine SELECT * FROM messages WHERE state = 1")
        connection.execute("UPDATE clock SET boot = ?, horizon = 60.0", (boot_id(),))
    path.chmod(0o600)
    now = [10.0]
    with closing(SQLiteStore(path, clock=lambda: now[0])) as store:
        assert store.depth() == Depth(waiting=1, dead=1, ahead=1)
        store.put([entry("new")], LIMIT)
        found = {row.record.envelope.message_id: row.record for row in store.claim(10)}
        assert found.keys() == {"free", "letter", "new"}
        assert (found["free"].attempts, found["free"].first_failed_at) == (2, 7.0)
        assert (found["letter"].dead, found["free"].accepted_at) == (True, 0.0)
        now[0] += 50.0
        assert "claimed" in {row.record.envelope.message_id for row in store.claim(10)}
    assert ask(path, "SELECT message_id FROM quarantine") == ["free"]
    assert ask(path, "PRAGMA user_version") == [2]


SCHEMA_1 = """
PRAGMA auto_vacuum = INCREMENTAL; PRAGMA application_id = 1835823218; PRAGMA user_version = 1;
CREATE TABLE messages (
    key INTEGER PRIMARY KEY AUTOINCREMENT, token INTEGER NOT NULL,
    claimed INTEGER NOT NULL CHECK (claimed IN (0, 1)), due REAL NOT NULL,
    state INTEGER NOT NULL CHECK (state IN (0, 1, 2)), attempts INTEGER NOT NULL,
    doubtful INTEGER NOT NULL, reason TEXT NOT NULL, first_failed_at INTEGER NOT NULL,
    message_id TEXT NOT NULL, task_type TEXT NOT NULL, exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL, checksum INTEGER NOT NULL, properties BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX messages_by_state ON messages (state, key, due);
CREATE TABLE quarantine AS SELECT * FROM messages;
CREATE TABLE clock (boot TEXT NOT NULL, shift REAL NOT NULL, horizon REAL NOT NULL);
INSERT INTO clock VALUES ('', 0.0, 0.0);
PRAGMA journal_mode = WAL;
"""
