"""Abstract Backend: application code depends on typed protocols; the broker is chosen when it is deployed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from abe.backends import get_message_queue_backend
    from abe.backends.message_queue.base.backoff import ConstantBackoff, ExponentialBackoff
    from abe.backends.message_queue.base.consumer import EventConsumer
    from abe.backends.message_queue.base.message import Message
    from abe.backends.message_queue.base.middleware import Middleware, Publication
    from abe.backends.message_queue.base.protocol import FullBackend, MessageQueueBackend
    from abe.backends.message_queue.consumer import AsyncLoopConsumer
    from abe.backends.message_queue.loader import load_backend
    from abe.backends.message_queue.retry import Reject, Retry, RetryPolicy
    from abe.errors import (
        AbeError,
        BackendConnectionError,
        BackendNotFoundError,
        BackpressureError,
        ConfigurationError,
        LeaseLostError,
        PayloadError,
        PublishRejectedError,
        PublishUnknownError,
    )

    __version__: str

__all__ = [
    "AbeError",
    "AsyncLoopConsumer",
    "BackendConnectionError",
    "BackendNotFoundError",
    "BackpressureError",
    "ConfigurationError",
    "ConstantBackoff",
    "EventConsumer",
    "ExponentialBackoff",
    "FullBackend",
    "LeaseLostError",
    "Message",
    "MessageQueueBackend",
    "Middleware",
    "PayloadError",
    "Publication",
    "PublishRejectedError",
    "PublishUnknownError",
    "Reject",
    "Retry",
    "RetryPolicy",
    "__version__",
    "get_message_queue_backend",
    "load_backend",
]

# A name is imported when it is first accessed: for our plugin every pytest run imports this package, and a program that
# uses only `abe.types` or `abe.errors` need not import the consumer.
_BASE: Final = "abe.backends.message_queue.base"
_HOMES: Final = {
    "AsyncLoopConsumer": "abe.backends.message_queue.consumer",
    "ConstantBackoff": _BASE,
    "EventConsumer": _BASE,
    "ExponentialBackoff": _BASE,
    "Message": _BASE,
    "FullBackend": _BASE,
    "MessageQueueBackend": _BASE,
    "Middleware": _BASE,
    "Publication": _BASE,
    "Reject": "abe.backends.message_queue.retry",
    "Retry": "abe.backends.message_queue.retry",
    "RetryPolicy": "abe.backends.message_queue.retry",
    "get_message_queue_backend": "abe.backends",
    "load_backend": "abe.backends.message_queue.loader",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Not at the top: reading metadata needs the parser of e-mail headers.
        from importlib.metadata import version

        return version("abe-core")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "abe.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
