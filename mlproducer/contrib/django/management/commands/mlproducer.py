"""``manage.py mlproducer ...``: the library's own commands, with Django's settings.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from mlproducer.cli import main
from mlproducer.contrib.django.process import one


class Command(BaseCommand):
    """Hands its arguments on, as they are."""

    help = "Run a command of mlproducer: check, relay, dead-letters, topology, publish ..."
    requires_system_checks: Sequence[str] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Take all that follows; options of Django's own stand before it."""
        parser.add_argument(
            "arguments",
            nargs=argparse.REMAINDER,
            metavar="COMMAND ...",
            help="as for mlproducer itself; 'manage.py mlproducer check --help' tells more",
        )

    def handle(self, *_: Any, arguments: list[str], **__: Any) -> None:
        """Run it.

        :raises CommandError: it failed, with its own exit code
        """
        code = main(arguments, settings=lambda: one.current().settings)
        if code:
            name = arguments[0] if arguments else "mlproducer"
            raise CommandError(f"{name}: exit code {code}", returncode=code)
