"""Forks under gevent, where the parent's greenlets go on in the child.

Runs on: a process of its own.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402

import gevent  # noqa: E402

from mlproducer import Message, MLProducer, Settings  # noqa: E402

SETTINGS = Settings.from_env()


def message(name: str) -> Message:
    """A message to the queue of the embeddings."""
    return Message(body=b"x", routing_key="ml.embed", message_id=name)


def tell(**report: object) -> None:
    """Report."""
    print(json.dumps(report), flush=True)


def wait_for_go() -> None:
    """Wait for a line, and let greenlets run meanwhile."""
    gevent.get_hub().threadpool.apply(os.read, (0, 1))


def main() -> None:
    """Fork with messages in flight; the child lives long enough to do harm."""
    producer = MLProducer(SETTINGS)
    producer.publish(message("first"))
    tell(connected=True)
    wait_for_go()
    futures = [producer.submit(message(f"pending-{n}")) for n in range(20)]
    gevent.sleep(0.2)
    child = os.fork()
    if child == 0:
        gevent.sleep(2.5)
        undecided = sum(not future.done() for future in futures)
        producer.close(1.0)
        os._exit(0 if undecided == len(futures) else 1)
    _, status = os.waitpid(child, 0)
    tell(code=os.waitstatus_to_exitcode(status))
    wait_for_go()
    tell(attempts=[future.result(30.0).attempts for future in futures], left=producer.flush(30.0))
    producer.close()


if __name__ == "__main__":
    main()
