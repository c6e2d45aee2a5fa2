"""The pieces of Python in a page.

Runs on: the tests' threads.
"""

from __future__ import annotations

import re
import textwrap


def snippets(page: str) -> list[str]:
    """Give them in their order."""
    pattern = r"^\.\. code:: python\n\n((?:    .*\n|\n)+)"
    return [textwrap.dedent(each) for each in re.findall(pattern, page, re.MULTILINE)]
