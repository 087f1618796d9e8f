"""The suite's parts: workers, the account of messages, loops that stand still."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import PublishRejectedError, PublishUnknownError
from abe_contract_tests import bounds
from abe_contract_tests.accounting import Accounting
from abe_contract_tests.stalls import LoopStalledError, watching
from abe_contract_tests.worker import ProcessWorker, ThreadWorker, Worker, WorkerFailed

ENVIRONMENT = {"QUEUE_NAMESPACE": "workers"}


async def echo(backend: MemoryBackend, report: Callable[[Any], None], receive: Any) -> None:
    try:
        while True:
            value = await receive()
            if value == "end":
                return
            if value == "fail":
                raise ValueError("as told")
            report(value)
    finally:
        report("cleaned up")


async def start(kind: type, function: Any = echo) -> Worker:
    if kind is ThreadWorker:
        return ThreadWorker(MemoryBackend, ENVIRONMENT, function, {})
    return await ProcessWorker.start(MemoryBackend, ENVIRONMENT, function, {})


@pytest.fixture(params=[ThreadWorker, ProcessWorker], ids=["thread", "process"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    # The worker's process imports the function by its module's name.
    monkeypatch.syspath_prepend(str(request.path.parent))
    monkeypatch.setattr(echo, "__module__", request.path.stem)
    kind: type = request.param
    return kind


async def test_a_worker_answers_and_ends(kind: type) -> None:
    async with bounds.within(10):
        worker = await start(kind)
        await worker.send({"n": 1})
        assert await worker.next_report() == {"n": 1}
        await worker.send("end")
        assert await worker.next_report() == "cleaned up"
        await worker.finished()
        await worker.kill()


async def test_a_worker_s_failure_reaches_the_test(kind: type) -> None:
    async with bounds.within(10):
        worker = await start(kind)
        await worker.send("fail")
        with pytest.raises(WorkerFailed, match="as told"):
            while True:
                assert await worker.next_report() == "cleaned up"
        await worker.kill()


async def test_a_killed_worker_cleans_nothing_up(kind: type) -> None:
    async with bounds.within(10):
        worker = await start(kind)
        await worker.send(1)
        await worker.next_report()
        await worker.kill()
        await worker.kill()
        with pytest.raises(WorkerFailed, match="without another report"):
            await worker.next_report()


async def test_a_paused_worker_stands_still_until_it_is_resumed(kind: type) -> None:
    async with bounds.within(10):
        worker = await start(kind)
        await worker.send("before")
        await worker.next_report()
        await worker.pause()
        await worker.send("paused")
        report = asyncio.ensure_future(worker.next_report())
        done, _ = await asyncio.wait([report], timeout=0.2)
        assert not done
        await worker.resume()
        assert await report == "paused"
        await worker.pause()
        await worker.kill()


class Failing:
    capabilities = None

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)

    async def publish(self, key: str, payload: dict[str, Any], **options: Any) -> None:
        error = self.errors.pop(0)
        if error is not None:
            raise error


async def test_the_account_goes_by_the_type_of_the_error() -> None:
    accounting = Accounting()
    backend: Any = Failing(None, PublishRejectedError("no"), PublishUnknownError("perhaps"))
    outcomes = [await accounting.publish(backend, "k", {}, id=id) for id in ("a", "b", "c")]
    assert outcomes == ["ok", "rejected", "unknown"]
    with pytest.raises(AssertionError, match="1 of 1 published messages lost: a"):
        accounting.check()
    accounting.delivered("a")
    accounting.check()
    accounting.delivered("c")
    accounting.check()
    accounting.delivered("c")
    with pytest.raises(AssertionError, match="delivered twice or more: c"):
        accounting.check()
    accounting.check(duplicates_allowed=True)
    accounting.delivered("b")
    with pytest.raises(AssertionError, match="rejected by publish, yet delivered: b"):
        accounting.check(duplicates_allowed=True)


async def test_a_stranger_in_the_account_is_unexpected() -> None:
    accounting = Accounting()
    accounting.delivered({"never": "published"})
    with pytest.raises(AssertionError, match="never published"):
        accounting.check()


async def test_what_keeps_the_loop_busy_is_ended() -> None:
    with watching(0.2):
        await asyncio.sleep(0.01)
        with pytest.raises(LoopStalledError, match=r"did not turn for [\d.]+ s"):
            while True:
                time.sleep(0.01)  # noqa: ASYNC251 - that is the fault


async def test_a_loop_that_turns_is_let_alone() -> None:
    with watching(0.1):
        await asyncio.sleep(0.3)
