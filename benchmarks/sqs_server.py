"""A small SQS in memory, in a process of its own: standard queues, in the JSON form of the protocol.

moto spends more time on a message than any client does, and would hide what is compared. This one knows the requests that
the two sides make, and nothing else: signatures, permissions, quotas, FIFO queues and durability are not there.
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import Any, Final, Self

Request = dict[str, Any]
Reply = Mapping[str, Any]

_MISSING: Final = "QueueDoesNotExist"
_QUERY_CODES: Final = {_MISSING: "AWS.SimpleQueueService.NonExistentQueue"}
"""What the SDK takes for an error's code, where it is not the error's name."""
_BAD_HANDLE: Final = "ReceiptHandleIsInvalid"
_handles: Final = count()


class RefusedError(Exception):
    """A request that is answered with an error."""


class Server:
    """The process, with its address; it ends with the block, or with whoever started it.

    Args:
        latency: Milliseconds that every answer takes besides.
    """

    version = "a small SQS in memory"

    def __init__(self, *, latency: float = 0.0) -> None:
        self._latency = latency
        self.url = ""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.sqs_server", "--latency", str(self._latency)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


class Message:
    """What a queue holds."""

    def __init__(self, entry: Request) -> None:
        self.body: str = entry["MessageBody"]
        self.attributes: Mapping[str, Any] = entry.get("MessageAttributes") or {}
        self.md5 = hashlib.md5(self.body.encode()).hexdigest()
        self.id = f"00000000-0000-4000-8000-{next(_handles):012d}"
        self.sent = str(int(time.time() * 1000))
        self.received = 0

    def delivered(self, handle: str) -> Reply:
        """Return it as an answer shows it."""
        delivery = {"MessageId": self.id, "ReceiptHandle": handle, "MD5OfBody": self.md5, "Body": self.body}
        told = {"ApproximateReceiveCount": str(self.received), "SentTimestamp": self.sent}
        return delivery | {"Attributes": told, "MessageAttributes": self.attributes}


class Queue:
    """Messages that wait, and those that somebody holds, by receipt handle."""

    def __init__(self) -> None:
        self.attributes: dict[str, str] = {"VisibilityTimeout": "30"}
        self.tags: dict[str, str] = {}
        self.waiting: deque[Message] = deque()
        self.held: dict[str, tuple[float, Message]] = {}
        self.delayed = 0
        self.arrived = asyncio.Event()

    def put(self, message: Message) -> None:
        """Have a message that can be received."""
        self.waiting.append(message)
        self.arrived.set()

    def send(self, entry: Request) -> Reply:
        """Store a message, delayed if it says so."""
        message = Message(entry)
        if delay := entry.get("DelaySeconds", 0):
            self.delayed += 1
            asyncio.get_running_loop().call_later(delay, self._due, message)
        else:
            self.put(message)
        return {"MessageId": message.id, "MD5OfMessageBody": message.md5}

    def take(self, most: int, timeout: float) -> Sequence[Reply]:
        """Hand out what waits, and hide it for that many seconds."""
        now = time.monotonic()
        if not self.waiting:
            for handle in [each for each, (until, _) in self.held.items() if until <= now]:
                self.put(self.held.pop(handle)[1])
        taken: list[Reply] = []
        while self.waiting and len(taken) < most:
            message, handle = self.waiting.popleft(), f"handle-{next(_handles)}"
            message.received += 1
            self.held[handle] = (now + timeout, message)
            taken.append(message.delivered(handle))
        return taken

    def next_return(self) -> float:
        """Return the seconds until a message that is held comes back."""
        return min((until for until, _ in self.held.values()), default=float("inf")) - time.monotonic()

    def delete(self, entry: Request) -> Reply:
        """Remove a message that is held."""
        if self.held.pop(entry["ReceiptHandle"], None) is None:
            raise RefusedError(_BAD_HANDLE)
        return {}

    def hide(self, entry: Request) -> Reply:
        """Hide a message that is held for another time."""
        if (found := self.held.pop(entry["ReceiptHandle"], None)) is None:
            raise RefusedError(_BAD_HANDLE)
        if seconds := entry["VisibilityTimeout"]:
            self.held[entry["ReceiptHandle"]] = (time.monotonic() + seconds, found[1])
        else:
            self.put(found[1])
        return {}

    def counted(self) -> dict[str, str]:
        """Return the attributes, the counts among them."""
        name = "ApproximateNumberOfMessages"
        counts = {name: len(self.waiting), f"{name}NotVisible": len(self.held), f"{name}Delayed": self.delayed}
        return self.attributes | {each: str(number) for each, number in counts.items()}

    def _due(self, message: Message) -> None:
        self.delayed -= 1
        self.put(message)


class Account:
    """All queues, and what may be asked of them."""

    def __init__(self) -> None:
        self.address = ""
        self._queues: dict[str, Queue] = {}
        one: Mapping[str, Callable[[Queue, Request], Reply]] = {
            "SendMessage": Queue.send,
            "DeleteMessage": Queue.delete,
            "ChangeMessageVisibility": Queue.hide,
        }
        self._operations: dict[str, Callable[[Request], Reply]] = {
            "CreateQueue": self._create,
            "ListQueues": self._list,
            "GetQueueUrl": self._locate,
            "DeleteQueue": self._delete,
            "SetQueueAttributes": lambda request: self._update(self._queue(request).attributes, request["Attributes"]),
            "GetQueueAttributes": self._attributes,
            "TagQueue": lambda request: self._update(self._queue(request).tags, request["Tags"]),
            "ListQueueTags": lambda request: {"Tags": self._queue(request).tags},
        }
        for name, act in one.items():
            self._operations[name] = lambda request, act=act: act(self._queue(request), request)
            self._operations[f"{name}Batch"] = lambda request, act=act: self._batch(act, request)

    async def answer(self, operation: str, request: Request) -> Reply:
        """Carry out a request.

        Raises:
            RefusedError: It cannot be; the text is the error's name.
        """
        if operation == "ReceiveMessage":
            return await self._receive(request)
        if operation not in self._operations:
            raise RefusedError("UnsupportedOperation")
        return self._operations[operation](request)

    async def _receive(self, request: Request) -> Reply:
        queue = self._queue(request)
        most = request.get("MaxNumberOfMessages", 1)
        timeout = request.get("VisibilityTimeout", int(queue.attributes["VisibilityTimeout"]))
        deadline = time.monotonic() + request.get("WaitTimeSeconds", 0)
        while not (found := queue.take(most, timeout)) and (left := deadline - time.monotonic()) > 0:
            queue.arrived.clear()
            try:
                async with asyncio.timeout(min(left, queue.next_return())):
                    await queue.arrived.wait()
            except TimeoutError:
                continue
        return {"Messages": found} if found else {}

    def _queue(self, request: Request) -> Queue:
        name = request.get("QueueName") or request["QueueUrl"].rpartition("/")[2]
        if name not in self._queues:
            raise RefusedError(_MISSING)
        return self._queues[name]

    def _create(self, request: Request) -> Reply:
        queue = self._queues.setdefault(request["QueueName"], Queue())
        self._update(queue.attributes, request.get("Attributes", {}))
        return self._locate(request)

    def _list(self, request: Request) -> Reply:
        prefix = request.get("QueueNamePrefix", "")
        return {"QueueUrls": [f"{self.address}/0/{name}" for name in self._queues if name.startswith(prefix)]}

    def _locate(self, request: Request) -> Reply:
        self._queue(request)
        return {"QueueUrl": f"{self.address}/0/{request['QueueName']}"}

    def _delete(self, request: Request) -> Reply:
        self._queue(request)
        del self._queues[request["QueueUrl"].rpartition("/")[2]]
        return {}

    def _attributes(self, request: Request) -> Reply:
        name = request["QueueUrl"].rpartition("/")[2]
        found = self._queue(request).counted() | {"QueueArn": f"arn:aws:sqs:us-east-1:0:{name}"}
        wanted = request.get("AttributeNames", ())
        return {"Attributes": {each: value for each, value in found.items() if each in wanted or "All" in wanted}}

    def _batch(self, act: Callable[[Queue, Request], Reply], request: Request) -> Reply:
        queue = self._queue(request)
        done: list[Reply] = []
        failed: list[Reply] = []
        for entry in request["Entries"]:
            try:
                done.append({"Id": entry["Id"], **act(queue, entry)})
            except RefusedError as exc:
                failed.append({"Id": entry["Id"], "Code": str(exc), "SenderFault": True})
        return {"Successful": done, "Failed": failed}

    @staticmethod
    def _update(values: dict[str, str], more: Mapping[str, str]) -> Reply:
        values.update(more)
        return {}


async def _serve(account: Account, latency: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection, one after the other."""
    try:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
            body = await reader.readexactly(int(headers["content-length"]))
            if latency:
                await asyncio.sleep(latency / 1000)
            writer.write(await _answer(account, headers["x-amz-target"].rpartition(".")[2], body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _answer(account: Account, operation: str, body: bytes) -> bytes:
    status, more = "200 OK", ""
    try:
        reply = await account.answer(operation, json.loads(body))
    except RefusedError as exc:
        status, reply = "400 Bad Request", {"__type": f"com.amazonaws.sqs#{exc}", "message": f"{operation}: {exc}"}
        more = f"x-amzn-query-error: {_QUERY_CODES.get(str(exc), exc)};Sender\r\n"
    text = json.dumps(reply).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/x-amz-json-1.0\r\n{more}Content-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


async def main() -> None:
    """Serve on a free port, whose address is printed, until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds that every answer takes besides")
    options = parser.parse_args()
    account, ended = Account(), asyncio.Event()
    connections: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(account, options.latency, reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 20)
    account.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    print(account.address, flush=True)
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
