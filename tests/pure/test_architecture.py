"""The house: floors, foreign libraries, heads of files, sizes, locks and waits."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlproducer"

FLOORS = [
    {"errors"},
    {"settings", "message", "shapes", "tracing", "latch"},
    {"topology", "tasks", "fate"},
    {"wire"},
    {"core"},
    {"status"},
    {"observe", "stores"},
    {"engine"},
    {"waiting"},
    {"producer"},
    {"dead_letters"},
    {"__init__"},
    {"monitoring", "page"},
    {"wsgi"},
    {"testing"},
    {"cli"},
    {"__main__"},
]
"""Rooms by floor, the ground first; a folder is one room, whose inside has its own order."""

INSIDE = {
    "core": [
        "states",
        "backoff",
        "delivery",
        "confirms",
        "trial",
        "recovery",
        "failure",
        "ports",
        "breaker",
        "lanes",
        "judge",
        "farewell",
        "courier",
    ],
    "wire": ["strict_json", "ids", "amqp", "frames", "celery", "raw", "encode", "dead_letter"],
    "engine": [
        "process",
        "roles",
        "tls",
        "losses",
        "gate",
        "mailbox",
        "threads",
        "shelf",
        "scribe",
        "keeper",
        "health",
        "cooldown",
        "undertaker",
        "setup",
        "checkup",
        "link",
        "dialer",
        "letterbox",
        "reactor",
        "io_thread",
        "engine",
        "fleet",
        "lifecycle",
    ],
    "stores": [
        "protocol",
        "memory",
        "redis_rows",
        "sqlite_reserve",
        "sqlite_rows",
        "sqlite_file",
        "sqlite_link",
        "sqlite",
        "redis_url",
        "redis_lua",
        "redis_scripts",
        "redis_link",
        "redis",
        "__init__",
    ],
    "monitoring": ["queries", "alerts", "panels", "dashboard", "__init__"],
    "observe": [
        "catalog",
        "events",
        "tally",
        "meter",
        "metrics",
        "limiter",
        "log",
        "callbacks",
        "otel",
        "spans",
        "recent",
    ],
}
"""Where order inside a room matters: a file imports only from those before it."""

FOREIGN = {
    "pika": {"engine/link.py"},
    "sqlite3": {"stores/sqlite_file.py", "stores/sqlite_link.py"},
    "redis": {"stores/redis_link.py"},
    "prometheus_client": {"observe/metrics.py"},
    "orjson": {"wire/strict_json.py"},
    "opentelemetry": {"observe/otel.py"},
    "random": {"engine/dialer.py", "engine/engine.py"},
}
"""Foreign libraries, and the only files that may know them; `testing` talks to what it likes."""

MODULES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in MODULES if "testing" not in path.parts]


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path: Path) -> Iterator[str]:
    """Give every module that a file imports, at its top or lazily, in dotted form."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}: relative import"
            module = node.module or ""
            yield module
            if (ROOT / module.replace(".", "/")).is_dir():
                yield from (f"{module}.{alias.name}" for alias in node.names)


def _room(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] != "mlproducer":
        return None
    known = len(parts) > 1 and any(parts[1] in floor for floor in FLOORS)
    return parts[1] if known else "__init__"


def _floor(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_run_downwards(path: Path) -> None:
    """A file imports only from floors below its own, and inside a room from files before it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = _floor(parts[0])
    for dotted in _imports(path):
        room = _room(dotted)
        if room is None or (room == "__init__" and dotted == "mlproducer" and len(parts) == 1):
            continue
        if room != parts[0]:
            package_itself = dotted == "mlproducer" and any(
                each.startswith("mlproducer.") for each in _imports(path)
            )
            assert package_itself or _floor(room) < own, f"{_name(path)} imports {dotted} above it"
        elif room in INSIDE and len(dotted.split(".")) > 2:
            order = INSIDE[room]
            assert order.index(dotted.split(".")[2]) < order.index(parts[1]), (
                f"{_name(path)} imports {dotted}, which comes after it"
            )


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_one_module_per_foreign_library(path: Path) -> None:
    """A foreign library is known to one file."""
    for dotted in _imports(path):
        allowed = FOREIGN.get(dotted.split(".")[0])
        assert allowed is None or _name(path) in allowed, f"{_name(path)} imports {dotted}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=_name)
def test_judgement_is_pure(path: Path) -> None:
    """The core knows no clock, thread, socket, randomness or log."""
    forbidden = {"time", "threading", "random", "socket", "logging", "queue", "os", "datetime"}
    used = {dotted.split(".")[0] for dotted in _imports(path)}
    assert not used & forbidden


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_every_file_has_a_head(path: Path) -> None:
    """A file's docstring says what it owns, and on which thread it runs."""
    head = ast.get_docstring(_tree(path)) or ""
    assert re.search(r"^Runs on: \S", head, re.MULTILINE), f"{_name(path)}: no 'Runs on:' line"


def _bodies(paths: list[Path]) -> Iterator[tuple[str, int]]:
    for path in paths:
        for node in ast.walk(_tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                yield f"{_name(path)}:{node.name}", lines


def test_sizes() -> None:
    """Functions are short, classes and files can be read at a sitting."""
    bodies = dict(_bodies(MODULES))
    lengths = sorted(bodies.values())
    assert statistics.median(lengths) <= 8
    assert lengths[int(len(lengths) * 0.9)] <= 30
    assert {name: size for name, size in bodies.items() if size > 60} == {}
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, _name(path)
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno <= 300, f"{_name(path)}:{node.name}"


def test_locks_are_few_and_say_what_they_guard() -> None:
    """At most three locks in the library, each with the list of what it guards."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in LIBRARY)
    locks = len(re.findall(r"\b(?:R?Lock|Condition|Semaphore)\(", text))
    assert locks <= 3
    assert text.count("# guards:") == locks
    spawning = [path for path in LIBRARY if "threading.Thread(" in path.read_text("utf-8")]
    assert set(map(_name, spawning)) == {"engine/threads.py", "wsgi.py"}


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_every_wait_has_a_limit_and_nothing_sleeps(path: Path) -> None:
    """No sleep, no wait without a timeout, no wall clock but for what people read."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            where = f"{_name(path)}:{node.lineno}"
            limited = bool(node.args or node.keywords)
            assert limited or node.func.attr not in {"wait", "join", "result"}, where
            assert ast.unparse(node.func) not in {"time.sleep", "time.time"}, where
