"""The tap, without a broker: what it makes of bytes however they arrive, and of what a broker cannot be made to send."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands, heartbeat
from pamqp import frame as pamqp_frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from abe.backends.message_queue.base import Delivery, Envelope
from abe.errors import AbeError, BackendConnectionError, BackpressureError, PublishUnknownError, UnroutableError
from abe_backend_rabbitmq import _wire
from abe_backend_rabbitmq._channel import Channel, Outgoing
from abe_backend_rabbitmq._tap import Tap, _Writer
from abe_contract_tests import bounds

FRAME_MAX = 4096
unhurried = settings(deadline=None)
OURS, OTHERS = 1, 2
Basic = commands.Basic


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True


class Native:
    """As much of aiormq's channel as the tap sees."""

    def __init__(self, number: int) -> None:
        self.number = number


class Line:
    """A tap with a channel, between a broker that the test plays and an aiormq that only listens."""

    def __init__(self, frame_max: int = FRAME_MAX) -> None:
        self.loop = asyncio.new_event_loop()
        self.reader = asyncio.StreamReader(limit=1 << 30, loop=self.loop)
        self.said: list[bytes] = []
        self.tap = Tap(self.reader, self.loop, self.said.append)
        self.transport = Transport()
        self.tap.connection_made(self.transport)
        self.got: list[tuple[int, str, str, bytes, bytes, bool]] = []
        self.channel = self.open(OURS, frame_max)
        self.writer = _Writer(self.transport, self.tap, self.reader, self.loop)
        self.writer.tap = self.tap

    def open(self, number: int, frame_max: int = FRAME_MAX) -> Channel:
        channel = Channel(self.tap, cast("Any", Native(number)), frame_max)

        def deliver(tag: int, header: _wire.Header, body: bytes, redelivered: bool) -> None:
            channel.in_flight[tag] = Delivery(body, header, 1, tag), header
            self.got.append((tag, header.exchange, header.key, header.properties, body, redelivered))

        channel._deliver = deliver
        return channel

    def feed(self, *frames: bytes) -> None:
        self.tap.data_received(b"".join(frames))

    def passed_on(self) -> bytes:
        """What aiormq got since the last time."""
        buffer: bytearray = self.reader._buffer  # type: ignore[attr-defined]
        found = bytes(buffer)
        buffer.clear()
        return found

    def sent(self) -> list[Any]:
        """The frames that went out since the last time."""
        data, frames = bytes(self.transport.written), []
        self.transport.written.clear()
        while data:
            size, _, frame = pamqp_frame.unmarshal(data)
            data = data[size:]
            frames.append(frame)
        return frames

    def wait(self, future: "asyncio.Future[Any]") -> Any:
        async def result() -> Any:
            async with bounds.within(1):
                return await future

        return self.loop.run_until_complete(result())

    def publish(self, *messages: Outgoing) -> "asyncio.Future[Any]":
        return self.channel.publish(messages)

    def ack(self, *tags: int) -> list[Any]:
        self.loop.run_until_complete(self.channel.ack(tags))
        return self.sent()

    def close(self) -> None:
        self.transport.closing = True
        self.loop.close()


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def marshal(frame: Any, number: int = OURS) -> bytes:
    return pamqp_frame.marshal(frame, number)


def content(method: Any, body: bytes, number: int = OURS, piece: int = FRAME_MAX - 8, **properties: Any) -> bytes:
    header = ContentHeader(body_size=len(body), properties=Basic.Properties(**properties))
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)]
    return b"".join(marshal(frame, number) for frame in (method, header, *map(ContentBody, pieces)))


def pushed(tag: int, body: bytes = b"{}", number: int = OURS, key: str = "k", **options: Any) -> bytes:
    redelivered = options.pop("redelivered", False)
    method = Basic.Deliver(consumer_tag="c", delivery_tag=tag, redelivered=redelivered, exchange="e", routing_key=key)
    return content(method, body, number, **options)


def returned(message: Outgoing, number: int = OURS) -> bytes:
    method = Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange=message.exchange, routing_key=message.key)
    header = b"\x00\x3c\x00\x00" + len(message.body).to_bytes(8, "big") + message.properties
    frames = [
        marshal(method, number),
        b"\2" + number.to_bytes(2, "big") + len(header).to_bytes(4, "big") + header + b"\xce",
    ]
    return b"".join([*frames, marshal(ContentBody(message.body), number)]) if message.body else b"".join(frames)


def acked(tag: int, multiple: bool = False, number: int = OURS) -> bytes:
    return marshal(Basic.Ack(delivery_tag=tag, multiple=multiple), number)


def refused(tag: int, multiple: bool = False) -> bytes:
    return marshal(Basic.Nack(delivery_tag=tag, multiple=multiple))


def outgoing(id: str, key: str = "k", body: bytes = b"{}", exchange: str = "e") -> Outgoing:
    return Outgoing(exchange, key, _wire.pack(Envelope(id, key, body, 1)), body, id)


def close_of(cls: type[Any], number: int = OURS) -> bytes:
    return marshal(cls(reply_code=200, reply_text="", class_id=0, method_id=0), number)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def kinds(outcomes: list[AbeError | None]) -> list[type[AbeError] | None]:
    return [None if outcome is None else type(outcome) for outcome in outcomes]


foreign = st.sampled_from(
    [
        marshal(heartbeat.Heartbeat(), 0),
        marshal(commands.Connection.Unblocked(), 0),
        marshal(commands.Queue.DeclareOk(queue="q", message_count=1, consumer_count=0), OURS),
        content(Basic.GetOk(delivery_tag=9, exchange="", routing_key="q", message_count=0), b"x" * 30, OURS, piece=7),
        pushed(3, b"not ours", OTHERS),
        acked(5, number=OTHERS),
    ]
)


@unhurried
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 200, 5000, 9000]), st.booleans(), st.lists(foreign, max_size=2)), max_size=6
    ),
    st.lists(st.integers(0, 1 << 20), max_size=12),
)
def test_frames_of_ours_are_taken_and_the_rest_goes_on_however_the_bytes_are_split(
    script: list[tuple[int, bool, list[bytes]]], cuts: list[int]
) -> None:
    with closing(Line()) as line:
        stream, rest, want = b"", b"", []
        for tag, (size, redelivered, others) in enumerate(script, 1):
            body = random.Random(tag).randbytes(size)
            stream += pushed(tag, body, redelivered=redelivered, message_id=f"m{tag}") + b"".join(others)
            rest += b"".join(others)
            want.append((tag, "e", "k", Basic.Properties(message_id=f"m{tag}").marshal(), body, redelivered))
        line.tap._fed = line.loop.time() + 1000
        for piece in pieces(stream, cuts):
            line.feed(piece)
        assert line.got == want
        assert line.passed_on() == rest
        assert line.tap._pieces == []


def test_a_stream_is_read_alike_split_at_every_byte_and_byte_by_byte() -> None:
    stream = b"".join(
        (
            pushed(1, b"a" * 20, piece=6, headers={"n": "v"}),
            marshal(heartbeat.Heartbeat(), 0),
            pushed(2, b""),
            marshal(commands.Channel.FlowOk(active=True), OURS),
            acked(1),
            pushed(3, b"b"),
        )
    )
    rest = marshal(heartbeat.Heartbeat(), 0) + marshal(commands.Channel.FlowOk(active=True), OURS)
    ways = [[stream[:at], stream[at:]] for at in range(len(stream) + 1)]
    ways.append([stream[at : at + 1] for at in range(len(stream))])
    for way in ways:
        with closing(Line()) as line:
            line.tap._fed = line.loop.time() + 1000
            future = line.publish(outgoing("x"))
            for piece in way:
                line.feed(piece)
            assert [(tag, body) for tag, _, _, _, body, _ in line.got] == [(1, b"a" * 20), (2, b""), (3, b"b")]
            assert line.passed_on() == rest
            assert line.wait(future) == ()


def test_a_body_of_many_large_frames_comes_in_small_pieces(line: Line) -> None:
    body = random.Random(1).randbytes(1_000_000)
    stream = pushed(1, body, piece=131_064) + pushed(2, b"after")
    for at in range(0, len(stream), 1000):
        line.feed(stream[at : at + 1000])
    assert [each[4] for each in line.got] == [body, b"after"]


def test_contents_of_several_channels_may_be_interleaved(line: Line) -> None:
    line.open(OTHERS)
    ours, others = pushed(1, b"a" * 30, piece=10), pushed(1, b"b" * 30, OTHERS, piece=10)
    sizes = [pamqp_frame.frame_parts(ours[:7])]
    assert sizes

    def frames(data: bytes) -> Iterator[bytes]:
        while data:
            size = int.from_bytes(data[3:7], "big") + 8
            yield data[:size]
            data = data[size:]

    for one, other in zip(frames(ours), frames(others), strict=True):
        line.feed(one, other)
    assert [each[4] for each in line.got] == [b"a" * 30, b"b" * 30]


def test_what_is_published_can_be_read_by_pamqp(line: Line) -> None:
    bodies = [b"", b"x", b"y" * (FRAME_MAX - 8), b"z" * (FRAME_MAX - 7), b"w" * 3 * FRAME_MAX]
    line.publish(*(outgoing(f"m{i}", body=body) for i, body in enumerate(bodies)))
    assert all(len(marshal(frame)) <= FRAME_MAX for frame in line.sent() if isinstance(frame, ContentBody))
    line.publish(*(outgoing(f"m{i}", body=body) for i, body in enumerate(bodies)))
    found: list[bytes] = []
    for frame in line.sent():
        match frame:
            case Basic.Publish():
                assert (frame.exchange, frame.routing_key, frame.mandatory) == ("e", "k", True)
            case ContentHeader():
                assert frame.properties.message_id == f"m{len(found)}"
                found.append(b"")
            case _:
                found[-1] += frame.value
    assert found == bodies


def test_a_broker_without_a_longest_frame_gets_a_body_in_one() -> None:
    with closing(Line(frame_max=0)) as line:
        line.publish(outgoing("m", body=b"x" * 300_000))
        assert [len(frame.value) for frame in line.sent() if isinstance(frame, ContentBody)] == [300_000]


def test_confirms_settle_each_message_once(line: Line) -> None:
    first = line.publish(*(outgoing(f"a{i}") for i in range(4)))
    second = line.publish(*(outgoing(f"b{i}") for i in range(4)))
    line.feed(acked(2), acked(5), refused(3))
    assert not first.done()
    line.feed(acked(6, multiple=True))
    assert kinds(line.wait(first)) == [None, None, BackpressureError, None]
    line.feed(acked(6), acked(2, multiple=True), refused(8, multiple=True))
    assert kinds(line.wait(second)) == [None, None, BackpressureError, BackpressureError]
    assert not line.channel._pending


@unhurried
@given(st.integers(1, 30), st.data())
def test_confirms_may_come_in_any_order_singly_and_for_several(count: int, data: st.DataObject) -> None:
    with closing(Line()) as line:
        futures = [line.publish(outgoing(f"m{i}")) for i in range(count)]
        fate: dict[int, bool] = {}
        while len(fate) < count:
            tag = data.draw(st.sampled_from([each for each in range(1, count + 1) if each not in fate]))
            multiple, nack = data.draw(st.booleans()), data.draw(st.booleans())
            for each in range(1, tag + 1) if multiple else (tag,):
                fate.setdefault(each, nack)
            line.feed((refused if nack else acked)(tag, multiple))
            assert [future.done() for future in futures] == [each in fate for each in range(1, count + 1)]
        found = [bool(line.wait(future)) for future in futures]
        assert found == [fate[each] for each in range(1, count + 1)]


def test_returned_messages_are_told_from_those_beside_them(line: Line) -> None:
    messages = [
        outgoing("m", "k1"),
        outgoing("m", "k2"),
        outgoing("n", "k1"),
        outgoing("m", "k1", exchange="f"),
        outgoing("o", body=b""),
    ]
    future = line.publish(*messages)
    line.feed(*(returned(messages[i]) for i in (1, 3, 4)), acked(5, multiple=True))
    outcomes = line.wait(future)
    assert kinds(outcomes) == [None, UnroutableError, None, UnroutableError, UnroutableError]
    assert "'k2'" in str(outcomes[1])


def test_a_message_that_is_in_flight_twice_is_returned_twice(line: Line) -> None:
    future = line.publish(*[outgoing("m")] * 3)
    line.feed(returned(outgoing("m")), returned(outgoing("m")), acked(1), acked(2), acked(3))
    assert kinds(line.wait(future)) == [UnroutableError, UnroutableError, None]


def test_a_return_that_fits_nothing_is_forgotten(line: Line) -> None:
    future = line.publish(outgoing("m"))
    line.feed(returned(outgoing("another")), acked(1))
    assert line.wait(future) == ()
    assert not line.channel._returned


def test_when_the_connection_is_lost_only_what_was_not_confirmed_is_unknown(line: Line) -> None:
    future = line.publish(*(outgoing(f"m{i}") for i in range(4)))
    line.feed(acked(1), refused(3))
    ended: list[str | None] = []
    line.channel.ended = lambda: ended.append(line.channel.closed)
    line.feed(pushed(1))
    delivery, _ = line.channel.in_flight[1]
    line.tap.connection_lost(ConnectionResetError("reset"))
    outcomes = line.wait(future)
    assert kinds(outcomes) == [None, PublishUnknownError, BackpressureError, PublishUnknownError]
    assert "reset" in str(outcomes[1])
    assert (delivery.lost, line.channel.in_flight) == (True, {})
    assert ended == ["the connection was lost: reset"]
    line.sent()
    with pytest.raises(BackendConnectionError, match="reset"):
        line.publish(outgoing("later"))
    assert line.ack(1) == []


def test_nothing_is_written_to_a_transport_that_is_closing(line: Line) -> None:
    line.transport.closing = True
    with pytest.raises(BackendConnectionError):
        line.publish(outgoing("m"))
    assert line.sent() == []


def test_a_publisher_that_was_cancelled_does_not_disturb_the_others(line: Line) -> None:
    gone, stays = line.publish(outgoing("a")), line.publish(outgoing("b"))
    gone.cancel()
    line.feed(acked(2, multiple=True))
    assert line.wait(stays) == ()


@pytest.mark.parametrize(
    "garbage",
    [acked(1)[:-1] + b"\xcf", b"HTTP/1.1 400 Bad Request\r\n", b"\x09\0\1\0\0\0\0\xce"],
    ids=["end octet", "text", "kind"],
)
def test_what_is_not_amqp_ends_the_channels_at_once(line: Line, garbage: bytes) -> None:
    future = line.publish(outgoing("m"))
    line.feed(pushed(1), garbage)
    assert line.passed_on() == garbage
    assert kinds(line.wait(future)) == [PublishUnknownError]
    assert line.channel.closed == "the broker sent something that is not AMQP"
    assert line.transport.aborted
    line.feed(b"more")
    assert line.passed_on() == b"more"


def test_before_a_channel_is_open_what_is_not_amqp_is_left_to_aiormq(line: Line) -> None:
    line.tap.channels.clear()
    line.feed(b"HTTP/1.1 400 Bad Request\r\n")
    assert line.passed_on() == b"HTTP/1.1 400 Bad Request\r\n"
    assert not line.transport.aborted


def test_a_callback_that_raises_costs_one_message_its_place_and_nothing_else(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    take = line.channel._deliver
    assert take is not None

    def deliver(tag: int, *rest: Any) -> None:
        take(tag, *rest)
        if tag == 2:
            raise KeyError("of no use")

    line.channel._deliver = deliver
    future = line.publish(outgoing("m"))
    line.sent()
    line.feed(pushed(1), pushed(2), pushed(3), acked(1))
    (rejection,) = line.sent()
    assert isinstance(rejection, Basic.Reject)
    assert (rejection.delivery_tag, rejection.requeue) == (2, True)
    assert sorted(line.channel.in_flight) == [1, 3]
    assert line.wait(future) == ()
    assert "goes back to its queue" in caplog.text
    (ack,) = line.ack(1, 3)
    assert (ack.delivery_tag, ack.multiple) == (3, True)


@unhurried
@given(st.data())
def test_every_tag_is_settled_exactly_once_however_handlers_finish(data: st.DataObject) -> None:
    with closing(Line()) as line:
        unacked: set[int] = set()
        last = 0
        for _ in range(data.draw(st.integers(1, 12))):
            for _ in range(data.draw(st.integers(0, 4))):
                last += 1
                unacked.add(last)
                line.feed(pushed(last))
            chosen = data.draw(st.lists(st.integers(1, last + 1), max_size=6))
            back = data.draw(st.booleans()) and chosen[:1]
            expected = {tag for tag in chosen if tag in unacked}
            for tag in back or ():
                line.loop.run_until_complete(line.channel.requeue(tag))
            for frame in (*line.sent(), *line.ack(*chosen)):
                tags = {frame.delivery_tag}
                if isinstance(frame, Basic.Ack) and frame.multiple:
                    assert frame.delivery_tag in unacked
                    tags = {tag for tag in unacked if tag <= frame.delivery_tag}
                assert tags <= expected & unacked
                unacked -= tags
            assert unacked == set(line.channel.in_flight)


def test_acknowledgements_below_the_oldest_one_that_is_held_are_one_frame(line: Line) -> None:
    line.feed(*(pushed(tag) for tag in range(1, 11)))
    assert [(frame.delivery_tag, frame.multiple) for frame in line.ack(2, 1, 3)] == [(3, True)]
    assert [(frame.delivery_tag, frame.multiple) for frame in line.ack(6, 8)] == [(6, False), (8, False)]
    assert [(frame.delivery_tag, frame.multiple) for frame in line.ack(9, 4, 5)] == [(9, False), (5, True)]
    assert line.ack(4, 5, 99) == []


def test_settling_100000_one_by_one_walks_over_each_once(line: Line) -> None:
    class Counted(dict[int, Any]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            Counted.looks += 1
            return super().__contains__(key)

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("that walks over what was taken out")

    count = 100_000
    channel = line.channel
    channel.in_flight = Counted((tag, (Delivery(b"", None, 1, tag), cast("Any", None))) for tag in range(1, count + 1))
    channel._newest = count
    frames = 0
    for tag in range(1, count + 1):
        singly, through = channel._settled([tag])
        frames += len(singly) + bool(through)
    assert (frames, len(channel.in_flight)) == (count, 0)
    assert Counted.looks <= 2 * count + 1


def test_frames_that_are_taken_count_as_signs_of_life(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(line.loop, "time", lambda: now)
    alive = marshal(heartbeat.Heartbeat(), 0)
    line.feed(pushed(1))
    assert line.passed_on() == alive
    line.feed(pushed(2), acked(1))
    assert line.passed_on() == b""
    now += 1.5
    line.feed(pushed(3)[:20])
    assert line.passed_on() == b""  # a frame that never ends is no life
    line.feed(pushed(3)[20:])
    assert line.passed_on() == alive
    now += 1.5
    answer = marshal(Basic.QosOk())
    line.feed(pushed(4), answer)
    assert line.passed_on() == answer


def test_nothing_is_put_between_the_frames_of_the_login(line: Line) -> None:
    line.tap.channels.clear()
    start = marshal(commands.Connection.OpenOk(), 0)
    line.feed(start[:5])
    line.feed(start[5:])
    assert line.passed_on() == start
    assert line.said == [start]


Out = Callable[[_Writer], None]


@pytest.mark.parametrize(
    "out",
    [
        lambda writer: writer.write(close_of(commands.Channel.Close)),
        lambda writer: writer.write(marshal(commands.Channel.CloseOk())),
        lambda writer: writer.write(close_of(commands.Connection.Close, 0)),
        lambda writer: writer.write(marshal(commands.Connection.CloseOk(), 0)),
        lambda writer: writer.close(),
    ],
    ids=["channel close", "channel close-ok", "connection close", "connection close-ok", "socket"],
)
def test_nothing_of_ours_follows_a_close_of_aiormq_s(line: Line, out: Out) -> None:
    line.feed(pushed(1), pushed(2))
    assert line.ack(1)
    future = line.publish(outgoing("m"))
    out(line.writer)
    line.sent()
    assert line.ack(2) == []
    with pytest.raises(BackendConnectionError):
        line.publish(outgoing("n"))
    assert kinds(line.wait(future)) == [PublishUnknownError]


def test_a_close_of_another_channel_is_not_ours(line: Line) -> None:
    line.writer.write(close_of(commands.Channel.Close, OTHERS))
    line.writer.write(marshal(commands.Channel.CloseOk(), OTHERS))
    assert line.channel.closed is None


def test_what_is_on_its_way_when_a_channel_closes_is_swallowed_and_the_number_is_free_again(line: Line) -> None:
    line.tap._fed = line.loop.time() + 1000
    line.writer.write(close_of(commands.Channel.Close))
    closed = marshal(commands.Channel.CloseOk())
    line.feed(pushed(1), acked(7), closed)
    assert line.got == []
    assert line.passed_on() == closed
    assert OURS not in line.tap.channels
    line.open(OURS)
    line.feed(pushed(1, b"new"))
    assert [each[4] for each in line.got] == [b"new"]


def test_a_number_that_is_opened_anew_is_not_the_old_channel_s(line: Line) -> None:
    future = line.publish(outgoing("m"))
    line.feed(
        marshal(
            commands.Channel.Close(reply_code=404, reply_text="NOT_FOUND - no exchange 'e'", class_id=0, method_id=0)
        )
    )
    assert line.channel.closed == "the broker closed the channel: NOT_FOUND - no exchange 'e'"
    assert "NOT_FOUND" in str(line.wait(future)[0])
    line.passed_on()
    opened, mine = marshal(commands.Channel.OpenOk()), acked(1)
    line.feed(opened, mine)  # a channel of aiormq's own, whose confirms are aiormq's
    assert line.passed_on() == opened + mine


def test_what_the_broker_says_of_the_connection_is_told(line: Line) -> None:
    frames = [marshal(commands.Connection.Blocked(reason="memory"), 0), marshal(commands.Connection.Unblocked(), 0)]
    line.feed(*frames)
    assert line.said == frames
    assert line.passed_on() == b"".join(frames)
