"""The command line, lines of ``publish`` input, the demo's texts and its sums; no broker."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import signal
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from attrs import frozen

from mlproducer import (
    CeleryTask,
    EmbeddingBatchTask,
    EmbeddingTask,
    Receipt,
    SummarizationTask,
    TranscriptionTask,
)
from mlproducer.cli import COMMANDS, main, output
from mlproducer.cli.connectivity import advise
from mlproducer.cli.demo_result import Progress
from mlproducer.cli.reliability import SCENARIOS, Report, show_totals
from mlproducer.cli.reliability.figures import Figures
from mlproducer.cli.reliability.scenario import Step
from mlproducer.cli.sample_texts import MAX_CHARACTERS, MIN_CHARACTERS, STANDARD_LIBRARY, texts
from mlproducer.cli.task_lines import parse, read_lines
from mlproducer.errors import (
    AuthenticationError,
    BrokerRejectedError,
    ConfirmTimeoutError,
    InvalidTaskError,
    NackError,
    NotConnectedError,
    PublishError,
)
from mlproducer.testing.audit import Journal
from tests.pure.tables import each_row

CONTENT = {"text": "PRIVATE"}
CELERY = {"task": "celery", "name": "x.y", "routing_key": "ml.embed"}


# --- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nosuch"],
        ["check", "--bogus"],
        ["publish"],
        ["publish", "-", "--timeout", "nan"],
        ["publish", "-", "--timeout", "-1"],
        ["publish", "-", "--timeout", "soon"],
        ["demo", "--messages", "0"],
        ["demo", "--messages", "many"],
        ["demo", "--messages", "100001"],
        ["dead-letters"],
        ["dead-letters", "nosuch"],
        ["dead-letters", "list", "id"],
        ["dead-letters", "show"],
        ["dead-letters", "show", "a", "b"],
        ["reliability", "nosuch"],
        ["reliability", "all", "message-retry"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments that do not parse give exit code 2 and the usage on standard error."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: mlproducer" in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        *([name] for name in COMMANDS),
        *(["dead-letters", name] for name in ("list", "show", "replay", "purge")),
    ],
    ids=" ".join,
)
def test_help_is_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command explains itself, and offers JSON."""
    assert main([*argv, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_a_moment_before_all_calendars_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """One that no time zone can be applied to is told as any other text that is no moment."""
    assert main(["dead-letters", "list", "--since", "0001-01-01"]) == 2
    assert "no moment such as" in capsys.readouterr().err


def test_the_scenarios_are_the_documented_ones() -> None:
    """They are found under their names, in the order in which ``all`` runs them."""
    assert list(SCENARIOS) == [
        "connection-resilience",
        "message-retry",
        "circuit-breaker",
        "publisher-confirms",
        "health-checks",
    ]
    assert all(name == scenario.name for name, scenario in SCENARIOS.items())


@pytest.mark.parametrize("argv", [["--json", "purge"], ["purge", "id", "--json"]], ids=" ".join)
def test_without_a_terminal_there_is_no_question(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal ``purge`` wants --yes: exit code 2, before anything is connected."""
    monkeypatch.setenv("RABBITMQ_URL", "amqp://127.0.0.1:1/")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["dead-letters", *argv]) == 2
    captured = capsys.readouterr()
    assert "--yes" in captured.err
    assert "--yes" in json.loads(captured.out)["error"]


def test_without_a_url_check_fails_with_the_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unset RABBITMQ_URL is no usage error: exit code 1, and what to set."""
    monkeypatch.delenv("RABBITMQ_URL", raising=False)
    assert main(["check", "--json"]) == 1
    captured = capsys.readouterr()
    assert "RABBITMQ_URL" in captured.err
    assert "RABBITMQ_URL" in json.loads(captured.out)["error"]


def test_a_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be read gives exit code 1 and its name, before anything is connected."""
    monkeypatch.setenv("RABBITMQ_URL", "amqp://127.0.0.1:1/")
    assert main(["publish", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl: No such file" in capsys.readouterr().err


# --- lines -----------------------------------------------------------------------------------


def _line(value: object) -> bytes:
    return json.dumps(value).encode()


def test_each_kind_of_task() -> None:
    """Fields become those of the kind's class."""
    summary = parse(_line({"task": "summarization", "share_id": "1", "content": CONTENT}))
    assert summary == SummarizationTask("1", CONTENT)
    recording = {"task": "transcription", "share_id": "2", "media_url": "https://x"}
    assert parse(_line(recording)) == TranscriptionTask("2", "https://x")
    options = {"forceModel": "m"}
    embedding = {"task": "embedding", "share_id": "3", "content": CONTENT, "options": options}
    assert parse(_line(embedding)) == EmbeddingTask("3", CONTENT, options)
    items = [{"share_id": "4", "content": CONTENT}, ["5", CONTENT]]
    batch = EmbeddingBatchTask([("4", CONTENT), ("5", CONTENT)])
    assert parse(_line({"task": "embedding_batch", "items": items})) == batch
    celery = CeleryTask("x.y", [1], {"a": 2}, routing_key="ml.embed", countdown=3)
    assert parse(_line({**CELERY, "args": [1], "kwargs": {"a": 2}, "countdown": 3})) == celery


@pytest.mark.parametrize("text", ["2030-01-31T12:00:00Z", "2030-01-31T14:00:00+02:00"])
def test_moments_are_text(text: str) -> None:
    """A point in time is read from text with a time zone; seconds stay seconds."""
    task = parse(_line({**CELERY, "eta": text, "expires": 60}))
    assert isinstance(task, CeleryTask)
    assert task.eta is not None
    assert task.eta.isoformat() == "2030-01-31T12:00:00+00:00"
    assert task.expires == 60


BAD_LINES = [
    (b"PRIVATE", r"not JSON \(column 1\)"),
    (b'{"task": "PRIVATE', "not JSON"),
    (b"\xff", "not UTF-8"),
    (b"1" * 5000, "nested too deeply"),
    (b"[" * 100_000, "nested too deeply"),
    (b"x" * 101, "longer than 100 bytes"),
    (b'["PRIVATE"]', "a JSON object is expected, got list"),
    (b"{}", "task is missing or unknown; accepted are summarization, transcription"),
    (_line({"task": "PRIVATE"}), "task is missing or unknown"),
    (_line({"task": ["PRIVATE"]}), "task is missing or unknown"),
    (_line({"task": "summarization"}), "share_id is missing"),
    (_line({"task": "summarization", "share_id": 1.5, "content": CONTENT}), "share_id is of typ"),
    (_line({"task": "transcription", "share_id": "1"}), "media_url is missing"),
    (_line({"task": "embedding_batch"}), "items is missing"),
    (_line({"task": "celery", "name": "x"}), "routing_key is missing"),
    (_line({**CELERY, "PRIVATE": 1}), "a field is unknown; accepted are task, name, args"),
    (_line({**CELERY, "eta": "PRIVATE"}), "eta is not a date and time"),
    (_line({**CELERY, "eta": "2030-01-31T12:00:00"}), "eta is of type datetime but without"),
    (b'{"task": "celery", "name": "a", "name": "b"}', "a key is there twice"),
    (b'{"task": "celery", "kwargs": {"a": 1, "a": 2}}', "a key is there twice"),
    (_line({**CELERY, "eta": 5}), "eta is of type int"),
    (_line({**CELERY, "priority": 300}), "priority is of type int but out of range"),
]


def test_what_is_wrong_is_said_without_quoting() -> None:
    """A bad line is refused with the reason, and without its content."""
    each_row(BAD_LINES, is_refused)


def is_refused(line: bytes, why: str) -> None:
    """Parse one bad line."""
    limit = 100 if line.startswith(b"x") else 200_000
    with pytest.raises(InvalidTaskError, match=why) as caught:
        parse(line, limit)
    assert "PRIVATE" not in str(caught.value)


def test_a_line_that_is_too_long_costs_no_memory_and_no_neighbour() -> None:
    """Of an endless line the beginning is kept; its number, and the next line, are right."""
    stream = io.BytesIO(b"ab\n" + b"x" * 1000 + b"\n" + b"y" * 10 + b"\ncd")
    lines = list(read_lines(stream, limit=10))
    assert lines == [b"ab\n", b"x" * 11, b"y" * 10 + b"\n", b"cd"]


def test_a_byte_order_mark_belongs_to_no_line() -> None:
    """It is dropped at the beginning, and there alone."""
    mark = b"\xef\xbb\xbf"
    assert list(read_lines(io.BytesIO(mark + b"ab\n" + mark + b"c"))) == [b"ab\n", mark + b"c"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the installed package's."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlproducer {metadata.version('mlproducer')}\n"


# --- output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "bar"), [(0.0, "." * 24), (0.5, "#" * 12 + "." * 12), (1.2, "#" * 24)]
)
def test_the_bar(share: float, bar: str) -> None:
    """The bar is never longer than full."""
    assert output.draw(share) == f"[{bar}] {min(int(share * 100), 100):3d} %"


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_what_the_output_cannot_encode(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is escaped, and ends no command amid its work."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    output.Console(as_json=False).say("\u65e5 \u20ac")
    assert written.getvalue() == b"\\u65e5 \\u20ac\n"


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, output.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_what_belongs_together_is_not_cut(
    number: signal.Signals, kind: type[KeyboardInterrupt]
) -> None:
    """A signal ends the command behind the block, and only there."""
    console = output.Console(as_json=False)
    steps = []

    def work() -> None:
        with console.undivided():
            signal.raise_signal(number)
            steps.append("the rest")

    with console.handling_sigterm(), pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert caught.type is kind
    assert steps == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_waits_for_nothing() -> None:
    """The first one waits for the end of the block."""
    steps = []

    def work() -> None:
        with output.Console(as_json=False).undivided():
            signal.raise_signal(signal.SIGINT)
            steps.append("the first")
            signal.raise_signal(signal.SIGINT)
            steps.append("the second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_people_and_programs_read_different_things(capsys: pytest.CaptureFixture[str]) -> None:
    """Programs find their JSON, and nothing else, on standard output; people find no JSON."""
    for as_json in (True, False):
        console = output.Console(as_json=as_json)
        console.say("sentence")
        console.table([("name", "1")])
        console.emit({"name": 1})
        captured = capsys.readouterr()
        if as_json:
            assert captured.out == '{"name": 1}\n'
        else:
            assert captured.out == "sentence\n  name  1\n"


def test_in_a_file_the_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a terminal a short run prints no progress at all."""
    console = output.Console(as_json=False)
    for step in range(100):
        console.progress(step / 100, "text")
    console.end_progress()
    assert capsys.readouterr().err == ""


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters of others' texts are shown, not sent; line ends stay where they may."""
    assert output.plain("a\x1b[2J\n\u202eb é") == "a\\x1b[2J\\n\\u202eb é"
    assert output.plain("a\tb\n\x07", lines=True) == "a\tb\n\\x07"
    console = output.Console(as_json=False)
    console.say("\x1b[31mred")
    console.error("\x9b2J")
    assert capsys.readouterr() == ("\\x1b[31mred\n", "mlproducer: \\x9b2J\n")


# --- advice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AuthenticationError("x", kind="authentication", reply_code=403), "user and password"),
        (AuthenticationError("x", kind="authentication", reply_code=530), "add_vhost"),
        (NotConnectedError("x", kind="refused"), "nothing listens"),
        (NotConnectedError("x", kind="dns"), "host name"),
        (NotConnectedError("x", kind="tls"), "RABBITMQ_SSL_CACERT"),
        (NotConnectedError("x", kind="tls"), "RABBITMQ_SSL_CERTFILE"),
        (NotConnectedError("x", kind="timeout"), "firewall"),
        (NotConnectedError("something new"), "broker's log"),
        (NotConnectedError("x", kind="authentication", reply_code=403), "user and password"),
        (NotConnectedError("x", kind="closed_by_broker", reply_code=404), "virtual host"),
        (BrokerRejectedError("x", reply_code=403), "set_permissions"),
        (BrokerRejectedError("x", reply_code=404), "ML_EXCHANGE"),
        (BrokerRejectedError("x", reply_code=999), "broker's log"),
        (ConfirmTimeoutError("x"), "overloaded or hung"),
        (NackError("x"), "broker's log"),
    ],
)
def test_advice(error: PublishError, words: str) -> None:
    """Each failure has something that can be done about it."""
    assert words in advise(error)
    assert "alarms" in advise(error, blocked=True)


# --- the demo's texts and sums ---------------------------------------------------------------


def test_texts_are_licences_or_documentation(tmp_path: Path) -> None:
    """Without licences there is Python's documentation; without either, an error names both."""
    licences = tmp_path / "licences"
    licences.mkdir()
    (licences / "GPL").write_text("short\n\n" + "free " * 100 + "\n\n" + "long " * 10_000)
    found = texts(licences)
    assert {text.title for text in found} == {"GPL"}
    assert found[0].text.startswith("short\n\nfree")
    library = tmp_path / "library"
    library.mkdir()
    for name in ("argparse", "keyword", "textwrap"):
        shutil.copy(STANDARD_LIBRARY / f"{name}.py", library)
    documentation = texts(tmp_path / "none", library)
    assert "argparse" in {text.title for text in documentation}
    assert inspect.signature(texts).parameters["library"].default == STANDARD_LIBRARY
    for text in (*found, *documentation):
        assert MIN_CHARACTERS <= len(text.text) <= MAX_CHARACTERS
    with pytest.raises(FileNotFoundError, match="no texts"):
        texts(tmp_path / "none", tmp_path / "none")


@frozen
class _Run:
    id: str


def _receipt(message_id: str, *, deferred: bool = False) -> Receipt:
    return Receipt(message_id, 1, 0.1, reason=NackError("nacked") if deferred else None)


def _progress(messages: int, *receipts: Receipt, longest: float = 0.0) -> Progress:
    journal = Journal()
    for receipt in receipts:
        journal.note(receipt.message_id, receipt)
    journal.longest = longest
    return Progress(messages, journal)


def test_the_sums_agree() -> None:
    """Everything published and run is well; duplicates and others' runs are told apart."""
    progress = _progress(2, _receipt("a"), _receipt("b", deferred=True), longest=2.0)
    assert progress.look([_Run("a")]) == (2, 2, 1)
    assert not progress.complete
    progress.look([_Run("a"), _Run("b"), _Run("b"), _Run("other")])
    assert progress.complete
    result = progress.figures()
    assert (result.confirmed, result.deferred_then_confirmed, result.lost) == (1, 1, 0)
    assert (result.run, result.duplicates, result.foreign) == (2, 1, 1)
    assert result.longest_publish == 2.0
    assert result.well


def test_what_was_not_run_is_lost() -> None:
    """A confirmed message that no worker ran is lost, and nothing is well."""
    progress = _progress(2, _receipt("a"), _receipt("b"))
    progress.look([_Run("a"), _Run("a"), _Run("a")])
    assert not progress.complete
    result = progress.figures()
    assert (result.run, result.duplicates, result.lost) == (1, 2, 1)
    assert not result.well
    assert ("lost", "1") in result.rows()


def test_what_was_not_published_is_not_well() -> None:
    """A run that ended early does not pass for a good one."""
    progress = _progress(2, _receipt("a"))
    progress.look([_Run("a")])
    assert not progress.figures().well


# --- reliability -----------------------------------------------------------------------------


def test_an_account_has_what_is_lost_leaked_and_double() -> None:
    """What was taken over must be found, what was given back as not sent must not."""
    journal = Journal()
    for name in ("there", "twice", "dead", "lost"):
        journal.note(name, _receipt(name))
    journal.note("leaked", NotConnectedError("x"))
    journal.note("doubtful", NackError("x"))
    journal.note("unsent", NotConnectedError("x"))
    found = Counter({"there": 1, "twice": 2, "leaked": 1, "doubtful": 1})
    figures = Figures.of(journal, found, Counter(["dead"]))
    assert (figures.taken_over, figures.delivered, figures.dead_lettered) == (4, 3, 1)
    assert (figures.given_back, figures.leaked, figures.duplicates) == (3, 1, 1)
    assert figures.rate == 0.75
    assert not figures.well
    assert (figures + figures).duplicates == 2


def test_the_totals_name_the_rate_and_what_was_skipped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """People read the delivery rate, and that a scenario without a step that ran is skipped."""
    journal = Journal()
    for name in "abc":
        journal.note(name, _receipt(name))
    journal.longest = 1.5
    figures = Figures.of(journal, Counter("abb"), Counter())
    first, second = list(SCENARIOS.values())[:2]
    failed, skipped = Step("d", "e", "s", ok=False), Step("d", "e", "s", ok=None)
    reports = [Report(first, (failed, skipped), figures), Report(second, (skipped,), Figures())]
    show_totals(reports, figures, 2.0, output.Console(as_json=False))
    rows = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name: value.strip() for name, value in rows.items()}
    assert told["delivery rate over the faults"] == "66.67%"
    assert told["longest publish()"] == "1.500 s"
    assert told["steps"] == "0 ok, 1 failed, 2 skipped"
    assert (told[first.name], told[second.name]) == ("FAILED", "skipped")
