"""The connection to Redis: runs scripts, and turns redis-py's errors into `StoreError`.

With `mlproducer.stores.redis.dial` the only module that imports redis-py. It does not know what
the scripts do.

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
"""Seconds after which an idle connection is tested before it is used."""

SLICE = 1024 * 1024
_HOPS = 5
_MOVED = re.compile(r"(?:MOVED )?\d+ (\S+):(\d+)")
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


class _CommandRefusedError(exceptions.NoPermissionError):
    """A command that the scripts run is not permitted to this user."""

    def __init__(self, command: bytes) -> None:
        super().__init__()
        self.command = command.decode()


class Connection:
    """One connection, made when it is needed, and made again after any failure.

    :param prefix: the one key that is passed to scripts
    :param greeting: the script that is run first, and its arguments; it returns the first command
        that this user may not run, if there is one
    :ivar timeout: seconds without an answer after which Redis counts as unreachable
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
        """Return the server's time at a monotonic moment, in microseconds, or a little less."""
        return int((moment + self._ahead) * MICROSECONDS)

    def get_ready(self) -> bool:
        """Connect, unless there is a connection that works, and return whether it is a new one.

        :raises StoreError: the server cannot be reached, or refuses the connection
        """
        try:
            works = self._works()
            if not works:
                self._connect()
        except _FOREIGN as error:
            failure = self._failed(error)
        else:
            return not works
        # Raised outside of the handler: nothing of redis-py, whose frames hold the password, is
        # chained to it.
        raise failure

    def run(
        self, script: str, arguments: Sequence[Field], deadline: float | None = None
    ) -> list[Any]:
        """Run a script, and return its results, without the time that comes first.

        :param deadline: when to give up, in monotonic seconds
        :raises StoreError: the script failed, or there was no answer in time
        """
        try:
            return self._evaluate(script, arguments, deadline)
        except _FOREIGN as error:
            failure = self._failed(error)
        raise failure

    def drop(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _works(self) -> bool:
        """Test whether there is a connection that was not closed, and, if it was idle, answers."""
        if self._connection is None:
            return False
        try:
            if self._connection.can_read(0):
                raise exceptions.ConnectionError("an answer without a question")
            if time.monotonic() - self._used > IDLE:
                self._greet()
        except (exceptions.ConnectionError, OSError):
            self.drop()
        return self._connection is not None

    def _connect(self) -> None:
        """Connect; in a cluster, to the node that has the keys."""
        node: tuple[str, int] | None = None
        for _ in range(_HOPS):
            self._connection = connect(self._address, node)
            try:
                self._greet()
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

    def _greet(self) -> None:
        refused = self._evaluate(*self._greeting)
        if refused:
            raise _CommandRefusedError(refused[0])

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
        """Close the connection, and return the error to be raised."""
        self.drop()
        return StoreError(f"the store at {self._address.name} {_describe(error)}")


def _packed(command: Sequence[Field]) -> list[memoryview]:
    """Encode a command in Redis's protocol (RESP); redis-py takes three times as long.

    The result is in slices, since redis-py limits the time for each write, however long it is.
    """
    parts = [b"*%d\r\n" % len(command)]
    for each in command:
        raw = each if isinstance(each, bytes) else str(each).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    whole = memoryview(b"".join(parts))
    return [whole[start : start + SLICE] for start in range(0, len(whole), SLICE)]


def _describe(error: Exception) -> str:
    """Describe an error; Redis's own text is not passed on, since it may quote what it was sent."""
    for kind, words in _TROUBLES:
        if isinstance(error, kind):
            if isinstance(error, _CommandRefusedError):
                return f"{words}: {error.command}"
            return words + _cause(error.__context__)
    text = str(error)
    if "DB index" in text:
        return "has no database of this number"
    if "compiling script" in text:
        return "is older than Redis 7.0"
    if isinstance(error, exceptions.ResponseError):
        found = _CODE.match(text)
        code = found[0] if found else "ERR"  # redis-py strips this one
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
