"""The page for people in a real browser, beside a real broker: live, hostile, without scripts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlproducer import Message, MLProducer, SummarizationTask, wsgi
from mlproducer.errors import BrokerRejectedError, PublishError, RetriesExhaustedError
from mlproducer.testing.plugin import VirtualHost
from tests.broker.browser import Browser
from tests.broker.conftest import Connect
from tests.helpers import LIMIT

pytestmark = pytest.mark.broker

DESKTOP, PHONE = (1100, 900), (390, 844)

HOSTILE = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, shared by the tests of this file."""
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, at whose end its console must be empty: no error, nothing that the CSP stops."""
    chromium.look_like(*DESKTOP)
    chromium.javascript(allowed=True)
    chromium.complaints.clear()
    yield chromium
    assert chromium.complaints == []


class Steady:
    """A publisher who goes on, whatever happens, as long as the block lasts."""

    def __init__(self, producer: MLProducer, timeout: float = 0.2, *, wait: bool = True) -> None:
        self._producer = producer
        self._timeout = timeout
        self._wait = wait
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()

    def _publish(self) -> None:
        task = SummarizationTask("share", {"text": "A user's own words"})
        while not self._stop.wait(0.05):
            try:
                if self._wait:
                    self._producer.publish(task, timeout=self._timeout)
                else:
                    self._producer.submit(task)
            except PublishError:  # the breaker is open
                continue


def wait_for_samples(producer: MLProducer, number: int) -> None:
    """Wait until the retry thread has taken samples, without having one taken by looking."""
    tick, deadline = threading.Event(), time.monotonic() + 2 * LIMIT
    while len(producer._factory.recorder._samples) < number:
        assert time.monotonic() < deadline
        tick.wait(0.1)


def url(server: wsgi.Server) -> str:
    """Where the page is."""
    return f"http://127.0.0.1:{server.port}/"


@contextmanager
def served(producer: MLProducer, browser: Browser) -> Iterator[str]:
    """Serve the page, and leave it before its server ends."""
    with wsgi.serve(producer, 0) as server:
        yield url(server)
        browser.open("about:blank")


def says(element: str, words: str) -> str:
    """Return the expression that an element's text has these words in it."""
    return f"document.getElementById('{element}').textContent.includes('{words}')"


def rate(name: str) -> str:
    """Return the expression of a rate that is shown."""
    return f"parseFloat(document.getElementById('{name}').textContent)"


def check_look(browser: Browser, name: str, directory: Path) -> None:
    """Nothing sticks out on any screen; a picture of each is kept where PAGE_PICTURES says."""
    pictures = Path(os.environ.get("PAGE_PICTURES", directory))
    for size, dark in ((DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)):
        browser.look_like(*size, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(20, 23, 27)" if dark else "rgb(244, 245, 247)")
        picture = pictures / f"{name}-{size[0]}-{'dark' if dark else 'light'}.png"
        browser.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
    browser.look_like(*DESKTOP)


def test_freeze_and_recovery(
    connect: Connect, rabbitmq_vhost: VirtualHost, browser: Browser, tmp_path: Path
) -> None:
    """An open page follows a freeze of the broker, and its return, without being loaded again."""
    producer = connect(circuit_breaker_threshold=5)
    assert producer.wait_connected(LIMIT)
    with served(producer, browser) as page, Steady(producer):
        browser.open(page)
        browser.evaluate("window.loadedOnce = true")
        browser.wait_for(f"{says('headline', 'all is well')} && {rate('confirmed')} > 0")
        assert browser.text("#broker") == producer.status().broker
        assert (browser.text("#connection"), browser.text("#circuit")) == ("Connected", "Closed")
        check_look(browser, "well", tmp_path)
        with rabbitmq_vhost.node.frozen():
            browser.wait_for(says("headline", "The circuit breaker is open"))
            assert browser.evaluate("document.getElementById('page').dataset.level") == "bad"
            assert browser.text("#circuit") == "Open"
            assert int(browser.text("#in-flight")) >= 5
            assert "ConfirmTimeoutError" in browser.text("#errors")
            browser.wait_for(f"{rate('confirmed')} === 0 && {rate('published')} > 0")
            browser.wait_for(says("errors", "no answer to the health check"))
            assert browser.text("#connection") != "Connected"
            assert int(browser.text("#retry-queue")) >= 5
            check_look(browser, "frozen", tmp_path)
        well = (says("headline", "all is well"), says("circuit", "Closed"))
        flows = (f"{rate('confirmed')} > 0", f"{rate('retry-queue')} === 0")
        browser.wait_for(" && ".join((*well, *flows)))
        check_look(browser, "recovered", tmp_path)
        assert browser.evaluate("window.loadedOnce") is True
        heights = browser.evaluate(
            "[...document.getElementById('confirmed-line').points].map((point) => point.y)"
        )
        assert max(heights) == 120 > min(heights)
        assert "own words" not in browser.evaluate("document.documentElement.outerHTML")


def test_silent_broker(
    connect: Connect, rabbitmq_vhost: VirtualHost, browser: Browser, tmp_path: Path
) -> None:
    """Where no call waits for confirms, the page still says soon that none come."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with served(producer, browser) as page, Steady(producer, wait=False):
        browser.open(page)
        browser.wait_for(f"{says('headline', 'all is well')} && {rate('confirmed')} > 0")
        with rabbitmq_vhost.node.frozen():
            browser.wait_for(says("headline", "Connected, but the broker confirms nothing"))
            assert browser.evaluate("document.getElementById('page').dataset.level") == "warn"
            check_look(browser, "silent", tmp_path)
        browser.wait_for(says("headline", "all is well"))


def test_hostile_texts(connect: Connect, browser: Browser, tmp_path: Path) -> None:
    """Names that look like HTML are shown as they are, with scripts and without."""
    producer = connect(max_message_retries=0)
    with pytest.raises(BrokerRejectedError):
        producer.publish(Message(body=b"x", routing_key="k", exchange=HOSTILE))
    buried = producer.submit(Message(body=b"x", routing_key="nowhere", message_id=f"{HOSTILE}1"))
    with pytest.raises(RetriesExhaustedError):
        buried.result(LIMIT)
    with served(producer, browser) as page:
        for allowed in (False, True):
            browser.javascript(allowed=allowed)
            browser.open(page)
            if allowed:
                browser.wait_for("document.title.startsWith('mlproducer: ')")
            assert f"no exchange '{HOSTILE}'" in browser.text("#errors")
            assert f"{HOSTILE}1: the broker returned the message" in browser.text("#letters")
            assert "UnroutableError" in browser.text("#letters")
            assert browser.text("#dead-letters") == "1"
            assert browser.evaluate("document.images.length") == 0
            assert "owned" not in browser.evaluate("document.title")
        check_look(browser, "hostile", tmp_path)


def test_without_javascript(connect: Connect, browser: Browser, tmp_path: Path) -> None:
    """Without scripts the page is a snapshot, complete, with a chart of the time before."""
    producer = connect()
    browser.javascript(allowed=False)
    with served(producer, browser) as page, Steady(producer, LIMIT):
        assert producer.wait_connected(LIMIT)
        wait_for_samples(producer, 4)
        browser.open(page)
        assert browser.text("#headline") == "Connected, all is well"
        assert browser.text("#broker") == producer.status().broker
        assert "This is a snapshot" in browser.text("footer")
        assert browser.evaluate("document.getElementById('published-line').points.length") >= 5
        check_look(browser, "snapshot", tmp_path)


def test_process_ends(connect: Connect, browser: Browser, tmp_path: Path) -> None:
    """An open page says that what it shows is old, and keeps it."""
    producer = connect()
    assert producer.wait_connected(LIMIT)
    with wsgi.serve(producer, 0) as server:
        browser.open(url(server))
        browser.wait_for(says("headline", "all is well"))
        assert browser.text("#stale") == ""
    browser.wait_for("!document.getElementById('stale').hidden")
    assert browser.evaluate("document.getElementById('page').dataset.level") == "old"
    assert browser.evaluate("document.title") == "mlproducer: no answer"
    assert "The process does not answer" in browser.text("#stale")
    assert browser.text("#connection") == "Connected"
    check_look(browser, "stale", tmp_path)
    browser.open("about:blank")
    refused = [each for each in browser.complaints if "ERR_CONNECTION_REFUSED" in each]
    assert browser.complaints == refused
    browser.complaints.clear()
