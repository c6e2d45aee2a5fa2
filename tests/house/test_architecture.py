"""The architecture: layers, foreign libraries, heads of files, locks, waits and loggers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlproducer"

LAYERS = [
    {"errors", "_foreign_calls", "_clock", "_synchronization", "_forks"},
    {
        "settings",
        "message",
        "tasks",
        "topology",
        "tracing",
        "_broker_url",
        "_field_checks",
        "_store_url",
    },
    {"_core", "_wire", "status"},
    {"observe", "stores"},
    {"_engine", "_answers", "_async_answers"},
    {
        "__init__",
        "producer",
        "outbox",
        "dead_letters",
        "wsgi",
        "monitoring",
        "_status_page",
        "_http_server",
    },
    {"testing", "cli", "contrib", "__main__"},
]
"""Modules and packages by layer, the lowest first."""

FOREIGN = {
    "pika": {"_engine"},
    "sqlite3": {"stores", "contrib"},
    "redis": {"stores", "contrib"},
    "psycopg": {"stores", "outbox", "contrib"},
    "prometheus_client": {"observe"},
    "orjson": {"_wire"},
    "opentelemetry": {"observe"},
    "celery": {"contrib"},
    "kombu": {"contrib"},
    "django": {"contrib", "outbox"},
    "flask": {"contrib"},
    "sqlalchemy": {"outbox", "contrib"},
}
"""Foreign libraries, and the parts that may import them; `testing` talks to what it likes."""

MODULES = sorted(PACKAGE.rglob("*.py"))
LIBRARY = [path for path in MODULES if "testing" not in path.parts]


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all that is in a file, the module itself first."""
    return tuple(ast.walk(ast.parse(_text(path))))


@cache
def _imports(path: Path) -> tuple[tuple[int, str], ...]:
    """Return the line and dotted name of all that a file imports, at its top or lazily."""
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


def _part(dotted: str) -> str | None:
    """Return the module or package, directly below `mlproducer`, that a dotted name is of."""
    parts = dotted.split(".")
    if parts[0] != "mlproducer":
        return None
    known = len(parts) > 1 and any(parts[1] in layer for layer in LAYERS)
    return parts[1] if known else "__init__"


def _part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _layer(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def _arrows() -> Iterator[tuple[Path, int, str, str]]:
    """Yield each import of one part by another: file, line, importing part, imported part."""
    for path, line, dotted in _all_imports(MODULES):
        part, own = _part(dotted), _part_of(path)
        package_itself = dotted == "mlproducer" and any(
            each.startswith("mlproducer.") for _, each in _imports(path)
        )
        if part is not None and part != own and not package_itself:
            yield path, line, own, part


def test_every_file_has_a_layer() -> None:
    """Each file has its place in the table above, and the layers are few."""
    homeless = [
        _name(path) for path in MODULES if not any(_part_of(path) in layer for layer in LAYERS)
    ]
    assert not homeless, "\n".join(homeless)
    assert len(LAYERS) <= 7


def test_imports_run_downwards() -> None:
    """A file imports only from its own layer and those below; lazy imports count."""
    wrong = [
        f"{_name(path)}:{line} imports {part}, which is in a layer above"
        for path, line, own, part in _arrows()
        if _layer(part) > _layer(own)
    ]
    assert not wrong, "\n".join(wrong)


def test_parts_of_a_layer_import_each_other_in_one_direction() -> None:
    """There is an order in which the parts could be written, each with those before it."""
    needs: dict[str, set[str]] = {}
    for _, _, own, part in _arrows():
        if own != "__init__":  # the package itself only gathers the public names
            needs.setdefault(own, set()).add(part)
    order = TopologicalSorter(needs)
    order.prepare()  # raises CycleError, which shows the circle


def test_files_import_each_other_in_one_direction() -> None:
    """No file needs, even lazily or for its types alone, what needs it in turn."""
    needs = {
        _name(path): {
            _name(file)
            for _, dotted in _imports(path)
            if (file := ROOT / (dotted.replace(".", "/") + ".py")) in MODULES and file != path
        }
        for path in MODULES
    }
    TopologicalSorter(needs).prepare()  # raises CycleError, which shows the circle


def test_imports_are_absolute() -> None:
    """A relative import would hide where it leads."""
    relative = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(MODULES)
        if dotted.startswith(".")
    ]
    assert not relative, "\n".join(relative)


def test_foreign_libraries_are_known_at_the_edge() -> None:
    """A foreign library is known to the parts that turn it into terms of ours, and to no other."""
    strangers = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(LIBRARY)
        if _part_of(path) not in FOREIGN.get(dotted.split(".")[0], {_part_of(path)})
    ]
    assert not strangers, "\n".join(strangers)


def test_judgement_is_pure() -> None:
    """The core knows no clock, thread, socket, randomness or log."""
    forbidden = {"time", "threading", "random", "socket", "logging", "queue", "os", "datetime"}
    used = [
        f"{_name(path)}:{line} imports {dotted}"
        for path, line, dotted in _all_imports(sorted((PACKAGE / "_core").glob("*.py")))
        if dotted.split(".")[0] in forbidden
    ]
    assert not used, "\n".join(used)


def test_every_file_has_a_head() -> None:
    """A file's docstring says what it owns, and on which thread it runs."""
    headless = []
    for path in MODULES:
        module = _nodes(path)[0]
        assert isinstance(module, ast.Module)
        if not re.search(r"^Runs on: \S", ast.get_docstring(module) or "", re.MULTILINE):
            headless.append(f"{_name(path)}:1 has no 'Runs on:' line")
    assert not headless, "\n".join(headless)


def test_locks_say_what_they_guard() -> None:
    """Each lock of the library stands below a line that says what it guards."""
    silent = []
    for path in LIBRARY:
        lines = _text(path).splitlines()
        for number, line in enumerate(lines):
            if re.search(r"\b(?:R?Lock|Condition|Semaphore)\(", line):
                above = "\n".join(lines[max(0, number - 3) : number])
                if "# guards:" not in above:
                    silent.append(f"{_name(path)}:{number + 1}")
    assert not silent, "\n".join(silent)


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


def test_one_monotonic_clock() -> None:
    """The library's clock is `mlproducer._clock`, which libraries for tests cannot stop."""
    others = [
        f"{_name(path)} uses time.monotonic: write 'from mlproducer import _clock as time'"
        for path in LIBRARY
        if "cli" not in path.parts and _name(path) != "_clock.py"
        if "time.monotonic" in _text(path) and "import _clock as time" not in _text(path)
    ]
    assert not others, "\n".join(others)


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
