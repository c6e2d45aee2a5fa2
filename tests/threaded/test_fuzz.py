"""Random input for each reader: a sample at each run, and a million by hand (`tests.fuzz`).

Runs on: the test's thread.
"""

from __future__ import annotations

import pytest

from mlproducer._engine.dead_letter_reader import stored_letter
from mlproducer.stores.postgres.rows import read_text
from mlproducer.stores.postgres.rows import text as postgres_text
from tests.fuzz import run
from tests.fuzzed import TARGETS
from tests.helpers import make_envelope

SEED = 20261130


@pytest.mark.parametrize("name", TARGETS)
def test_a_sample(name: str) -> None:
    """Each reader answers as it says, whatever it is given, and both takes and refuses (56)."""
    report = run(TARGETS[name](), 150, SEED)
    assert len(report.answers) > 1, report


def test_a_letter_whose_content_type_is_no_text() -> None:
    """Found so: the list of dead letters ended at one that anyone may have put there."""
    letter = stored_letter(make_envelope(properties=b"\x80\x00\x01\xff"))
    assert letter.content == "\\xff"
    assert letter.message is None
    assert "content_type" in letter.problem


@pytest.mark.parametrize("text", ["\\-", "\\", "\\x4", "\\101", "\\N{DIGIT ONE}"])
def test_a_row_with_escapes_that_are_not_ours(text: str) -> None:
    """Found so: Python only warns of some, and where warnings are errors it was no ValueError."""
    with pytest.raises(ValueError, match="escapes"):
        read_text(text)


@pytest.mark.parametrize("text", ["a\\b", "\0\n\r\t", "\x7f\xe9", "\u20ac\ud800", "\U0001f600\\U"])
def test_escapes_of_ours(text: str) -> None:
    """What is written comes back."""
    assert read_text(postgres_text(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_million(name: str) -> None:
    """The same a million times, in bounded memory."""
    run(TARGETS[name](), 1_000_000, SEED)
