"""Typed objects in payloads are written so that their own library reads them back equal, or refused; no error shows a value."""

import datetime
import decimal
import enum
import json
import logging
import math
import traceback
import uuid
import warnings
import zoneinfo
from collections import ChainMap, UserDict
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import attrs
import msgspec
import pydantic
import pytest

import abe.codec
from abe.codec import Codec, JSONCodec
from abe.errors import DecodeError, PayloadError

CODEC: Codec = JSONCodec()
PLAIN = JSONCodec()


class Text(str):
    __slots__ = ()


def test_the_interpreter_s_own_errors_in_decoding_are_decode_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        RecursionError(SECRET),
        ValueError(SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    ):

        def fail(_: bytes, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(abe.codec, "_decode_object", fail)
        with pytest.raises(DecodeError) as caught:
            CODEC.decode(b"{}")
        assert SECRET not in shown(caught.value)


SECRET = "4111-1111-1111-1111"


def shown(error: BaseException) -> str:
    """Return all that a log could show of an error: its chain, whether Python would print it or not."""
    texts: list[str] = []
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None:
            texts += [*traceback.format_exception(link), repr(link), repr(vars(link)), repr(link.args)]
            chain += [link.__cause__, link.__context__]
    return "\n".join(texts)


class Leaky:
    """Whatever is done with it, its error says what it holds."""

    def __eq__(self, other: object) -> bool:
        raise ValueError(SECRET)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return SECRET


class LeakyStr(str):
    __slots__ = ()


@dataclass
class LeakyOrder:
    card: Any
    amount: Any = math.nan


class LeakyModel(pydantic.BaseModel):
    card: Any

    @pydantic.field_serializer("card")
    def leak(self, value: Any) -> Any:
        raise ValueError(SECRET)


class PickyModel(pydantic.BaseModel):
    card: str
    amount: float = math.nan

    @pydantic.field_validator("card")
    @classmethod
    def pick(cls, value: str) -> str:
        if getattr(PickyModel, "closed", False):
            raise ValueError(f"no more {value}")
        return value


LEAKS: dict[str, Any] = {
    "a value beside": {"card": SECRET, "amount": math.nan},
    "a lone surrogate": {"card": SECRET + "\ud800"},
    "a key": {SECRET: math.nan},
    "a nested key": {"cards": {SECRET: {1: 2}}},
    "a key that is none": {"cards": {(SECRET,): 1}},
    "a bytes key": {"cards": {SECRET.encode(): 1}},
    "a lone surrogate in a key": {SECRET + "\ud800": 1},
    "a tuple": {"card": (SECRET,)},
    "an object": {"card": Leaky()},
    "a subclass": {"card": LeakyStr(SECRET)},
    "no object": [SECRET],
    "a string": SECRET,
    "a dataclass": LeakyOrder(SECRET),
    "an object in a dataclass": LeakyOrder(Leaky(), 1),
    "a key in a dataclass": LeakyOrder({SECRET: Leaky()}, 1),
    "a lone surrogate in a dataclass": LeakyOrder(SECRET + "\ud800", 1),
    "a serializer": LeakyModel(card=SECRET),
    "a validator": PickyModel(card=SECRET),
    "a wrong type in a model": PickyModel.model_construct(card=[SECRET]),
    "a model in a dataclass": LeakyOrder(LeakyModel(card=SECRET), 1),
}


@pytest.mark.parametrize("codec", [PLAIN, JSONCodec(types=True)], ids=["plain", "types"])
@pytest.mark.parametrize("name", LEAKS)
def test_no_error_shows_a_value_of_the_payload_and_neither_does_its_chain(
    name: str, codec: JSONCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PickyModel, "closed", True, raising=False)
    if name in {"a tuple", "a nested key", "a bytes key"} and codec is not PLAIN:
        codec.encode(LEAKS[name])
        return
    with pytest.raises(PayloadError) as caught:
        codec.encode(LEAKS[name])
    assert "4111" not in shown(caught.value)


@pytest.mark.parametrize(
    "body", [b'{"card":"4111-1111-1111-1111",}', b'["4111-1111-1111-1111"]', b'{"4111-1111-1111-1111":"\xff"}']
)
def test_no_error_of_decoding_shows_what_was_received(body: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        CODEC.decode(body)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


class Grade(enum.Enum):
    GOOD = "good"


class Level(enum.IntEnum):
    LOW = 1


class Mixed(enum.Enum):
    ONE = 1
    TWO = "two"


@dataclass
class Line:
    sku: str
    price: decimal.Decimal


@dataclass
class Order:
    order_id: uuid.UUID
    at: datetime.datetime
    lines: list[Line]
    day: datetime.date = datetime.date(2026, 2, 28)
    clock: datetime.time = datetime.time(23, 59, 59, 999999)
    took: datetime.timedelta = datetime.timedelta(days=-1, microseconds=1)
    grade: Grade = Grade.GOOD
    level: Level = Level.LOW
    raw: bytes = b"\x00\xff"
    stock: dict[int, int] = field(default_factory=lambda: {1: 2, -3: 4})
    by_day: dict[datetime.date, float] = field(default_factory=lambda: {datetime.date(2026, 1, 1): 0.1})
    pair: tuple[int, str] = (1, "a")
    tags: set[str] = field(default_factory=lambda: {"x", "y"})
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Odd:
    """A dataclass with more than fields."""

    log: ClassVar[logging.Logger] = logging.getLogger("a logger is no JSON")
    seed: InitVar[int]
    a: int = 1
    b: int = field(default=2, init=False, repr=False)

    def __post_init__(self, seed: int) -> None:
        """Take no notice of the seed."""


def test_only_the_fields_of_a_dataclass_are_written() -> None:
    assert CODEC.decode(CODEC.encode(Odd(seed=5, a=3))) == {"a": 3, "b": 2}


@pytest.mark.parametrize("payload", [MappingProxyType({"a": 1}), UserDict({"a": 1}), ChainMap({"a": 1}, {"b": 2})])
def test_another_mapping_is_an_object_too(payload: Any) -> None:
    assert CODEC.decode(CODEC.encode(payload)) == dict(payload)
    with pytest.raises(PayloadError, match="a mappingproxy"):
        CODEC.encode({"a": MappingProxyType({})})


class Coded(msgspec.Struct, rename="camel", tag=True, omit_defaults=True):
    order_id: uuid.UUID
    unit_price: decimal.Decimal = decimal.Decimal("0.10")
    left_out: int | msgspec.UnsetType = msgspec.UNSET


@attrs.define
class Attributes:
    at: datetime.datetime
    price: decimal.Decimal


class Model(pydantic.BaseModel):
    order_id: uuid.UUID
    at: datetime.datetime = pydantic.Field(alias="createdAt")
    price: decimal.Decimal
    lines: list[Line] = []
    raw: bytes = b"abc"
    _cache: dict[str, int] = pydantic.PrivateAttr(default_factory=dict)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> decimal.Decimal:
        return self.price * 2


class StrictModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")
    order_id: uuid.UUID
    at: datetime.datetime
    hidden: str = pydantic.Field("unseen", exclude=True)


class OneWayAlias(pydantic.BaseModel):
    price: int = pydantic.Field(serialization_alias="written")


@pydantic.dataclasses.dataclass
class ModelDataclass:
    at: datetime.datetime
    price: decimal.Decimal


NOW = datetime.datetime(
    2026, 2, 28, 12, 30, 15, 123456, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, minutes=-30))
)
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")
TYPED: dict[str, Any] = {
    "dataclass": Order(ID, NOW, [Line("tea", decimal.Decimal("1.10"))]),
    "dataclass without a zone": Order(ID, NOW.replace(tzinfo=None), []),
    "dataclass with a zone by name": Order(ID, NOW.replace(tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")), []),
    "struct": Coded(ID, decimal.Decimal("1E+3")),
    "attrs": Attributes(NOW, decimal.Decimal("-0.00")),
    "pydantic": Model(order_id=ID, createdAt=NOW, price=decimal.Decimal("1.10"), lines=[Line("a", decimal.Decimal(1))]),
    "strict pydantic": StrictModel(order_id=ID, at=NOW),
    "pydantic with a one-way alias": OneWayAlias(price=5),
    "pydantic dataclass": ModelDataclass(NOW, decimal.Decimal("1.10")),
}


@pytest.mark.parametrize("codec", [PLAIN, JSONCodec(types=True)], ids=["plain", "types"])
@pytest.mark.parametrize("name", TYPED)
def test_a_typed_object_is_a_json_object_that_its_own_library_reads_back_equal(name: str, codec: JSONCodec) -> None:
    value = TYPED[name]
    body = codec.encode(value)
    assert isinstance(json.loads(body), dict)
    assert codec.decode(body) == json.loads(body)
    kind = type(value)
    if hasattr(kind, "__pydantic_validator__"):
        back = pydantic.TypeAdapter(kind).validate_json(body)
    else:
        back = msgspec.json.decode(body, type=kind)
    assert back == value


WRITTEN = [
    (NOW, "2026-02-28T12:30:15.123456-03:30"),
    (datetime.datetime(2026, 2, 28, 12, tzinfo=datetime.UTC), "2026-02-28T12:00:00Z"),
    (datetime.date(2026, 2, 28), "2026-02-28"),
    (datetime.time(1, 2, 3), "01:02:03"),
    (datetime.timedelta(days=1, seconds=1.5), "P1DT1.5S"),
    (ID, str(ID)),
    (decimal.Decimal("1.10"), "1.10"),
    (b"abc", "YWJj"),
    (Grade.GOOD, "good"),
    (Level.LOW, 1),
    ((1, "a"), [1, "a"]),
    ({3}, [3]),
    ({1: "a"}, {"1": "a"}),
    ({ID: 1}, {str(ID): 1}),
    (Line("tea", decimal.Decimal(1)), {"sku": "tea", "price": "1"}),
    (OneWayAlias(price=5), {"price": 5}),
]


@pytest.mark.parametrize(("value", "written"), WRITTEN, ids=lambda value: type(value).__name__)
def test_with_types_a_value_is_written_as_documented_wherever_it_is(value: Any, written: Any) -> None:
    codec = JSONCodec(types=True)
    assert codec.decode(codec.encode({"a": value, "b": [{"c": value}]})) == {"a": written, "b": [{"c": written}]}
    if not isinstance(value, dict | OneWayAlias):
        assert msgspec.convert(written, type(value)) == value


@pytest.mark.parametrize(
    "value", [value for value, _ in WRITTEN if value is not Level.LOW], ids=lambda value: type(value).__name__
)
def test_without_types_it_is_refused_inside_of_a_dict_and_the_text_says_what_to_do(value: Any) -> None:
    with pytest.raises(PayloadError, match=r"is not JSON: payload\['a'\] (is|has)") as caught:
        CODEC.encode({"a": value})
    if not isinstance(value, dict):
        assert "use JSONCodec(types=True)" in str(caught.value)
        assert "a dataclass, msgspec Struct or Pydantic model" in str(caught.value)


class Animal(pydantic.BaseModel):
    name: str


class Dog(Animal):
    tricks: int


class Kennel(pydantic.BaseModel):
    animal: Animal


class Account(pydantic.BaseModel):
    password: pydantic.SecretStr
    limit: float | None = None


class Root(pydantic.RootModel[list[int]]):
    pass


class Listed(msgspec.Struct, array_like=True):
    a: int = 1


ODD_ZONE = datetime.timezone(datetime.timedelta(minutes=19, seconds=32))
LOST: dict[str, tuple[Any, str]] = {
    "nan": (LeakyOrder("x", math.nan), "payload.amount is nan"),
    "nested nan": (LeakyOrder([{"b": (math.inf,)}], 1), "payload.card[0]['b'][0] is inf"),
    "object": (LeakyOrder(object(), 1), "payload.card is a object; .* and no string represents this type"),
    "complex": (LeakyOrder(1j, 1), "payload.card is a complex"),
    "an enum of both": (LeakyOrder(Mixed.ONE, 1), "payload.card is a Mixed"),
    "raw json": (LeakyOrder(msgspec.Raw(b"1"), 1), "payload.card is a Raw"),
    "subclass": (LeakyOrder(Text("a"), 1), "payload.card is a Text"),
    "offset with seconds": (LeakyOrder(NOW.replace(tzinfo=ODD_ZONE), 1), "offset with seconds, which would be rounded"),
    "time with such an offset": (LeakyOrder(datetime.time(1, tzinfo=ODD_ZONE), 1), "offset with seconds"),
    "keys that become one": (LeakyOrder({1: "a", "1": "b"}, 1), "it changes when it is encoded"),
    "a boolean key": (LeakyOrder({True: 1}, 1), "payload.card has a key that is a bool"),
    "nan as a key": (LeakyOrder({math.nan: 1}, 1), "a key of payload.card is nan"),
    "lone surrogate": (LeakyOrder("\ud800", 1), "payload.card holds half a character"),
    "itself": (LOOP := LeakyOrder(None, 1), "nested too deeply"),
    "a list of one": (Root([1]), "the payload is a Root, which is not a JSON object"),
    "a struct like a list": (Listed(), "the payload is a Listed, which is not a JSON object"),
    "a secret": (Account(password=pydantic.SecretStr("x")), "left out or changed"),
    "nan in a model": (PickyModel(card="x"), r"its JSON cannot be decoded \('amount': float_type\)"),
    "nan where a model has none": (
        Account.model_construct(password="x", limit=math.nan),
        "cannot be published as it is",
    ),
    "a subclass of a field's model": (Kennel(animal=Dog(name="rex", tricks=3)), "left out or changed"),
    "a model with a wrong value": (OneWayAlias.model_construct(price="many"), r"\('price': missing\)"),
}
LOOP.card = LOOP


@pytest.mark.parametrize("codec", [PLAIN, JSONCodec(types=True)], ids=["plain", "types"])
@pytest.mark.parametrize("name", LOST)
def test_what_would_not_come_back_equal_is_refused_in_a_typed_object_too(name: str, codec: JSONCodec) -> None:
    value, text = LOST[name]
    with warnings.catch_warnings(), pytest.raises(PayloadError, match=text.replace("[", r"\[")):
        warnings.simplefilter("error")
        codec.encode(value)
