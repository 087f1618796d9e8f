"""What aiormq and pamqp log of our connections: we say it ourselves, in our own words, without URLs and tracebacks.

A context variable tells our connections from those that the application makes with aiormq itself: theirs are logged as ever.
"""

import logging
from contextvars import ContextVar
from typing import Final

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

_log: Final = logging.getLogger("abe.rabbitmq")


def install() -> None:
    """Have it told at DEBUG, without its arguments. May be called again and again."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_filter)


def _filter(record: logging.LogRecord) -> bool:
    if not OURS.get() or record.levelno < logging.WARNING:
        return True
    _log.debug("%s: %s", record.name, str(record.msg).replace("%", ""))
    return False
