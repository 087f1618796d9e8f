"""Silences what aiormq and pamqp log of our connections: the provider logs it itself, without URLs and tracebacks.

A context variable tells our connections from those that the application opens with aiormq itself, whose records are left alone. Records
of `asyncio.run` about aiormq's tasks that it cancelled have no context: they are silenced whosever connection it was.
"""

import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Final, TypeVar

from aiormq.exceptions import AMQPError

from abe.backends.message_queue.base.log import Log

OURS: Final[ContextVar[bool]] = ContextVar("ours", default=False)
"""Whether the current task works for one of our connections."""

_LOGGERS: Final = (
    "aiormq.connection.marshall",
    "aiormq.channel",
    "aiormq.connection",
    "pamqp.base",
    "pamqp.encode",
    "pamqp.frame",
)

_SHUTDOWN: Final = "unhandled exception during asyncio.run() shutdown"
"""The beginning of the message of `asyncio.runners` about a cancelled task that raised."""

_log: Final = Log("abe.rabbitmq")

_T = TypeVar("_T")


async def quietly(work: Callable[[], Awaitable[_T]]) -> _T:
    """Run work in a context that is marked as ours, for the tasks that it starts too. Needs a task of its own."""
    OURS.set(True)
    return await work()


def install() -> None:
    """Install the filters: records of our connections become DEBUG records without arguments. Idempotent."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_filter)
    logging.getLogger("asyncio").addFilter(_filter_shutdown)


def _filter(record: logging.LogRecord) -> bool:
    if not OURS.get() or record.levelno < logging.WARNING:
        return True
    _log.debug("%s: %s", record.name, str(record.msg).replace("%", ""))
    return False


def _filter_shutdown(record: logging.LogRecord) -> bool:
    """Drop the tracebacks of requests that `asyncio.run` cancelled: aiormq turns that into an error of a closed channel."""
    ended_by = record.exc_info[1] if record.exc_info else None
    if not isinstance(ended_by, AMQPError) or not str(record.msg).startswith(_SHUTDOWN):
        return True
    _log.debug("a request was in progress when the event loop ended: %s", type(ended_by).__name__)
    return False
