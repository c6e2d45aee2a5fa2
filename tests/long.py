"""Long runs: each is one command with a seed, and its report is one screen.

::

    .venv/bin/python -m tests.long nemesis --minutes 30 --store redis --ahead
    .venv/bin/python -m tests.long kills --times 1000 --store sqlite    # of publishers
    .venv/bin/python -m tests.long relays --times 1000                  # of applications, relays
    .venv/bin/python -m tests.long forks --times 10000
    .venv/bin/python -m tests.long reconnects --times 1000
    .venv/bin/python -m tests.long soak --minutes 60

They are tests that are marked ``slow``; this runs one of them with the given length, and without it
each has one of its own. The report is what pytest shows at the end, "measured under faults".

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random

import pytest
from attrs import asdict, frozen

_VARIABLE = "MLPRODUCER_LONG"

TESTS = {
    "nemesis": "tests/faults/test_nemesis.py::test_long_run",
    "kills": "tests/faults/test_kill9.py::test_killed_at_any_instant",
    "relays": "tests/faults/test_outbox_kill9.py",
    "forks": "tests/faults/test_leaks.py::test_forks",
    "reconnects": "tests/faults/test_leaks.py::test_reconnects",
    "soak": "tests/faults/test_soak.py",
}


@frozen
class Length:
    """What a long run was asked for; what was not is the test's own.

    :ivar times: kills, forks or reconnects
    :ivar store: where messages wait, by its URL's scheme
    :ivar ahead: whether each message is stored before it is sent
    :ivar nodes: of the broker: one, or a cluster of three
    """

    seed: int = 307
    minutes: float | None = None
    times: int | None = None
    store: str = "memory"
    ahead: bool = False
    nodes: int = 1


GIVEN = Length(**json.loads(os.environ.get(_VARIABLE, "{}")))


def main() -> int:
    """Run one of the tests."""
    parser = argparse.ArgumentParser(prog="python -m tests.long", description="Long runs.")
    parser.add_argument("run", choices=TESTS)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--minutes", type=float, help="of a nemesis, or a soak")
    parser.add_argument("--times", type=int, help="kills, forks or reconnects")
    parser.add_argument(
        "--store", choices=["memory", "sqlite", "redis", "postgresql"], default="memory"
    )
    parser.add_argument("--ahead", action="store_true", help="store each message before it is sent")
    parser.add_argument("--nodes", type=int, choices=[1, 3], default=1, help="of a nemesis")
    given = vars(parser.parse_args())
    run = given.pop("run")
    test, length = TESTS[run], Length(**given)
    if run == "kills" and length.store != "memory":
        test += f"[{length.store}-long]"
    os.environ[_VARIABLE] = json.dumps(asdict(length))
    print(length, flush=True)
    return pytest.main(["-q", "--show-capture=no", "-m", "slow", test])


if __name__ == "__main__":
    raise SystemExit(main())
