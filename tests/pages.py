"""The repository's pages, and the code that they show.

Runs on: the tests' threads.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    """Return the paths of all pages."""
    ours = (path.relative_to(ROOT) for path in ROOT.rglob("*.rst"))
    return sorted(ROOT / path for path in ours if not path.parts[0].startswith("."))


def snippets(page: str, language: str = "python") -> list[str]:
    """Return the blocks of code in a page's text, in order."""
    pattern = rf"^\.\. code(?:-block)?:: {language}\n\n((?:    .*\n|\n)+)"
    return [textwrap.dedent(each) for each in re.findall(pattern, page, re.MULTILINE)]


def run(snippet: str, page: Path, module: dict[str, Any]) -> None:
    """Run a block of code as a part of a module."""
    exec(compile(snippet, str(page), "exec"), module)
