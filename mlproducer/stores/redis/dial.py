"""Connect to Redis: over TCP, TLS or a Unix socket, directly or by way of Sentinels.

Runs on: the retry thread.
"""

from __future__ import annotations

import logging
from typing import Any

from mlproducer._foreign_calls import write
from mlproducer._store_url import RedisAddress
from mlproducer.errors import ConfigurationError

try:
    import redis
    from redis import exceptions
except ImportError:
    raise ConfigurationError(
        "store_url (ML_STORE_URL): redis:// needs the package redis: "
        "pip install 'mlproducer[redis]'"
    ) from None

__all__ = ["TIMEOUT", "connect", "exceptions", "warn_of_eviction"]

logger = logging.getLogger(__name__)

TIMEOUT = 0.5
"""Seconds without an answer after which Redis counts as unreachable."""

_warned: set[str] = set()


def connect(address: RedisAddress, node: tuple[str, int] | None) -> Any:
    """Return an open connection.

    :param node: host and port to which a cluster has redirected, in place of the address
    :raises redis.RedisError: the connection cannot be made
    """
    if node is not None:
        return _opened(_server(address, *node))
    if address.path is not None:
        return _opened(_socket(address, address.path))
    if address.service is not None:
        return _connect_by_sentinels(address, address.service)
    return _opened(_server(address, *address.nodes[0]))


def _opened(connection: Any) -> Any:
    connection.connect()
    return connection


# --- Sentinels -----------------------------------------------------------------------------------


def _connect_by_sentinels(address: RedisAddress, service: str) -> Any:
    """Connect to the master that a Sentinel names, once the server says that it is the master.

    A Sentinel that was cut off may name a server that was replaced; then the next one is asked.
    """
    problem: Exception = exceptions.ConnectionError("no Sentinel knows a master of this name")
    for host, port in address.nodes:
        try:
            node = _ask_sentinel(_sentinel(address, host, port), service)
            if node is not None:
                return _master(_opened(_server(address, *node)))
        except (exceptions.RedisError, OSError) as error:
            problem = error
    raise problem


def _ask_sentinel(connection: Any, service: str) -> tuple[str, int] | None:
    try:
        connection.connect()
        connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        answer = connection.read_response()
    finally:
        connection.disconnect()
    return None if answer is None else (answer[0].decode(), int(answer[1]))


def _master(connection: Any) -> Any:
    try:
        connection.send_command("ROLE")
        role = connection.read_response()[0]
    except exceptions.RedisError:
        connection.disconnect()
        raise
    if role != b"master":
        connection.disconnect()
        raise exceptions.ReadOnlyError("the server is not the master any more")
    return connection


# --- connections of redis-py ---------------------------------------------------------------------


def _server(address: RedisAddress, host: str, port: int) -> Any:
    make: Any = redis.SSLConnection if address.tls else redis.Connection
    return make(
        host=host,
        port=port,
        socket_connect_timeout=address.connect_timeout or address.timeout or TIMEOUT,
        socket_keepalive=address.keepalive,
        **_common(address),
        **(_tls(address) if address.tls else {}),
    )


def _sentinel(address: RedisAddress, host: str, port: int) -> Any:
    make: Any = redis.SSLConnection if address.tls else redis.Connection
    timeout = address.connect_timeout or address.timeout or TIMEOUT
    return make(
        host=host,
        port=port,
        username=address.sentinel_user,
        password=address.sentinel_password,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        protocol=2,
        **(_tls(address) if address.tls else {}),
    )


def _socket(address: RedisAddress, path: str) -> Any:
    make: Any = redis.UnixDomainSocketConnection
    return make(path=path, **_common(address))


def _common(address: RedisAddress) -> dict[str, Any]:
    return {
        "db": address.database,
        "username": address.user,
        "password": address.password,
        "client_name": address.client_name,
        "socket_timeout": address.timeout or TIMEOUT,
        "protocol": 2,
    }


def _tls(address: RedisAddress) -> dict[str, Any]:
    return {
        "ssl_ca_certs": address.ca_certs,
        "ssl_ca_path": address.ca_path,
        "ssl_certfile": address.certfile,
        "ssl_keyfile": address.keyfile,
        # Never None: OpenSSL would ask for the password on the terminal, and the process hang.
        "ssl_password": address.key_password or "",
        "ssl_cert_reqs": "required" if address.verify else "none",
        "ssl_check_hostname": address.check_hostname,
        "ssl_ciphers": address.ciphers,
    }


# --- eviction ------------------------------------------------------------------------------------


def warn_of_eviction(connection: Any, address: RedisAddress) -> None:
    """Warn, once for each server, if it evicts keys when its memory is full."""
    if address.name in _warned:
        return
    _warned.add(address.name)
    try:
        connection.send_command("INFO", "memory")
        memory = connection.read_response()
    except exceptions.ResponseError:  # this user may not run INFO
        return
    lines = memory.decode(errors="replace").splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    policy = said.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        write(
            logger,
            logging.WARNING,
            "the store at %s has maxmemory-policy %s: when its memory is full, Redis may evict "
            "stored messages; set it to noeviction",
            address.name,
            policy,
        )
