"""``mlproducer topology [--apply]``: what the settings declare, and how the broker differs.

Nothing is changed without ``--apply``. Each exchange and queue is first declared passively, and
only if it exists with all its arguments, which the broker refuses if they differ; so looking
creates nothing. AMQP cannot query bindings; with ``--apply`` they are made.

A queue that differs is never deleted, since tasks are in it. A policy adds in place what its
arguments lack.

Runs on: the main thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from mlproducer import Settings, Topology
from mlproducer._engine.endpoints import Endpoints
from mlproducer._engine.session import Session
from mlproducer.cli.output import Console
from mlproducer.settings import topology_of
from mlproducer.topology import Declaration

HELP = "show what the settings declare, and how the broker differs"
DESCRIPTION = (
    "Show the exchanges, queues and bindings that the settings ask for, and how those of the "
    "broker in RABBITMQ_URL differ. Exit code 1 if anything is missing or differs."
)
LOG_LEVEL = logging.WARNING

NOT_FOUND = 404

_DIFFERENCE = re.compile(r"inequivalent arg (.*?) for (?:exchange|queue) .*?: (.*)", re.DOTALL)

_POLICY_KEYS = {
    "x-delivery-limit": "delivery-limit",
    "x-dead-letter-exchange": "dead-letter-exchange",
    "x-dead-letter-strategy": "dead-letter-strategy",
    "x-overflow": "overflow",
}


@frozen
class Finding:
    """A declaration, compared with the broker.

    :ivar kind: ``exchange``, ``queue`` or ``binding``
    :ivar state: ``there``, ``missing``, ``differs``, ``declared``, ``refused`` or ``not asked``
    """

    kind: str
    name: str
    declared: str
    state: str
    detail: str = ""

    @property
    def well(self) -> bool:
        """Whether the broker has it, as far as is known."""
        return self.state in ("there", "declared", "not asked")

    def to_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "kind": self.kind,
            "name": self.name,
            "declared": self.declared,
            "state": self.state,
            "detail": self.detail,
        }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the option to declare."""
    parser.add_argument(
        "--apply", action="store_true", help="declare what is missing; what differs stays as it is"
    )


def run(arguments: argparse.Namespace, console: Console) -> bool:
    """Compare, print, and return whether the broker has what the settings ask for.

    :raises ConfigurationError: no broker is named, or a setting does not parse
    :raises NotConnectedError: no broker answers
    """
    settings: Settings = arguments.settings()
    topology = topology_of(settings)
    with Session(Endpoints(settings).known, settings.connection_timeout) as session:
        findings = list(compare(session, topology, apply=arguments.apply))
    _show(findings, console)
    advice = [line for each in findings for line in _advise(each, topology, settings)]
    for line in advice:
        console.detail(line)
    well = all(each.well for each in findings)
    console.say(f"{session.address}: {'as declared' if well else 'differs'}")
    console.emit(
        {
            "ok": well,
            "broker": session.address,
            "topology": [each.to_json() for each in findings],
            "advice": advice,
        }
    )
    return well


def compare(session: Session, topology: Topology, *, apply: bool) -> Iterator[Finding]:
    """Compare each declaration with the broker; with ``apply`` declare what is missing."""
    for declaration in topology.declarations("active"):
        yield _compare(session, declaration, apply=apply)


def _compare(session: Session, declaration: Declaration, *, apply: bool) -> Finding:
    kind, name, told = _describe(declaration)
    arguments = declaration.arguments
    if kind == "binding":
        if not apply:
            return Finding(kind, name, told, "not asked")
    else:
        what = "queue" if kind == "queue" else "exchange"
        loss = session.refusal(declaration.method, arguments[what], passive=True)
        if loss is not None and loss.reply_code != NOT_FOUND:
            return Finding(kind, name, told, "refused", f"{loss.reply_code} {loss.text}")
        if loss is not None and not apply:
            return Finding(kind, name, told, "missing")
    loss = session.refusal(declaration.method, **arguments)
    if loss is None:
        return Finding(kind, name, told, "declared" if apply else "there")
    different = _DIFFERENCE.search(loss.text)
    if different is not None:
        return Finding(kind, name, told, "differs", f"{different[1]}: {different[2]}")
    return Finding(kind, name, told, "refused", f"{loss.reply_code} {loss.text}")


def _describe(declaration: Declaration) -> tuple[str, str, str]:
    arguments = declaration.arguments
    if declaration.method == "exchange_declare":
        return "exchange", declaration.target, f"{arguments['exchange_type']}, durable"
    if declaration.method == "queue_bind":
        told = f"from {arguments['exchange']} by {arguments['routing_key']}"
        return "binding", declaration.target, told
    told = ", ".join(f"{name}={value}" for name, value in arguments["arguments"].items())
    return "queue", declaration.target, told


def _show(findings: list[Finding], console: Console) -> None:
    width = max(len(each.name) for each in findings)
    for each in findings:
        state = each.state + (f": {each.detail}" if each.detail else "")
        console.detail(f"  {each.kind:<8}  {each.name:<{width}}  {state}")
        console.detail(f"  {'':<8}  {'':<{width}}    {each.declared}")


def _advise(finding: Finding, topology: Topology, settings: Settings) -> Iterator[str]:
    """Yield advice on a difference that loses nothing in a queue."""
    if finding.state == "missing":
        yield f"{finding.name}: mlproducer topology --apply declares it"
    elif finding.state == "differs" and finding.name == topology.dead_letter_queue:
        yield f"{finding.name} stays in use as it is; it needs no arguments"
    elif finding.state == "differs" and finding.kind == "queue":
        yield (
            f"{finding.name} stays in use as it is. A policy adds in place what its arguments "
            "lack; then ML_DECLARE_TOPOLOGY=passive keeps the broker's log quiet:"
        )
        yield f"  {policy(finding.name, topology, settings)}"
        yield (
            "  or move to queues under another name: set ML_QUEUE_PREFIX, let workers consume from "
            "the old queues too until these are empty, and unbind them"
        )
    elif finding.state == "differs":
        yield f"{finding.name}: name another one in ML_EXCHANGE, or a Topology with its type"


def policy(queue: str, topology: Topology, settings: Settings) -> str:
    """Return the command that sets by a policy what a queue's arguments should be."""
    virtual_host = settings.brokers[0].virtual_host
    declared = {each.name: each for each in topology.queues}
    arguments: Mapping[str, Any] = {}
    if queue in declared:
        arguments = declared[queue].declared_arguments(topology.dead_letter_exchange)
    keys = {_POLICY_KEYS[name]: value for name, value in arguments.items() if name in _POLICY_KEYS}
    words = ["rabbitmqctl", "set_policy", "-p", virtual_host, f"mlproducer {queue}"]
    words += [f"^{re.escape(queue)}$", json.dumps(keys), "--apply-to", "queues"]
    return shlex.join(words)
