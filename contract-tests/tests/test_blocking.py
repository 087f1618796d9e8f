"""Blocking calls in the event loop: whose they are decides whether the test fails."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from runner import Run, Runner

pytestmark = pytest.mark.thorough

TEST = "test_close_may_be_called_twice_and_before_anything_else"
PROVIDER = """
import os

from abe.backends.message_queue.service.memory import MemoryBackend

class Sluggish(MemoryBackend):
    async def disconnect(self):
        {provider}
        await super().disconnect()

    def look(self):
        return os.listdir("/")
"""
HARNESS = """
from abe.backends.message_queue.service._harness import MemoryHarness
from sluggish import Sluggish

class SluggishHarness(MemoryHarness):
    backend = Sluggish
    {setting}

    def environment(self, namespace, *, lease):
        {harness}
        return super().environment(namespace, lease=lease)

    async def oracle(self, namespace):
        {harness}
        return Oracle(await super().oracle(namespace))

    async def clean(self, namespace):
        {harness}
        await super().clean(namespace)

class Oracle:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        {harness}
        return getattr(self.inner, name)
"""


def run(folder: Path, *, provider: str = "pass", harness: str = "pass", setting: str = "") -> Run:
    runner = Runner(folder)
    runner.write("sluggish.py", PROVIDER.format(provider=provider))
    runner.write("sluggish_harness.py", HARNESS.format(harness=harness, setting=setting))
    return runner("--contract=sluggish_harness:SluggishHarness", "-k", f"{TEST} or test_messages_of_an_existing_group")


@pytest.fixture(autouse=True)
def blockbuster() -> None:
    pytest.importorskip("blockbuster")


def test_a_call_of_the_provider_fails_and_says_how_to_allow_it(tmp_path: Path) -> None:
    done = run(tmp_path, provider="self.look()")
    assert done.status == 1
    assert "Blocking call to os.listdir" in done.output
    assert "SluggishHarness.may_block: 'sluggish:Sluggish.look'" in done.output


def test_a_function_that_may_block_may(tmp_path: Path) -> None:
    done = run(tmp_path, provider="self.look()", setting='may_block = ("sluggish:Sluggish.look",)')
    assert done.status == 0, done.output


def test_a_function_that_is_not_there_cannot_be_allowed(tmp_path: Path) -> None:
    done = run(tmp_path, setting='may_block = ("sluggish:Sluggish.looks",)')
    assert done.status == 1
    assert "SluggishHarness.may_block: 'sluggish:Sluggish.looks' is not an existing 'module:function'" in done.output


def test_the_harness_and_its_oracle_may_call_what_blocks(tmp_path: Path) -> None:
    done = run(tmp_path, harness="Sluggish.look(None)")
    assert done.status == 0, done.output
