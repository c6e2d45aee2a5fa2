"""``check`` and ``publish``, in processes of their own, against a real broker."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mlproducer.cli.check import STEPS
from mlproducer.cli.publish import CHUNK
from mlproducer.testing import CeleryWorker, Certificates, RabbitMQNode, RedisServer
from mlproducer.testing.audit import drain, open_channel
from mlproducer.testing.plugin import VirtualHost
from mlproducer.topology import ROUTING_KEYS
from tests.broker.commands import COMMAND, LIMIT, documents, environ_of, run

pytestmark = pytest.mark.broker

SUMMARY = {"task": "summarization", "share_id": "1", "content": {"text": "PRIVATE"}}
EMBEDDING = {"task": "embedding", "share_id": "2", "content": {"text": "PRIVATE"}}
CELERY = {"task": "celery", "name": "x.y", "kwargs": {"a": "PRIVATE"}}


# --- check -----------------------------------------------------------------------------------


def _check(url: str, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = run("check", "--json", url=url, **environ)
    (document,) = documents(result.stdout)
    assert document["ok"] == (result.returncode == 0)
    return result.returncode, {step["step"]: step for step in document["steps"]}


def test_check_of_a_good_broker(rabbitmq_vhost: VirtualHost) -> None:
    """All steps are fine, and no queue holds anything afterwards."""
    result = run("check", url=rabbitmq_vhost.url)
    assert result.returncode == 0, result.stderr
    node = rabbitmq_vhost.node
    assert result.stdout.splitlines()[-1] == f"{node.host}:{node.port}: all is well"
    steps = [line[2:14].strip() for line in result.stdout.splitlines()[:-1]]
    assert steps == list(STEPS)
    assert [line[16:24].strip() for line in result.stdout.splitlines()[:-2]] == ["ok"] * 6
    assert drain(rabbitmq_vhost.url, (*ROUTING_KEYS, "ml.dead_letter")).total() == 0


def test_check_names_a_routing_key_without_a_queue(rabbitmq_vhost: VirtualHost) -> None:
    """Where others declare, a key that leads nowhere fails; probes are taken back."""
    url = rabbitmq_vhost.url
    run("check", url=url)
    everything = (*ROUTING_KEYS, "ml.dead_letter")
    for mode in ("passive", "off"):
        code, steps = _check(url, ML_DECLARE_TOPOLOGY=mode)
        assert (code, steps["routes"]["ok"]) == (0, True)
        assert steps["routes"]["detail"] == "5 routing keys lead to a queue"
    with open_channel(url) as channel:
        channel.queue_unbind("ml.embed", "bookmarkai.ml", "ml.embed")
    for mode in ("passive", "off"):
        code, steps = _check(url, ML_DECLARE_TOPOLOGY=mode)
        assert (code, steps["routes"]["ok"], steps["confirm"]["ok"]) == (1, False, True)
        assert steps["routes"]["detail"] == "no queue is bound for ml.embed"
        assert "ML_DECLARE_TOPOLOGY=active" in steps["routes"]["advice"]
    assert drain(url, everything).total() == 0
    assert _check(url)[0] == 0  # which binds it again


def test_a_worker_discards_what_check_sends(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """A stock worker takes the probes and runs nothing."""
    url = rabbitmq_vhost.url
    run("check", url=url)
    with CeleryWorker(url, ROUTING_KEYS, directory=tmp_path) as worker:
        code, _ = _check(url, ML_DECLARE_TOPOLOGY="off")
        assert code == 0
        task = {**EMBEDDING, "share_id": "after"}
        run("publish", "-", url=url, stdin=_lines(task))
        (only,) = worker.wait_for(lambda runs: len(runs) >= 1, 10.0)
        assert only.kwargs["share_id"] == "after"
        assert worker.running


def test_check_names_dead_letters_that_may_not_be_sent(rabbitmq_vhost: VirtualHost) -> None:
    """A user who may write to the exchange alone cannot dead-letter; a missing one is named too."""
    node, vhost = rabbitmq_vhost.node, rabbitmq_vhost.name
    run("check", url=rabbitmq_vhost.url)
    user = f"user-{vhost}"
    url = node.url_for(vhost, user, "a-password")
    node.add_user(user, "a-password")
    node.set_permissions(vhost, user, "^$", "^bookmarkai\\.ml$", "^$")
    code, steps = _check(url, ML_DECLARE_TOPOLOGY="off")
    assert (code, steps["confirm"]["ok"], steps["dead letters"]["ok"]) == (1, True, False)
    assert "bookmarkai.ml.dlx: 403" in steps["dead letters"]["detail"]
    assert "set_permissions" in steps["dead letters"]["advice"]
    with open_channel(rabbitmq_vhost.url) as channel:
        channel.exchange_delete("bookmarkai.ml.dlx")
    code, steps = _check(rabbitmq_vhost.url, ML_DECLARE_TOPOLOGY="off")
    assert (code, steps["dead letters"]["ok"]) == (1, False)
    assert "404" in steps["dead letters"]["detail"]


def test_check_opens_the_store(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """One that is not there yet is not made; one that cannot be used fails."""
    path = tmp_path / "store.db"
    url = rabbitmq_vhost.url
    code, steps = _check(url, ML_STORE_URL=f"sqlite:///{path}")
    assert (code, steps["store"]["ok"], path.exists()) == (0, True, False)
    run("publish", "-", url=url, stdin="", ML_STORE_URL=f"sqlite:///{path}")
    path.write_text("no database")
    code, steps = _check(url, ML_STORE_URL=f"sqlite:///{path}")
    assert (code, steps["store"]["ok"], steps["connect"]["ok"]) == (1, False, True)
    assert str(path) in steps["store"]["detail"]
    code, steps = _check(url, ML_STORE_URL=f"sqlite:///{tmp_path / 'none' / 'store.db'}")
    assert (code, steps["store"]["ok"]) == (1, False)


def test_check_writes_to_the_store(rabbitmq_vhost: VirtualHost) -> None:
    """One that is full or read-only opens nevertheless; of the probe nothing is left."""
    url = rabbitmq_vhost.url
    with RedisServer() as server, RedisServer() as replica:
        replica.call("REPLICAOF", server.host, str(server.port))
        code, steps = _check(url, ML_STORE_URL=replica.url)
        assert (code, steps["store"]["ok"]) == (1, False)
        assert "read-only" in steps["store"]["detail"]
        server.call("CONFIG", "SET", "maxmemory", "1mb")
        code, steps = _check(url, ML_STORE_URL=server.url)
        assert (code, steps["store"]["ok"]) == (1, False)
        assert "out of memory" in steps["store"]["detail"]
        server.call("CONFIG", "SET", "maxmemory", "0")
        for _ in range(2):
            code, steps = _check(url, ML_STORE_URL=server.url)
            assert (code, steps["store"]["ok"]) == (0, True)
            assert ": 0 messages stored" in steps["store"]["detail"]
        assert not server.call("KEYS", "*row:*")


def test_check_names_a_slash_too_many(rabbitmq_vhost: VirtualHost) -> None:
    """A virtual host with a slash behind its name is another virtual host."""
    code, steps = _check(f"{rabbitmq_vhost.url}/")
    assert code == 1
    assert "530" in steps["connect"]["detail"]
    assert "'/prod/' is not '/prod'" in steps["connect"]["advice"]


def test_check_names_wrong_credentials_and_virtual_hosts(rabbitmq_vhost: VirtualHost) -> None:
    """A refusal fails the first step, skips the others and says which part of the URL is wrong."""
    node = rabbitmq_vhost.node
    code, steps = _check(node.url_for(rabbitmq_vhost.name, password="wrong-password"))
    assert code == 1
    assert "user and password" in steps["connect"]["advice"]
    assert [steps[name]["ok"] for name in STEPS[:-1]] == [False, *[None] * 5]
    code, steps = _check(node.url_for("nosuch"))
    assert code == 1
    assert "virtual host" in steps["connect"]["advice"]


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("amqp://u:password@127.0.0.1:1/", "nothing listens"),
        ("amqp://u:password@no.such.invalid/", "host name"),
    ],
)
def test_check_names_what_cannot_be_reached(url: str, advice: str) -> None:
    """A port on which nothing listens, and a name that does not resolve, are told apart."""
    code, steps = _check(url)
    assert code == 1
    assert advice in steps["connect"]["advice"]


def test_check_of_a_silent_broker(rabbitmq_vhost: VirtualHost) -> None:
    """A frozen broker fails the first step within the connection timeout."""
    with rabbitmq_vhost.node.frozen():
        code, steps = _check(rabbitmq_vhost.url, RABBITMQ_CONNECTION_TIMEOUT="500")
    assert code == 1
    assert "says nothing" in steps["connect"]["advice"]
    assert 0.4 < steps["connect"]["seconds"] < 5.0


def test_check_names_missing_permissions(rabbitmq_vhost: VirtualHost) -> None:
    """Who may not configure fails to declare; who may not write fails to publish."""
    node, vhost = rabbitmq_vhost.node, rabbitmq_vhost.name
    run("check", url=rabbitmq_vhost.url)
    url = node.url_for(vhost, f"user-{vhost}", "a-password")
    node.add_user(f"user-{vhost}", "a-password")
    node.set_permissions(vhost, f"user-{vhost}", "^$", ".*", "^$")
    code, steps = _check(url)
    assert (code, steps["declare"]["ok"], steps["confirm"]["ok"]) == (1, False, True)
    assert "ML_DECLARE_TOPOLOGY=passive" in steps["declare"]["advice"]
    code, steps = _check(url, ML_DECLARE_TOPOLOGY="off")
    assert (code, steps["declare"]["ok"], steps["confirm"]["ok"]) == (0, None, True)
    node.set_permissions(vhost, f"user-{vhost}", "^$", "^$", "^$")
    code, steps = _check(url, ML_DECLARE_TOPOLOGY="off")
    assert (code, steps["publish"]["ok"], steps["confirm"]["ok"]) == (1, False, None)
    assert "set_permissions" in steps["publish"]["advice"]


def test_check_names_a_missing_exchange(rabbitmq_vhost: VirtualHost) -> None:
    """What should be there and is not fails both steps that need it."""
    code, steps = _check(rabbitmq_vhost.url, ML_DECLARE_TOPOLOGY="passive", ML_EXCHANGE="nosuch")
    assert (code, steps["declare"]["ok"], steps["publish"]["ok"]) == (1, False, False)
    assert "nosuch: 404" in steps["declare"]["detail"]
    assert "ML_EXCHANGE" in steps["publish"]["advice"]


def test_check_names_an_alarm(rabbitmq_vhost: VirtualHost) -> None:
    """A broker short of memory takes the first message and blocks; that does not pass for well."""
    with rabbitmq_vhost.node.memory_alarm():
        code, steps = _check(rabbitmq_vhost.url, ML_PUBLISH_TIMEOUT="500")
    assert (code, steps["publish"]["ok"]) == (1, False)
    assert "alarms" in steps["publish"]["advice"]


def test_check_names_tls_where_there_is_none(rabbitmq_vhost: VirtualHost) -> None:
    """TLS spoken to a port without it is named as such."""
    code, steps = _check(rabbitmq_vhost.url.replace("amqp://", "amqps://"))
    assert code == 1
    assert "TLS failed" in steps["connect"]["detail"]
    assert "does the port speak TLS" in steps["connect"]["advice"]


def test_check_names_the_certificate(tmp_path: Path) -> None:
    """An authority that is not trusted is named; with it in the environment all is well."""
    certificates = Certificates(tmp_path)
    with RabbitMQNode(tls=certificates.server_tls()) as node:
        code, steps = _check(node.tls_url)
        assert code == 1
        assert "RABBITMQ_SSL_CACERT" in steps["connect"]["advice"]
        assert _check(node.tls_url, RABBITMQ_SSL_CACERT=str(certificates.ca))[0] == 0


# --- topology --------------------------------------------------------------------------------


def test_topology(rabbitmq_vhost: VirtualHost) -> None:
    """Nothing is made by a look; --apply makes what is missing; then all is there."""
    url, node = rabbitmq_vhost.url, rabbitmq_vhost.node

    def look(*argv: str) -> tuple[int, dict[str, Any]]:
        result = run("topology", *argv, "--json", url=url, ML_QUEUE_PREFIX="a.")
        (document,) = documents(result.stdout)
        return result.returncode, {
            each["name"]: each["state"]
            for each in document["topology"]
            if each["kind"] != "binding"
        }

    names = [
        "bookmarkai.ml",
        "a.bookmarkai.ml.dlx",
        "a.ml.dead_letter",
        *(f"a.{key}" for key in ROUTING_KEYS),
    ]
    for _ in range(2):
        assert look() == (1, dict.fromkeys(names, "missing"))
    assert node.ctl("-q", "list_queues", "-p", rabbitmq_vhost.name, "--no-table-headers") == ""
    assert look("--apply") == (0, dict.fromkeys(names, "declared"))
    assert look() == (0, dict.fromkeys(names, "there"))
    with open_channel(url) as channel:
        channel.queue_delete("a.ml.embed")
        channel.queue_declare("a.ml.embed", durable=True)
    result = run("topology", url=url, ML_QUEUE_PREFIX="a.")
    assert result.returncode == 1
    assert re.search(r"a\.ml\.embed +differs: 'x-", result.stdout)
    assert "--apply-to queues" in result.stdout


# --- publish ---------------------------------------------------------------------------------


def _lines(*values: object) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


def test_publish_accounts_for_every_line(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """Good lines arrive; each other one is reported with its number, on both outputs."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        _lines(SUMMARY, EMBEDDING)
        + "\n  \nPRIVATE\n"
        + _lines(
            {"task": "PRIVATE"},
            {**CELERY, "routing_key": "ml.embed"},
            {**CELERY, "routing_key": "nowhere"},
            {**CELERY, "routing_key": "k", "exchange": "missing"},
            {**SUMMARY, "content": {"text": "PRIVATE \ud800"}},
            SUMMARY,
        )
    )
    result = run("publish", str(path), "--json", "--timeout", "0.5", url=rabbitmq_vhost.url)
    assert result.returncode == 1
    *records, last = documents(result.stdout)
    outcomes = {record["line"]: record["outcome"] for record in records}
    wrong = {5: "bad", 6: "bad", 8: "undelivered", 9: "refused", 10: "bad"}
    assert outcomes == {**dict.fromkeys((1, 2, 7, 11), "confirmed"), **wrong}
    assert last["summary"] == {
        "lines": 9,
        "confirmed": 4,
        "deferred": 1,
        "refused": 1,
        "bad": 3,
        "dead_lettered": 0,
        "undelivered": 1,
        "stopped": None,
    }
    for number, outcome in wrong.items():
        assert f"line {number}: {outcome}: " in result.stderr
    confirmed = {r["message_id"] for r in records if r["outcome"] == "confirmed"}
    # The refused one closed the channel; what was in flight beside it was sent again.
    assert drain(rabbitmq_vhost.url).keys() == confirmed


def test_publish_streams_standard_input(rabbitmq_vhost: VirtualHost) -> None:
    """More lines than are held at a time arrive once each, and people get a table."""
    count = 12_000
    result = run("publish", "-", url=rabbitmq_vhost.url, stdin=_lines(EMBEDDING) * count)
    assert result.returncode == 0, result.stderr
    assert ["confirmed", str(count)] in [line.split() for line in result.stdout.splitlines()]
    found = drain(rabbitmq_vhost.url)
    assert (len(found), found.total()) == (count, count)


def test_publish_waits_for_what_was_deferred(rabbitmq_vhost: VirtualHost) -> None:
    """A message that has no queue at first goes out once there is one, and all is well."""
    process = subprocess.Popen(
        [*COMMAND, "publish", "-", "--json"],
        env=environ_of(rabbitmq_vhost.url, {"ML_MESSAGE_RETRY_BASE_DELAY": "200"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(_lines({**CELERY, "routing_key": "later"}))
        process.stdin.close()
        assert "waiting for 1 deferred messages" in process.stderr.readline()
        with open_channel(rabbitmq_vhost.url) as channel:
            channel.queue_declare("later", durable=True)
            channel.queue_bind("later", "bookmarkai.ml", "later")
        record, last = documents(process.stdout.read())
        assert process.wait(LIMIT) == 0
    assert record["outcome"] == "confirmed"
    assert (last["summary"]["deferred"], last["summary"]["confirmed"]) == (1, 1)
    assert drain(rabbitmq_vhost.url, ["later"]) == {record["message_id"]: 1}


def test_publish_tells_what_stays_in_a_store(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """A message that another process will deliver is not to be published again."""
    line = _lines({**CELERY, "routing_key": "nowhere"})
    for store, kept in (("memory://", None), (f"sqlite:///{tmp_path}/store.db", True)):
        argv = ("publish", "-", "--json", "--timeout", "1")
        result = run(*argv, url=rabbitmq_vhost.url, stdin=line, ML_STORE_URL=store)
        record, _ = documents(result.stdout)
        assert (record["outcome"], record.get("stored")) == ("undelivered", kept)
        assert ("it stays in the store" in result.stderr) is bool(kept)


def test_publish_tells_of_dead_letters(rabbitmq_vhost: VirtualHost) -> None:
    """A message that never finds a queue ends among the dead letters, and the exit code says so."""
    line = _lines({**CELERY, "routing_key": "nowhere"})
    retries = {"ML_MAX_MESSAGE_RETRIES": "1", "ML_MESSAGE_RETRY_BASE_DELAY": "100"}
    result = run("publish", "-", "--json", url=rabbitmq_vhost.url, stdin=line, **retries)
    assert result.returncode == 1
    record, last = documents(result.stdout)
    assert (record["line"], record["outcome"]) == (1, "dead_lettered")
    assert last["summary"]["dead_lettered"] == 1
    assert "line 1: dead-lettered: " in result.stderr
    assert drain(rabbitmq_vhost.url, ["ml.dead_letter"]).total() == 1


def test_publish_reads_nothing_without_a_broker() -> None:
    """Where there is no broker, or no way in, it says so and at which line it stopped."""
    url = "amqp://u:password@127.0.0.1:1/"
    result = run("publish", "-", "--timeout", "0.2", url=url, stdin=_lines(SUMMARY))
    assert result.returncode == 1
    assert "stopped before line 1: " in result.stderr
    assert "nothing listens there" in result.stderr


def test_publish_is_not_patient_with_a_wrong_password(rabbitmq_vhost: VirtualHost) -> None:
    """Credentials that are refused end it at once, whatever the patience."""
    url = rabbitmq_vhost.node.url_for(rabbitmq_vhost.name, password="wrong-password")
    result = run("publish", "-", "--timeout", "60", url=url, stdin=_lines(SUMMARY))
    assert result.returncode == 1
    assert "fix user and password" in result.stderr


def test_publish_outlives_a_broker_that_is_killed(
    rabbitmq_vhost: VirtualHost, mortal_node: RabbitMQNode
) -> None:
    """The broker dies while lines are read; it comes back, and every line arrives."""
    process = subprocess.Popen(
        [*COMMAND, "publish", "-", "--json"],
        env=environ_of(rabbitmq_vhost.url, {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("PRIVATE\n" + _lines(SUMMARY) * 2000)
        process.stdin.flush()
        assert "line 1: bad" in process.stderr.readline()  # it reads: there is a connection
        mortal_node.save_queues()
        mortal_node.kill()
        mortal_node.launch()
        stdout, stderr = process.communicate(_lines(SUMMARY) * 2000, LIMIT)
    *records, last = documents(stdout)
    assert last["summary"]["confirmed"] == 4000, stderr
    found = drain(rabbitmq_vhost.url)
    assert found.keys() == {record["message_id"] for record in records if record["message_id"]}


def _start(path: str, url: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "publish", path, "--json"],
        env=environ_of(url, environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_while_it_reads(rabbitmq_vhost: VirtualHost) -> None:
    """What was read is published and accounted for; nothing more is read."""
    with _start("-", rabbitmq_vhost.url) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("PRIVATE\n" + _lines(EMBEDDING) * 3)
        process.stdin.flush()
        assert "line 1: bad" in process.stderr.readline()
        deadline = time.monotonic() + LIMIT
        while rabbitmq_vhost.node.queue_depth(rabbitmq_vhost.name, "ml.embed") < 3:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 143
    last = documents(stdout)[-1]
    assert last["summary"]["stopped"] == "stopped by SIGTERM after line 4"
    assert (last["summary"]["lines"], last["summary"]["confirmed"]) == (4, 3)
    assert drain(rabbitmq_vhost.url).total() == 3
    assert "Traceback" not in stderr


def test_sigterm_while_it_waits(rabbitmq_vhost: VirtualHost) -> None:
    """What was deferred has as long as at a process's end, and is accounted for."""
    with _start("-", rabbitmq_vhost.url, ML_EXIT_TIMEOUT="500") as process:
        assert process.stderr is not None
        assert process.stdin is not None
        process.stdin.write(_lines({**CELERY, "routing_key": "nowhere"}))
        process.stdin.close()
        process.stdin = None
        assert "waiting for 1 deferred" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 143
    assert documents(stdout)[-1]["summary"]["undelivered"] == 1


@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        ("| head -1", "the output was closed by its reader"),
        ("> /dev/full", "No space left on device"),
        (">&-", "standard output is closed"),
    ],
)
def test_output_that_cannot_be_written(
    redirection: str, words: str, rabbitmq_vhost: VirtualHost, tmp_path: Path
) -> None:
    """It is said in one line, with what is known of the lines, and the exit code is 1."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(_lines(EMBEDDING) * 20_000)
    command = " ".join(map(shlex.quote, [*COMMAND, "publish", str(path), "--json"]))
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {redirection}"],
        env=environ_of(rabbitmq_vhost.url, {}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    if redirection != ">&-":
        lines = [each for each in result.stderr.splitlines() if not each.startswith("[")]
        known = re.match(r"mlproducer: (\d+) confirmed; of the (\d+) read last", lines[0])
        assert known is not None
        confirmed, unknown = map(int, known.groups())
        assert confirmed + unknown >= CHUNK
        assert confirmed <= drain(rabbitmq_vhost.url).total() <= confirmed + unknown
        assert len(lines) == 2  # besides the progress, which a slow machine shows


def test_a_table_that_cannot_be_written(rabbitmq_vhost: VirtualHost) -> None:
    """Its counts are on standard error then."""
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(
            [*COMMAND, "publish", "-"],
            env=environ_of(rabbitmq_vhost.url, {}),
            input=_lines(EMBEDDING) * 3,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert result.returncode == 1
    assert "mlproducer: 3 lines, 3 confirmed, " in result.stderr


def test_standard_input_that_is_closed(rabbitmq_vhost: VirtualHost) -> None:
    """It is said in one line."""
    command = " ".join(map(shlex.quote, [*COMMAND, "publish", "-"]))
    result = subprocess.run(
        ["bash", "-c", f"{command} <&-"],
        env=environ_of(rabbitmq_vhost.url, {}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "mlproducer: standard input: is closed\n"


def test_a_closed_output(rabbitmq_vhost: VirtualHost, tmp_path: Path) -> None:
    """A reader that goes away ends the command with 1 and without a traceback."""
    path = tmp_path / "tasks.jsonl"
    path.write_text("PRIVATE\n" * 5000)
    with (
        (tmp_path / "stderr").open("wb") as errors,
        subprocess.Popen(
            [*COMMAND, "publish", str(path), "--json"],
            env=environ_of(rabbitmq_vhost.url, {}),
            stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LIMIT) == 1
    assert "Traceback" not in (tmp_path / "stderr").read_text()
