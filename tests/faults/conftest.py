"""What the fault suite shares: producers on a real node, and a table of what was measured.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from mlproducer.testing import RedisServer
from tests.broker.conftest import connect, mortal_node, proxy, strict_node, strict_vhost
from tests.faults.traffic import FIGURES

__all__ = ["connect", "mortal_node", "proxy", "strict_node", "strict_vhost"]


@pytest.fixture
def mortal_redis() -> Iterator[RedisServer]:
    """Yield a Redis that the test may end."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """Return a prefix that no other test has."""
    return f"test-{secrets.token_hex(4)}:"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures, also where every test has passed."""
    if FIGURES:
        terminalreporter.section("measured under faults")
        for name, figure in FIGURES.items():
            terminalreporter.line(f"{name}: {figure}")
