"""What aiormq and pamqp log of our connections: we say it ourselves, in our own words, without URLs and tracebacks.

A context variable tells our connections from those that the application makes with aiormq itself: theirs are logged as ever. What
`asyncio.run` says of aiormq's tasks when it ends them comes without a context: there, whose they were cannot be told, and nothing is lost
that anybody still waits for.
"""

import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Final, TypeVar

from aiormq.exceptions import AMQPError

OURS: Final[ContextVar[bool]] = ContextVar("ours", default=False)
"""Whether what runs here is work of one of our connections."""

_LOGGERS: Final = (
    "aiormq.connection.marshall",
    "aiormq.channel",
    "aiormq.connection",
    "pamqp.base",
    "pamqp.encode",
    "pamqp.frame",
)

_SHUTDOWN: Final = "unhandled exception during asyncio.run() shutdown"
"""How `asyncio.runners` begins what it says of a task that ended with an error although it was cancelled."""

_log: Final = logging.getLogger("abe.rabbitmq")

_T = TypeVar("_T")


async def quietly(work: Callable[[], Awaitable[_T]]) -> _T:
    """Do something in a context that tells that it is ours, and so are the tasks that it begins. Needs a task of its own."""
    OURS.set(True)
    return await work()


def install() -> None:
    """Have it told at DEBUG, without its arguments. May be called again and again."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_filter)
    logging.getLogger("asyncio").addFilter(_filter_shutdown)


def _filter(record: logging.LogRecord) -> bool:
    if not OURS.get() or record.levelno < logging.WARNING:
        return True
    _log.debug("%s: %s", record.name, str(record.msg).replace("%", ""))
    return False


def _filter_shutdown(record: logging.LogRecord) -> bool:
    """Drop the tracebacks of requests that `asyncio.run` ended on their way: to aiormq a cancelled request is a closed channel."""
    ended_by = record.exc_info[1] if record.exc_info else None
    if not isinstance(ended_by, AMQPError) or not str(record.msg).startswith(_SHUTDOWN):
        return True
    _log.debug("a request was on its way when the event loop ended: %s", type(ended_by).__name__)
    return False
