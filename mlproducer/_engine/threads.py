"""How threads begin and end: one way to start one, one deadline to join them all.

Runs on: any thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from mlproducer import _clock as time
from mlproducer import _forks as forks
from mlproducer._foreign_calls import write
from mlproducer._synchronization import Bell

logger = logging.getLogger(__name__)

IDLE = 3600.0
"""Seconds after which a thread with nothing to do looks again."""

REST_LIMIT = 0.2
"""Seconds of a close's grace that a durable store has for what could not be delivered."""

CLOSE_MARGIN = 0.4
"""Seconds of a close's grace that ending the connections and the threads may take."""

_ordinals: dict[int, object] = {}
forks.in_child(_ordinals.clear)


class _Here:
    """Whose thread this is: what `spawn` was told, ``None`` on users' threads.

    Kept by the thread's number and not in a ``threading.local``: that would be of the wrong kind
    where gevent or eventlet patch after the import, and the same for all green threads.
    """

    def __init__(self) -> None:
        self.owners: dict[int, object] = {}

    @property
    def owner(self) -> object:
        """Whose thread this is."""
        return self.owners.get(threading.get_ident())

    def run(self, owner: object, target: Callable[[], None]) -> None:
        """Run something on a thread that is ``owner``'s as long as it runs."""
        me = threading.get_ident()
        self.owners[me] = owner
        try:
            target()
        finally:
            self.owners.pop(me, None)

    def forked(self) -> None:
        """Forget, in a forked child, the threads that it has not: their numbers come again."""
        me = threading.get_ident()
        self.owners = {me: self.owners[me]} if me in self.owners else {}


here = _Here()
forks.in_child(here.forked)


def take_ordinal(owner: object) -> int:
    """Return the lowest number that no open producer of this process has; 1 is the first."""
    # setdefault() is one step under the GIL: of two threads one gets the number.
    free = (n for n in itertools.count(1) if _ordinals.setdefault(n, owner) is owner)
    return next(free)


def return_ordinal(ordinal: int, owner: object) -> None:
    """Let another producer have the number, unless another has it already."""
    if _ordinals.get(ordinal) is owner:
        del _ordinals[ordinal]


def spawn(role: str, ordinal: int, target: Callable[[], None], owner: object) -> threading.Thread:
    """Start a daemon named after its role, ``mlproducer-io`` say, and its producer's number.

    :param owner: what `here` says on it
    :raises RuntimeError: the interpreter is shutting down (Python 3.12 and later) or out of threads
    """
    name = f"mlproducer-{role}" if ordinal == 1 else f"mlproducer-{role}-{ordinal}"
    thread = threading.Thread(target=here.run, args=(owner, target), name=name, daemon=True)
    thread.start()
    return thread


class TimerThread:
    """A thread that carries out orders, and its own job whenever that is due.

    Both are run one at a time; one that raises is logged, and the thread goes on. The job waits
    for one order at the most once it is due, and so do orders for the job: neither keeps the
    other from its turn, however slow and many they are.

    An order stays the first in line until it is carried out. One that raises, or is cut by what is
    raised on the thread from outside, is carried out once more: what was done of it by then is done
    again.

    :param job: what to do when it is due; it sets the time when it is due next
    """

    def __init__(self, job: Callable[[], None]) -> None:
        self._job = job
        self._orders: deque[Callable[[], object]] = deque()
        self._tried: Callable[[], object] | None = None  # the order that has failed once
        self._bell = Bell()
        self._running = True
        self._left = False
        self.due: float | None = None

    def order(self, function: Callable[[], object]) -> None:
        """Have something done soon; from any thread."""
        self._orders.append(function)
        self._bell.ring()

    def call_at(self, when: float) -> None:
        """Have the job done at a monotonic time; from any thread."""
        self.order(partial(setattr, self, "due", when))

    def stop(self) -> None:
        """End the thread once it has done what it was ordered so far."""
        self.order(self._stop)

    def leave(self) -> None:
        """Sleep for good, in a forked child: a greenlet, unlike a thread, goes on in it.

        It must not end there, for Python has forgotten it and complains.
        """
        self._left = True
        self.due = None

    def run(self) -> None:
        """Work until `stop`."""
        ordered = False
        while self._running:
            try:
                ordered = self.step(after_order=ordered)
            except BaseException as error:  # noqa: BLE001 - even SystemExit must not end the thread
                write(logger, logging.ERROR, "a timer thread's step failed; going on", error=error)

    def step(self, *, after_order: bool) -> bool:
        """Do what is next, or wait for it; true if it was ordered."""
        patience = self._patience()
        if self._orders and not (after_order and patience == 0.0):
            self._carry_out()
            return True
        if patience == 0.0:
            self._job()
        else:
            self._bell.wait(patience)
        return False

    def _carry_out(self) -> None:
        order = self._orders[0]
        again = order is self._tried
        if again:
            self._orders.popleft()  # whatever comes of it now
        self._tried = order
        if not self._left:
            order()
        if not again:
            self._orders.popleft()
        self._tried = None

    def _patience(self) -> float:
        return IDLE if self.due is None else max(0.0, self.due - time.monotonic())

    def _stop(self) -> None:
        self._running = False


def join_all(threads: Iterable[threading.Thread], deadline: float) -> bool:
    """Join threads, all within one monotonic deadline; true if all of them ended."""
    me = threading.current_thread()
    others = [thread for thread in threads if thread is not me]
    for thread in others:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in others)
