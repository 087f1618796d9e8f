"""Checks the answers of SQS and SNS before the client reads them. Pure.

The client accepts anything with status 200 as an answer: a page of a captive portal or a proxy, an empty body. As SQS leaves out members
that would be empty, such an answer would mean "no queues", "no tags" or "no messages" to it. So an answer without the expected member
must at least have the headers of SQS.

A malformed message of an answer gets a fault; the other messages are delivered all the same.
"""

import binascii
import json
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec

FAULT: Final = "abe-fault"
"""A system attribute that is added to a malformed message: which of its parts are malformed."""

_MEMBERS: Final[Mapping[str, Mapping[str, type]]] = {
    "ListQueues": {"QueueUrls": list},
    "ListQueueTags": {"Tags": dict},
    "ReceiveMessage": {"Messages": list},
}
"""Members that SQS leaves out where they would be empty."""

_REQUIRED: Final[Mapping[str, Mapping[str, type]]] = {
    "CreateQueue": {"QueueUrl": str},
    "GetQueueUrl": {"QueueUrl": str},
    "GetQueueAttributes": {"Attributes": dict},
}

_OUTCOMES: Final = frozenset({"SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"})
_REQUEST_ID: Final = "x-amzn-requestid"
_JSON: Final = "application/x-amz-json-"


class _Attribute(msgspec.Struct):
    DataType: str | None = None
    StringValue: str | None = None
    BinaryValue: str | None = None


class _Message(msgspec.Struct):
    ReceiptHandle: str
    MessageId: str
    Body: str = ""
    Attributes: dict[str, str] | None = None
    MessageAttributes: dict[str, _Attribute] | None = None


class _Received(msgspec.Struct):
    Messages: list[_Message]


_received: Final = msgspec.json.Decoder(_Received).decode
_decode: Final = msgspec.json.Decoder().decode


class FormError(Exception):
    """An answer that is not one of the service."""


def checked(service: str, operation: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the body of a successful answer as the client may read it.

    Args:
        service: ``sqs`` or ``sns``.
        operation: The operation that was requested.
        headers: The answer's headers, by names in lower case.
        body: The answer's body.

    Raises:
        FormError: An intermediary has answered in the service's place, or the answer is cut off.
    """
    if service == "sns":
        if f"<{operation}Response".encode() not in body:
            raise FormError(f"{operation} was answered by something that is not SNS")
        return body
    if not body and _own(headers) and not _says_something(operation):
        return body  # of an operation without a result
    found = _load(operation, body)
    if not isinstance(found, dict):
        raise FormError(f"{operation} was answered by JSON that is no object")
    answer = cast("dict[str, Any]", found)
    _check_members(operation, answer, _own(headers))
    return _mended(answer, body) if operation == "ReceiveMessage" and answer.get("Messages") else body


def _load(operation: str, body: bytes) -> object:
    try:
        return _decode(body)
    except (msgspec.MsgspecError, RecursionError):
        try:
            return json.loads(body)  # accepts half of a surrogate pair, too, which is a fault of one message
        except (ValueError, RecursionError) as exc:
            raise FormError(f"{operation} was answered by something that is not JSON") from exc


def _says_something(operation: str) -> bool:
    return operation in _MEMBERS or operation in _REQUIRED or operation in _OUTCOMES


def _own(headers: Mapping[str, str]) -> bool:
    """Whether the headers are those of SQS, or of something that speaks its protocol."""
    return _REQUEST_ID in headers or headers.get("content-type", "").startswith(_JSON)


def _check_members(operation: str, answer: Mapping[str, Any], own: bool) -> None:
    for name, kind in {**_MEMBERS.get(operation, {}), **_REQUIRED.get(operation, {})}.items():
        value = answer.get(name)
        if value is None and operation in _MEMBERS and own:
            continue
        if not isinstance(value, kind):
            raise FormError(f"the answer to {operation} has no {name}")
    if operation in _OUTCOMES:
        _check_outcomes(operation, answer)
    elif not _says_something(operation) and not own:
        raise FormError(f"the answer to {operation} does not come from SQS")
    if operation == "ListQueues":
        _check_listing(answer)
    elif operation in ("ListQueueTags", "GetQueueAttributes"):
        texts = cast("dict[str, Any]", answer.get("Tags" if operation == "ListQueueTags" else "Attributes") or {})
        if not all(isinstance(value, str) for value in texts.values()):
            raise FormError(f"the answer to {operation} holds a value that is not text")


def _check_listing(answer: Mapping[str, Any]) -> None:
    token = answer.get("NextToken")
    urls = answer.get("QueueUrls") or ()
    if not all(isinstance(url, str) for url in urls) or not (token is None or isinstance(token, str)):
        raise FormError("the answer to ListQueues holds a value that is not text")


def _check_outcomes(operation: str, answer: Mapping[str, Any]) -> None:
    lists = [answer.get(name) for name in ("Successful", "Failed")]
    if all(each is None for each in lists) or not all(each is None or isinstance(each, list) for each in lists):
        raise FormError(f"the answer to {operation} has no outcomes of the entries")
    entries: list[Any] = [entry for each in lists for entry in each or ()]
    if not all(isinstance(entry, dict) and isinstance(cast("Any", entry).get("Id"), str) for entry in entries):
        raise FormError(f"the answer to {operation} has entries without an id")


def _mended(answer: Mapping[str, Any], body: bytes) -> bytes:
    """Return a body that the client can read: a malformed message is mended, and gets a fault."""
    try:
        for message in _received(body).Messages:
            for attribute in (message.MessageAttributes or {}).values():
                if attribute.BinaryValue is not None:
                    binascii.a2b_base64(attribute.BinaryValue)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        messages = [mended for each in answer["Messages"] if (mended := _mend(each)) is not None]
        return msgspec.json.encode({"Messages": messages})
    return body


def _mend(message: Any) -> Mapping[str, Any] | None:
    """Return a well-formed message; None without a receipt handle: it is redelivered when its lease runs out."""
    if not isinstance(message, dict):
        return None
    given = cast("dict[str, Any]", message)
    handle, id, text = given.get("ReceiptHandle"), given.get("MessageId"), given.get("Body")
    if not _is_text(handle):
        return None
    faults: list[str] = []
    system = {name: str(each) for name, each in _kept(given, "Attributes", _is_plain, faults).items()}
    attributes = _kept(given, "MessageAttributes", _is_attribute, faults)
    if not _is_text(id):
        faults.append("MessageId")
        id = str(handle)[:100]
    if text is not None and not _is_text(text):
        faults.append("Body")
        text = str(text).encode(errors="replace").decode()
    if faults:
        system[FAULT] = ", ".join(faults)
    return {
        "ReceiptHandle": handle,
        "MessageId": id,
        "Body": text or "",
        "Attributes": system,
        "MessageAttributes": attributes,
    }


def _kept(message: Mapping[str, Any], member: str, good: Any, faults: list[str]) -> dict[str, Any]:
    """Return those of a member's values that can be read, and add the others to `faults`."""
    value = message.get(member)
    if value is None:
        return {}
    if not isinstance(value, dict):
        faults.append(member)
        return {}
    values = cast("dict[str, Any]", value)
    faults += [f"{member}.{name}" for name, each in values.items() if not good(each)]
    return {name: each for name, each in values.items() if _is_text(name) and good(each)}


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float) or _is_text(value)


def _is_attribute(value: object) -> bool:
    try:
        attribute = msgspec.convert(value, _Attribute)
        binascii.a2b_base64(attribute.BinaryValue or "")
    except (msgspec.MsgspecError, ValueError):
        return False
    return all(each is None or _is_text(each) for each in (attribute.DataType, attribute.StringValue))
