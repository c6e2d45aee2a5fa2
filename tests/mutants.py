"""Change the core in small ways, and see if the ring ``pure`` fails: `python -m tests.mutants`.

Each mutant is one change, in a forked process whose imports find the changed source; no file is
written. What survives is printed: a test is missing, or the change makes no difference.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import CodeType, ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "mlproducer" / "_core"
PURE = ROOT / "tests" / "pure"

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
REMOVED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Continue)
CPU_LIMIT, LIMIT = 60, 900
"""Seconds; a mutant whose tests do not end is killed, too."""

OPTIONS = [
    *("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"),
    *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
]


def variants(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield what may stand in a node's place, and what to call the change."""
    new = deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()  # type: ignore[assignment]
        yield new, "comparison"
    elif isinstance(new, (ast.BoolOp, ast.BinOp, ast.AugAssign)) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()  # type: ignore[assignment]
        yield new, "operator"
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not):
        yield new.operand, "no not"
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value), "bool"
    elif isinstance(new, ast.Constant) and isinstance(new.value, (int, float)):
        yield ast.Constant(new.value + 1), "number"
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield new, "swapped"
    elif isinstance(new, (ast.If, ast.While)) and isinstance(
        new.test, (ast.Name, ast.Attribute, ast.Call)
    ):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield new, "negated"
    elif isinstance(new, ast.Return) and isinstance(new.value, (ast.Name, ast.Attribute, ast.Call)):
        yield ast.Return(ast.UnaryOp(ast.Not(), new.value)), "returns the opposite"
    if isinstance(node, REMOVED):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not docstring:
            yield ast.Pass(), "removed"


class _Replacement(ast.NodeTransformer):
    """Replaces one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old = old
        self._new = new

    def visit(self, node: ast.AST) -> ast.AST:
        """Replace the node, or look into it."""
        if node is self._old:
            return ast.copy_location(self._new, node)
        return self.generic_visit(node)


def code_of(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that run when a function is called."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    if not isinstance(node, (ast.Load, ast.Store)):
                        yield node


class Mutant:
    """One change.

    :param number: which of a file's changes it is
    """

    def __init__(self, path: Path, number: int, line: int, text: str) -> None:
        self.path = path
        self.number = number
        self.name = f"{path.relative_to(ROOT)}:{line}: {text}"

    @staticmethod
    def changes(path: Path) -> Iterator[tuple[ast.Module, ast.AST, ast.AST, str]]:
        """Yield all changes of a file, in the same order each time."""
        tree = ast.parse(path.read_text())
        seen: set[ast.AST] = set()
        for node in code_of(tree):
            if node not in seen:
                seen.add(node)
                for new, text in variants(node):
                    yield tree, node, new, text

    @classmethod
    def all_of(cls, path: Path) -> list[Mutant]:
        """Return all that can be made of a file."""
        made = []
        for number, (_, node, _, text) in enumerate(cls.changes(path)):
            where = f"{text}: {ast.unparse(node).splitlines()[0][:90]}"
            made.append(cls(path, number, getattr(node, "lineno", 0), where))
        return made

    def code(self) -> CodeType:
        """Compile the file with the change."""
        tree, old, new, _ = list(self.changes(self.path))[self.number]
        _Replacement(old, new).visit(tree)
        return compile(ast.fix_missing_locations(tree), str(self.path), "exec")


class _Loader(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Loads the changed module instead of its file."""

    def __init__(self, mutant: Mutant) -> None:
        parts = mutant.path.relative_to(ROOT).with_suffix("").parts
        self._name = ".".join(parts)
        self._code = mutant.code()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the changed module's specification, and leave other names to Python."""
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed code."""
        exec(self._code, module.__dict__)


def tests() -> list[str]:
    """Return the files of the ring; first those that import the core, the model after those."""

    def rank(path: Path) -> tuple[bool, bool, str]:
        return "_core" not in path.read_text(), "model" in path.name, path.name

    return [str(path) for path in sorted(PURE.glob("test_*.py"), key=rank)]


def exit_code(mutant: Mutant, files: Sequence[str]) -> int:
    """Run the tests in a forked process; return 0 if they passed, or less if a limit ended it."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    with contextlib.suppress(BaseException):
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
        signal.alarm(LIMIT)
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        sys.meta_path.insert(0, _Loader(mutant))
        code = int(pytest.main([*OPTIONS, *files]))
    os._exit(code)


def main() -> None:
    """Try a sample, print those that survive, and end with 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of mlproducer/_core")
    parser.add_argument("--sample", type=int, default=150, help="0: all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="show the sample, and try nothing")
    arguments = parser.parse_args()
    # That an example fails is enough, it is not made smaller. The tests read this when imported.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    paths = [path.resolve() for path in arguments.files] or sorted(CORE.glob("*.py"))
    mutants = [mutant for path in paths for mutant in Mutant.all_of(path)]
    total = len(mutants)
    if arguments.sample and arguments.sample < total:
        mutants = random.Random(arguments.seed).sample(mutants, arguments.sample)
    if arguments.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return
    os.chdir(ROOT)
    files, survivors = tests(), 0
    for mutant in mutants:
        code = exit_code(mutant, files)
        survivors += code == 0
        if code <= 0:
            print("survived" if code == 0 else "ended by a limit", mutant.name, flush=True)
    print(f"{len(mutants)} of {total} mutants tried, {len(mutants) - survivors} killed")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
