"""Forks a process whose producer is connected, in the way that the first argument names.

Argument 2: how the child ends. The test follows by reports and lets each step go on.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from telling import message, tell, wait_for_go

from mlproducer import MLProducer, Settings

producer = MLProducer()
PORT = producer.settings.brokers[0].port
EXECUTED = """
import json, os
print(json.dumps({"descriptors": sorted(os.listdir("/proc/self/fd"))[:-1]}))
"""


def descriptors() -> dict[int, str]:
    """Say where each descriptor of this process leads."""
    links = {}
    for path in Path("/proc/self/fd").iterdir():
        if path.is_symlink():  # the listing's own one is gone by now
            links[int(path.name)] = str(path.readlink())
    return links


def held() -> list[int]:
    """Return the descriptors of sockets and epolls, all of which are the producer's here."""
    return [fd for fd, link in descriptors().items() if link.startswith(("socket:", "anon_inode:"))]


def local_ports() -> list[int]:
    """Return the local ports of the connections to the broker that this process holds."""
    ports = []
    for fd in (fd for fd, link in descriptors().items() if link.startswith("socket:")):
        with socket.socket(fileno=os.dup(fd)) as twin:
            if twin.family == socket.AF_INET and twin.getpeername()[1] == PORT:
                ports.append(twin.getsockname()[1])
    return ports


def end(how: str) -> None:
    """End this process without a word to the producer."""
    if how == "sys.exit":
        sys.exit(7)
    elif how == "os._exit":
        os._exit(7)
    elif how == "exec":
        os.execv(sys.executable, [sys.executable, "-c", EXECUTED])
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def reap(pid: int) -> int:
    """Wait for a child and give its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def own_connection() -> None:
    """The child publishes on a connection of its own while the parent goes on with its."""
    producer.publish(message("parent-1"))
    inherited = held()
    before = local_ports()
    child = os.fork()
    if child == 0:
        links = descriptors()
        kept = {fd: links.get(fd) for fd in inherited}
        receipt = producer.publish(message("child-1"))
        tell(pid=os.getpid(), inherited=kept, ports=local_ports(), confirmed=receipt.confirmed)
        wait_for_go()
        producer.close()
        os._exit(0)
    confirmed = producer.publish(message("parent-2")).confirmed
    code = reap(child)
    again = producer.publish(message("parent-3")).confirmed
    tell(code=code, before=before, after=local_ports(), confirmed=confirmed and again)
    producer.close()


def pending(how: str) -> None:
    """The child ends while messages of its parent are on their way, and sends none of them."""
    producer.publish(message("first"))
    tell(connected=True)
    wait_for_go()
    futures = [producer.submit(message(f"pending-{n}")) for n in range(20)]
    child = os.fork()
    if child == 0:
        look_at_inherited(futures)
        end(how)
        return
    tell(code=reap(child))
    wait_for_go()
    receipts = [future.result(30.0) for future in futures]
    tell(attempts=[receipt.attempts for receipt in receipts], left=producer.flush(1.0))
    producer.close()


def look_at_inherited(futures: list[Any]) -> None:
    """A parent's future stays undecided in the child, whose own producer is empty."""
    undecided = 0
    for future in futures:
        try:
            future.result(0.0)
        except FutureTimeoutError:
            undecided += 1
    tell(undecided=undecided, left=producer.flush(0.0), state=producer.status().connection_state)


def delivering(how: str) -> None:
    """The child publishes, submits, and ends."""
    producer.publish(message("parent"))
    child = os.fork()
    if child == 0:
        producer.publish(message("published"))
        futures: list[Future[Any]] = [producer.submit(message(f"submitted-{n}")) for n in range(20)]
        if how not in ("return", "sys.exit"):
            for future in futures:
                future.result(30.0)
        end(how)
        return
    tell(code=reap(child), confirmed=producer.publish(message("parent-again")).confirmed)
    producer.close()


def sleeping(how: str) -> None:
    """The child sleeps, having used nothing, while its parent closes its producer, or dies."""
    producer.publish(message("parent"))
    if os.fork() == 0:
        tell(child=os.getpid())
        signal.pause()
    wait_for_go()
    if how == "close":
        producer.close()
        tell(closed=True)
        wait_for_go()
    end("kill")


def in_callback(_how: str) -> None:
    """A callback forks, and the child publishes."""
    codes: Future[int] = Future()
    parent = os.getpid()

    def fork(*_: object) -> None:
        if os.getpid() != parent:  # the child connects too
            return
        child = os.fork()
        if child == 0:
            confirmed = producer.publish(message("child")).confirmed
            os._exit(0 if confirmed else 1)
        codes.set_result(reap(child))

    producer.on("connected", fork)
    producer.publish(message("parent"))
    tell(code=codes.result(30.0))
    producer.close()


def unused(_how: str) -> None:
    """A producer that was only made in the parent is used in the child."""
    child = os.fork()
    if child == 0:
        with MLProducer(Settings(url=os.environ["RABBITMQ_URL"])) as second:
            confirmed = producer.publish(message("first")).confirmed
            confirmed = confirmed and second.publish(message("second")).confirmed
        os._exit(0 if confirmed else 1)
    tell(code=reap(child))


STEPS = {
    "own_connection": lambda _how: own_connection(),
    "pending": pending,
    "delivering": delivering,
    "sleeping": sleeping,
    "in_callback": in_callback,
    "unused": unused,
}

if __name__ == "__main__":
    STEPS[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")
