"""Publishes, and ends without ``close()``: how much and how is said by the arguments.

Argument 1: ``publish`` or ``submit``; argument 2: how many; argument 3: how the script ends, after
``wait`` once it is told to go on, after ``tell`` once it has said so.
"""

from __future__ import annotations

import sys
import threading

from telling import message, tell, wait_for_go

from mlproducer import MLProducer

producer = MLProducer()


def hand_over(how: str, count: int) -> None:
    """Publish or submit this many."""
    for number in range(count):
        name = f"{how}-{number}"
        if how == "publish":
            producer.publish(message(name))
        else:
            producer.submit(message(name))


def end(how: str) -> None:
    """End as Python programs do."""
    if how == "sys.exit":
        sys.exit(3)
    elif how == "raise":
        raise RuntimeError("unhandled")


def main() -> None:
    """Hand over, and end, perhaps in a thread that outlives this one."""
    how, count, ending = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if ending == "thread":
        producer.publish(message("first"))
        threading.Thread(target=hand_over, args=[how, count]).start()
        return
    if ending.startswith("wait"):
        producer.publish(message("first"))
        tell(connected=True)
        wait_for_go()
    hand_over(how, count)
    if ending.startswith("tell"):
        tell(ends=True)
    end(ending.split()[-1])


if __name__ == "__main__":
    main()
