"""`RabbitMQNode`: a private RabbitMQ broker on a port of its own.

Owns one node's configuration and process, and the calls by which tests query and change
the broker. Must not know its publishers. Facts were checked on RabbitMQ 3.10.8.

Runs on: the caller's thread.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import quote

from mlproducer.testing.erlang import (
    ErlangNetwork,
    RabbitMQError,
    RabbitMQNotInstalled,
    find_script,
    free_port,
)
from mlproducer.testing.server import Server

if TYPE_CHECKING:
    from mlproducer.testing.certificates import ServerTLS
    from mlproducer.testing.workspace import Program

__all__ = ["RabbitMQError", "RabbitMQNode", "RabbitMQNotInstalled"]

_HOST = "127.0.0.1"
_CALL_LIMIT = 300.0
_MEMORY = "{resource_limit,memory,node()}"


class RabbitMQNode(Server):
    """A RabbitMQ node of your own, as a context manager.

    ``with RabbitMQNode() as node:`` starts it (about 5 s) and at the end kills it and removes its
    files. Without ``with``, call `start` and `close`; a node that was never closed ends with the
    process that started it. `stop` closes clients' connections with 320; it and `kill` keep the
    data for `restart`; see `save_queues`.

    Args:
        directory: where to make the node's directory; the system's temporary directory by default.
        tls: certificates for a second, encrypted listener.
        config: further lines of ``rabbitmq.conf``, such as ``{"max_message_size": "1024"}``
            (https://www.rabbitmq.com/docs/configure).
        plugins: of those that come with RabbitMQ, which to enable.
        port: the AMQP port; a free one by default.
        network: the cookie and port mapper to share with other nodes; its own by default.

    """

    error = RabbitMQError
    look_interval = 0.05

    def __init__(
        self,
        *,
        directory: str | Path | None = None,
        tls: ServerTLS | None = None,
        config: Mapping[str, str] = MappingProxyType({}),
        plugins: Sequence[str] = (),
        port: int | None = None,
        network: ErlangNetwork | None = None,
    ) -> None:
        super().__init__()
        self.name = f"mlproducer-{secrets.token_hex(4)}@localhost"
        self.host = _HOST
        self.port = free_port() if port is None else port
        self.tls_port = free_port() if tls is not None else None
        self.user = "tester"
        self.password = secrets.token_urlsafe(16) if network is None else network.password
        self._directory = directory
        self._tls = tls
        self._config = dict(config)
        self._plugins = tuple(plugins)
        self._network = network
        self._owns_network = network is None
        self._distribution_port = free_port()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<RabbitMQNode {self.name} {self.host}:{self.port} {state}>"

    # -- life ------------------------------------------------------------------------------------

    def _spawn(self) -> Program:
        if self._network is None:
            self._network = ErlangNetwork(self._directory)
        home = self._network.workspace.path / self.name
        if not home.exists():
            home.mkdir()
            (home / "enabled_plugins").write_text(f"[{','.join(self._plugins)}].\n")
            (home / "rabbitmq.conf").write_text(_configuration(self, self._tls, self._config))
        interface = "{127,0,0,1}"
        return self._network.workspace.spawn(
            self.name,
            [find_script("rabbitmq-server"), "-kernel", "inet_dist_use_interface", interface],
            self._network.environ | _environment(self, self._distribution_port, home),
        )

    def _answers(self) -> bool:
        """Whether the broker speaks AMQP, and listens for TLS if it is to.

        RabbitMQ 4 opens its TLS port up to a tenth of a second after the plain one.
        """
        if not _speaks_amqp(self.host, self.port):
            return False
        return self.tls_port is None or _accepts(self.host, self.tls_port)

    def _clean_up(self) -> None:
        if self._owns_network and self._network is not None:
            self._network.close()
            self._network = None

    # -- addresses -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """``amqp://user:password@127.0.0.1:port/``, the virtual host ``/``."""
        return f"amqp://{self.user}:{self.password}@{self.host}:{self.port}/"

    @property
    def tls_url(self) -> str:
        """The encrypted listener, by the name ``localhost``."""
        if self.tls_port is None:
            raise RabbitMQError(f"{self.name} has no TLS listener: give RabbitMQNode(tls=...)")
        return f"amqps://{self.user}:{self.password}@localhost:{self.tls_port}/"

    def url_for(self, vhost: str, user: str | None = None, password: str | None = None) -> str:
        """The address of a virtual host, for the node's own user or for another."""
        name = quote(self.user if user is None else user, safe="")
        secret = quote(self.password if password is None else password, safe="")
        return f"amqp://{name}:{secret}@{self.host}:{self.port}/{quote(vhost, safe='')}"

    # -- queries and commands --------------------------------------------------------------------

    def ctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` with ``arguments`` (about 1.5 s) and return what it printed."""
        return self._running_network().ctl(self.name, arguments, _CALL_LIMIT)

    def eval(self, expression: str) -> str:
        """Evaluate an Erlang expression in the broker and return its value as Erlang prints it."""
        return self._running_network().evaluate(self.name, expression, _CALL_LIMIT)

    def add_vhost(self, name: str) -> None:
        """Make a virtual host in which the node's own user may do everything."""
        self._run(f"rabbit_vhost:add({_binary(name)}, {_binary(self.user)})")
        self.set_permissions(name, self.user)

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host; its connections are closed."""
        self._run(f"rabbit_vhost:delete({_binary(name)}, {_binary(self.user)})")

    def add_user(self, name: str, password: str) -> None:
        """Make a user, who may do nothing yet."""
        arguments = ", ".join(map(_binary, (name, password, self.user)))
        self._run(f"rabbit_auth_backend_internal:add_user({arguments})")

    def set_permissions(
        self, vhost: str, user: str, configure: str = ".*", write: str = ".*", read: str = ".*"
    ) -> None:
        """Set a user's permissions, regular expressions over names of exchanges and queues."""
        arguments = ", ".join(map(_binary, (user, vhost, configure, write, read, self.user)))
        self._run(f"rabbit_auth_backend_internal:set_permissions({arguments})")

    def set_memory_alarm(self) -> None:
        """Block every publisher at once, as when memory is short."""
        # rabbit_alarm:set_alarm() would not wait: what is published next might still be confirmed,
        # and the publisher not told of the alarm before it publishes again.
        self._run(f"gen_event:sync_notify(rabbit_alarm, {{set_alarm,{{{_MEMORY},[]}}}})")

    def clear_memory_alarm(self) -> None:
        """End `set_memory_alarm`."""
        self._run(f"rabbit_alarm:clear_alarm({_MEMORY})")

    @contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """A memory alarm for the length of the block."""
        self.set_memory_alarm()
        try:
            yield
        finally:
            self.clear_memory_alarm()

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Close this node's AMQP connections with 320, CONNECTION_FORCED."""
        text = f"unicode:characters_to_list({_binary(reason)})"
        pids = "rabbit_networking:local_connections()"
        self._run(f"rabbit_networking:close_connections({pids}, {text})")

    def connections(self) -> list[str]:
        """The names (``peer -> host:port``) of this node's open AMQP connections."""
        names = (
            "lists:join(10, [proplists:get_value(name, rabbit_networking:connection_info(P, "
            "[name])) || P <- rabbit_networking:local_connections()])"
        )
        network = self._running_network()
        return network.evaluate(self.name, names, _CALL_LIMIT, form="~ts").splitlines()

    def queue_depth(self, vhost: str, queue: str) -> int:
        """The number of messages ready for delivery.

        A passive declare says 0 while a quorum queue has no leader, such as just after a restart;
        this waits for the leader (5 s), and raises `RabbitMQError` where there is none.
        """
        resource = f"rabbit_misc:r({_binary(vhost)}, queue, {_binary(queue)})"
        return int(
            self.eval(
                f"{{ok, Q}} = rabbit_amqqueue:lookup({resource}), "
                "case amqqueue:get_pid(Q) of "
                "P when is_pid(P) -> {ok, N, _} = rabbit_amqqueue:stat(Q), N; "
                "P -> {ok, {N, _}, _} = ra:consistent_query(P, fun rabbit_fifo:query_stat/1), N "
                "end"
            )
        )

    def save_queues(self) -> None:
        """Write the register of quorum queues to disk.

        RabbitMQ 3.10 does so only half a second after the last change. A queue declared less than
        that before `kill` comes back without a leader, for ever, and its messages with it.
        """
        self._run("lists:foreach(fun(Table) -> ok = dets:sync(Table) end, dets:all())")

    def _run(self, expression: str) -> None:
        answer = self.eval(expression)
        if answer != "ok":
            raise RabbitMQError(f"{self.name} answered {answer}")

    # -- parts -----------------------------------------------------------------------------------

    @property
    def _label(self) -> str:
        return self.name

    def _running_network(self) -> ErlangNetwork:
        self._running_program()
        if self._network is None:
            raise RabbitMQError(f"{self.name} is not running")
        return self._network


def _configuration(node: RabbitMQNode, tls: ServerTLS | None, extra: Mapping[str, str]) -> str:
    lines = {
        "listeners.tcp.1": f"{node.host}:{node.port}",
        "default_user": node.user,
        "default_pass": node.password,
        "disk_free_limit.absolute": "1MB",
    }
    if tls is not None:
        lines["listeners.ssl.1"] = f"{node.host}:{node.tls_port}"
        lines |= tls.configuration()
    lines |= extra
    return "".join(f"{key} = {value}\n" for key, value in lines.items())


def _environment(node: RabbitMQNode, distribution_port: int, home: Path) -> dict[str, str]:
    return {
        "RABBITMQ_NODENAME": node.name,
        "RABBITMQ_NODE_IP_ADDRESS": node.host,
        "RABBITMQ_NODE_PORT": str(node.port),
        "RABBITMQ_DIST_PORT": str(distribution_port),
        "RABBITMQ_MNESIA_BASE": str(home / "data"),
        "RABBITMQ_LOG_BASE": str(home),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
        # The script then becomes the Erlang machine instead of watching over it, so that the
        # process we started is the one to be frozen and killed.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_START_ARGS": "-noinput +B i",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false +S 2:2 +sbwt none",
    }


def _binary(text: str) -> str:
    """Render text as an Erlang binary of numbers, in which nothing needs quoting."""
    return f"<<{','.join(map(str, text.encode()))}>>"


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def _speaks_amqp(host: str, port: int) -> bool:
    """Whether the answer to a protocol header (AMQP 0-9-1, 4.2.2) is a method frame."""
    try:
        with socket.create_connection((host, port), timeout=2.0) as link:
            link.sendall(b"AMQP\x00\x00\x09\x01")
            return link.recv(1) == b"\x01"
    except OSError:
        return False
