"""A producer for the broker that an app's own settings name.

Runs on: the thread that sends the first task.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from attrs import evolve
from celery import Celery
from kombu import Connection

from mlproducer import MLProducer, Settings, TLSSettings, Topology
from mlproducer.errors import ConfigurationError
from mlproducer.settings import topology_of
from mlproducer.topology import Declaration

logger = logging.getLogger(__name__)

TRANSPORTS = ("amqp", "amqps", "pyamqp", "pyamqps", "librabbitmq")
"""kombu's names of RabbitMQ."""

ALWAYS_THERE = "amq.topic"
"""An exchange that every virtual host has, for the health probe."""

Place = tuple[str, int, str]
"""Host, port and virtual host."""


def check_transport(settings: Mapping[str, Any]) -> None:
    """Check that the broker in Celery's settings is RabbitMQ, as far as they are known.

    :raises ConfigurationError: it is another broker; the text has only its scheme
    """
    urls = settings.get("broker_write_url") or settings.get("broker_url") or ""
    for each in urls.split(";") if isinstance(urls, str) else urls:
        scheme, separator, _ = each.strip().partition("://")
        if separator and scheme not in TRANSPORTS:
            _refuse(scheme)


def producer_of_settings(app: Celery) -> MLProducer:
    """Make a producer for the app's broker; other settings come from the environment.

    It declares by itself nothing but what Celery would.

    :raises ConfigurationError: the broker is not RabbitMQ, or a value does not parse
    """
    check_transport(app.conf)  # first, since kombu's library for another broker may be missing
    connections = list(_connections(app))
    for each in connections:
        if each.transport_cls not in TRANSPORTS:
            _refuse(str(each.transport_cls))
    environ = {**os.environ, "RABBITMQ_URL": ",".join(map(_url, connections))}
    for name in ("RABBITMQ_URL_FILE", "RABBITMQ_PASSWORD_FILE", "RABBITMQ_USE_SSL"):
        environ.pop(name, None)
    login = str(connections[0].login_method or "").upper()
    if login == "EXTERNAL":
        environ["RABBITMQ_AUTH_MECHANISM"] = login
    settings = Settings.from_env(environ)
    names = topology_of(settings)
    return MLProducer(
        evolve(
            settings,
            declare_topology="off",
            tls=_tls(app.conf.broker_use_ssl) or settings.tls,
            topology=Topology(
                ALWAYS_THERE,
                queues=(),
                dead_letter_exchange=names.dead_letter_exchange,
                dead_letter_queue=names.dead_letter_queue,
            ),
            queue_prefix="",
        )
    )


def dead_letters(settings: Settings) -> list[Declaration]:
    """Return what is to be declared for dead letters, of such a producer's settings."""
    declarations = topology_of(settings).declarations("active")
    return [each for each in declarations if each.target != ALWAYS_THERE]


def places_of(app: Celery) -> frozenset[Place]:
    """Return the brokers to which the app sends."""
    return frozenset(map(place_of, _connections(app)))


def place_of(connection: Connection) -> Place:
    """Return host, port and virtual host of a connection."""
    port = connection.port or (5671 if _is_encrypted(connection) else 5672)
    return connection.hostname or "localhost", int(port), connection.virtual_host or "/"


def _connections(app: Celery) -> Iterator[Connection]:
    """Yield a connection, not opened, for each broker between which the app fails over."""
    whole = app.connection_for_write()
    for url in whole.alt or [None]:
        login = {"ssl": whole.ssl, "login_method": whole.login_method}
        one = whole if url is None else Connection(url, **login)
        yield one


def _refuse(scheme: str) -> None:
    raise ConfigurationError(
        f"the app's broker must be RabbitMQ (amqp://, amqps:// or pyamqp://), got {scheme}://: "
        "no other broker confirms what it has taken"
    )


def _url(connection: Connection) -> str:
    """Return a broker's address as an AMQP URL of the standard form."""
    host, port, virtual_host = place_of(connection)
    host = f"[{host}]" if ":" in host else host
    scheme = "amqps" if _is_encrypted(connection) else "amqp"
    user, password = connection.userid, connection.password
    if str(connection.login_method or "").upper() == "EXTERNAL":
        return f"{scheme}://{host}:{port}/{quote(virtual_host, safe='')}"
    login = f"{quote(user or 'guest', safe='')}:{quote(password or 'guest', safe='')}"
    return f"{scheme}://{login}@{host}:{port}/{quote(virtual_host, safe='')}"


def _is_encrypted(connection: Connection) -> bool:
    return bool(connection.ssl) or str(connection.transport_cls).endswith("amqps")


_UNDERSTOOD = {"ca_certs", "certfile", "keyfile", "cert_reqs", "server_hostname"}


def _tls(use_ssl: Any) -> TLSSettings | None:
    """Return our settings for ``broker_use_ssl``: True, or options of Python's ssl module."""
    if not isinstance(use_ssl, Mapping):
        return TLSSettings() if use_ssl else None
    unknown = sorted(map(str, use_ssl.keys() - _UNDERSTOOD))
    if unknown:
        logger.warning("broker_use_ssl: %s has no meaning here", ", ".join(unknown))
    return TLSSettings(
        ca_certs=use_ssl.get("ca_certs"),
        certfile=use_ssl.get("certfile"),
        keyfile=use_ssl.get("keyfile"),
        verify_peer=use_ssl.get("cert_reqs", ssl.CERT_REQUIRED) != ssl.CERT_NONE,
        server_name=use_ssl.get("server_hostname"),
    )
