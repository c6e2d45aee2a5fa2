"""What the fault suite shares: producers on a real node, and a table of what was measured.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlproducer.testing import RedisServer
from tests.broker.conftest import connect, mortal_node, proxy, strict_node, strict_vhost
from tests.faults.traffic import FIGURES
from tests.long import GIVEN

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


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path, prefix: str) -> str:
    """Return the URL of the store that `tests.long` was asked for, in memory without."""
    ahead = f"write_ahead={GIVEN.ahead:d}"
    if GIVEN.store == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}?{ahead}"
    if GIVEN.store == "redis":
        return f"{request.getfixturevalue('redis_server').url}?prefix={prefix}&{ahead}"
    if GIVEN.store == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        return f"{server.url}?table=test_{secrets.token_hex(4)}&{ahead}"
    return "memory://"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures, also where every test has passed."""
    if FIGURES:
        terminalreporter.section("measured under faults")
        for name, figure in FIGURES.items():
            terminalreporter.line(f"{name}: {figure}")
