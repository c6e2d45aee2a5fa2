"""``mlproducer reliability``: break a broker in several ways, and check that nothing is lost.

Each scenario has a private node of its own. If RABBITMQ_URL is set, that broker is used, and steps
that would harm it are skipped. At the end the answers of `publish()` are held against the queues.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from attrs import asdict, frozen

from mlproducer import Settings
from mlproducer.cli.output import Console
from mlproducer.cli.reliability import (
    circuit_breaker,
    connection_resilience,
    health_checks,
    message_retry,
    publisher_confirms,
)
from mlproducer.cli.reliability.figures import Figures
from mlproducer.cli.reliability.scenario import Scenario, Step, Trial, UnexpectedError
from mlproducer.cli.reliability.scenario_setup import ScenarioSetup
from mlproducer.errors import MLProducerError
from mlproducer.testing import RabbitMQError

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (
        connection_resilience,
        message_retry,
        circuit_breaker,
        publisher_confirms,
        health_checks,
    )
}
ALL = "all"

HELP = "break a broker in several ways, and see what is lost"
DESCRIPTION = (
    "Run a scenario, or all (about a minute), each on a private RabbitMQ node, with shortened "
    "timers. If RABBITMQ_URL is set, that broker is used: it is not harmed, nothing is declared on "
    "it, and only messages that it returns are published; the other steps are skipped."
)
LOG_LEVEL = logging.CRITICAL  # what the library warns of is done here on purpose

_FAILURES = (
    UnexpectedError,
    MLProducerError,
    RabbitMQError,
    TimeoutError,
    FutureTimeoutError,  # a class of its own in Python 3.10
    queue.Empty,
)


@frozen
class Report:
    """The result of one scenario."""

    scenario: Scenario
    steps: tuple[Step, ...]
    figures: Figures

    @property
    def ok(self) -> bool | None:
        """Whether no step failed; ``None`` if all were skipped."""
        results = {step.ok for step in self.steps}
        return None if results == {None} else False not in results

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        steps = [{**asdict(step), "seconds": round(step.seconds, 3)} for step in self.steps]
        figures = self.figures.to_json()
        return {"scenario": self.scenario.name, "ok": self.ok, "steps": steps, "account": figures}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a scenario."""
    parser.add_argument(
        "scenario",
        nargs="?",
        default=ALL,
        choices=(ALL, *SCENARIOS),
        help=f"{ALL} (the default), {', '.join(SCENARIOS)}",
        metavar="SCENARIO",
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Run the scenarios, print them, and return whether all went as expected.

    :raises RabbitMQNotInstalled: no RABBITMQ_URL is set and there is no RabbitMQ to start
    """
    started = time.monotonic()
    chosen = [SCENARIOS[name] for name in SCENARIOS if arguments.scenario in (ALL, name)]
    settings = Settings.from_env() if os.environ.get("RABBITMQ_URL") else None
    reports = [_scenario(scenario, settings, console) for scenario in chosen]
    total = sum((report.figures for report in reports), Figures())
    well = all(report.ok is not False for report in reports)
    seconds = time.monotonic() - started
    show_totals(reports, total, seconds, console)
    console.emit(
        {
            "ok": well,
            "seconds": round(seconds, 3),
            "private": settings is None,
            "scenarios": [report.to_json() for report in reports],
            **total.to_json(),
        }
    )
    return well


def _scenario(scenario: Scenario, settings: Settings | None, console: Console) -> Report:
    console.say(f"{scenario.name}: {scenario.summary}")
    with ScenarioSetup(settings) as setup:
        steps = []
        for step in _steps(scenario, setup):
            _show(step, console)
            steps.append(step)
        figures = Figures()
        if setup.journal.receipts:
            arrived, figures = _settle(setup)
            _show(arrived, console)
            steps.append(arrived)
    console.say()
    return Report(scenario, tuple(steps), figures)


def _steps(scenario: Scenario, setup: ScenarioSetup) -> Iterator[Step]:
    for trial in scenario.trials:
        if setup.lacks(trial.need):
            yield Step(trial.done, trial.expected, trial.need.value, None)
        else:
            yield _try(trial, setup)


def _try(trial: Trial, setup: ScenarioSetup) -> Step:
    started = time.monotonic()
    try:
        ok, seen = True, trial.run(setup)
    except UnexpectedError as error:
        ok, seen = False, str(error)
    except _FAILURES as error:
        ok, seen = False, f"{type(error).__name__}: {error}"
    return Step(trial.done, trial.expected, seen, ok, time.monotonic() - started)


def _settle(setup: ScenarioSetup) -> tuple[Step, Figures]:
    """Hold the journal against the queues, as a step of its own."""
    accounts: list[Figures] = []

    def settle(setup: ScenarioSetup) -> str:
        accounts.append(figures := setup.figures())
        if not figures.well:
            raise UnexpectedError(f"{figures}, {figures.leaked} leaked")
        return str(figures)

    trial = Trial("compare the answers of publish() with the queues", "everything arrived", settle)
    step = _try(trial, setup)
    return step, accounts[0] if accounts else Figures(taken_over=len(setup.journal.receipts))


def _show(step: Step, console: Console) -> None:
    taken = "" if step.ok is None else f"{step.seconds:.2f} s"
    console.say(f"  {_word(step.ok):<7}  {taken:>7}  {step.done}")
    if step.ok is None:
        console.say(f"{'':20}it {step.seen}")
    else:
        console.say(f"{'':20}expected  {step.expected}")
        console.say(f"{'':20}seen      {step.seen}")


def _word(ok: bool | None) -> str:
    return {True: "ok", False: "FAILED", None: "skipped"}[ok]


def show_totals(
    reports: Sequence[Report], total: Figures, seconds: float, console: Console
) -> None:
    """Print how each scenario went, and the sums of all messages."""
    steps = [step.ok for report in reports for step in report.steps]
    ok, failed, skipped = (steps.count(result) for result in (True, False, None))
    rows = [(report.scenario.name, _word(report.ok)) for report in reports]
    rows.append(("steps", f"{ok} ok, {failed} failed, {skipped} skipped"))
    if total.taken_over:
        rows += [
            ("taken over by publish()", str(total.taken_over)),
            ("delivered", f"{total.delivered}, {total.dead_lettered} of them as dead letters"),
            ("delivery rate over the faults", f"{total.rate:.2%}"),
            ("duplicates", str(total.duplicates)),
            ("given back by publish()", str(total.given_back)),
            ("longest publish()", f"{total.longest_publish:.3f} s"),
        ]
    console.table([*rows, ("seconds", f"{seconds:.1f}")])
