"""An application with an outbox, killed again and again: a child does business until SIGKILL.

Arguments: the database's URL, the store's URL, how many children.
"""

import itertools
import os
import random
import select
import signal
import sys
import time

import sqlalchemy
from sqlalchemy.orm import Session

from mlproducer import CeleryTask, MLProducer, Settings, outbox

database, store, children = sys.argv[1], sys.argv[2], int(sys.argv[3])


def business(child: int, begun: int) -> None:
    """Insert rows, each with its task; every fourth transaction is rolled back."""
    engine = sqlalchemy.create_engine(database)
    producer = MLProducer(Settings(url="amqp://u:p@127.0.0.1:1/", store_url=store))
    row = sqlalchemy.text("INSERT INTO orders VALUES (:id)")
    for number in itertools.count():
        try:
            with Session(engine) as session:
                for place in "ab":
                    order = f"{child}-{number}{place}"
                    session.execute(row, {"id": order})
                    task = CeleryTask("t", routing_key="ml.embed", task_id=order)
                    outbox.add(session, task, producer=producer)
                if number % 4 == 3:
                    session.rollback()
                else:
                    session.commit()
                    os.write(begun, b"c")
        except sqlalchemy.exc.DBAPIError:
            time.sleep(0.01)  # PostgreSQL is away: what was not committed is not to arrive


sqlalchemy.create_engine(database)  # imports what the children need

for child in range(children):
    ear, bell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            business(child, bell)
        finally:
            os._exit(1)
    select.select([ear], [], [], 10.0)  # its first COMMIT
    time.sleep(random.uniform(0.0, 0.3))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ear)
    os.close(bell)
    print(child, flush=True)
