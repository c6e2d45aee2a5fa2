"""Real programs for tests, ours and yours: a private broker, a cluster, a worker, certificates.

Owns the public names of this package. pytest is not needed here; the fixtures that need it are in
`mlproducer.testing.plugin`.

Runs on: any thread.
"""

from __future__ import annotations

from mlproducer.testing.certificates import Certificate, CertificateError, Certificates, ServerTLS
from mlproducer.testing.cluster import RabbitMQCluster
from mlproducer.testing.node import RabbitMQError, RabbitMQNode, RabbitMQNotInstalled
from mlproducer.testing.worker import CeleryNotInstalled, CeleryWorker, TaskRun, WorkerError

__all__ = [
    "CeleryNotInstalled",
    "CeleryWorker",
    "Certificate",
    "CertificateError",
    "Certificates",
    "RabbitMQCluster",
    "RabbitMQError",
    "RabbitMQNode",
    "RabbitMQNotInstalled",
    "ServerTLS",
    "TaskRun",
    "WorkerError",
]
