"""What the fault suite shares: producers on a real node, and a table of what was measured.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import pytest

from tests.broker.conftest import connect, mortal_node, proxy
from tests.faults.traffic import FIGURES

__all__ = ["connect", "mortal_node", "proxy"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures, also where every test has passed."""
    if FIGURES:
        terminalreporter.section("measured under faults")
        for name, figure in FIGURES.items():
            terminalreporter.line(f"{name}: {figure}")
