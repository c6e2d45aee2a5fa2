"""The pages: they are well formed, lead somewhere, ship, and agree with the code's own lists.

Runs on: pytest's main thread.
"""

from __future__ import annotations

import configparser
import re
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import pytest
from attrs import fields
from docutils.core import publish_doctree

from mlproducer import Settings
from mlproducer.cli import COMMANDS
from mlproducer.monitoring import ALERTS_FILE, files
from mlproducer.observe import metric_families
from mlproducer.settings import TLSSettings
from tests.house.test_architecture import LAYERS
from tests.pages import ROOT, pages

README = ROOT / "README.rst"
TESTS = ROOT / "tests"
LONGEST_README = 300


def _first_cells(page: Path, after: str) -> list[str]:
    """Return the first cells of the first simple table after a heading."""
    text = page.read_text()
    rule = re.compile(r"^=+(?:  =+)+$", re.MULTILINE)
    top, head, end = list(rule.finditer(text, text.index(f"\n{after}\n")))[:3]
    assert top.group() == head.group()
    rows = text[head.end() : end.start()].splitlines()
    width = top.group().index(" ")
    return [row[:width].strip() for row in rows if row[:width].strip()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_well_formed(page: Path) -> None:
    """Docutils has nothing to report, and links to files lead to files."""
    levels = {"report_level": 2, "halt_level": 2}
    publish_doctree(page.read_text(), str(page), settings_overrides=levels)
    for target in re.findall(r"<([^<>`\s]+)>`_", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target).is_file(), f"{page}: {target} is not there"


def test_the_readme_is_short() -> None:
    """A newcomer reads it to its end; the rest has pages of its own."""
    assert len(README.read_text().splitlines()) <= LONGEST_README


def test_pages_of_the_package_ship_with_it() -> None:
    """A wheel has each page beside the code that it is about."""
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "setup.cfg")
    shipped = configuration["options.package_data"]["mlproducer"].replace(",", " ").split()
    for page in pages():
        inside = page.relative_to(ROOT)
        if inside.parts[0] == "mlproducer":
            name = inside.relative_to("mlproducer").as_posix()
            assert any(fnmatchcase(name, each) for each in shipped), f"{name} is not shipped"


def test_the_table_of_settings() -> None:
    """It has each variable once, and so each field."""
    rows = _first_cells(README, "Settings")
    variables = {name for row in rows for name in re.findall(r"``(\w+)``", row)}
    text = README.read_text()
    without = {"credentials", "tls", "topology"}
    names = {each.name for each in fields(Settings) if each.name not in without}
    found = {re.sub("^(RABBITMQ|ML)_", "", variable).lower() for variable in variables}
    assert names <= found
    for name in ("RABBITMQ_SSL_KEYFILE", "RABBITMQ_SSL_KEY_PASSWORD_FILE"):
        assert f"``{name}``" in text
    assert len(fields(TLSSettings)) == 8  # a new one has a row of its own
    assert len(rows) == len(set(rows))


def test_the_table_of_metrics() -> None:
    """It has each family, with its labels and type."""
    families = {
        each for each in vars(metric_families).values() if isinstance(each, metric_families.Family)
    }
    text = (ROOT / "mlproducer/observe/README.rst").read_text()
    for family in families:
        name = family.name.removeprefix(metric_families.PREFIX)
        labels = f"{{{', '.join(family.labels)}}}" if family.labels else ""
        assert re.search(
            rf"^``{re.escape(name + labels)}`` +{family.kind.value} ", text, re.MULTILINE
        ), name
    assert len(_first_cells(ROOT / "mlproducer/observe/README.rst", "Metrics")) == len(families)


def test_the_table_of_alerts() -> None:
    """It has each alert."""
    rows = _first_cells(ROOT / "mlproducer/observe/README.rst", "Dashboard and alerts")
    alerts = re.findall(r"- alert: (\w+)", files()[ALERTS_FILE])
    assert {row.strip("`") for row in rows} == set(alerts)


def test_the_list_of_commands() -> None:
    """It has each command."""
    text = (ROOT / "mlproducer/cli/README.rst").read_text()
    assert set(re.findall(r"^``([a-z-]+)", text, re.MULTILINE)) - {"mlproducer"} == set(COMMANDS)


def test_the_layers_of_the_readme() -> None:
    """They are those that imports are held to."""
    lines = re.findall(r"^    ([1-7])  ((?:\w+, )*\w+)", README.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in lines] == [7, 6, 5, 4, 3, 2, 1]
    for number, names in lines[:-1]:
        assert set(names.split(", ")) <= LAYERS[int(number) - 1]


def _cited(pattern: str) -> set[str]:
    """Return what tests cite by a number in a docstring, a comment or an assertion."""
    texts = (path.read_text() for path in TESTS.rglob("*.py") if path != Path(__file__))
    return set(chain.from_iterable(re.findall(pattern, text) for text in texts))


def test_faults_that_are_cited_are_listed() -> None:
    """The number of a fault in a test's docstring leads to a row of the list."""
    listed = set(re.findall(r"^(\d+) +\S", (TESTS / "README.rst").read_text(), re.MULTILINE))
    groups = _cited(r'\((\d{1,3}(?:, \d{1,3})*)\)[.:]?"""') | _cited(
        r"Faults? (\d{1,3}(?:(?:, | and | to )\d{1,3})*)"
    )
    numbers = set(chain.from_iterable(re.findall(r"\d+", group) for group in groups))
    assert len(numbers) > 40
    assert numbers - REPLY_CODES <= listed


REPLY_CODES = {"312", "320"}
"""Of AMQP's, which docstrings have in brackets too."""


def test_invariants_that_are_cited_are_listed() -> None:
    """The number of an invariant in a test leads to a row of the list."""
    listed = set(re.findall(r"^(I\d+) ", (TESTS / "README.rst").read_text(), re.MULTILINE))
    numbers = _cited(r"\b(I[1-9]\d?)\b")
    assert len(numbers) > 20
    assert numbers <= listed
