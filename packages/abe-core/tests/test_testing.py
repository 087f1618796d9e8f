"""What the library offers to the tests of applications."""

import asyncio
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import abe.testing
from abe import AsyncLoopConsumer, Middleware, Publication, get_message_queue_backend, load_backend
from abe.backends.message_queue.base import clock as clocks
from abe.backends.message_queue.base.middleware import PublishNext
from abe.backends.message_queue.loader import installed_backends
from abe.backends.message_queue.loader import load_backend as imported_elsewhere
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.codec import JSONCodec
from abe.errors import (
    BackendClosedError,
    ConfigurationError,
    InvalidNameError,
    PartialPublishError,
    PayloadError,
    PublishRejectedError,
    PublishUnknownError,
)
from abe.testing import ManualClock, RecordingBackend, fresh_memory_backend, registered_backend
from abe.testing.plugin import RegisterBackend
from abe_contract_tests import bounds

pytest_plugins = ["pytester"]


class TestManualClock:
    async def test_it_stands_still_until_it_is_moved(self, manual_clock: ManualClock) -> None:
        before = manual_clock.time()
        await asyncio.sleep(0.01)
        assert manual_clock.time() == before
        await manual_clock.advance(2.5)
        assert manual_clock.time() == before + 2.5

    async def test_what_is_due_happens_in_its_order_and_each_at_its_time(self, manual_clock: ManualClock) -> None:
        seen: list[tuple[str, float]] = []
        for name, when in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("late", 9.0)):
            manual_clock.call_at(when, lambda name=name: seen.append((name, manual_clock.time())))
        await manual_clock.advance(5)
        assert seen == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
        assert manual_clock.time() == 5

    async def test_what_is_due_at_one_time_happens_in_the_order_it_was_asked_for(
        self, manual_clock: ManualClock
    ) -> None:
        seen: list[int] = []
        for number in range(5):
            manual_clock.call_at(1.0, lambda number=number: seen.append(number))
        await manual_clock.advance(1)
        assert seen == [0, 1, 2, 3, 4]

    async def test_what_is_due_already_happens_soon(self, manual_clock: ManualClock) -> None:
        done = asyncio.Event()
        manual_clock.call_at(0.0, done.set)
        assert not done.is_set()
        async with bounds.within(1):
            await done.wait()

    async def test_a_cancelled_timer_does_not_fire(self, manual_clock: ManualClock) -> None:
        done = asyncio.Event()
        for when in (0.0, 1.0):
            manual_clock.call_at(when, done.set).cancel()
        await manual_clock.advance(2)
        assert not done.is_set()

    async def test_a_sleeper_that_sleeps_again_wakes_again_in_one_advance(self, manual_clock: ManualClock) -> None:
        woken: list[float] = []

        async def sleeper() -> None:
            for _ in range(3):
                await clocks.sleep(manual_clock, 10)
                woken.append(manual_clock.time())

        task = asyncio.create_task(sleeper())
        await manual_clock.advance(100)
        assert woken == [10, 20, 30]
        await task

    async def test_it_only_goes_forward(self, manual_clock: ManualClock) -> None:
        with pytest.raises(ValueError, match="forward"):
            await manual_clock.advance(-1)

    def test_a_timer_of_a_closed_event_loop_is_forgotten(self) -> None:
        clock, seen = ManualClock(), list[int]()

        async def ask() -> None:
            clock.call_at(1.0, lambda: seen.append(1))

        asyncio.run(ask())
        asyncio.run(clock.advance(5))
        assert seen == []
        assert clock.time() == 5


class TestMemoryBackend:
    async def test_it_is_empty_and_shares_with_no_other(self, memory_backend: MemoryBackend) -> None:
        other = fresh_memory_backend()
        await memory_backend.declare("billing")
        assert await other.groups() == {}
        await other.disconnect()

    async def test_it_is_on_the_manual_clock(self, memory_backend: MemoryBackend, manual_clock: ManualClock) -> None:
        await memory_backend.publish("order.created", {"order_id": 1}, delay=3600)
        async with memory_backend.consume() as messages:
            coming = asyncio.ensure_future(anext(messages))
            await manual_clock.advance(3599)
            assert not coming.done()
            await manual_clock.advance(1)
            assert await coming == {"order_id": 1}


class TestRecordingBackend:
    async def test_it_records_what_is_published_in_order(self, recording_backend: RecordingBackend) -> None:
        await recording_backend.publish("a", {"n": 1})
        await recording_backend.publish("b", {"n": 2}, headers={"h": "v"}, id="seven", delay=5, mandatory=True)
        first, second = recording_backend.published
        assert (first.key, first.payload, first.headers, first.delay, first.mandatory) == (
            "a",
            {"n": 1},
            None,
            0,
            False,
        )
        assert first.id
        assert second == Publication("b", {"n": 2}, {"h": "v"}, "seven", 5, True)

    async def test_to_whom_and_within_what_time_a_message_is_published_is_recorded(
        self, recording_backend: RecordingBackend
    ) -> None:
        await recording_backend.publish("a", {"n": 1}, group="billing", timeout=2.5)
        await recording_backend.publish_many([Publication("a", {"n": 2}, group="audit", timeout=1, mandatory=True)])
        assert [(item.group, item.timeout, item.mandatory) for item in recording_backend.published] == [
            ("billing", 2.5, False),
            ("audit", 1, True),
        ]
        with pytest.raises(ConfigurationError, match="timeout must be"):
            await recording_backend.publish("a", {}, timeout=-1)
        with pytest.raises(InvalidNameError):
            await recording_backend.publish("a", {}, group="no group")

    async def test_typed_objects_are_recorded_as_the_objects_that_a_consumer_would_get(
        self, recording_backend: RecordingBackend
    ) -> None:
        await recording_backend.publish("a", Parcel(NOW, Decimal("1.10")))
        await recording_backend.publish_many([("b", Parcel(NOW, Decimal(2)))])
        recording_backend.assert_published("a", {"at": "2026-02-28T00:00:00Z", "weight": "1.10"})
        recording_backend.assert_published("a", Parcel(NOW, Decimal("1.10")), times=1)
        with pytest.raises(AssertionError):
            recording_backend.assert_published("b", Parcel(NOW, Decimal("1.10")))
        with pytest.raises(PayloadError):
            await recording_backend.publish("a", {"at": NOW})

    async def test_it_has_the_codec_and_the_middleware_that_it_is_made_with(self) -> None:
        stamp = Stamp()
        backend = RecordingBackend.from_env(codec=JSONCodec(types=True), middleware=[stamp], environ={})
        async with backend:
            await backend.publish("a", {"at": NOW})
            await backend.publish("b", Parcel(NOW, Decimal(1)), timeout=2)
            await backend.publish_many([("c", Parcel(NOW, Decimal(1))), ("d", {"at": NOW})])
        assert [item.headers for item in backend.published] == [{"stamp": key} for key in "abcd"]
        assert backend.payloads("d") == [{"at": "2026-02-28T00:00:00Z"}]
        # Middleware sees what a consumer's would: an object, whatever it was made of.
        assert [type(item.payload) for item in stamp.seen] == [dict] * 4

    async def test_a_payload_is_recorded_as_it_was_at_the_call(self, recording_backend: RecordingBackend) -> None:
        payload = {"items": [1]}
        await recording_backend.publish("a", payload)
        payload["items"].append(2)
        assert recording_backend.published[0].payload == {"items": [1]}

    async def test_what_no_broker_would_carry_is_refused(self, recording_backend: RecordingBackend) -> None:
        with pytest.raises(PayloadError):
            await recording_backend.publish("a", {"when": {1, 2}})
        with pytest.raises(InvalidNameError):
            await recording_backend.publish("", {})
        with pytest.raises(InvalidNameError):
            await recording_backend.publish_many([("a", {}), ("", {})])
        assert recording_backend.published == []

    async def test_publish_many_is_recorded_message_by_message(self, recording_backend: RecordingBackend) -> None:
        await recording_backend.publish_many([("a", {"n": 1}), Publication("b", {"n": 2}, {"h": "v"})])
        assert [(item.key, item.payload) for item in recording_backend.published] == [("a", {"n": 1}), ("b", {"n": 2})]

    async def test_a_publish_can_be_made_to_fail(self, recording_backend: RecordingBackend) -> None:
        recording_backend.fail_next(PublishUnknownError("no confirm"), PublishRejectedError("full"))
        with pytest.raises(PublishUnknownError):
            await recording_backend.publish("a", {})
        with pytest.raises(PartialPublishError) as caught:
            await recording_backend.publish_many([("a", {"n": 1}), ("a", {"n": 2})])
        assert [index for index, _ in caught.value.failures] == [0]
        assert recording_backend.payloads() == [{"n": 2}]

    async def test_consumers_get_what_is_fed_and_not_what_is_published(
        self, recording_backend: RecordingBackend
    ) -> None:
        await recording_backend.publish("a", {"n": 1})
        await recording_backend.feed("b", {"n": 2}, headers={"h": "v"}, id="seven")
        async with bounds.within(5), recording_backend.consume(group="billing") as messages:
            message = await anext(messages)
        assert (message, message.key, message.headers, message.id) == ({"n": 2}, "b", {"h": "v"}, "seven")
        assert recording_backend.payloads() == [{"n": 1}]

    async def test_a_consumer_with_everything_runs_on_it(
        self, recording_backend: RecordingBackend, manual_clock: ManualClock
    ) -> None:
        attempts: list[int] = []

        async def handler(message: abe.Message) -> None:
            attempts.append(message.attempt)
            if message.attempt == 1:
                raise ValueError("once")
            await recording_backend.publish("order.billed", message)

        async with bounds.within(5), AsyncLoopConsumer(recording_backend, "billing", concurrency=5) as consumer:
            running = asyncio.create_task(consumer.run(handler))
            await recording_backend.feed("order.created", {"order_id": 1})
            await manual_clock.advance(1)
        await running
        assert attempts == [1, 2]
        recording_backend.assert_published("order.billed", {"order_id": 1}, times=1)

    async def test_assertions_say_what_there_is(self, recording_backend: RecordingBackend) -> None:
        with pytest.raises(
            AssertionError, match=r"'a' should have been published at least once, and was 0 times\.\nPublished: nothing"
        ):
            recording_backend.assert_published("a")
        await recording_backend.publish("order.created", {"n": 1}, headers={"h": "v", "i": "w"})
        found = recording_backend.assert_published("order.*", {"n": 1}, headers={"h": "v"}, times=1)
        assert found is recording_backend.published[0]
        with pytest.raises(AssertionError, match=r"2 times, and was 1 times(.|\n)*'order.created' \{'n': 1\} headers="):
            recording_backend.assert_published("order.created", times=2)
        with pytest.raises(AssertionError, match=r"\{'n': 2\} should have been"):
            recording_backend.assert_published("order.created", {"n": 2})
        with pytest.raises(AssertionError, match="headers="):
            recording_backend.assert_published("order.created", headers={"h": "other"})
        recording_backend.assert_not_published("order.deleted")
        with pytest.raises(AssertionError, match=r"nothing with the key 'order\.#' should"):
            recording_backend.assert_not_published("order.#")
        with pytest.raises(AssertionError, match="nothing should"):
            recording_backend.assert_not_published()
        for wrong in (
            recording_backend.payloads,
            recording_backend.assert_published,
            recording_backend.assert_not_published,
        ):
            with pytest.raises(InvalidNameError, match=r"order\.#"):
                wrong("order*")
        with pytest.raises(ValueError, match="assert_not_published"):
            recording_backend.assert_published("a", times=0)

    async def test_it_is_closed_like_any_backend(self) -> None:
        backend = RecordingBackend.from_env()
        async with backend:
            await backend.publish("a", {})
        with pytest.raises(BackendClosedError):
            await backend.publish("a", {})


@dataclass
class Parcel:
    at: datetime
    weight: Decimal


NOW = datetime(2026, 2, 28, tzinfo=UTC)


class Stamp(Middleware):
    """Marks what is published."""

    def __init__(self) -> None:
        self.seen: list[Publication] = []

    async def publish(self, publication: Publication, forward: PublishNext) -> None:
        self.seen.append(publication)
        await forward(replace(publication, headers={"stamp": publication.key}))


class TestEntryPoints:
    async def test_the_recording_backend_takes_on_what_the_application_gives_the_loader(
        self, recording_backend: RecordingBackend
    ) -> None:
        with registered_backend("mine", recording_backend):
            backend = load_backend(
                environ={"QUEUE_BACKEND": "mine"}, codec=JSONCodec(types=True), middleware=[Stamp(), Stamp()]
            )
            assert backend is recording_backend
            await backend.publish("a", {"at": NOW})
        found = recording_backend.assert_published("a", {"at": "2026-02-28T00:00:00Z"}, headers={"stamp": "a"})
        assert found.id

    @pytest.mark.parametrize("given", [{"codec": JSONCodec()}, {"middleware": [Stamp()]}], ids=["codec", "middleware"])
    def test_another_instance_has_its_own_and_says_so(self, given: dict[str, Any]) -> None:
        with (
            registered_backend("mine", fresh_memory_backend()),
            pytest.raises(ConfigurationError, match="register the class"),
        ):
            load_backend("mine", **given)

    def test_a_registered_class_is_found_by_the_metadata_itself_until_the_block_ends(self) -> None:
        with registered_backend("mine", MemoryBackend):
            assert entry_points(group="abe.backends.message_queue")["mine"].load() is MemoryBackend
            assert type(load_backend("mine")) is MemoryBackend
        assert "mine" not in installed_backends()

    def test_it_comes_before_an_installed_provider_of_its_name(self) -> None:
        with registered_backend("memory", RecordingBackend):
            assert type(load_backend("memory")) is RecordingBackend
        assert type(load_backend("memory")) is MemoryBackend

    def test_an_instance_is_what_the_loader_returns(self) -> None:
        backend = fresh_memory_backend()
        with registered_backend("mine", backend):
            assert load_backend("mine") is backend

    def test_the_last_registered_of_one_name_is_found_and_all_of_them_end(
        self, register_backend: RegisterBackend
    ) -> None:
        finders = len(sys.meta_path)
        with registered_backend("mine", MemoryBackend), registered_backend("mine", RecordingBackend):
            assert type(load_backend("mine")) is RecordingBackend
        assert len(sys.meta_path) == finders
        register_backend("mine", MemoryBackend)
        assert type(load_backend("mine")) is MemoryBackend

    def test_no_module_is_found_through_it(self) -> None:
        with registered_backend("mine", MemoryBackend), pytest.raises(ModuleNotFoundError):
            __import__("mine_is_no_module")


async def test_a_typed_object_that_is_published_comes_back_equal_to_a_handler_of_its_type(
    memory_backend: MemoryBackend,
) -> None:
    parcel, got = Parcel(NOW, Decimal("1.10")), asyncio.Queue[Parcel]()

    async def handler(parcel: Parcel) -> None:
        got.put_nowait(parcel)

    async with bounds.within(10), AsyncLoopConsumer(memory_backend, "g") as consumer, asyncio.TaskGroup() as tasks:
        tasks.create_task(consumer.run(handler))
        await memory_backend.publish("a", parcel)
        await memory_backend.publish_many([("a", parcel), Publication("a", {"at": NOW.isoformat(), "weight": "1.10"})])
        assert [await got.get() for _ in range(3)] == [parcel] * 3
        await consumer.shutdown()


async def test_the_patched_loader_returns_the_recording_backend_whatever_it_is_asked_for(
    patched_load_backend: RecordingBackend, recording_backend: RecordingBackend
) -> None:
    assert patched_load_backend is recording_backend
    found = [
        load_backend(),
        imported_elsewhere(),
        load_backend("memory"),
        load_backend("redis"),
        get_message_queue_backend(),
    ]
    assert all(backend is recording_backend for backend in found)


def test_the_patch_ends_with_the_test() -> None:
    assert type(load_backend("memory")) is MemoryBackend


APPLICATION_TEST = """
    from abe.testing import RecordingBackend
    from abe import load_backend

    def test_fixtures(memory_backend, recording_backend, manual_clock, register_backend, patched_load_backend):
        assert load_backend() is recording_backend
"""


@pytest.mark.parametrize("options", [(), ("-p", "no:asyncio")], ids=["pytest-asyncio", "no pytest-asyncio"])
def test_the_plugin_is_found_by_pytest_and_its_fixtures_work(
    pytester: pytest.Pytester, options: tuple[str, ...]
) -> None:
    pytester.makepyfile(textwrap.dedent(APPLICATION_TEST))
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)


def test_fixtures_work_where_the_tests_have_a_loop_of_their_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        async def test_publishes(recording_backend, patched_load_backend, memory_backend):
            await recording_backend.publish("k", {})
            await memory_backend.publish("k", {})
        """
    )
    options = ("-p", "no:xdist", "-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session")
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)


def test_a_run_that_uses_no_fixture_imports_nothing_of_the_library(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported():
            assert not [name for name in sys.modules if name.startswith("abe.") and not name.startswith("abe.testing")]
            assert "msgspec" not in sys.modules
        """
    )
    without = [point.name for point in entry_points(group="pytest11") if point.name not in ("abe", "asyncio")]
    options = [text for name in without for text in ("-p", f"no:{name}")]
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)


def test_the_package_of_the_tests_support_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "TESTING.md").read_text()
    fixtures = ("manual_clock", "memory_backend", "recording_backend", "register_backend", "patched_load_backend")
    assert all(f"`{name}`" in text for name in (*fixtures, *abe.testing.__all__))


def test_every_python_example_on_the_page_runs(pytester: pytest.Pytester) -> None:
    text = (Path(__file__).parents[3] / "docs" / "TESTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for number, block in enumerate(blocks):
        (pytester.path / ("shop.py" if block.startswith("# shop.py") else f"test_{number}.py")).write_text(block)
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\npythonpath = ."
    )
    pytester.runpytest_subprocess("-p", "no:xdist").assert_outcomes(passed=text.count("def test_"))
