"""The library's loggers: a filter of the application that raises ends nothing."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_doubles import ScriptedReceiver, delivery, inbox_on, within

from abe.backends.message_queue.base.log import Log
from abe.errors import BackendConnectionError
from abe.testing import ManualClock


@pytest.fixture
def failing_filter() -> Iterator[list[str]]:
    """A filter of all of the library's loggers that raises; it remembers the texts."""
    texts: list[str] = []

    def fails(record: logging.LogRecord) -> bool:
        texts.append(record.getMessage())
        raise ZeroDivisionError

    names = ("abe.consumer", "abe.engine", "abe.test")
    for name in names:
        logging.getLogger(name).addFilter(fails)
    yield texts
    for name in names:
        logging.getLogger(name).removeFilter(fails)


def test_a_filter_that_raises_drops_its_record(failing_filter: list[str], caplog: pytest.LogCaptureFixture) -> None:
    Log("abe.test").warning("a %s of %d", "text", 1)
    assert failing_filter == ["a text of 1"]
    assert not caplog.records


def test_a_record_is_its_caller_s(caplog: pytest.LogCaptureFixture) -> None:
    log = Log("abe.test")
    log.warning("%s", 1, extra={"message_id": "m"})
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    with caplog.at_level(logging.ERROR, "abe.test"):
        log.warning("unheard")
    first, second = caplog.records
    assert {each.funcName for each in caplog.records} == {"test_a_record_is_its_caller_s"}
    assert {each.filename for each in caplog.records} == {"test_log.py"}
    assert (first.message_id, first.levelname) == ("m", "WARNING")  # type: ignore[attr-defined]
    assert second.exc_info


async def test_a_filter_that_raises_ends_no_consumer(manual_clock: ManualClock, failing_filter: list[str]) -> None:
    class Failing(ScriptedReceiver):
        tries = 0

        async def receive(self, limit: int) -> list[object]:  # type: ignore[override]
            self.tries += 1
            if self.tries == 1:
                raise BackendConnectionError("no broker")
            return await super().receive(limit)  # type: ignore[return-value]

    inbox = inbox_on(Failing(delivery(1)), manual_clock)
    receiving = asyncio.create_task(inbox.receive())
    await manual_clock.advance(5)
    assert (await within(receiving)).id == "1"
    assert any("no broker" in text for text in failing_filter)
    await within(inbox.close())


def test_every_module_logs_by_it() -> None:
    packages = Path(__file__).parents[2]
    modules = [module for module in packages.glob("*/src/**/*.py") if module.name != "log.py"]
    assert [module for module in modules if 'logging.getLogger("abe' in module.read_text()] == []
    assert sum('Log("abe' in module.read_text() for module in modules) > 30
