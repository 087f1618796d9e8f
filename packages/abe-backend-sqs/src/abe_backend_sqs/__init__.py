"""Amazon SQS as a backend: one queue for each group, fanned out by the publisher."""

from abe_backend_sqs._backend import SqsBackend
from abe_backend_sqs._settings import SqsSettings

__all__ = ["SqsBackend", "SqsSettings"]
