"""``mlproducer dead-letters list|show|replay|purge``.

A payload is a user's text: it is printed by ``show --body`` and by nothing else, and of headers
the names alone.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import base64
import logging
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from typing import Any

from attrs import define, field

from mlproducer.cli import connectivity
from mlproducer.cli.output import Console, UsageError, plain
from mlproducer.dead_letters import Letter, Place, Target, Wanted, places
from mlproducer.errors import AuthenticationError, MLProducerError, NotConnectedError, PublishError

HELP = "look at dead letters, send them again, delete them"
DESCRIPTION = (
    "Dead letters are messages that failed at every retry, or that workers or the broker gave up. "
    "They are in the queue ml.dead_letter of the broker in RABBITMQ_URL; while a command reads it, "
    "no other consumer gets them. Those that the broker has not taken yet are in the store in "
    "ML_STORE_URL, unless that is memory://."
)
LOG_LEVEL = logging.CRITICAL  # what fails is reported letter by letter

_SPAN = re.compile(r"(\d{1,9})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, act: Any, summary: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        added.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="output for programs"
        )
        added.set_defaults(act=act)
        return added

    every = "their message ids; without, all that the filters let through"
    _add_filters(action("list", _list, "list the dead letters"))
    show = action("show", _show, "show one letter: its fields and sizes")
    show.add_argument("ids", metavar="ID", nargs=1, help="its message id")
    show.add_argument("--body", action="store_true", help="print its payload too")
    replay = action("replay", _replay, "send letters to where they were to go")
    replay.add_argument("ids", metavar="ID", nargs="*", help=every)
    _add_filters(replay)
    replay.add_argument("--exchange", help="send them to this exchange instead; '' is the default")
    replay.add_argument("--routing-key", metavar="KEY", help="send them with this key instead")
    purge = action("purge", _purge, "delete letters for good")
    purge.add_argument("ids", metavar="ID", nargs="*", help=every)
    _add_filters(purge)
    purge.add_argument("--yes", action="store_true", help="do not ask")


def _add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", metavar="NAME", help="only tasks of this name; * and ? stand for any characters"
    )
    parser.add_argument("--reason", metavar="TEXT", help="only those whose reason has this in it")
    parser.add_argument(
        "--since",
        type=_moment,
        metavar="WHEN",
        help="only those that failed first after this: 30m, 2h, 7d, or 2030-01-31T12:00:00+00:00",
    )


def _moment(text: str) -> datetime:
    span = _SPAN.fullmatch(text)
    try:
        if span is not None:
            return datetime.now(timezone.utc) - timedelta(**{_UNITS[span[2]]: int(span[1])})
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return moment if moment.tzinfo is not None else moment.astimezone()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no span such as 30m, 2h or 7d, and no moment such as 2030-01-31T12:00:00Z"
        ) from None


def _wanted(arguments: argparse.Namespace) -> Wanted:
    """Return the predicate that selects letters by id and by the filters."""
    ids = set(getattr(arguments, "ids", ()))
    task, reason, since = arguments.task, arguments.reason, arguments.since

    def fits(letter: Letter) -> bool:
        if ids and letter.message_id not in ids:
            return False
        if task is not None and not fnmatchcase(letter.task, task):
            return False
        if reason is not None and reason.lower() not in letter.reason.lower():
            return False
        return since is None or (letter.since is not None and letter.since >= since)

    return fits


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Carry out the action, and return whether it succeeded.

    :raises ConfigurationError: a setting does not parse
    :raises UsageError: there is no terminal on which to confirm a deletion
    """
    return bool(arguments.act(arguments, places(arguments.settings()), console))


def _visit(where: Sequence[Place], act: Callable[[Place], object], console: Console) -> bool:
    """Act in each place; the error of one does not stop the others, and is reported last."""
    reasons: dict[str, MLProducerError] = {}
    for place in where:
        try:
            act(place)
        except MLProducerError as error:
            reasons.setdefault(str(error), error)
    for text, reason in reasons.items():
        if any(other in text for other in reasons if other != text):
            continue  # the same in more words
        console.emit({"error": text})
        console.error(text)
        if isinstance(reason, (NotConnectedError, AuthenticationError)):
            console.error(f"-> {connectivity.advise(reason)}")
    return not reasons


def _list(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    count = 0

    def look(place: Place) -> None:
        nonlocal count
        for letter in place.list(_wanted(arguments)):
            count += 1
            console.emit(letter.to_json())
            console.detail(_line(letter))

    well = _visit(where, look, console)
    console.say(_count(count))
    return well


def _show(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    found: set[str] = set()

    def look(place: Place) -> None:
        for letter in place.list(arguments.ids):
            found.add(letter.message_id)
            _show_letter(letter, console, with_body=arguments.body)

    well = _visit(where, look, console)
    return _all_found(arguments.ids, found, console) and well


def _show_letter(letter: Letter, console: Console, *, with_body: bool) -> None:
    further = {
        "task": letter.task,
        "body_bytes": len(letter.body),
        "headers": list(letter.headers),
        "problem": letter.problem,
    }
    body = _body(letter) if with_body else {}
    console.emit({**letter.to_json(), **further, **body})
    for name, value in _rows(letter):
        console.detail(f"  {name:<16}  {plain(value)}")
    if with_body:
        console.detail(plain(letter.body.decode(errors="backslashreplace"), lines=True))


@define
class _Count:
    """Counts letters that are gone and that stay, and reports the latter."""

    console: Console
    seen: set[str] = field(factory=set)
    gone: int = 0
    stayed: int = 0

    def add(self, letter: Letter, error: PublishError | None) -> str | None:
        """Count a letter, and return why it stays, if it does."""
        self.seen.add(letter.message_id)
        self.gone += error is None
        self.stayed += error is not None
        if error is None:
            return None
        text = f"{type(error).__name__}: {error}"
        self.console.error(f"{plain(letter.message_id)} stays a dead letter: {plain(text)}")
        return text


def _replay(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    count = _Count(console)
    target = None
    if arguments.exchange is not None or arguments.routing_key is not None:
        target = Target(arguments.exchange, arguments.routing_key)

    def tell(letter: Letter, error: PublishError | None) -> None:
        text = count.add(letter, error)
        console.emit({**letter.to_json(), "replayed": error is None, "error": text})
        if error is None:
            sent_to = _route(letter, target)
            console.detail(f"replayed  {plain(letter.message_id)}  to {sent_to}")

    wanted = _wanted(arguments)
    well = _visit(
        where, lambda place: place.replay(wanted, tell, target, console.undivided), console
    )
    console.say(f"{count.gone} replayed, {count.stayed} stayed")
    return _all_found(arguments.ids, count.seen, console) and count.stayed == 0 and well


def _purge(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    if not arguments.yes and not _agreed(arguments):
        console.say("nothing was deleted")
        return False
    count = _Count(console)

    def tell(letter: Letter, error: PublishError | None) -> None:
        count.add(letter, error)
        if error is None:
            console.emit(letter.to_json())
            console.detail(f"deleted  {plain(letter.message_id)}")

    well = _visit(where, lambda place: place.purge(_wanted(arguments), tell), console)
    console.say(f"{count.gone} deleted" + (f", {count.stayed} stayed" if count.stayed else ""))
    return _all_found(arguments.ids, count.seen, console) and count.stayed == 0 and well


def _agreed(arguments: argparse.Namespace) -> bool:
    """Ask for confirmation on a terminal.

    :raises UsageError: standard input is no terminal
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("purge deletes for good: confirm it with --yes")
    ids = arguments.ids
    what = "ALL dead letters" if not ids else f"the dead letters {', '.join(map(plain, ids))}"
    filters = ("task", "reason", "since")
    named = [f"--{name} {plain(str(vars(arguments)[name]))}" for name in filters]
    given = [text for name, text in zip(filters, named, strict=True) if vars(arguments)[name]]
    what += f" with {' '.join(given)}" if given else ""
    sys.stderr.write(f"Delete {what} for good? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _all_found(ids: list[str], found: set[str], console: Console) -> bool:
    missing = [each for each in dict.fromkeys(ids) if each not in found]
    for each in missing:
        console.error(f"no dead letter has the id {plain(each)}")
    return not missing


# --- how a letter looks ------------------------------------------------------------------------


def _count(count: int) -> str:
    return {0: "no dead letters", 1: "1 dead letter"}.get(count, f"{count} dead letters")


def _route(letter: Letter, target: Target | None = None) -> str:
    exchange, key = letter.exchange, letter.routing_key
    if target is not None:
        exchange = exchange if target.exchange is None else target.exchange
        key = key if target.routing_key is None else target.routing_key
    return plain(f"{exchange or '(default exchange)'} {key}")


def _line(letter: Letter) -> str:
    since, task = letter.first_failed_at[:19], letter.task or letter.type or "-"
    told = f"{letter.where}  {task}  attempts {letter.attempts}  {letter.reason}"
    if letter.problem:
        told += f"  ({letter.problem})"
    return f"{plain(letter.message_id):<36}  {plain(since):<19}  {_route(letter)}  {plain(told)}"


def _rows(letter: Letter) -> list[tuple[str, str]]:
    rows = [(name.replace("_", " "), str(value)) for name, value in letter.to_json().items()]
    further = [
        ("task", letter.task),
        ("content", letter.content),
        ("type", letter.type),
        ("headers", ", ".join(letter.headers)),
        ("body", f"{len(letter.body)} bytes"),
        ("problem", letter.problem),
    ]
    return [row for row in [*rows, *further] if row[1]]


def _body(letter: Letter) -> dict[str, str]:
    """Return the payload for JSON: as text, or else in base 64."""
    try:
        return {"body": letter.body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(letter.body).decode()}
