"""C-ENC: what goes in comes out, or is refused."""

import asyncio
import math
import struct
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from abe.errors import PayloadError
from abe_contract_tests.contract import Contract
from abe_contract_tests.marks import clause
from abe_contract_tests.suite import jobs
from abe_contract_tests.suite.steps import collect, collect_distinct, expect_counts, until_dead, until_empty

GENERATED: Final = 200
LONE_SURROGATE: Final = "\ud800"


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal in value and in type, all the way down, floats to the bit."""
    kind: Any = type(one)  # pyright: ignore[reportUnknownVariableType]
    if kind is not type(other):
        return False
    if kind is float:
        return struct.pack("d", one) == struct.pack("d", other)
    if kind is dict:
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if kind is list:
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def nested(depth: int) -> dict[str, Any]:
    """Return a payload that many objects and lists deep."""
    value: Any = "bottom"
    for level in range(depth - 1):
        value = [value] if level % 2 else {"d": value}
    return {"d": value}


TEXT: Final = st.text(st.characters(codec="utf-8"), max_size=40)
VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=15,
)

CORNERS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"": ""},
    {"a": None, "b": True, "c": False, "d": 0, "e": 1, "f": [], "g": {}},
    {"1": "text, not 1", "true": 1, "null": 0, "": [{}]},
    {"int": 1, "float": 1.0, "true": True, "text": "1"},
    {"zero": 0.0, "minus": -0.0, "in": [-0.0, {"x": -0.0}]},
    {
        "floats": [
            5e-324,
            -5e-324,
            2.2250738585072014e-308,
            1.7976931348623157e308,
            0.1,
            1e16,
            1e22,
            123456789.123456789,
            1 / 3,
        ]
    },
    {
        "ints": [
            2**31,
            2**53,
            2**53 + 1,
            2**63 - 1,
            2**63,
            2**64 - 1,
            2**64,
            -(2**63),
            -(2**63) - 1,
            10**100,
            -(10**1_000),
        ]
    },
    {"huge": 7 * 10**4_000 + 3},
    {"text": "\x00\x01\x1f \x7f\x80\u2028\u2029\ufeff\ufffe\uffff\U0001f600\U0010ffff"},
    {"text": '"\\/\b\f\n\r\t</script>'},
    {"ä": "é", "e\u0301": "not composed", "\u00e9": "composed", "\U0001f600": 1, "\x00": 2},
    {"long": "x" * 100_000, "many": list(range(5_000))},
    {"order": {"z": 1, "a": 2, "m": {"b": 1, "a": 2}}},
    nested(200),
)


@clause("C-ENC-01")
async def test_every_corner_of_json_comes_back_as_it_was(contract: Contract) -> None:
    await _assert_round_trip(contract, list(CORNERS))


@clause("C-ENC-01")
async def test_generated_json_comes_back_as_it_was(contract: Contract) -> None:
    payloads: list[dict[str, Any]] = []

    # One batch for the broker, drawn by Hypothesis; a shrunk example would cost a round trip each.
    @given(st.dictionaries(TEXT, VALUES, max_size=6))
    @settings(
        max_examples=GENERATED,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    def draw(payload: dict[str, Any]) -> None:
        payloads.append(payload)

    await asyncio.to_thread(draw)  # it takes its time, and the event loop must turn
    assert len(payloads) >= GENERATED / 2
    await _assert_round_trip(contract, payloads)


async def _assert_round_trip(contract: Contract, payloads: list[dict[str, Any]]) -> None:
    backend = contract.backend()
    async with contract.within(20):
        await backend.declare("g")
        await backend.publish_many([(f"n.{n}", payload) for n, payload in enumerate(payloads)])
        async with backend.consume(group="g") as subscription:
            messages = {message.key: dict(message) for message in await collect(subscription, len(payloads))}
    changed = [
        (payload, messages[f"n.{n}"]) for n, payload in enumerate(payloads) if not same(payload, messages[f"n.{n}"])
    ]
    smallest = min(changed, key=lambda pair: len(repr(pair[0])), default=None)
    assert smallest is None


@clause("C-ENC-01")
async def test_a_payload_is_read_alike_in_another_process(contract: Contract) -> None:
    backend = contract.backend()
    payload: dict[str, Any] = {
        "text": "é\U0001f600\x00",
        "ints": [2**64, 10**50],
        "floats": [0.1, -0.0, 5e-324],
        "none": None,
        "nested": {"a": [{}]},
    }
    async with contract.within(15):
        await backend.declare("back", keys=["back"] if contract.declares("key_patterns") else None)
        async with contract.worker(jobs.exchange, group="there") as worker:
            assert await worker.next_report() == "subscribed"
            await backend.publish("there", payload, headers={"trace": "é"}, id="the-id")
            report = await worker.next_report()
            assert same(report["payload"], payload)
            assert (report["headers"], report["id"], report["key"]) == ({"trace": "é"}, "the-id", "there")
            async with backend.consume(group="back") as subscription:
                while (message := await subscription.receive()).key != "back":
                    await message.ack()
                assert same(dict(message), payload)
                assert (message.headers, message.id) == ({"trace": "é"}, "the-id")
            await worker.kill()


REFUSED: Final[dict[str, Any]] = {
    "NaN": {"x": math.nan},
    "infinity": {"x": math.inf},
    "minus infinity": {"x": [-math.inf]},
    "integer key": {1: "a"},
    "integer key inside": {"x": {1: "a", "1": "b"}},
    "none key": {"x": {None: 1}},
    "boolean key": {"x": [{True: 1}]},
    "float key": {"x": {1.5: 1}},
    "tuple": {"x": (1, 2)},
    "empty tuple": {"x": ()},
    "tuple inside": {"x": [{"y": (1,)}]},
    "set": {"x": {1, 2}},
    "empty set": {"x": set()},
    "frozenset": {"x": frozenset({1})},
    "bytes": {"x": b"abc"},
    "bytearray": {"x": bytearray(b"abc")},
    "lone surrogate": {"x": LONE_SURROGATE},
    "lone surrogate in a key": {LONE_SURROGATE: 1},
    "lone surrogate inside": {"x": ["a" + LONE_SURROGATE + "b"]},
    "datetime": {"x": datetime(2026, 1, 1, tzinfo=UTC)},
    "decimal": {"x": Decimal("1.5")},
    "uuid": {"x": UUID(int=0)},
    "complex": {"x": 1j},
    "object": {"x": object()},
    "a list": [1, 2],
    "a string": "text",
    "a number": 1,
    "nothing": None,
    "bytes as a whole": b"{}",
}


def _circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["x"] = [circle]
    return circle


@clause("C-ENC-02")
async def test_what_json_cannot_hold_is_refused_and_nothing_is_published(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    accepted: list[str] = []
    async with contract.within():
        await backend.declare("g")
        for name, payload in {**REFUSED, "circle": _circle()}.items():
            try:
                await backend.publish("order.created", payload)
                accepted.append(name)
            except PayloadError as exc:
                accepted += [name] if exc.retryable or exc.maybe_accepted or not str(exc) else []
            with pytest.raises(PayloadError, match="1"):
                await backend.publish_many([("order.created", {"n": 0}), ("order.created", payload)])
        assert not accepted, "changed without a word"
        await expect_counts(contract, oracle, "g", total=0)


@clause("C-ENC-03")
async def test_a_foreign_message_of_plain_json_is_delivered(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await oracle.inject("g", b'{"n": 1, "text": "\\u00e9", "spaces" :  [1.0, null]}', key="from.elsewhere")
        async with backend.consume(group="g") as subscription:
            message = await subscription.receive()
            assert same(dict(message), {"n": 1, "text": "é", "spaces": [1.0, None]})
            assert message.id
            assert message.attempt == 1
            assert message.headers == {}
            assert message.key in ("from.elsewhere", "")
            assert message.published_at >= 0
            # It is as good as any other: it can fail and come back.
            await message.nack(delay=0)
            again = await subscription.receive()
            assert (dict(again), again.attempt) == (dict(message), 2)
            assert again.id
            await again.ack()
            await until_empty(oracle, "g")


@clause("C-ENC-03", capability="dead_letter")
async def test_an_envelope_of_an_unknown_version_takes_the_poison_path(contract: Contract) -> None:
    backend = contract.backend()
    oracle = await contract.oracle()
    async with contract.within():
        await backend.declare("g")
        await oracle.inject_version("g", b'{"n": 0}')
        await backend.publish("order.created", {"n": 1})
        async with backend.consume(group="g") as subscription:
            assert set(await collect_distinct(subscription, [1])) == {1}
            await until_dead(oracle, "g", 1)
            await until_empty(oracle, "g")
        (letter,) = await backend.dead_letters("g").list()
        assert letter.body.endswith(b'{"n": 0}')
        assert letter.reason
