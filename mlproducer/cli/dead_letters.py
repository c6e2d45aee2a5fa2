"""``mlproducer dead-letters list|show|replay|purge``.

A payload is a user's text: it is printed by ``show --body`` and by nothing else, and of headers
the names alone.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import base64
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, field

from mlproducer import Message, Settings
from mlproducer.cli import reach
from mlproducer.cli.output import Console, UsageError, plain
from mlproducer.dead_letters import Letter, Place, places
from mlproducer.errors import AuthenticationError, MLProducerError, NotConnectedError, PublishError

HELP = "look at dead letters, send them again, delete them"
DESCRIPTION = (
    "Dead letters are messages that failed at every retry. They lie in the queue ml.dead_letter of "
    "the broker in RABBITMQ_URL; while a command looks at that, nobody else gets them. Those that "
    "the broker has not taken yet are in the store in ML_STORE_URL, unless that is memory://."
)
LOG_LEVEL = logging.CRITICAL  # what fails is told letter by letter


def configure(parser: argparse.ArgumentParser) -> None:
    """Add what can be done with letters."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, act: Any, summary: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        added.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="output for programs"
        )
        added.set_defaults(act=act)
        return added

    action("list", _list, "list the dead letters")
    show = action("show", _show, "show one letter: its fields and sizes")
    show.add_argument("ids", metavar="ID", nargs=1, help="its message id")
    show.add_argument("--body", action="store_true", help="print its payload too")
    replay = action("replay", _replay, "send letters to where they were to go")
    replay.add_argument("ids", metavar="ID", nargs="*", help="their message ids; without, all")
    purge = action("purge", _purge, "delete letters for good")
    purge.add_argument("ids", metavar="ID", nargs="*", help="their message ids; without, all")
    purge.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Do what is asked, and say whether all went well.

    :raises ConfigurationError: a setting does not parse
    :raises UsageError: nobody can be asked whether to delete
    """
    return bool(arguments.act(arguments, places(Settings.from_env()), console))


def _visit(where: Sequence[Place], act: Callable[[Place], object], console: Console) -> bool:
    """Act in each place; one that cannot be used keeps nobody from the others, and is told last."""
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
        console.complain(text)
        if isinstance(reason, (NotConnectedError, AuthenticationError)):
            console.complain(f"-> {reach.advise(reason)}")
    return not reasons


def _list(_arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    count = 0

    def look(place: Place) -> None:
        nonlocal count
        for letter in place.list():
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
    message = letter.message
    sizes = {"body_bytes": len(message.body), "headers": sorted(message.headers or {})}
    body = _body(message) if with_body else {}
    console.emit({**letter.to_json(), **sizes, **body})
    for name, value in _rows(letter):
        console.detail(f"  {name:<16}  {plain(value)}")
    if with_body:
        console.detail(plain(message.body.decode(errors="backslashreplace"), lines=True))


@define
class _Count:
    """What became of letters, as it is told."""

    console: Console
    seen: set[str] = field(factory=set)
    gone: int = 0
    stayed: int = 0

    def add(self, letter: Letter, error: PublishError | None) -> str | None:
        """Count a letter, and give the reason why it stays."""
        self.seen.add(letter.message_id)
        self.gone += error is None
        self.stayed += error is not None
        if error is None:
            return None
        text = f"{type(error).__name__}: {error}"
        self.console.complain(f"{plain(letter.message_id)} stays a dead letter: {plain(text)}")
        return text


def _replay(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    count = _Count(console)

    def tell(letter: Letter, error: PublishError | None) -> None:
        text = count.add(letter, error)
        console.emit({**letter.to_json(), "replayed": error is None, "error": text})
        if error is None:
            console.detail(f"replayed  {plain(letter.message_id)}  to {_route(letter)}")

    well = _visit(where, lambda place: place.replay(arguments.ids or None, tell), console)
    console.say(f"{count.gone} replayed, {count.stayed} stayed")
    return _all_found(arguments.ids, count.seen, console) and count.stayed == 0 and well


def _purge(arguments: argparse.Namespace, where: Sequence[Place], console: Console) -> bool:
    if not arguments.yes and not _agreed(arguments.ids):
        console.say("nothing was deleted")
        return False
    count = _Count(console)

    def tell(letter: Letter, error: PublishError | None) -> None:
        count.add(letter, error)
        if error is None:
            console.emit(letter.to_json())
            console.detail(f"deleted  {plain(letter.message_id)}")

    well = _visit(where, lambda place: place.purge(arguments.ids or None, tell), console)
    console.say(f"{count.gone} deleted" + (f", {count.stayed} stayed" if count.stayed else ""))
    return _all_found(arguments.ids, count.seen, console) and count.stayed == 0 and well


def _agreed(ids: list[str]) -> bool:
    """Ask on a terminal; nobody is asked where nobody could answer.

    :raises UsageError: standard input is no terminal
    """
    if not sys.stdin.isatty():
        raise UsageError("purge deletes for good: say so with --yes")
    what = "ALL dead letters" if not ids else f"the dead letters {', '.join(map(plain, ids))}"
    sys.stderr.write(f"Delete {what} for good? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _all_found(ids: list[str], found: set[str], console: Console) -> bool:
    missing = [each for each in dict.fromkeys(ids) if each not in found]
    for each in missing:
        console.complain(f"no dead letter has the id {plain(each)}")
    return not missing


# --- how a letter looks ------------------------------------------------------------------------


def _count(count: int) -> str:
    return {0: "no dead letters", 1: "1 dead letter"}.get(count, f"{count} dead letters")


def _route(letter: Letter) -> str:
    return plain(f"{letter.exchange or '(default exchange)'} {letter.routing_key}")


def _line(letter: Letter) -> str:
    since = f"{letter.first_failed_at[:19]:<19}"
    last = plain(f"{letter.where}  attempts {letter.attempts}  {letter.reason}")
    return f"{plain(letter.message_id):<36}  {since}  {_route(letter)}  {last}"


def _rows(letter: Letter) -> list[tuple[str, str]]:
    message = letter.message
    rows = [(name.replace("_", " "), str(value)) for name, value in letter.to_json().items()]
    kind = ", ".join(filter(None, (message.content_type, message.content_encoding)))
    further = [
        ("content", kind),
        ("type", message.type or ""),
        ("headers", ", ".join(sorted(message.headers or {}))),
        ("body", f"{len(message.body)} bytes"),
    ]
    return [row for row in [*rows, *further] if row[1]]


def _body(message: Message) -> dict[str, str]:
    """Give the payload as JSON can carry it: as text, or else in base 64."""
    try:
        return {"body": message.body.decode()}
    except UnicodeDecodeError:
        return {"body_base64": base64.b64encode(message.body).decode()}
