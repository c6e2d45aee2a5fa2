"""Users of a node, changed by calls that take milliseconds; ``rabbitmqctl`` takes seconds of a CPU.

Runs on: pytest's main thread.
"""

from __future__ import annotations

from mlproducer.testing import RabbitMQNode

_INTERNAL = "rabbit_auth_backend_internal"


def delete_user(node: RabbitMQNode, name: str) -> None:
    """Delete a user; its connections are closed."""
    _run(node, f'{_INTERNAL}:delete_user(<<"{name}">>, <<"test">>)')


def change_password(node: RabbitMQNode, name: str, password: str) -> None:
    """Give a user another password; open connections stay open."""
    _run(node, f'{_INTERNAL}:change_password(<<"{name}">>, <<"{password}">>, <<"test">>)')


def limit_user(node: RabbitMQNode, name: str, what: str, most: int) -> None:
    """Limit a user's connections or channels."""
    limits = f'#{{<<"{what}">> => {most}}}'
    _run(node, f'{_INTERNAL}:set_user_limits(<<"{name}">>, {limits}, <<"test">>)')


def _run(node: RabbitMQNode, expression: str) -> None:
    assert node.eval(expression) == "ok"
