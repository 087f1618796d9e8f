"""The attributes of queues: those of new ones, and which ones of existing queues are corrected or refused.

A queue that keeps messages for a shorter time, moves them elsewhere after a few deliveries, delays all of them or takes smaller ones would
silently break the contract. It is corrected if the group's tags say that it is ours. Any other is refused.
"""

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from abe.backends.message_queue.base.log import Log
from abe.errors import ConfigurationError, PermissionDeniedError
from abe_backend_sqs._errors import SqsError
from abe_backend_sqs._queue import Queue
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topology import FIFO
from abe_backend_sqs._wire import LIMIT

_log: Final = Log("abe.sqs")

_RETENTION: Final = 14 * 86_400
"""Seconds that SQS keeps a message at most."""
_BACKSTOP: Final = 1_000
"""Deliveries after which SQS itself dead-letters a message. The engine does so much earlier."""


class Fault(NamedTuple):
    """An attribute of a queue that would break the contract."""

    attribute: str
    found: str
    right: str
    why: str


async def wanted(settings: SqsSettings, name: str, dead: Queue | None) -> dict[str, str]:
    """Return the attributes of a new queue.

    Args:
        settings: The provider's settings.
        name: The queue's name.
        dead: The queue of its dead letters; None: it has none.
    """
    found = {"VisibilityTimeout": str(settings.visibility), "MessageRetentionPeriod": str(_RETENTION)}
    if dead is not None:
        found["RedrivePolicy"] = _redrive(await dead.arn())
    if name.endswith(FIFO):
        found["FifoQueue"] = "true"
    return found


async def check(queue: Queue, dead: Queue | None, *, ours: bool) -> None:
    """Correct attributes that would break the contract, if the queue is ours. Without the right to read them, nothing is checked.

    Raises:
        ConfigurationError: The queue is not ours, or may not be changed. The text says what is wrong, and what would be right.
    """
    try:
        found = await queue.attributes("All")
        arn = None if dead is None else await dead.arn()
    except PermissionDeniedError as exc:
        _log.debug("the attributes of the queue %s are not checked: %s", queue.name, exc)
        return
    faults = faults_of(queue.name, found, arn)
    if not faults:
        return
    if not ours or any(fault.attribute == "FifoQueue" for fault in faults):
        raise _refused(queue.name, faults)
    try:
        await queue.set_attributes({fault.attribute: fault.right for fault in faults})
    except (PermissionDeniedError, SqsError) as exc:
        raise _refused(queue.name, faults) from exc
    _log.warning("the queue %s was put right: %s", queue.name, _listed(faults))


def faults_of(name: str, attributes: Mapping[str, str], dead: str | None) -> list[Fault]:
    """Return the attributes of a queue that would break the contract. Pure.

    Args:
        name: The queue's name.
        attributes: Its attributes.
        dead: The ARN of the queue of its dead letters; None for a queue that has none.
    """
    fifo = name.endswith(FIFO)
    retention = _number(attributes, "MessageRetentionPeriod", _RETENTION) < _RETENTION
    delay = _number(attributes, "DelaySeconds", 0) > 0
    size = _number(attributes, "MaximumMessageSize", LIMIT) < LIMIT
    kind = (_of(attributes, "FifoQueue") == "true") is not fifo
    wrong = [
        ("MessageRetentionPeriod", retention, str(_RETENTION), "loses messages sooner"),
        ("DelaySeconds", delay, "0", "delays every message"),
        ("MaximumMessageSize", size, str(LIMIT), "refuses larger messages"),
        ("RedrivePolicy", *_redriven(attributes, dead), "moves messages away after some deliveries"),
        ("FifoQueue", kind, str(fifo).lower(), "is of the other kind"),
    ]
    return [Fault(what, _of(attributes, what), right, why) for what, found, right, why in wrong if found]


def _redriven(attributes: Mapping[str, str], dead: str | None) -> tuple[bool, str]:
    """Return whether the redrive policy moves messages to a wrong queue, or too soon; and the right policy."""
    right = "" if dead is None else _redrive(dead)
    if not (found := _of(attributes, "RedrivePolicy")):
        return False, right
    try:
        policy = json.loads(found)
        return policy["deadLetterTargetArn"] != dead or int(policy["maxReceiveCount"]) < _BACKSTOP, right
    except (ValueError, KeyError, TypeError):
        return True, right


def _redrive(dead: str) -> str:
    return json.dumps({"deadLetterTargetArn": dead, "maxReceiveCount": _BACKSTOP})


def _of(attributes: Mapping[str, str], name: str) -> str:
    return str(attributes.get(name, ""))


def _number(attributes: Mapping[str, str], name: str, default: int) -> int:
    text = _of(attributes, name)
    return int(text) if text.isdecimal() else default


def _listed(faults: list[Fault]) -> str:
    return "; ".join(
        f"{each.attribute} was {each.found!r}, which {each.why}, and must be {each.right or 'unset'!r}"
        for each in faults
    )


def _refused(name: str, faults: list[Fault]) -> ConfigurationError:
    return ConfigurationError(
        f"the queue {name!r} in SQS would break the contract: {_listed(faults)}. "
        f"Set its attributes so, or use another QUEUE_NAMESPACE"
    )
