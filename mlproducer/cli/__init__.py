"""The commands ``mlproducer`` and ``python -m mlproducer``.

Owns the command line and the exit codes: 0 fine, 1 failed, 2 usage, 130 for Ctrl-C. Each command is
a module of its own with ``configure`` and ``run``.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from mlproducer.cli import (
    check,
    dead_letters,
    demo,
    monitoring,
    publish,
    reliability,
    topology,
)
from mlproducer.cli.output import Console, UsageError
from mlproducer.errors import MLProducerError
from mlproducer.testing import RabbitMQError, WorkerError

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

COMMANDS = {
    "demo": demo,
    "publish": publish,
    "check": check,
    "dead-letters": dead_letters,
    "reliability": reliability,
    "monitoring": monitoring,
    "topology": topology,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit code.

    :param argv: the arguments; ``None`` takes those of the process
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as ended:  # argparse has printed the help, or what is wrong
        return int(ended.code or FINE)
    console = Console(as_json=arguments.json)
    try:
        with console.showing_log(arguments.log_level):
            well = arguments.run(arguments, console)
        sys.stdout.flush()
    except KeyboardInterrupt:
        console.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more; Python itself would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MLProducerError, RabbitMQError, WorkerError, UsageError, OSError) as error:
        text = _text(error)
        console.emit({"error": text})
        console.complain(text)
        return USAGE if isinstance(error, UsageError) else FAILED
    return FINE if well else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlproducer",
        description="Publish machine-learning tasks to RabbitMQ without losing one.",
        epilog="The broker is the one in RABBITMQ_URL. Exit codes: 0 fine, 1 failed, 2 usage.",
    )
    parser.add_argument(
        "--version", action="version", version=f"mlproducer {metadata.version('mlproducer')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        command.add_argument("--json", action="store_true", help="output for programs")
        command.set_defaults(run=module.run, log_level=module.LOG_LEVEL)
        module.configure(command)
    return parser


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
