"""Trace context: carried where it is well formed, dropped where it is not, never fatal."""

from __future__ import annotations

from typing import Any

import pytest

from mlproducer.tracing import current, trace_context

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "rojo=00f067aa0ba902b7,congo@vendor=t61rcWkgMzE"


def seen(*arguments: Any) -> dict[str, str]:
    """Return the headers that a message published inside would carry."""
    with trace_context(*arguments):
        return dict(current())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((PARENT,), {"traceparent": PARENT}),
        ((PARENT, STATE), {"traceparent": PARENT, "tracestate": STATE}),
        ((PARENT, "a=1, \tb=2 ,"), {"traceparent": PARENT, "tracestate": "a=1, \tb=2 ,"}),
        ((PARENT, None), {"traceparent": PARENT}),
    ],
)
def test_carries_a_valid_context(arguments: tuple[Any, ...], expected: dict[str, str]) -> None:
    """Both headers are carried as they came; an empty tracestate is left out."""
    assert seen(*arguments) == expected


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        None,
        PARENT.encode(),
        PARENT + "\n",
        PARENT + "\r\nx: y",
        PARENT.upper(),
        PARENT.replace("00-", "01-", 1),
        PARENT + "-00",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "00-" + "a" * 100_000,
    ],
)
def test_drops_a_malformed_traceparent(traceparent: Any) -> None:
    """Fault 128: without a valid traceparent there is no context, nor that of an outer block."""
    with trace_context(PARENT, STATE):
        assert seen(traceparent, STATE) == {}


@pytest.mark.parametrize(
    "tracestate",
    [
        "a=1\r\nb=2",
        "a=1\n",
        "a=" + "1" * 257,
        ",".join(f"{key}=" + "1" * 200 for key in "abc"),
        ",".join(f"k{i}=1" for i in range(33)),
        "no member",
        "a=b=c",
        "a=\u00e9",
        ",",
        b"a=1",
    ],
)
def test_drops_a_malformed_tracestate(tracestate: Any) -> None:
    """Fault 128: a bad or oversize tracestate is left out, the traceparent stays."""
    assert seen(PARENT, tracestate) == {"traceparent": PARENT}


def test_ends_with_its_block() -> None:
    """The outer context is back after the inner block, also when that raised."""
    assert current() == {}
    with trace_context(PARENT):
        with pytest.raises(RuntimeError), trace_context(PARENT, STATE):
            raise RuntimeError
        assert current() == {"traceparent": PARENT}
    assert current() == {}
