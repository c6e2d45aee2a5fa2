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
from typing import Any

from mlproducer import Message, Settings
from mlproducer.cli import reach
from mlproducer.cli.output import Console, UsageError, plain
from mlproducer.dead_letters import DeadLetters, Letter
from mlproducer.errors import NotConnectedError, PublishError

HELP = "look at dead letters, send them again, delete them"
DESCRIPTION = (
    "Dead letters are messages that failed at every retry. They lie in the queue ml.dead_letter of "
    "the broker in RABBITMQ_URL. While a command looks at them nobody else gets them."
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

    :raises ConfigurationError: no broker is named, or a setting does not parse
    :raises UsageError: nobody can be asked whether to delete
    """
    box = DeadLetters(Settings.from_env())
    try:
        return bool(arguments.act(arguments, box, console))
    except NotConnectedError as error:
        console.emit({"error": str(error)})
        console.complain(str(error))
        console.complain(f"-> {reach.advise(error)}")
        return False


def _list(_arguments: argparse.Namespace, box: DeadLetters, console: Console) -> bool:
    count = 0
    for letter in box.list():
        count += 1
        console.emit(letter.to_json())
        console.detail(_line(letter))
    console.say(_count(count))
    return True


def _show(arguments: argparse.Namespace, box: DeadLetters, console: Console) -> bool:
    found = list(box.list(arguments.ids))
    for letter in found:
        message = letter.message
        sizes = {"body_bytes": len(message.body), "headers": sorted(message.headers or {})}
        body = _body(message) if arguments.body else {}
        console.emit({**letter.to_json(), **sizes, **body})
        for name, value in _rows(letter):
            console.detail(f"  {name:<16}  {plain(value)}")
        if arguments.body:
            console.detail(plain(message.body.decode(errors="backslashreplace"), lines=True))
    return _all_found(arguments.ids, {letter.message_id for letter in found}, console)


def _replay(arguments: argparse.Namespace, box: DeadLetters, console: Console) -> bool:
    seen: set[str] = set()
    replayed = 0

    def tell(letter: Letter, error: PublishError | None) -> None:
        nonlocal replayed
        seen.add(letter.message_id)
        replayed += error is None
        text = None if error is None else f"{type(error).__name__}: {error}"
        console.emit({**letter.to_json(), "replayed": error is None, "error": text})
        if text is None:
            console.detail(f"replayed  {plain(letter.message_id)}  to {_route(letter)}")
        else:
            console.complain(f"{plain(letter.message_id)} stays a dead letter: {plain(text)}")

    stayed = box.replay(arguments.ids or None, tell)
    console.say(f"{replayed} replayed, {stayed} stayed")
    return _all_found(arguments.ids, seen, console) and stayed == 0


def _purge(arguments: argparse.Namespace, box: DeadLetters, console: Console) -> bool:
    if not arguments.yes and not _agreed(arguments.ids):
        console.say("nothing was deleted")
        return False
    seen: set[str] = set()

    def tell(letter: Letter) -> None:
        seen.add(letter.message_id)
        console.emit(letter.to_json())
        console.detail(f"deleted  {plain(letter.message_id)}")

    console.say(f"{box.purge(arguments.ids or None, tell)} deleted")
    return _all_found(arguments.ids, seen, console)


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
    last = plain(f"attempts {letter.attempts}  {letter.reason}")
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
