"""Under the patches of gevent and eventlet a publish works, and lets other greenlets run (91)."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from mlproducer.testing import Proxy
from mlproducer.testing.audit import drain
from mlproducer.testing.plugin import VirtualHost
from tests.broker.scripts import Program
from tests.faults.test_outage import SCRIPTS
from tests.faults.traffic import FIGURES

pytestmark = pytest.mark.broker


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="needs gevent")
def test_greenlets_go_on_during_a_publish(rabbitmq_vhost: VirtualHost, proxy: Proxy) -> None:
    """Fifty greenlets publish; while one waits for a stalled broker the others have their turns."""
    url = proxy.url(rabbitmq_vhost.url)
    with Program([sys.executable, str(SCRIPTS / "green.py")], url) as program:
        assert program.next()["outcomes"] == ["CONFIRMED"] * 50
        proxy.stall()
        program.go()
        late = program.next()
        proxy.resume()
        program.go()
        assert program.next() == {"left": 0}
        ended = program.end()
    assert (ended.returncode, ended.stderr) == (0, "")
    FIGURES["gevent"] = (
        f"{late['ticks']} of {late['expected']:.0f} turns during a publish of {late['took']:.2f} s"
    )
    assert late["outcome"] == "DEFERRED"
    assert late["took"] >= 1.0
    assert late["own"] < 1.25
    assert late["ticks"] >= 0.7 * late["expected"]
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(50)} | {"late": 1}


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="needs gevent")
def test_fork_under_gevent(rabbitmq_vhost: VirtualHost, proxy: Proxy) -> None:
    """The parent's greenlets, which go on in the child, neither answer nor deliver there."""
    url = proxy.url(rabbitmq_vhost.url)
    with Program([sys.executable, str(SCRIPTS / "green_fork.py")], url) as program:
        assert program.next() == {"connected": True}
        proxy.stall("c2s")
        program.go()
        assert program.next() == {"code": 0}
        proxy.resume()
        program.go()
        assert program.next() == {"attempts": [1] * 20, "left": 0}
        ended = program.end()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert proxy.accepted == 1
    expected = {"first": 1} | {f"pending-{n}": 1 for n in range(20)}
    assert drain(rabbitmq_vhost.url) == expected


@pytest.mark.skipif(importlib.util.find_spec("eventlet") is None, reason="needs eventlet")
@pytest.mark.parametrize("order", ["early", "late"])
def test_eventlet(rabbitmq_vhost: VirtualHost, order: str) -> None:
    """Fifty green threads publish, whether eventlet patches before the import or after it."""
    argv = [sys.executable, str(SCRIPTS / "green_eventlet.py"), order]
    with Program(argv, rabbitmq_vhost.url) as program:
        report = program.next()
        ended = program.end()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert report["outcomes"] == ["CONFIRMED"] * 50
    assert report["ticks"] > 0
    assert report["left"] == 0
    assert drain(rabbitmq_vhost.url) == {f"m{n}": 1 for n in range(50)}
