"""A `Message` is a dict that can be copied, pickled, compared and printed like others."""

import copy
import gc
import pickle

import pytest

from abe import Message
from abe.backends.message_queue.service.memory import MemoryBackend
from abe.errors import UnsupportedCapabilityError
from abe_contract_tests import bounds

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda message: pickle.loads(pickle.dumps(message)),
    "oldest pickle": lambda message: pickle.loads(pickle.dumps(message, protocol=0)),
}
TOLD = ("id", "key", "headers", "published_at", "attempt", "group", "lease_lost", "settled")


async def delivered(backend: MemoryBackend) -> Message:
    await backend.publish("order.created", {"n": 1, "lines": [{"sku": "tea"}]}, id="seven", headers={"tenant": "acme"})
    subscription = backend.consume(group="billing")
    async with bounds.within(5):
        return await subscription.receive()


@pytest.mark.parametrize("kind", COPIES)
async def test_a_copy_tells_what_the_message_tells(memory_backend: MemoryBackend, kind: str) -> None:
    message = await delivered(memory_backend)
    copied = COPIES[kind](message)
    assert type(copied) is Message
    assert copied == message == {"n": 1, "lines": [{"sku": "tea"}]}
    assert [getattr(copied, name) for name in TOLD] == [getattr(message, name) for name in TOLD]
    assert repr(copied) == repr(message)
    assert (copied["lines"][0] is message["lines"][0]) is (kind == "copy")


@pytest.mark.parametrize("settle", ["ack", "nack", "reject"])
async def test_a_copy_cannot_be_settled_and_leaves_the_message_alone(
    memory_backend: MemoryBackend, settle: str
) -> None:
    message = await delivered(memory_backend)
    copied = copy.deepcopy(message)
    with pytest.raises(UnsupportedCapabilityError, match="settle the message itself"):
        await getattr(copied, settle)()
    with pytest.raises(UnsupportedCapabilityError):
        await copied.extend(1)
    del copied
    gc.collect()
    await message.ack()
    assert (await memory_backend.stats("billing")).in_flight == 0


async def test_its_repr_says_which_message_it_is_and_nothing_of_its_payload(memory_backend: MemoryBackend) -> None:
    message = await delivered(memory_backend)
    assert repr(message) == "<Message id='seven', key='order.created', group='billing', attempt=1>"
    assert str(message) == repr(message)


async def test_it_says_whether_it_is_settled(memory_backend: MemoryBackend) -> None:
    message = await delivered(memory_backend)
    assert not message.settled
    await message.reject("no")
    assert message.settled


def test_one_that_an_application_makes_tells_what_there_is_to_tell() -> None:
    message = Message({"n": 1})
    assert message == {"n": 1}
    assert (message.id, message.key, message.headers, message.attempt, message.group) == ("", "", {}, 1, "")
    assert not message.settled
    assert repr(message) == "<Message id='', key='', group='', attempt=1>"
    assert copy.deepcopy(message) == message
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = message.nothing  # type: ignore[attr-defined]


async def test_its_payload_alone_is_a_plain_dict(memory_backend: MemoryBackend) -> None:
    message = await delivered(memory_backend)
    assert type(dict(message)) is type(message.copy()) is type(message | {}) is dict
