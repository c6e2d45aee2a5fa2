"""What all rings share: the library's own fixtures, and coverage in the workers of pytest-xdist.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

_MEASURE = "COVERAGE_PROCESS_START"
"""Where this variable names a configuration, each worker measures by it from here on."""

_coverage = None
if _MEASURE in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    from coverage import Coverage

    # Before anything imports the library; not in what the tests start, which may look at stderr.
    _coverage = Coverage(config_file=os.environ.pop(_MEASURE))
    _coverage.start()

pytest_plugins = ["mlproducer.testing.plugin"]

# How fast examples come says how busy the machine is. A change is checked by the same examples each
# time; ``--hypothesis-profile explore`` tries others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Write down what was measured: a worker ends without the interpreter's own end."""
    if _coverage is not None:
        _coverage.stop()
        _coverage.save()


@pytest.fixture(scope="session", autouse=True)
def _audible_ctrl_c() -> Iterator[None]:
    """Hear SIGINT, here and in programs, also where a shell's background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
