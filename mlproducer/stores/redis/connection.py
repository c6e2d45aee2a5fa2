"""The connection to Redis; with `mlproducer.stores.redis.dial` the only file that knows redis-py.

Owns one connection: has it made, runs scripts over it, and says what went wrong in words of its
own. It must not know what the scripts do.

Runs on: the retry thread.
"""

from __future__ import annotations

import functools
import hashlib
import re
import ssl
from collections.abc import Sequence
from typing import Any

from mlproducer import _clock as time
from mlproducer._store_url import RedisAddress
from mlproducer.errors import StoreError
from mlproducer.stores.redis.dial import TIMEOUT, connect, exceptions, warn_of_eviction
from mlproducer.stores.redis.rows import MICROSECONDS, Field

IDLE = 1.0
"""Seconds after which a connection is asked whether it still works, before it is relied on."""

SLICE = 1024 * 1024
_HOPS = 5
_MOVED = re.compile(r"(?:MOVED )?\d+ (\S+):(\d+)")
_NEEDED = re.compile(r"the store needs ([A-Z]+)")
_CODE = re.compile(r"[A-Z]{2,20}\b")
_FOREIGN = (exceptions.RedisError, OSError, ValueError)

_TROUBLES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.BusyLoadingError, "is still loading its data"),
    (exceptions.AuthenticationError, "refuses the user or the password"),
    (exceptions.AuthenticationWrongNumberOfArgsError, "refuses the user or the password"),
    (exceptions.NoPermissionError, "does not permit this user what the store needs"),
    (exceptions.ReadOnlyError, "is a read-only replica"),
    (exceptions.OutOfMemoryError, "is out of memory"),
    (exceptions.TimeoutError, "did not answer in time"),
    (exceptions.ConnectionError, "cannot be reached"),
    (OSError, "cannot be reached"),
)
_ANSWERS = {
    "WRONGTYPE": "has keys of another type under this store's prefix",
    "MISCONF": "cannot write to its disk",
    "NOREPLICAS": "has too few replicas to write",
    "CLUSTERDOWN": "is in a cluster that is down",
    "MASTERDOWN": "is a replica that has lost its master",
}


class Connection:
    """One connection, made when it is needed, and made anew after whatever went wrong.

    :param prefix: the one key that scripts are given
    :param greeting: the script that is run first, and its arguments
    :ivar timeout: seconds of silence after which Redis is taken to be away
    """

    def __init__(
        self, address: RedisAddress, prefix: str, greeting: tuple[str, list[Field]]
    ) -> None:
        self._address = address
        self.timeout = address.timeout or TIMEOUT
        self._prefix = prefix
        self._greeting = greeting
        self._connection: Any = None
        self._used = 0.0
        self._ahead = 0.0

    def server_time(self, moment: float) -> int:
        """Give the server's time at a monotonic moment, in microseconds, or a little less."""
        return int((moment + self._ahead) * MICROSECONDS)

    def get_ready(self) -> None:
        """Have a connection that works.

        :raises StoreError: there is none
        """
        try:
            if not self._works():
                self._connect()
        except _FOREIGN as error:
            failure = self._failed(error)
        else:
            return
        raise failure  # with nothing of redis-py's in it, whose frames know the password

    def run(
        self, script: str, arguments: Sequence[Field], deadline: float | None = None
    ) -> list[Any]:
        """Run a script, and give what it returned after the time.

        :param deadline: when to give up, in monotonic seconds
        :raises StoreError: it failed, or there is no answer
        """
        try:
            return self._evaluate(script, arguments, deadline)
        except _FOREIGN as error:
            failure = self._failed(error)
        raise failure

    def drop(self) -> None:
        """End the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _works(self) -> bool:
        """Whether there is a connection that was not closed, and answers if it has idled."""
        if self._connection is None:
            return False
        try:
            if self._connection.can_read(0):
                raise exceptions.ConnectionError("an answer that nobody asked for")
            if time.monotonic() - self._used > IDLE:
                self._evaluate(*self._greeting)
        except (exceptions.ConnectionError, OSError):
            self.drop()
        return self._connection is not None

    def _connect(self) -> None:
        """Connect, in a cluster to the node that has the keys."""
        node: tuple[str, int] | None = None
        for _ in range(_HOPS):
            self._connection = connect(self._address, node)
            try:
                self._evaluate(*self._greeting)
            except exceptions.ResponseError as error:
                moved = _MOVED.fullmatch(str(error))
                if moved is None:
                    raise
                self.drop()
                node = moved[1], int(moved[2])
            else:
                warn_of_eviction(self._connection, self._address)
                return
        raise exceptions.ConnectionError("the nodes of the cluster do not agree")

    def _evaluate(
        self, script: str, arguments: Sequence[Field], deadline: float | None = None
    ) -> list[Any]:
        rest = (1, self._prefix, *arguments)
        try:
            answer = self._ask(("EVALSHA", _digest(script), *rest), deadline)
        except exceptions.NoScriptError:
            answer = self._ask(("EVAL", script, *rest), deadline)
        self._used = time.monotonic()
        self._ahead = answer[0] / MICROSECONDS - self._used
        return answer[1:]

    def _ask(self, command: Sequence[Field], deadline: float | None) -> list[Any]:
        connection = self._connection
        if connection is None:
            raise exceptions.ConnectionError("no connection")
        until = time.monotonic() + self.timeout if deadline is None else deadline
        connection.send_packed_command(_packed(command), check_health=False)
        if not connection.can_read(max(0.0, until - time.monotonic())):
            raise exceptions.TimeoutError("no answer")
        answer: list[Any] = connection.read_response()
        return answer

    def _failed(self, error: Exception) -> StoreError:
        self.drop()
        return StoreError(f"the store at {self._address.name} {_describe(error)}")


def _packed(command: Sequence[Field]) -> list[memoryview]:
    """Write a command as Redis's protocol has it; redis-py takes three times as long.

    It comes in slices, since the time for each write is limited.
    """
    parts = [b"*%d\r\n" % len(command)]
    for each in command:
        raw = each if isinstance(each, bytes) else str(each).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    whole = memoryview(b"".join(parts))
    return [whole[start : start + SLICE] for start in range(0, len(whole), SLICE)]


def _describe(error: Exception) -> str:
    """Say what is wrong in words of our own: Redis's may quote what it was sent."""
    for kind, words in _TROUBLES:
        if isinstance(error, kind):
            lacking = _NEEDED.search(str(error))
            return words + (f": {lacking[1]}" if lacking else _cause(error.__context__))
    text = str(error)
    if "DB index" in text:
        return "has no database of this number"
    if "compiling script" in text:
        return "is older than Redis 7.0"
    if isinstance(error, exceptions.ResponseError):
        found = _CODE.match(text)
        code = found[0] if found else "ERR"  # which redis-py leaves out
        return _ANSWERS.get(code, f"answered {code}")
    return f"did not answer as Redis does ({type(error).__name__})"


def _cause(error: BaseException | None) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f": certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f": TLS failed: {error.reason}"
    if isinstance(error, OSError) and error.strerror:
        return f": {error.strerror}"
    return ""


@functools.cache
def _digest(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
