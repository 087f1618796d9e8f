"""Message ids: 64 random bits per process, then a counter. Random bits for each message would cost five times as much."""

import os
from collections.abc import Callable
from itertools import count
from typing import Final


class _Ids:
    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.prefix: str = os.urandom(8).hex()
        self.serial: Callable[[], int] = count().__next__


_ids: Final = _Ids()


def next_id() -> str:
    """Return a globally unique id."""
    return f"{_ids.prefix}{_ids.serial()}"
