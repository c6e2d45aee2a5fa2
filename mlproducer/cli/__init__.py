"""The commands ``mlproducer`` and ``python -m mlproducer``.

Owns the command line and the exit codes: 0 fine, 1 failed, 2 usage, 130 for Ctrl-C, 143 for
SIGTERM. Each command is a module of its own with ``configure`` and ``run``.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from mlproducer.cli import (
    check,
    dead_letters,
    demo,
    monitoring,
    publish,
    relay,
    reliability,
    topology,
)
from mlproducer.cli.output import Console, Terminated, UsageError
from mlproducer.errors import MLProducerError
from mlproducer.settings import Settings
from mlproducer.testing import RabbitMQError, WorkerError

FINE, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
STANDARD_STREAMS = 3

COMMANDS = {
    "demo": demo,
    "publish": publish,
    "check": check,
    "dead-letters": dead_letters,
    "reliability": reliability,
    "monitoring": monitoring,
    "relay": relay,
    "topology": topology,
}


def main(
    argv: Sequence[str] | None = None, *, settings: Callable[[], Settings] = Settings.from_env
) -> int:
    """Run a command and return its exit code.

    :param argv: the arguments; ``None`` for those of the process
    :param settings: returns the settings, for everything but a private node
    """
    try:
        arguments = _parser(settings).parse_args(argv)
    except SystemExit as ended:  # argparse has printed the help, or the error
        return int(ended.code or FINE)
    if not _has_output():
        return FAILED
    console = Console(as_json=arguments.json)
    try:
        with console.showing_log(arguments.log_level), console.handling_sigterm():
            well = arguments.run(arguments, console)
        sys.stdout.flush()
    except Terminated:
        console.error("terminated")
        return TERMINATED
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        console.error("the output was closed by its reader")
        return FAILED
    except (MLProducerError, RabbitMQError, WorkerError, UsageError, OSError) as error:
        text = _text(error)
        with contextlib.suppress(OSError):  # which may be what went wrong
            console.emit({"error": text})
        console.error(text)
        return USAGE if isinstance(error, UsageError) else FAILED
    finally:
        _flush_or_drop()
    if console.terminated:
        return TERMINATED
    return FINE if well else FAILED


def _has_output() -> bool:
    """Open standard streams that are missing, and return whether there is an output to write to.

    Otherwise the next file or socket would get the stream's number, and the text meant for it.
    """
    missing = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    while missing and os.open(os.devnull, os.O_RDWR) < STANDARD_STREAMS:
        pass
    if "stderr" in missing:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open for good
    if "stdout" in missing:
        sys.stderr.write("mlproducer: standard output is closed\n")
        return False
    return True


def _flush_or_drop() -> None:
    """Flush the output, or drop it if that fails: Python would report the failure once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser(settings: Callable[[], Settings]) -> argparse.ArgumentParser:
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
        command.set_defaults(run=module.run, log_level=module.LOG_LEVEL, settings=settings)
        module.configure(command)
    return parser


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
