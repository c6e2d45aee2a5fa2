"""Real texts that are on every machine: licences, or else docstrings of Python's library.

Runs on: the main thread.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from attrs import field, frozen

LICENSES = Path("/usr/share/common-licenses")
STANDARD_LIBRARY = Path(os.__file__).parent

MIN_CHARACTERS, MAX_CHARACTERS = 200, 4000


@frozen
class Text:
    """A piece of text and its source."""

    title: str
    text: str = field(repr=False)


def texts(licenses: Path = LICENSES, library: Path = STANDARD_LIBRARY) -> list[Text]:
    """Return the texts of the first of the two directories that has any.

    :raises FileNotFoundError: neither has any
    """
    found = list(_licences(licenses)) or list(_docstrings(library))
    if not found:
        raise FileNotFoundError(f"no texts in {licenses} nor in {library}")
    return found


def _licences(directory: Path) -> Iterator[Text]:
    for path in sorted(directory.glob("*")):
        if path.is_file() and not path.is_symlink():
            yield from _pieces(path.name, path.read_text(encoding="utf-8", errors="replace"))


def _docstrings(directory: Path) -> Iterator[Text]:
    for path in sorted(directory.glob("*.py")):
        documentation = ast.get_docstring(ast.parse(path.read_bytes()))
        yield from _pieces(path.stem, documentation or "")


def _pieces(title: str, text: str) -> Iterator[Text]:
    """Cut a text at paragraphs; a rest that is too short to be summarised is left out."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece = f"{piece}\n\n{paragraph}".strip()[:MAX_CHARACTERS]
        if len(piece) >= MIN_CHARACTERS:
            yield Text(title, piece)
            piece = ""
