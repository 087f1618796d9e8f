"""What queues are made with, and what is put right, or refused, where they were made by somebody else.

A queue that keeps messages for a shorter time, moves them elsewhere after a few deliveries, delays all of them or takes smaller ones would
break what is promised without a word. Where the group's tags say that it is ours, it is put right. Any other is refused.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from abe.errors import ConfigurationError, PermissionDeniedError
from abe_backend_sqs._connection import Clients
from abe_backend_sqs._errors import SqsError, translated
from abe_backend_sqs._settings import SqsSettings
from abe_backend_sqs._topology import FIFO
from abe_backend_sqs._wire import LIMIT

_log: Final = logging.getLogger("abe.sqs")

_RETENTION: Final = 14 * 86_400
"""Seconds that SQS keeps a message at most."""
_BACKSTOP: Final = 1_000
"""Deliveries after which SQS itself buries a message. We count, and bury sooner."""


class Fault(NamedTuple):
    """An attribute of a queue that would break what is promised."""

    attribute: str
    found: str
    right: str
    why: str


class Attributes:
    """Looks at the attributes of queues.

    Args:
        settings: What queues are to be like.
        clients: Asks SQS.
    """

    def __init__(self, settings: SqsSettings, clients: Clients) -> None:
        self._settings = settings
        self._clients = clients

    async def new(self, name: str, dead_url: str | None) -> dict[str, str]:
        """Return what a queue is made with. One that is made first and described later would lose messages after four days in between.

        Args:
            name: Its name.
            dead_url: The address of the queue of its dead letters, where it has one.
        """
        found = {"VisibilityTimeout": str(self._settings.visibility), "MessageRetentionPeriod": str(_RETENTION)}
        if dead_url is not None:
            found["RedrivePolicy"] = _redrive(await self._arn(dead_url))
        if name.endswith(FIFO):
            found["FifoQueue"] = "true"
        return found

    async def check(self, name: str, url: str, dead_url: str | None, *, ours: bool) -> None:
        """Put right what would break what is promised, where the queue is ours. Who may not look takes it as it is.

        Raises:
            ConfigurationError: It is not, or may not be changed. The text says what is wrong, and what would be right.
        """
        client = await self._clients.calls()
        try:
            with translated(self._settings.address):
                reply: Mapping[str, Any] = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])
            dead = None if dead_url is None else await self._arn(dead_url)
        except PermissionDeniedError as exc:
            _log.debug("the queue %s is taken as it is: %s", name, exc)
            return
        found = cast("Mapping[str, str]", reply["Attributes"])
        faults = faults_of(name, found, dead)
        if not faults:
            return
        if ours and not any(fault.attribute == "FifoQueue" for fault in faults):
            try:
                with translated(self._settings.address):
                    right = {fault.attribute: fault.right for fault in faults}
                    await client.set_queue_attributes(QueueUrl=url, Attributes=right)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            except (PermissionDeniedError, SqsError) as exc:
                raise _refused(name, faults) from exc
            _log.warning("the queue %s was put right: %s", name, _listed(faults))
            return
        raise _refused(name, faults)

    async def _arn(self, url: str) -> str:
        client = await self._clients.calls()
        with translated(self._settings.address):
            found = await client.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])
            return found["Attributes"]["QueueArn"]


def faults_of(name: str, attributes: Mapping[str, str], dead: str | None) -> list[Fault]:
    """Return what is wrong with a queue. Pure.

    Args:
        name: Its name.
        attributes: What SQS says about it.
        dead: The ARN of the queue of its dead letters; None for a queue that has none.
    """
    wrong = [
        Fault(
            "MessageRetentionPeriod",
            _of(attributes, "MessageRetentionPeriod"),
            str(_RETENTION),
            "loses messages sooner",
        )
        if _number(attributes, "MessageRetentionPeriod", _RETENTION) < _RETENTION
        else None,
        Fault("DelaySeconds", _of(attributes, "DelaySeconds"), "0", "delays every message")
        if _number(attributes, "DelaySeconds", 0)
        else None,
        Fault("MaximumMessageSize", _of(attributes, "MaximumMessageSize"), str(LIMIT), "refuses larger messages")
        if _number(attributes, "MaximumMessageSize", LIMIT) < LIMIT
        else None,
        _redriven(attributes, dead),
        Fault("FifoQueue", _of(attributes, "FifoQueue"), str(name.endswith(FIFO)).lower(), "is of the other kind")
        if (_of(attributes, "FifoQueue") == "true") is not name.endswith(FIFO)
        else None,
    ]
    return [fault for fault in wrong if fault is not None]


def _redriven(attributes: Mapping[str, str], dead: str | None) -> Fault | None:
    """Return what is wrong with where SQS itself moves messages to, and after how many deliveries."""
    found = _of(attributes, "RedrivePolicy")
    if not found:
        return None
    right = "" if dead is None else _redrive(dead)
    try:
        policy = json.loads(found)
        same = policy["deadLetterTargetArn"] == dead and int(policy["maxReceiveCount"]) >= _BACKSTOP
    except (ValueError, KeyError, TypeError):
        same = False
    return None if same else Fault("RedrivePolicy", found, right, "moves messages away after some deliveries")


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
        f"there is a queue {name!r} in SQS that cannot keep what is promised: {_listed(faults)}. "
        f"Set its attributes so, or use another QUEUE_NAMESPACE"
    )
