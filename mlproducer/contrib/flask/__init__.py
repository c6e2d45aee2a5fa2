"""Flask: one producer for a process, a blueprint with health, metrics and a page, and commands.

::

    ml = MLProducerExtension()

    def create_app():
        app = Flask(__name__)
        app.config["MLPRODUCER_URL"] = "amqp://user:password@localhost/"
        ml.init_app(app)
        app.register_blueprint(ml.blueprint, url_prefix="/ml")
        return app

Runs on: Flask's threads.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

import click
from flask import Blueprint, Flask, Response, current_app, request
from flask.cli import with_appcontext

from mlproducer import MLProducer, Settings
from mlproducer.cli import main
from mlproducer.contrib import configured_producer
from mlproducer.wsgi import make_app

__all__ = ["MLProducerExtension"]

PREFIX = "MLPRODUCER_"
EXTENSION = "mlproducer"

_RULES = {
    "page": "/",
    "page_json": "/page.json",
    "health": "/health",
    "metrics": "/metrics",
    "metrics_json": "/metrics/json",
}

_shared: list[tuple[Settings, object, MLProducer]] = []
"""Settings, the value of ``PRODUCER``, and the producer that apps with both share.

Only appended to, and the first that fits is used, so that threads agree without a lock.
"""


class MLProducerExtension:
    """The producer of an app, which it shares with all apps of the process that have its settings.

    Configuration keys are the fields of `Settings` in upper case after ``MLPRODUCER_``; what is
    missing comes from the environment. ``MLPRODUCER_PRODUCER`` names another one: a callable that
    takes the settings, its dotted name, or a producer. With ``TESTING``, and where pytest or
    ``python -m unittest`` runs, an app has a `RecordingProducer` of its own instead, unless that
    key says otherwise.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Add the commands to an app; its producer is made when it is first used."""
        app.extensions[EXTENSION] = {}
        app.cli.add_command(_command)

    @property
    def producer(self) -> MLProducer:
        """The producer of the current app.

        :raises RuntimeError: there is no current app, or it has not been initialised
        :raises ConfigurationError: its configuration, or the environment, does not parse
        """
        return _producer_of(current_app)

    @cached_property
    def blueprint(self) -> Blueprint:
        """Health, metrics and the page. **There is no authentication**: see ``before_request``."""
        blueprint = Blueprint(EXTENSION, __name__)
        for endpoint, rule in _RULES.items():
            defaults = {"rule": rule}
            blueprint.add_url_rule(rule, endpoint, view_func=_answer, defaults=defaults)
        return blueprint


def _producer_of(app: Flask) -> MLProducer:
    if EXTENSION not in app.extensions:
        raise RuntimeError("call MLProducerExtension.init_app(app) first")
    given = {
        key.removeprefix(PREFIX): value
        for key, value in app.config.items()
        if key.startswith(PREFIX)
    }
    testing = bool(app.config.get("TESTING")) or configured_producer.in_test_run()
    if testing and configured_producer.PRODUCER not in given:
        return _own(app, given)
    return _shared_one(given)


def _own(app: Flask, given: dict[str, Any]) -> MLProducer:
    own: dict[str, MLProducer] = app.extensions[EXTENSION]
    if "recording" not in own:
        own.setdefault("recording", configured_producer.make(given, "app.config", testing=True))
    return own["recording"]


def _shared_one(given: dict[str, Any]) -> MLProducer:
    wanted = (
        configured_producer.settings_of(given, "app.config"),
        given.get(configured_producer.PRODUCER),
    )
    for *key, made in _shared:
        if tuple(key) == wanted:
            return made
    _shared.append((*wanted, configured_producer.make(given, "app.config", testing=False)))
    return next(made for *key, made in _shared if tuple(key) == wanted)


def _answer(rule: str) -> Response:
    """Answer by the WSGI application."""
    environ = {"REQUEST_METHOD": request.method, "PATH_INFO": rule, "SCRIPT_NAME": ""}
    return Response.from_app(make_app(_producer_of(current_app)), environ)


@click.command(
    EXTENSION,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
    short_help="Run a command of mlproducer: check, relay, dead-letters ...",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@with_appcontext
def _command(arguments: tuple[str, ...]) -> None:
    code = main(arguments, settings=lambda: _producer_of(current_app).settings)
    if code:
        sys.exit(code)
