"""Serialises the calls to an oracle."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from abe_contract_tests.blocking import trusted
from abe_contract_tests.harness import Counts, Oracle

_T = TypeVar("_T")


class OneByOne:
    """Wraps an oracle so that tasks may call it concurrently: its calls are serialised."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle: Final = oracle
        self._turn = asyncio.Lock()

    async def inject(self, group: str, body: bytes, *, key: str = "injected") -> None:
        """As in `Oracle`."""
        await self._ask(lambda: self._oracle.inject(group, body, key=key))

    async def inject_version(self, group: str, body: bytes) -> None:
        """As in `Oracle`."""
        await self._ask(lambda: self._oracle.inject_version(group, body))

    async def counts(self, group: str) -> Counts:
        """As in `Oracle`."""
        return await self._ask(lambda: self._oracle.counts(group))

    async def consumers(self, group: str) -> int | None:
        """As in `Oracle`."""
        return await self._ask(lambda: self._oracle.consumers(group))

    async def connections(self) -> int:
        """As in `Oracle`."""
        return await self._ask(lambda: self._oracle.connections())

    async def aclose(self) -> None:
        """As in `Oracle`."""
        await self._ask(lambda: self._oracle.aclose())

    async def _ask(self, question: Callable[[], Awaitable[_T]]) -> _T:
        async with self._turn:
            with trusted():
                return await question()
