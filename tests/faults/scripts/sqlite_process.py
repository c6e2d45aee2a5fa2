"""A process that uses an SQLite store: ``ROLE PATH LEASE``. What it has done it says line by line.

- ``finish``: claims and finishes rows until none is left, and names each.
- ``write``: stores batches for ever; each is named once it is stored, and then mostly deleted.
- ``ahead``: stores rows ahead, claims others, says so, and waits. ``ahead-with-child``: so does
  one whose forked child outlives it.
- ``create``: says that it is there, and stores rows, perhaps in a new file, when a line comes.
- ``claim``: claims a row, and says so; then, at each line that it reads, tries what it may do.
- ``fork``: forks while another thread writes; says how the children fared.
- ``fork-new``: forks while another thread opens, uses and closes one store after another.
- ``refuse``: forks without waiting for the thread that opens the file, which another has locked.
- ``inherit``: says what a child holds of locks, and of its parent's claims.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlproducer.errors import StoreError
from mlproducer.message import Envelope
from mlproducer.stores.protocol import Change, Entry, Record
from mlproducer.stores.sqlite import SQLiteStore, database

T = TypeVar("T")

PATIENCE = 5.0
FORKS = 40
ROWS = 200
CHILD_LIMIT = 9
"""Seconds; less than what a store waits for another thread."""

never = threading.Event()


def say(thing: Any) -> None:
    """Write a line at once, however this process ends."""
    os.write(1, json.dumps(thing).encode() + b"\n")


def entry(name: str, delay: float | None) -> Entry:
    """Return a message of 1 kB."""
    return Entry(Record(Envelope(name, "raw", "x", "k", b"\x10\x00", b"x" * 1000)), delay)


def finish(store: SQLiteStore) -> None:
    """Take what there is; who has to wait too long for the others tries again."""
    while True:
        rows = insist(partial(store.claim, 50))
        if not rows and store.depth().waiting == 0:
            return
        insist(partial(store.done, [row.claim for row in rows]))
        for row in rows:
            say({"done": row.record.envelope.message_id, "doubtful": row.record.doubtful})


def insist(call: Callable[[], T]) -> T:
    """Make a call again while others are in the way."""
    while True:
        try:
            return call()
        except StoreError as error:
            if "locked by another writer" not in str(error):
                raise
            say({"locked": True})


def write(store: SQLiteStore) -> None:
    """Store, and delete two of three batches."""
    for batch in itertools.count():
        names = [f"{os.getpid()}-{batch}-{number}" for number in range(random.choice([1, 7, 60]))]
        claims = store.put([entry(name, None) for name in names], PATIENCE)
        say({"stored": names})
        if batch % 3:
            say({"deleting": names})
            store.done(claims)


def ahead(store: SQLiteStore) -> None:
    """Hold rows that were stored ahead, one that is claimed for a retry, and a letter."""
    rows = [Entry(entry(f"ahead-{number}", None).record, ahead=True) for number in range(ROWS)]
    store.put(rows, PATIENCE)
    letter = entry("letter", 0.0)
    letter.record.dead = True
    store.put([entry("retried", 0.0), letter], PATIENCE)
    store.claim(10)
    say({"held": ROWS + 2})
    sys.stdin.read()


def ahead_with_child(store: SQLiteStore) -> None:
    """Do the same, with a forked child that lives on."""
    store.depth()
    if os.fork() == 0:
        os.close(1)
        never.wait(CHILD_LIMIT)
        os._exit(0)
    ahead(store)


def create(store: SQLiteStore) -> None:
    """Store a batch as soon as a line comes."""
    say({"ready": True})
    sys.stdin.readline()
    try:
        store.put([entry(f"{os.getpid()}-{number}", 0.0) for number in range(5)], PATIENCE)
        say({"stored": True})
    except StoreError as error:
        say({"error": str(error)})


def claim(store: SQLiteStore) -> None:
    """Hold a row, and see after each line whether it is still ours."""
    (row,) = store.claim(1)
    say({"claimed": row.record.envelope.message_id})
    for _ in sys.stdin:
        lost = store.renew([row.claim])
        kept = store.release([Change(row.claim, row.record, 0.0)])
        store.done([row.claim])
        say({"lost": len(lost), "refused": len(kept)})


def fork(store: SQLiteStore) -> None:
    """Fork again and again, at any moment of a thread's transactions."""
    _fork_beside(store, partial(_use, store))


def fork_new(store: SQLiteStore) -> None:
    """Fork again and again, at any moment of a store's life."""

    def work() -> None:
        with closing(SQLiteStore(store.name)) as new:
            _use(new)

    _fork_beside(store, work)


def _use(store: SQLiteStore) -> None:
    claims = store.put([entry(f"parent-{n}", None) for n in range(200)], PATIENCE)
    store.done(claims)


def _fork_beside(store: SQLiteStore, work: Callable[[], None]) -> None:
    over = threading.Event()

    def work_on() -> None:
        while not over.is_set():
            work()

    thread = threading.Thread(target=work_on)
    thread.start()
    statuses = []
    for number in range(FORKS):
        statuses.append(_in_child(partial(_store_one, store, number)))
        never.wait(random.uniform(0.0, 0.02))
    over.set()
    thread.join(PATIENCE)
    say({"statuses": statuses, "depth": store.depth().waiting})


def refuse(store: SQLiteStore) -> None:
    """Fork once, without waiting any longer for the opening."""
    database.FORK_WAIT, database.WAIT = 0.0, PATIENCE
    thread = threading.Thread(target=lambda: say({"depth": store.depth().waiting}))
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while store.name not in _open_files() and time.monotonic() < deadline:
        never.wait(0.001)
    say({"status": _in_child(partial(_be_refused, store.name))})
    thread.join(PATIENCE)


def _open_files() -> set[str]:
    links = Path("/proc/self/fd").iterdir()
    return {os.path.realpath(link) for link in links}


def _be_refused(path: str) -> None:
    try:
        SQLiteStore(path).put([entry("child", 0.0)], PATIENCE)
    except StoreError as error:
        say({"refused": str(error)})


def inherit(store: SQLiteStore) -> None:
    """Fork once, with a claim and the file open."""
    (held,) = store.put([entry("parent", None)], PATIENCE)
    status = _in_child(partial(_tell_and_close, store))
    say({"status": status, "lost": len(store.renew([held])), "due": len(store.claim(1))})


def _store_one(store: SQLiteStore, number: int) -> None:
    grandchild = _in_child(lambda: None)
    if grandchild != 0:
        raise AssertionError(f"a fork before the first use: {grandchild}")
    store.put([entry(f"child-{number}", 0.0)], PATIENCE)
    say({"stored": f"child-{number}"})
    store.close()


def _tell_and_close(store: SQLiteStore) -> None:
    store.depth()
    here, inode = f" {os.getpid()} ", f":{Path(store.name).stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()  # proc(5)
    say({"locks": sum(here in line and inode in line for line in lines)})
    store.close()


def _in_child(work: Callable[[], None]) -> int:
    """Do work in a child, and return its status; one that hangs is ended."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    signal.alarm(CHILD_LIMIT)
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


ROLES = {
    "finish": finish,
    "write": write,
    "ahead": ahead,
    "ahead-with-child": ahead_with_child,
    "create": create,
    "claim": claim,
    "fork": fork,
    "fork-new": fork_new,
    "refuse": refuse,
    "inherit": inherit,
}

if __name__ == "__main__":
    role, path, lease = sys.argv[1:]
    faulthandler.register(signal.SIGALRM, chain=True)  # a child that hangs says where
    opened = SQLiteStore(path, lease=float(lease))
    ROLES[role](opened)
    opened.close()
