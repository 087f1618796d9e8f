"""A batch of messages, on its way from its first message to the outcome of each."""

import asyncio
from collections.abc import Sequence
from typing import Final

from abe.backends.message_queue.base.transport import Envelope, Outcomes
from abe.errors import AbeError, BackendConnectionError, PublishUnknownError

AGAIN: Final = (BackendConnectionError, PublishUnknownError)
"""Outcomes that are not final: the message is retried, with the same id."""


class Batch:
    """Messages that are sent together, with one deadline. A message with less time than that has a timer of its own."""

    # Attributes of the class until they change, as each lone message has a batch.
    size = 0
    sent = False
    sending = False
    doubtful: frozenset[int] = frozenset()  # messages that an earlier try may have published
    error: AbeError | None = None
    timer: asyncio.TimerHandle | None = None  # where its deadline may come before its turn

    def __init__(self, envelopes: list[Envelope], deadline: float, timeout: float) -> None:
        self.envelopes = envelopes
        self.futures: list[asyncio.Future[AbeError | None]] = []
        self.deadline = deadline
        self.timeout = timeout

    def end_timer(self) -> None:
        """Cancel the timer, which would keep the messages in memory until the deadline."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def tell(self, pending: Sequence[int], results: Outcomes) -> None:
        """Set the results of messages whose outcome is final: they do not wait for the retries of others."""
        if not self.futures:
            return  # a lone publish has no future
        for index, result in zip(pending, results, strict=True):
            final = result is None or not (isinstance(result, AGAIN) or index in self.doubtful)
            if final and not self.futures[index].done():
                self.futures[index].set_result(result)
