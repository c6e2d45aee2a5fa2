"""gunicorn's configuration beside metrics in multiprocess mode, as the README shows it."""

from __future__ import annotations

from typing import Any

from prometheus_client import multiprocess


def child_exit(_server: object, worker: Any) -> None:
    """Forget the gauges of a worker that has ended."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
