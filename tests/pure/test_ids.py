"""Ids of messages: random UUIDs, each a text of its own."""

from __future__ import annotations

import uuid

from mlproducer._wire.ids import new_id

MANY = 1_000
"""More than are made at a time."""


def test_ids_are_random_uuids() -> None:
    """Each reads as a UUID of version 4 in its canonical form, and none comes twice."""
    made = [new_id() for _ in range(MANY)]
    read = [uuid.UUID(each) for each in made]
    assert [str(each) for each in read] == made
    assert {(each.version, each.variant) for each in read} == {(4, uuid.RFC_4122)}
    assert len(set(made)) == MANY


def test_every_digit_varies() -> None:
    """But for the version, and for the variant, which has four values."""
    columns = zip(*(new_id() for _ in range(MANY)), strict=True)
    values = [len(set(column)) for column in columns]
    expected = [1 if digit in "-4" else 4 if digit == "v" else 16 for digit in FORM]
    assert values == expected


FORM = "xxxxxxxx-xxxx-4xxx-vxxx-xxxxxxxxxxxx"
