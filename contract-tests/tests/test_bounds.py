"""Bounds are stretched where the machine is busy, and only there."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from abe.settings import QueueSettings
from abe_contract_tests import bounds


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Say how many threads there are for each processor."""
    bounds.forget()

    def crowd(threads: float) -> None:
        monkeypatch.setattr(bounds._METER, "crowding", lambda _: threads)

    monkeypatch.setattr(bounds, "_speed", lambda: 1.0)
    monkeypatch.delenv(bounds.FACTOR_VARIABLE, raising=False)
    crowd(1)
    return crowd


async def test_a_bound_holds_on_a_quiet_machine(crowded: Callable[[float], None]) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with bounds.within(0.05):
            await asyncio.Event().wait()
    assert time.monotonic() - began >= 0.05


async def test_a_bound_is_stretched_while_the_machine_is_busy(crowded: Callable[[float], None]) -> None:
    crowded(4)
    late = asyncio.Event()
    asyncio.get_running_loop().call_later(0.4, late.set)
    async with bounds.within(0.2):
        await late.wait()


async def test_a_machine_that_gets_busy_stretches_the_bounds_that_run(crowded: Callable[[float], None]) -> None:
    late = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.call_later(0.1, crowded, 4)
    loop.call_later(0.5, late.set)
    async with bounds.within(0.25):
        await late.wait()


async def test_a_bound_that_is_over_stretches_nothing(crowded: Callable[[float], None]) -> None:
    crowded(4)
    async with bounds.within(0.01):
        pass
    unused = bounds.within(0.01)
    await asyncio.sleep(0.05)
    assert unused.when() is not None


async def test_a_wait_without_a_bound_has_none() -> None:
    async with bounds.within(None) as timeout:
        assert timeout.when() is None


def test_a_deadline_passes_late_on_a_busy_machine(crowded: Callable[[float], None]) -> None:
    deadline = bounds.Deadline(0.02)
    time.sleep(0.03)
    assert deadline.passed
    crowded(20)
    assert not deadline.passed


def test_the_factor_is_the_product_of_what_is_measured_and_what_is_asked_for(
    crowded: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded(3)
    monkeypatch.setenv(bounds.FACTOR_VARIABLE, "2")
    assert bounds.slowness() == 6
    crowded(1000)
    assert bounds.slowness() == bounds._MOST


def test_the_meter_averages_what_it_sees() -> None:
    seen: list[float] = [8.0, 0.0]
    meter: Any = bounds._Meter(lambda: seen[0], 2)
    began = time.monotonic()
    assert meter.crowding(None) == 4  # at once, by what there is
    while len(meter._wanted) < 3:
        time.sleep(0.01)
    assert meter.crowding(began) == pytest.approx(4, rel=0.1)
    seen.reverse()
    while len(meter._wanted) < 6:
        time.sleep(0.01)
    assert 1 < meter.crowding(began) < 4


def test_time_outs_of_settings_are_stretched_and_nothing_else(crowded: Callable[[float], None]) -> None:
    settings = QueueSettings(publish_timeout=2, lease=3)
    assert bounds.stretched(settings) == settings
    crowded(4)
    stretched = bounds.stretched(settings)
    assert (stretched.publish_timeout, stretched.lease) == (8, 3)


async def test_a_bound_allows_for_the_time_outs_that_were_stretched_before(crowded: Callable[[float], None]) -> None:
    crowded(4)
    settings = bounds.stretched(QueueSettings(close_timeout=0.1))
    crowded(1)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with bounds.within(0.15):
            await asyncio.Event().wait()
    assert time.monotonic() - began >= settings.close_timeout + 0.2
    bounds.forget()
    with pytest.raises(TimeoutError):
        async with bounds.within(0.15):
            await asyncio.sleep(settings.close_timeout)
