"""The house: floors, foreign libraries, heads of files, sizes, locks, waits and loggers."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

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

PUBLIC = {
    "mlproducer",
    "mlproducer.dead_letters",
    "mlproducer.errors",
    "mlproducer.monitoring",
    "mlproducer.testing",
}
"""What a command of ``cli`` may import, besides its own room."""

MODULES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in MODULES if "testing" not in path.parts]


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    """Give all that is in a file, the module itself first."""
    return tuple(ast.walk(ast.parse(_text(path))))


@cache
def _imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Give the line and dotted name of all that a file imports, at its top or lazily."""
    found: list[tuple[int, str]] = []
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            found += ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.append((node.lineno, module))
            if (ROOT / module.replace(".", "/")).is_dir():
                found += ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
    return tuple(found)


def _all_imports(paths: list[Path]) -> Iterator[tuple[Path, int, str]]:
    yield from ((path, line, dotted) for path in paths for line, dotted in _imports(path))


def _room(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] != "mlproducer":
        return None
    known = len(parts) > 1 and any(parts[1] in floor for floor in FLOORS)
    return parts[1] if known else "__init__"


def _floor(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def _runs_down(path: Path, dotted: str) -> bool:
    """Tell whether a file may import that, by its floor, and by its place in its room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = _room(dotted)
    if room is None or (room == "__init__" and dotted == "mlproducer" and len(parts) == 1):
        return True
    if room != parts[0]:
        package_itself = dotted == "mlproducer" and any(
            each.startswith("mlproducer.") for _, each in _imports(path)
        )
        return package_itself or _floor(room) < _floor(parts[0])
    if room in INSIDE and len(dotted.split(".")) > 2:
        order = INSIDE[room]
        return order.index(dotted.split(".")[2]) < order.index(parts[1])
    return True


def test_every_file_has_a_floor() -> None:
    """Each file, and what rooms with an order hold, has its place in the tables above."""
    homeless = []
    for path in MODULES:
        room, *inside = path.relative_to(PACKAGE).with_suffix("").parts
        known = any(room in floor for floor in FLOORS)
        placed = room not in INSIDE or inside[0] in {*INSIDE[room], "__init__"}
        if not (known and placed):
            homeless.append(_name(path))
    assert not homeless, "\n".join(homeless)


def test_imports_run_downwards() -> None:
    """A file imports only from floors below its own, and inside a room from files before it."""
    wrong = [
        f"{_name(path)}:{line} imports {dotted}, which is not below it"
        for path, line, dotted in _all_imports(MODULES)
        if not _runs_down(path, dotted)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute() -> None:
    """A relative import would hide where it leads."""
    relative = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(MODULES)
        if dotted.startswith(".")
    ]
    assert not relative, "\n".join(relative)


def test_one_module_per_foreign_library() -> None:
    """A foreign library is known to one file."""
    strangers = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(LIBRARY)
        if _name(path) not in FOREIGN.get(dotted.split(".")[0], {_name(path)})
    ]
    assert not strangers, "\n".join(strangers)


def test_judgement_is_pure() -> None:
    """The core knows no clock, thread, socket, randomness or log."""
    forbidden = {"time", "threading", "random", "socket", "logging", "queue", "os", "datetime"}
    used = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(sorted((PACKAGE / "core").glob("*.py")))
        if dotted.split(".")[0] in forbidden
    ]
    assert not used, "\n".join(used)


def test_commands_know_the_public_api_only() -> None:
    """A command does what any user could do."""
    inner = []
    for path in sorted((PACKAGE / "cli").rglob("*.py")):
        for node in _nodes(path):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                inside = module.startswith("mlproducer.cli")
                if not inside and module.startswith("mlproducer") and module not in PUBLIC:
                    inner.append(f"{_name(path)}:{node.lineno} imports {module}")
    assert not inner, "\n".join(inner)


def test_every_file_has_a_head() -> None:
    """A file's docstring says what it owns, and on which thread it runs."""
    headless = []
    for path in MODULES:
        module = _nodes(path)[0]
        assert isinstance(module, ast.Module)
        if not re.search(r"^Runs on: \S", ast.get_docstring(module) or "", re.MULTILINE):
            headless.append(f"{_name(path)}:1 has no 'Runs on:' line")
    assert not headless, "\n".join(headless)


def _bodies() -> Iterator[tuple[str, int]]:
    for path in MODULES:
        for node in _nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
                yield f"{_name(path)}:{node.lineno} {node.name}", lines


def test_functions_are_short() -> None:
    """Half have at most eight lines, nine of ten at most thirty, none more than sixty."""
    bodies = dict(_bodies())
    lengths = sorted(bodies.values())
    assert statistics.median(lengths) <= 8
    assert lengths[int(len(lengths) * 0.9)] <= 30
    assert {name: size for name, size in bodies.items() if size > 60} == {}


def test_classes_and_files_can_be_read_at_a_sitting() -> None:
    """A class has at most 300 lines, a file at most 400."""
    classes = {
        f"{_name(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno
        for path in MODULES
        for node in _nodes(path)
        if isinstance(node, ast.ClassDef)
    }
    files = {_name(path): len(_text(path).splitlines()) for path in MODULES}
    assert {name: size for name, size in classes.items() if size > 300} == {}
    assert {name: size for name, size in files.items() if size > 400} == {}


def test_locks_are_few_and_say_what_they_guard() -> None:
    """At most three locks in the library, each with the list of what it guards."""
    text = "\n".join(_text(path) for path in LIBRARY)
    locks = len(re.findall(r"\b(?:R?Lock|Condition|Semaphore)\(", text))
    assert locks <= 3
    assert text.count("# guards:") == locks
    spawning = [path for path in LIBRARY if "threading.Thread(" in _text(path)]
    assert set(map(_name, spawning)) == {"engine/threads.py", "wsgi.py"}


def test_every_wait_has_a_limit_and_nothing_sleeps() -> None:
    """No sleep, no wait without a timeout, no wall clock but for what people read."""
    endless = []
    for path in LIBRARY:
        for node in _nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                limited = bool(node.args or node.keywords)
                waits = node.func.attr in {"wait", "join", "result"} and not limited
                called = ast.unparse(node.func) if node.func.attr in {"sleep", "time"} else ""
                if waits or called in {"time.sleep", "time.time"}:
                    endless.append(f"{_name(path)}:{node.lineno} calls {ast.unparse(node.func)}")
    assert not endless, "\n".join(endless)


def test_one_logger_per_module() -> None:
    """Each module logs under its own name, so that each can be turned down alone."""
    others = [
        f"{_name(path)}:{node.lineno} {ast.unparse(node)}"
        for path in LIBRARY
        for node in _nodes(path)
        if "cli" not in path.parts
        if isinstance(node, ast.Call)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "getLogger"
        if [ast.unparse(each) for each in node.args] != ["__name__"]
    ]
    assert not others, "\n".join(others)
