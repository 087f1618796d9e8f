"""The library's loggers."""

import logging
from contextlib import suppress
from typing import Any


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger by which nothing fails: a filter of the application that raises concerns no message, and no loop around it.

    Args:
        name: The logger's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), None)

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log, as the caller's; an exception is dropped with the record."""
        with suppress(Exception):
            self.logger.log(level, msg, *args, **kwargs, stacklevel=2)
