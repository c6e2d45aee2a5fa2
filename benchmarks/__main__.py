"""The command: which benchmarks, how much of each, and where the results go.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from benchmarks import charts, machine
from benchmarks.lab import FULL, QUICK, Lab
from benchmarks.report import Report
from benchmarks.suite import LONG, NAMES

DEFAULT_OUT = Path(__file__).parent.parent / ".benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a benchmark failed, whatever the figures say."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unknown = set(options.names).difference(NAMES, LONG)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    scale = QUICK if options.quick else FULL
    scale = evolve(
        scale,
        rounds=options.rounds or scale.rounds,
        seconds=options.seconds or scale.seconds,
    )
    reports: dict[str, Report] = {}
    failed = []
    started = time.monotonic()
    with Lab(scale) as lab:
        for name in options.names or NAMES:
            try:
                reports[name] = _run(name, lab)
            except Exception:  # noqa: BLE001 - one that fails must not take the others with it
                traceback.print_exc()
                failed.append(name)
        broker, notes = lab.broker_name, lab.notes
    found = machine.describe()
    print(f"{machine.caption(found, broker)}\n{time.monotonic() - started:.0f} s in all")
    print(*notes, sep="\n")
    _write(options.out, reports, {**found, "broker": broker, "notes": notes, "failed": failed})
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare the library with its peers, round by round. Starts a RabbitMQ node "
        "of its own unless RABBITMQ_URL names a broker, whose queue ml.summarize it then empties.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"which; by default {', '.join(NAMES)}; only by name: {', '.join(LONG)}",
    )
    parser.add_argument("--quick", action="store_true", help="a short form, under 2 minutes")
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="where results.json and the charts go (default: .benchmarks)",
    )
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, help="length of a turn")
    return parser


def _run(name: str, lab: Lab) -> Report:
    module = importlib.import_module(f"benchmarks.suite.{name}")
    title = (module.__doc__ or name).partition("\n")[0]
    started = time.monotonic()
    print(f"\n{name}: {title}", flush=True)
    report: Report = module.run(lab)
    print(f"{report.table()}\n  {time.monotonic() - started:.0f} s", flush=True)
    return report


def _write(out: Path, reports: dict[str, Report], about: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results = {**about, "benchmarks": {name: each.to_json() for name, each in reports.items()}}
    path = out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    drawn = charts.draw(reports, out)
    print(f"written: {path}", *(each.name for each in drawn))
    if charts.Canvas is None:
        print("no charts: matplotlib is not installed (pip install '.[bench]')")


if __name__ == "__main__":
    sys.exit(main())
