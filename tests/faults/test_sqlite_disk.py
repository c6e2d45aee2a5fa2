"""An SQLite store on a disk that is full, and what it costs on one that is not.

Runs on: pytest's main thread; a process under strace.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from mlproducer.errors import StoreError
from mlproducer.stores.protocol import Change, Claim, Depth, Entry, Record, RowFate
from mlproducer.stores.sqlite import SQLiteStore
from mlproducer.stores.sqlite.disk_reserve import SIZE
from tests.helpers import LIMIT, make_envelope

Disk = Callable[[str], Path]


def entry(name: str, size: int = 1000) -> Entry:
    """Return a message that is due."""
    return Entry(Record(make_envelope(name, body=b"x" * size)), 0.0)


@contextmanager
def mounted(size: str) -> Iterator[Path]:
    """Mount a small disk in memory."""
    folder = Path(tempfile.mkdtemp(prefix="mlproducer-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True, check=False, timeout=LIMIT).returncode:
            pytest.skip("needs the right to mount a small disk")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=LIMIT)
    finally:
        folder.rmdir()


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Yield small disks: ``disk("16m")``."""
    with ExitStack() as stack:
        yield lambda size: stack.enter_context(mounted(size))


def fill(folder: Path) -> Path:
    """Let another program take all the room that is left."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    assert os.statvfs(folder).f_bavail == 0
    return filler


def store_until_full(store: SQLiteStore, batch: int) -> list[str]:
    """Store batches until one is refused, and name what was stored."""
    names: list[str] = []
    with pytest.raises(StoreError) as caught:  # noqa: PT012 - which of them is refused is not known
        while True:
            new = [f"m{len(names) + number}" for number in range(batch)]
            store.put([entry(each) for each in new], LIMIT)
            names += new
    assert store.name in str(caught.value)
    return names


def finish(store: SQLiteStore) -> list[str]:
    """Claim and delete all that is due, and name it."""
    names: list[str] = []
    while rows := store.claim(1000):
        names += [row.record.envelope.message_id for row in rows]
        store.done([row.claim for row in rows])
    return names


@pytest.mark.parametrize(("size", "batch"), [("1m", 1), ("1m", 50), ("16m", 50)])
def test_a_store_that_has_filled_its_disk_delivers(disk: Disk, size: str, batch: int) -> None:
    """A full disk refuses messages, keeps those it has, delivers them, and takes more then (93)."""
    with closing(SQLiteStore(disk(size) / "store.db")) as store:
        names = store_until_full(store, batch)
        assert store.depth() == Depth(waiting=len(names))
        assert finish(store) == names
        assert store.depth() == Depth()
        store.put([entry("after")], LIMIT)
        assert finish(store) == ["after"]


def test_without_a_directory_for_temporary_files(disk: Disk) -> None:
    """In a container whose root is read-only, large batches are stored and delivered too."""
    folder = disk("64m")
    places = ("/tmp", "/var/tmp", "/usr/tmp")
    hide = "".join(
        f"! test -d {each} || (mount --rbind {each} {each} && mount -o remount,ro,bind {each})\n"
        for each in places
    )
    program = (
        "import sys\n"
        "from mlproducer.stores.sqlite import SQLiteStore\n"
        "from tests.faults.test_sqlite_disk import entry, finish\n"
        "store = SQLiteStore(sys.argv[1])\n"
        "for _ in range(2):\n"
        "    store.put([entry('m', 20_000) for _ in range(500)], 10.0)\n"
        "assert len(finish(store)) == 1000\n"
        "store.close()\n"
    )
    arguments = [sys.executable, "-c", program, str(folder / "store.db")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("TMPDIR", "SQLITE_TMPDIR"):
        environment.pop(name, None)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{hide} cd /tmp && exec "$@"', "sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * LIMIT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", ["1m", "16m"])
def test_a_disk_that_others_have_filled(disk: Disk, size: str) -> None:
    """With no byte left on the disk, what is stored is delivered; nothing new is taken (93)."""
    folder = disk(size)
    with closing(SQLiteStore(folder / "store.db")) as store:
        names = [f"m{number}" for number in range(100)]
        for name in names:
            store.put([entry(name)], LIMIT)
        filler = fill(folder)
        store_until_full(store, 10)
        rows = store.claim(20)
        changes = [Change(row.claim, row.record, 0.0) for row in rows]
        assert store.release(changes) == []
        assert finish(store)[: len(names)] == names
        fill(folder)
        store_until_full(store, 10)
        filler.unlink()
        store.put([entry("after")], LIMIT)
        assert finish(store)[-1:] == ["after"]


@pytest.mark.parametrize("size", ["1m", "16m"])
def test_another_process_delivers_from_a_full_disk(disk: Disk, size: str) -> None:
    """The fates that it leaves for who stored the rows find room too (93)."""
    path = disk(size) / "store.db"
    with closing(SQLiteStore(path)) as store, closing(SQLiteStore(path)) as other:
        names = store_until_full(store, 50)
        claims: list[Claim] = []
        found: list[str] = []
        while rows := other.claim(1000):
            claims += [row.claim for row in rows]
            found += [row.record.envelope.message_id for row in rows]
            other.done([row.claim for row in rows])
        assert found == names
        assert set(store.trace(claims)) == {RowFate.CONFIRMED}
        store.put([entry("after")], LIMIT)


def test_a_disk_that_does_not_tell_its_size(disk: Disk) -> None:
    """Some file systems say 0; the store is used all the same, with its reserve."""
    folder = disk("0")
    assert os.statvfs(folder).f_blocks == 0
    with closing(SQLiteStore(folder / "store.db")) as store:
        store.put([entry("a")], LIMIT)
        assert finish(store) == ["a"]
        assert (folder / "store.db-reserve").stat().st_size == SIZE


def test_what_cannot_be_allocated_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that knows no allocation has a reserve too."""

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with closing(SQLiteStore(tmp_path / "store.db")) as store:
        store.put([entry("a")], LIMIT)
    assert (tmp_path / "store.db-reserve").stat().st_blocks * 512 >= SIZE


def test_opened_on_a_full_disk(disk: Disk) -> None:
    """A process that starts when no byte is left delivers what the last one has stored (93)."""
    folder = disk("16m")
    names = [f"m{number}" for number in range(100)]
    with closing(SQLiteStore(folder / "store.db")) as store:
        store.put([entry(name) for name in names], LIMIT)
    fill(folder)
    with closing(SQLiteStore(folder / "store.db")) as store:
        assert store.depth() == Depth(waiting=len(names))
        assert finish(store) == names


def test_made_on_a_full_disk(disk: Disk) -> None:
    """Where there is no room for a file none is made; once there is, it is."""
    folder = disk("1m")
    filler = fill(folder)
    with closing(SQLiteStore(folder / "store.db")) as store:
        with pytest.raises(StoreError, match=store.name):
            store.put([entry("early")], 0.05)
        filler.unlink()
        assert [each.name for each in folder.iterdir() if each.name == "store.db"] == []
        store.put([entry("m")], LIMIT)
        assert finish(store) == ["m"]


def test_large_messages_on_a_full_disk(disk: Disk) -> None:
    """Claims of large messages need no more room than those of small ones."""
    folder = disk("64m")
    with closing(SQLiteStore(folder / "store.db")) as store:
        store.put([entry(f"m{number}", 1 << 20) for number in range(20)], LIMIT)
        fill(folder)
        assert len(finish(store)) == 20


def test_the_log_is_cut_off(tmp_path: Path) -> None:
    """Of a log that ends in the middle, what was whole before is there, and nothing else (95)."""
    path, copy = tmp_path / "store.db", tmp_path / "copy.db"
    with closing(SQLiteStore(path)) as store:
        for number in range(20):
            store.put([entry(f"m{number}")], LIMIT)
        log = path.with_name("store.db-wal").read_bytes()
        for part in (0, 100, len(log) // 2, len(log) - 1):
            shutil.copy(path, copy)
            copy.chmod(0o600)
            copy.with_name("copy.db-wal").write_bytes(log[:part])
            copy.with_name("copy.db-wal").chmod(0o600)
            with closing(SQLiteStore(copy)) as cut:
                names = [row.record.envelope.message_id for row in cut.claim(100)]
            assert names == [f"m{number}" for number in range(len(names))]
            assert len(names) < 20
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    store.close()


CALLS = """
import os, sys
from mlproducer.message import Envelope
from mlproducer.stores.protocol import Change, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore

def entries(count, delay=None):
    envelopes = [Envelope(f"m{n}", "raw", "x", "k", b"", b"x" * 1000) for n in range(count)]
    return [Entry(Record(each), delay) for each in envelopes]

store = SQLiteStore(sys.argv[1])
store.put(entries(1), 1.0)
os.write(1, b"put one")
store.put(entries(1), 1.0)
os.write(1, b"put many")
claims = store.put(entries(700), 1.0)
os.write(1, b"renew")
store.renew(claims)
os.write(1, b"done")
store.done(claims)
os.write(1, b"put due")
store.put(entries(10, 0.0), 1.0)
os.write(1, b"claim")
rows = store.claim(10)
os.write(1, b"release")
store.release([Change(row.claim, row.record, 5.0) for row in rows])
os.write(1, b"depth")
store.depth()
os.write(1, b"end")
store.close()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_one_fsync_for_all_messages_of_a_put(tmp_path: Path) -> None:
    """What stores is on the disk after one fsync, however much it was; a deletion needs none."""
    trace = tmp_path / "trace"
    tracing = [
        "strace",
        "-f",
        "-o",
        str(trace),
        "-e",
        "trace=fsync,fdatasync,write",
        "-e",
        "signal=none",
    ]
    script = [sys.executable, "-c", CALLS, str(tmp_path / "store.db")]
    subprocess.run([*tracing, *script], check=True, capture_output=True, timeout=60)
    counts: dict[str, int] = {}
    call = "open"
    for line in trace.read_text().splitlines():
        if 'write(1, "' in line:
            call = line.partition('"')[2].partition('"')[0]
            counts[call] = 0
        elif "sync(" in line and call in counts:
            counts[call] += 1
    assert counts.pop("end") >= 0
    assert counts == {
        "put one": 1,
        "put many": 1,
        "renew": 0,
        "done": 0,
        "put due": 1,
        "claim": 0,
        "release": 1,
        "depth": 0,
    }
