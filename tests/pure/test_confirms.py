"""Delivery tags against the simplest model of them: a dict of what is open."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlproducer._core.delivery import Delivery
from mlproducer._core.send_queue import Confirms
from mlproducer._engine.dead_letter_channel import Tags
from tests.helpers import make_delivery


class ConfirmsMachine(RuleBasedStateMachine):
    """Any order of registrations and acks, also of those that no honest broker would send."""

    def __init__(self) -> None:
        super().__init__()
        self.confirms = Confirms()
        self.open: dict[int, Delivery] = {}
        self.apart: set[int] = set()
        self.last = 0

    @rule()
    def register(self) -> None:
        """I7: tags count 1, 2, 3 ..."""
        delivery = make_delivery()
        self.last += 1
        assert self.confirms.register(delivery) == self.last
        self.open[self.last] = delivery

    @rule()
    def register_apart(self) -> None:
        """A confirm of several does not speak of what went over another channel."""
        self.register()
        self.confirms.set_apart([self.last])
        self.apart.add(self.last)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), multiple=st.booleans())
    def settle_open(self, data: st.DataObject, multiple: bool) -> None:
        """I8: one, or all up to it, oldest first."""
        tag = data.draw(st.sampled_from(sorted(self.open)))
        self._settle(tag, multiple=multiple)

    @rule(multiple=st.booleans(), offset=st.integers(0, 5))
    def settle_any(self, multiple: bool, offset: int) -> None:
        """Tags near the last one, open or not, given out or not."""
        self._settle(max(1, self.last + 2 - offset), multiple=multiple)

    @rule()
    def settle_all(self) -> None:
        """AMQP 0-9-1, basic.ack: tag 0 with multiple is everything outstanding."""
        here = [tag for tag in self.open if tag not in self.apart]
        expected = [self.open.pop(tag) for tag in here]
        assert self.confirms.settle(0, multiple=True) == expected

    @rule()
    def settle_zero(self) -> None:
        """Tag 0 without multiple names nothing."""
        assert self.confirms.settle(0, multiple=False) == []

    @rule(beyond=st.integers(1, 2**40), multiple=st.booleans())
    def settle_the_future(self, beyond: int, multiple: bool) -> None:
        """I9: what was never sent settles nothing."""
        assert self.confirms.settle(self.last + beyond, multiple=multiple) == []

    @rule()
    def abandon(self) -> None:
        """The channel is gone: everything comes back in order, and tags begin at 1 again."""
        assert self.confirms.lose_all() == list(self.open.values())
        assert self.confirms.lose_all() == []
        self.open.clear()
        self.apart.clear()
        self.last = 0

    def _settle(self, tag: int, *, multiple: bool) -> None:
        known = tag <= self.last
        tags = [t for t in self.open if t == tag and not multiple]
        if multiple and known:
            tags = [t for t in self.open if t <= tag and t not in self.apart]
        expected = [self.open.pop(each) for each in tags]
        assert self.confirms.settle(tag, multiple=multiple) == expected
        if not multiple or tag not in self.apart:
            assert self.confirms.settle(tag, multiple=False) == []  # never twice

    @invariant()
    def agrees(self) -> None:
        """What is open is open, what is settled is unknown."""
        assert len(self.confirms) == len(self.open)
        assert self.confirms.oldest() is next(iter(self.open.values()), None)
        for tag in range(self.last + 2):
            assert self.confirms.find(tag) is self.open.get(tag)


TestConfirms = ConfirmsMachine.TestCase
TestConfirms.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


def test_tags_apart_end_with_their_channel() -> None:
    """A tag of the next channel that has the same number is not set apart."""
    confirms = Confirms()
    confirms.set_apart([confirms.register(make_delivery())])
    confirms.lose_all()
    delivery = make_delivery()
    confirms.register(delivery)
    assert confirms.settle(0, multiple=True) == [delivery]


@given(st.lists(st.booleans(), max_size=60))
def test_tags_of_two_channels(elsewhere: list[bool]) -> None:
    """The broker counts what is on its channel, the sender what is on both."""
    tags, here = Tags(), []
    for tag, skipped in enumerate(elsewhere, start=1):
        if skipped:
            tags.skip(tag)
        else:
            here.append(tag)
        assert [tags.sender(n) for n in range(1, len(here) + 1)] == here
    assert tags.sender(0) == 0
