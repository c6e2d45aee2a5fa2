"""Parts for tests: a producer without a broker, private servers, a worker, a proxy.

Owns the public names of this package. pytest is not needed here; the fixtures that need it are in
`mlproducer.testing.plugin`.

Runs on: any thread.
"""

from __future__ import annotations

from mlproducer.testing.certificates import Certificate, CertificateError, Certificates, ServerTLS
from mlproducer.testing.cluster import RabbitMQCluster
from mlproducer.testing.fake_broker import Behaviour, FakeBroker
from mlproducer.testing.node import RabbitMQError, RabbitMQNode, RabbitMQNotInstalled
from mlproducer.testing.postgresql_server import (
    PostgreSQLError,
    PostgreSQLNotInstalled,
    PostgreSQLServer,
)
from mlproducer.testing.proxy import Proxy
from mlproducer.testing.recording import RecordingProducer
from mlproducer.testing.redis_server import RedisError, RedisNotInstalled, RedisServer
from mlproducer.testing.worker import CeleryNotInstalled, CeleryWorker, TaskRun, WorkerError

__all__ = [
    "Behaviour",
    "CeleryNotInstalled",
    "CeleryWorker",
    "Certificate",
    "CertificateError",
    "Certificates",
    "FakeBroker",
    "PostgreSQLError",
    "PostgreSQLNotInstalled",
    "PostgreSQLServer",
    "Proxy",
    "RabbitMQCluster",
    "RabbitMQError",
    "RabbitMQNode",
    "RabbitMQNotInstalled",
    "RecordingProducer",
    "RedisError",
    "RedisNotInstalled",
    "RedisServer",
    "ServerTLS",
    "TaskRun",
    "WorkerError",
]
