"""A private node starts, dies, freezes, answers, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from mlproducer.testing import RabbitMQCluster, RabbitMQError, RabbitMQNode, RabbitMQNotInstalled
from mlproducer.testing.erlang import free_port
from mlproducer.testing.plugin import VirtualHost
from tests.leftovers import left_in_the_end

QUORUM = {"x-queue-type": "quorum"}


@contextmanager
def _channel(url: str) -> Iterator[BlockingChannel]:
    parameters = pika.URLParameters(url)
    parameters.blocked_connection_timeout = 10.0
    connection = pika.BlockingConnection(parameters)
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        if connection.is_open:
            connection.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _processes_below(directory: Path) -> list[str]:
    """The command lines of processes whose environment names ``directory`` as HOME."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue  # ended meanwhile, or not ours
        if any(entry.startswith(f"HOME={directory}".encode()) for entry in environment):
            found.append(command)
    return found


def test_each_port_is_given_once() -> None:
    """Servers of one process that are made before they listen never share a port."""
    ports = [free_port() for _ in range(150)]  # more than one block has
    assert len(set(ports)) == len(ports)


@pytest.mark.broker
def test_close_leaves_nothing_behind(tmp_path: Path) -> None:
    """After the block there is no broker, no epmd, no port and no file."""
    with RabbitMQNode(directory=tmp_path) as node:
        pid = node.pid
        assert any("epmd" in command for command in _processes_below(tmp_path))
    assert not node.running
    assert not _alive(pid)
    assert list(tmp_path.iterdir()) == []
    assert [command for command in _processes_below(tmp_path) if "epmd" in command] == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((node.host, node.port), timeout=5.0)


@pytest.mark.broker
@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_confirmed_messages_survive_kill_and_stop(tmp_path: Path, ending: str) -> None:
    """A restart after kill and after stop has the same port, user, vhost and messages."""
    with RabbitMQNode(directory=tmp_path) as node:
        node.add_vhost("kept")
        url = node.url_for("kept")
        with _channel(url) as channel:
            channel.queue_declare("q", durable=True, arguments=QUORUM)
            for _ in range(3):
                channel.basic_publish("", "q", b"x", pika.BasicProperties(delivery_mode=2))
        node.save_queues()
        getattr(node, ending)()
        assert not node.running
        with pytest.raises(RabbitMQError, match="is not running"):
            node.eval("1")
        node.restart()
        assert node.url_for("kept") == url
        assert node.queue_depth("kept", "q") == 3
        with _channel(url) as channel:
            assert channel.basic_get("q", auto_ack=True)[2] == b"x"


_OWNER = """
import sys
from mlproducer.testing import RabbitMQNode
node = RabbitMQNode(directory=sys.argv[1])
node.start()
node.freeze()
print(node.pid, node._network.workspace._guard.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.broker
@pytest.mark.parametrize("ending", [signal.SIGKILL, None], ids=["killed", "exits without closing"])
def test_a_node_ends_with_its_owner(tmp_path: Path, ending: signal.Signals | None) -> None:
    """However the owner ends, its broker, even a frozen one, and its files are gone soon after."""
    argv = [sys.executable, "-c", _OWNER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        broker, guard = map(int, owner.stdout.readline().split())
        guard_end = os.pidfd_open(guard)
        if ending is None:
            owner.stdin.close()
        else:
            owner.send_signal(ending)
        owner.wait(120.0)
    try:
        assert select.select([guard_end], [], [], 10.0)[0], "the guard is still there"
    finally:
        os.close(guard_end)
    assert list(tmp_path.iterdir()) == []
    assert not any("beam" in command for command in _processes_below(tmp_path)), broker


@pytest.mark.broker
def test_a_frozen_node_has_stopped(rabbitmq_node: RabbitMQNode) -> None:
    """Once it is frozen, none of its threads runs any more: nothing is answered by chance."""
    tasks = Path(f"/proc/{rabbitmq_node.pid}/task")
    for _ in range(20):
        with rabbitmq_node.frozen():
            stats = [(each / "stat").read_text() for each in tasks.iterdir()]
        assert {each.rpartition(")")[2].split()[0] for each in stats} == {"T"}


@pytest.mark.broker
def test_a_frozen_node_accepts_and_does_not_answer(rabbitmq_node: RabbitMQNode) -> None:
    """A frozen broker takes a connection and stays silent; thawed, it answers what it was sent."""
    address = (rabbitmq_node.host, rabbitmq_node.port)
    with socket.socket() as link:
        with rabbitmq_node.frozen():
            link.settimeout(0.5)
            link.connect(address)
            link.sendall(b"AMQP\x00\x00\x09\x01")
            with pytest.raises(TimeoutError):
                link.recv(1)
            assert rabbitmq_node.running
        link.settimeout(60.0)
        assert link.recv(1) == b"\x01"


@pytest.mark.broker
def test_a_memory_alarm_blocks_publishers(rabbitmq_vhost: VirtualHost) -> None:
    """A publisher hears Connection.Blocked during the alarm, and Unblocked after it."""
    heard: list[str] = []
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_vhost.url))
    connection.add_on_connection_blocked_callback(lambda *_: heard.append("blocked"))
    connection.add_on_connection_unblocked_callback(lambda *_: heard.append("unblocked"))
    channel = connection.channel()
    with rabbitmq_vhost.node.memory_alarm():
        channel.basic_publish("", "nowhere", b"x")
        connection.process_data_events(10.0)
        assert heard == ["blocked"]
    connection.process_data_events(10.0)
    assert heard == ["blocked", "unblocked"]
    connection.close()


@pytest.mark.broker
def test_the_memory_alarm_ends_when_the_block_raises(rabbitmq_node: RabbitMQNode) -> None:
    """An error in the block does not leave the shared broker blocked."""

    def fail_during_alarm() -> None:
        with rabbitmq_node.memory_alarm():
            assert "memory" in rabbitmq_node.eval("rabbit_alarm:get_alarms()")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_during_alarm()
    assert rabbitmq_node.eval("rabbit_alarm:get_alarms()") == "[]"


@pytest.mark.broker
def test_connections_are_seen_and_closed(rabbitmq_vhost: VirtualHost) -> None:
    """An open connection is listed by its name, and ends with 320 when all are closed."""
    node = rabbitmq_vhost.node
    with _channel(rabbitmq_vhost.url) as channel:
        (name,) = node.connections()
        assert name.endswith(f"-> 127.0.0.1:{node.port}")
        node.close_all_connections()
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
            channel.connection.process_data_events(10.0)
        assert caught.value.reply_code == 320
    assert node.connections() == []


@pytest.mark.broker
def test_queue_depth_counts_ready_messages(rabbitmq_vhost: VirtualHost) -> None:
    """The depth of a quorum queue is exact at once, and an unknown queue is an error."""
    node, vhost = rabbitmq_vhost.node, rabbitmq_vhost.name
    with _channel(rabbitmq_vhost.url) as channel:
        channel.queue_declare("q", durable=True, arguments=QUORUM)
        assert node.queue_depth(vhost, "q") == 0
        for _ in range(5):
            channel.basic_publish("", "q", b"x")
        assert node.queue_depth(vhost, "q") == 5
    with pytest.raises(RabbitMQError, match="not_found"):
        node.queue_depth(vhost, "other")


@pytest.mark.broker
def test_users_and_permissions(rabbitmq_vhost: VirtualHost) -> None:
    """A user with odd characters gets in, and may do what the permissions say and no more."""
    node, vhost = rabbitmq_vhost.node, rabbitmq_vhost.name
    user, password = "o'user", "p@ss/wörd:%"
    node.add_user(user, password)
    node.set_permissions(vhost, user, "^mine$", "", "")
    with _channel(node.url_for(vhost, user, password)) as channel:
        channel.queue_declare("mine")
        with pytest.raises(pika.exceptions.ChannelClosedByBroker) as caught:
            channel.queue_declare("other")
        assert caught.value.reply_code == 403
    with pytest.raises(RabbitMQError, match="user_already_exists"):
        node.add_user(user, password)


@pytest.mark.broker
def test_ctl_and_eval_return_what_the_broker_says(rabbitmq_node: RabbitMQNode) -> None:
    """Values come back as Erlang prints them; what the broker refuses is an error with its text."""
    assert rabbitmq_node.eval('[1, <<"é"/utf8>>, "x"].') == '[1,<<"é"/utf8>>,"x"]'
    header, *users = rabbitmq_node.ctl("--quiet", "list_users").splitlines()
    assert header == "user\ttags"
    assert "tester\t[administrator]" in users  # among those that other tests have made there
    with pytest.raises(RabbitMQError, match="undef"):
        rabbitmq_node.eval("nobody:knows()")
    with pytest.raises(RabbitMQError, match="nobody"):
        rabbitmq_node.ctl("set_user_tags", "nobody", "monitoring")


@pytest.mark.broker
def test_a_node_that_does_not_start_says_why(tmp_path: Path) -> None:
    """A wrong line of configuration ends the start at once, with the broker's own words."""
    with (
        pytest.raises(RabbitMQError, match="no_such_setting"),
        RabbitMQNode(directory=tmp_path, config={"no_such_setting": "1"}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.broker
def test_extra_configuration_reaches_the_broker(tmp_path: Path) -> None:
    """A line given in config is in force, and a given port is used."""
    port = free_port()
    with RabbitMQNode(directory=tmp_path, config={"heartbeat": "7"}, port=port) as node:
        assert node.port == port
        assert node.eval("application:get_env(rabbit, heartbeat)") == "{ok,7}"


def test_no_password_in_repr(rabbitmq_free_node: RabbitMQNode) -> None:
    """The repr names the node and its port, and no secret."""
    text = repr(rabbitmq_free_node)
    assert str(rabbitmq_free_node.port) in text
    assert rabbitmq_free_node.password not in text
    assert rabbitmq_free_node.password not in repr(
        VirtualHost("v", rabbitmq_free_node, rabbitmq_free_node.url)
    )


@pytest.fixture
def rabbitmq_free_node() -> RabbitMQNode:
    """A node that was never started, and so needs no RabbitMQ."""
    return RabbitMQNode()


def test_a_node_that_is_not_running_refuses(rabbitmq_free_node: RabbitMQNode) -> None:
    """Before the start every order is an error, and stop and close have nothing to do."""
    for order in ("freeze", "thaw", "connections", "set_memory_alarm"):
        with pytest.raises(RabbitMQError, match="is not running"):
            getattr(rabbitmq_free_node, order)()
    with pytest.raises(RabbitMQError, match=r"tls="):
        _ = rabbitmq_free_node.tls_url
    rabbitmq_free_node.stop()
    rabbitmq_free_node.close()


def test_a_missing_rabbitmq_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RabbitMQ the error holds the command that installs it."""
    monkeypatch.setattr("mlproducer.testing.erlang._DIRECTORIES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RabbitMQNotInstalled, match="apt-get install -y rabbitmq-server"):
        RabbitMQNode().start()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_goes_on_without_one_node(tmp_path: Path) -> None:
    """A quorum queue of three members confirms after one was killed, which catches up later."""
    with RabbitMQCluster(3, directory=tmp_path) as cluster:
        first, second, third = cluster.nodes
        assert cluster.url.split(",") == [first.url, second.url, third.url]
        with _channel(first.url) as channel:
            channel.queue_declare("q", durable=True, arguments=QUORUM)
            third.kill()
            channel.basic_publish("", "q", b"x")
        assert second.queue_depth("/", "q") == 1
        second.kill()
        with pytest.raises(RabbitMQError, match="timeout"):
            first.queue_depth("/", "q")
        third.restart()
        assert third.queue_depth("/", "q") == 1
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import signal, sys
from mlproducer.testing.workspace import Workspace

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
interrupted = 0
for step in range(60):
    workspace = None
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002 * (step + 1))
        workspace = Workspace("interrupted-", sys.argv[1])
        workspace.spawn("sleeper", ["sleep", "60"], {})
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    if workspace is not None:
        workspace.close()
print(interrupted)
"""


def test_an_interrupted_owner_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C while directory, guard and program are being made: all are gone soon after."""
    argv = [sys.executable, "-W", "ignore", "-c", _INTERRUPTED, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120.0, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    assert left_in_the_end(tmp_path) == []
