"""An oracle answers one question at a time, however many tasks ask."""

import asyncio
from typing import Any

from abe_contract_tests.harness import Counts
from abe_contract_tests.oracles import OneByOne


class Exclusive:
    """An oracle that cannot be asked twice at once."""

    def __init__(self) -> None:
        self.answering = False
        self.go_on = asyncio.Event()
        self.asked: list[str] = []

    async def counts(self, group: str) -> Counts:
        assert not self.answering
        self.answering = True
        self.asked.append(group)
        try:
            await self.go_on.wait()
        finally:
            self.answering = False
        return Counts(waiting=len(self.asked), in_flight=0, delayed=0, dead=0)


async def test_tasks_that_ask_at_once_are_answered_one_after_the_other() -> None:
    inner: Any = Exclusive()
    oracle = OneByOne(inner)
    asking = [asyncio.create_task(oracle.counts(group)) for group in "abc"]
    await asyncio.sleep(0)
    inner.go_on.set()
    assert [counts.waiting for counts in await asyncio.gather(*asking)] == [1, 2, 3]
    assert inner.asked == ["a", "b", "c"]


async def test_a_question_given_up_while_it_waits_is_never_asked() -> None:
    inner: Any = Exclusive()
    oracle = OneByOne(inner)
    first, second, third = (asyncio.create_task(oracle.counts(group)) for group in "abc")
    await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    await asyncio.wait([first, second])
    inner.go_on.set()
    assert (await third).waiting == 2
    assert inner.asked == ["a", "c"]
