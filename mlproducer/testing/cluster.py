"""`RabbitMQCluster`: several private nodes on one host, joined.

Owns the nodes and the Erlang network they share. It must not know who publishes to them.

Runs on: the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mlproducer.testing.erlang import ErlangNetwork
from mlproducer.testing.node import RabbitMQNode

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RabbitMQCluster"]

_START_LIMIT = 240.0


class RabbitMQCluster:
    """``size`` nodes of one cluster, as a context manager (about 15 s for three on two cores).

    A quorum queue declared on it has a member on every node. The nodes are in ``nodes``; each can
    be killed, frozen and restarted by itself, with the same user and password on all.

    Args:
        size: how many nodes.
        directory: where to make the cluster's directory; the temporary directory by default.
        config: further lines of every node's ``rabbitmq.conf``, such as
            ``{"cluster_partition_handling": "pause_minority"}``.

    """

    def __init__(
        self,
        size: int = 3,
        *,
        directory: str | Path | None = None,
        config: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._size = size
        self._directory = directory
        self._config = config
        self._network: ErlangNetwork | None = None
        self.nodes: tuple[RabbitMQNode, ...] = ()

    def __repr__(self) -> str:
        return f"<RabbitMQCluster of {self._size}: {list(self.nodes)}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def urls(self) -> tuple[str, ...]:
        """One address per node."""
        return tuple(node.url for node in self.nodes)

    @property
    def url(self) -> str:
        """All addresses, separated by commas, as the library's ``RABBITMQ_URL`` takes them."""
        return ",".join(self.urls)

    def url_for(self, vhost: str) -> str:
        """All addresses of a virtual host, separated by commas."""
        return ",".join(node.url_for(vhost) for node in self.nodes)

    def start(self, timeout: float = _START_LIMIT) -> None:
        """Start the nodes side by side and join them, at most ``timeout`` seconds.

        Raises:
            RabbitMQError: a node did not come up or did not join; with what it said.

        """
        deadline = time.monotonic() + timeout
        self._network = ErlangNetwork(self._directory)
        self.nodes = tuple(
            RabbitMQNode(network=self._network, config=self._config) for _ in range(self._size)
        )
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready(deadline - time.monotonic())
        for node in self.nodes[1:]:
            _join(node, self.nodes[0])

    def close(self) -> None:
        """Kill all nodes and remove all they left."""
        for node in self.nodes:
            node.close()
        if self._network is not None:
            self._network.close()
            self._network = None


def _join(node: RabbitMQNode, first: RabbitMQNode) -> None:
    """Join ``node`` to the cluster of ``first`` (https://www.rabbitmq.com/docs/clustering)."""
    node.eval("rabbit:stop()")
    node.ctl("join_cluster", first.name)
    node.eval("rabbit:start()")
    node.wait_ready()
