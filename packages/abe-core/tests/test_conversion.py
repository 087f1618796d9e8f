"""Payloads become what the handler's annotation says, by the rules of the library that the type belongs to, as from JSON."""

import dataclasses
import datetime
import decimal
import enum
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import annotated_types
import attrs
import msgspec
import pydantic
import pytest
from pydantic import dataclasses as pydantic_dataclasses

from abe import Message
from abe.backends.message_queue.conversion import converter
from abe.backends.message_queue.retry import Reject, Retry

ID = uuid.UUID("6f3b5c1a-3f35-4f3b-8a34-0e0a0c1d9f10")
AT = datetime.datetime(2026, 3, 1, 9, tzinfo=datetime.UTC)
PAYLOAD: dict[str, Any] = {"id": str(ID), "at": "2026-03-01T09:00:00Z", "counts": {"1": 2}, "tags": ["a"]}


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int]
    tags: set[str]


@dataclass
class Plain:
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int]
    tags: set[str]


class Struct(msgspec.Struct):
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int]
    tags: set[str]


class Typed(TypedDict):
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int]
    tags: set[str]


@attrs.define
class Attrs:
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int]
    tags: set[str]


@pydantic_dataclasses.dataclass
class PydanticData:
    id: uuid.UUID
    at: datetime.datetime
    counts: dict[int, int] = pydantic.Field(min_length=1)
    tags: set[str] = pydantic.Field(default_factory=set)


FIELDS = {"id": ID, "at": AT, "counts": {1: 2}, "tags": {"a"}}


@pytest.mark.parametrize("kind", [Strict, Plain, Struct, Typed, Attrs, PydanticData], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "wrapped", [lambda k: k, lambda k: k | None, lambda k: Annotated[k, "x"], lambda k: NewType("N", k)]
)
def test_what_json_writes_as_text_is_read_from_it(kind: Any, wrapped: Callable[[Any], Any]) -> None:
    convert = converter(wrapped(kind))
    assert convert is not None
    assert convert(Message(PAYLOAD)) == kind(**FIELDS)


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


T = TypeVar("T")
B = TypeVar("B", bound=Cat)
C = TypeVar("C", Cat, Dog)


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Root(pydantic.RootModel[dict[str, int]]):
    """A model that is a mapping."""


@dataclass
class Owner:
    pet: Cat


@dataclass
class Left:
    left: int


@dataclass
class Right:
    right: int


class TaggedLeft(msgspec.Struct, tag="left"):
    n: int


class TaggedRight(msgspec.Struct, tag="right"):
    n: int


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Rich:
    price: decimal.Decimal
    colour: Colour
    took: datetime.timedelta
    raw: bytes
    pair: tuple[int, str]
    note: str | None = None
    more: list[Left] = field(default_factory=list)


CAT = {"kind": "cat", "lives": 9}
RICH = {"price": "1.10", "colour": "red", "took": "PT5S", "raw": "aGk=", "pair": [1, "a"], "more": [{"left": 1}]}
SECONDS = datetime.timedelta(seconds=5)
KINDS: list[tuple[Any, dict[str, Any], object]] = [
    (Cat | Dog, CAT, Cat(kind="cat", lives=9)),
    (Cat | Dog | None, {"kind": "dog", "tricks": []}, Dog(kind="dog", tricks=[])),
    (Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], CAT, Cat(kind="cat", lives=9)),
    (B, CAT, Cat(kind="cat", lives=9)),
    (C, {"kind": "dog", "tricks": []}, Dog(kind="dog", tricks=[])),
    (Page[Cat], {"items": [CAT]}, Page[Cat](items=[Cat(kind="cat", lives=9)])),
    (Root, {"a": 1}, Root({"a": 1})),
    (Owner, {"pet": CAT}, Owner(Cat(kind="cat", lives=9))),
    (dict[str, Cat], {"tom": CAT}, {"tom": Cat(kind="cat", lives=9)}),
    (Left | Right, {"right": 1}, Right(1)),
    (TaggedLeft | TaggedRight, {"type": "right", "n": 1}, TaggedRight(1)),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (dict[int, str], {"1": "a"}, {1: "a"}),
    (Mapping[str, list[int]], {"a": [1]}, {"a": [1]}),
    (Rich, RICH, Rich(decimal.Decimal("1.10"), Colour.RED, SECONDS, b"hi", (1, "a"), None, [Left(1)])),
    (Cat | dict[str, Any], {"a": 1}, {"a": 1}),
]


@pytest.mark.parametrize(("wanted", "payload", "expected"), KINDS, ids=[str(kind[0]) for kind in KINDS])
def test_any_type_is_read_by_its_own_library(wanted: Any, payload: dict[str, Any], expected: object) -> None:
    convert = converter(wanted)
    assert convert is not None
    converted = convert(Message(payload))
    assert converted == expected
    assert type(converted) is type(expected)


MESSAGES = [
    dict,
    Message,
    Mapping,
    typing.Mapping,
    typing.MutableMapping,
    Any,
    object,
    dict[str, Any],
    dict[str, object],
    Mapping[str, Any],
    T,
    Message | None,
]
LIKEWISE = [dict[str, Any] | None, Annotated[dict[str, Any], "x"], NewType("Payload", dict), dict | Message]


@pytest.mark.parametrize("wanted", [*MESSAGES, *LIKEWISE], ids=str)
def test_who_asks_for_no_more_than_an_object_gets_the_message(wanted: Any) -> None:
    assert converter(wanted) is None


class Service:
    """No data."""


class Point(NamedTuple):
    x: int


class Array(msgspec.Struct, array_like=True):
    x: int


class Numbers(pydantic.RootModel[list[int]]):
    """A model that is a list."""


@dataclass(init=False)
class Initialised:
    n: int

    def __init__(self, n: int) -> None:
        self.n = 2 * n


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (int, "a payload is always an object"),
        (list[int], "a payload is always an object"),
        (list[Cat], "a payload is always an object"),
        (int | str, "a payload is always an object"),
        (Point, "a payload is always an object"),
        (Array, "a payload is always an object"),
        (Numbers, "a payload is always an object"),
        (Service, "Service"),
        (dict[str, Service], "custom types"),
        (Callable[[], None], ""),
        (Initialised, "Initialised has its own __init__"),
    ],
    ids=str,
)
def test_what_no_payload_can_become_is_refused(wanted: Any, text: str) -> None:
    with pytest.raises(TypeError) as caught:
        converter(wanted)
    assert text in str(caught.value) or text in str(caught.value.__cause__)


MARKER = "4111-1111-1111-1111"


@dataclass
class Checked:
    card: str

    def __post_init__(self) -> None:
        raise ValueError(f"no such card: {self.card}")


@dataclass
class Broken:
    card: str

    def __post_init__(self) -> None:
        raise KeyError(self.card)


@attrs.define
class AttrsChecked:
    card: str = attrs.field(validator=attrs.validators.max_len(3))


class ModelChecked(pydantic.BaseModel):
    card: str

    @pydantic.field_validator("card")
    @classmethod
    def check(cls, value: str) -> str:
        raise ValueError(f"no such card: {value}")


class Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    card: int


class ClosedStruct(msgspec.Struct, forbid_unknown_fields=True):
    card: int = 0


class ByCard(pydantic.BaseModel):
    cards: dict[str, int]


@dataclass
class Enums:
    card: Colour


@dataclass
class Literals:
    card: Literal["a", "b"]


@dataclass
class Constrained:
    card: Annotated[str, annotated_types.MaxLen(3)]


FAULTS: list[tuple[Any, dict[str, Any], str]] = [
    (Checked, {"card": MARKER}, "Checked: its own check raised ValueError"),
    (Broken, {"card": MARKER}, "Broken: it raised KeyError"),
    (AttrsChecked, {"card": MARKER}, "AttrsChecked: its own check raised ValueError"),
    (ModelChecked, {"card": MARKER}, "ModelChecked: card: value_error"),
    (Closed, {"card": MARKER}, "Closed: card: int_parsing"),
    (Closed, {"card": 1, MARKER: 1}, "Closed: *: extra_forbidden"),
    (ClosedStruct, {MARKER: 1}, "ClosedStruct: Object contains an unknown field"),
    (ClosedStruct, {"card": MARKER}, "ClosedStruct: Expected `int`, got `str` - at `$.card`"),
    (ByCard, {"cards": {MARKER: MARKER}}, "ByCard: cards.*: int_parsing"),
    (dict[str, int], {MARKER: MARKER}, "dict: Expected `int`, got `str` - at `$[...]`"),
    (Enums, {"card": MARKER}, "Enums: Invalid enum value - at `$.card`"),
    (Literals, {"card": MARKER}, "Literals: Invalid enum value - at `$.card`"),
    (Constrained, {"card": MARKER}, "Constrained: card: string_too_long"),
    (TaggedLeft | TaggedRight, {"type": MARKER, "n": 1}, "Invalid value - at `$.type`"),
    (Annotated[Cat | Dog, pydantic.Field(discriminator="kind")], {"kind": MARKER}, "payload: union_tag_invalid"),
    (Plain, {**PAYLOAD, "id": MARKER}, "Plain: Invalid UUID - at `$.id`"),
    (Plain, {**PAYLOAD, "at": MARKER}, "Plain: Invalid RFC3339 encoded datetime - at `$.at`"),
    (Plain, {}, "Plain: Object missing required field `id`"),
]


@pytest.mark.parametrize(("wanted", "payload", "problem"), FAULTS, ids=range(len(FAULTS)))
def test_what_does_not_fit_is_rejected_with_location_and_kind_and_without_a_value(
    wanted: Any, payload: dict[str, Any], problem: str
) -> None:
    convert = converter(wanted)
    assert convert is not None
    with pytest.raises(Reject) as caught:
        convert(Message(payload))
    assert problem in str(caught.value)
    assert MARKER not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_many_errors_are_told_in_few_words() -> None:
    convert = converter(ByCard)
    assert convert is not None
    with pytest.raises(Reject, match="and 90 more") as caught:
        convert(Message({"cards": {str(n): "x" for n in range(100)}}))
    assert len(str(caught.value)) < 500


def test_a_type_may_have_the_last_word_itself() -> None:
    @dataclass
    class Later:
        n: int

        def __post_init__(self) -> None:
            raise Retry(after=5)

    convert = converter(Later)
    assert convert is not None
    with pytest.raises(Retry):
        convert(Message({"n": 1}))


def test_a_change_that_middleware_made_to_the_payload_counts() -> None:
    message = Message({"left": 1})
    message["left"] = 2
    convert = converter(Left)
    assert convert is not None
    assert convert(message) == Left(2)


def test_without_pydantic_msgspec_says_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydantic", None)
    with pytest.raises(TypeError, match="more than one dataclass"):
        converter(Left | Right)


def test_a_dataclass_with_init_only_fields_is_read_by_pydantic() -> None:
    @dataclass
    class WithInitVar:
        n: int
        factor: dataclasses.InitVar[int]

        def __post_init__(self, factor: int) -> None:
            self.n *= factor

    convert = converter(WithInitVar)
    assert convert is not None
    assert convert(Message({"n": 2, "factor": 3})).n == 6  # type: ignore[attr-defined]


class Raw(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    raw: bytes
    at: datetime.datetime


def test_what_a_codec_of_the_applications_own_brings_is_taken_as_it_is() -> None:
    convert = converter(Raw)
    assert convert is not None
    assert convert(Message({"raw": b"\xff", "at": AT})) == Raw(raw=b"\xff", at=AT)
    with pytest.raises(Reject, match="raw: bytes_type"):
        convert(Message({"raw": object(), "at": AT}))
