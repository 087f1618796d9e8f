"""Every error that Abstract Backend raises: one tree, with one class for each way to handle an error.

    AbeError
    +-- ConfigurationError (ValueError)      a setting, variable, name or handler is wrong: fix the deployment or the code
    |   +-- InvalidNameError                 a key, group, header or pattern is not valid on every backend
    |   `-- PermissionDeniedError            the broker refuses the credentials, or an operation for lack of rights
    +-- BackendNotFoundError (RuntimeError)  no such provider is installed, or it cannot be imported
    +-- BackendConnectionError               the broker cannot be reached; a retry can help
    +-- BackendClosedError (RuntimeError)    used after close
    +-- EventLoopError (RuntimeError)        used from another event loop, or after fork
    +-- PublishRejectedError                 the message is certainly not in the broker
    |   +-- BackpressureError                a limit of the broker or of the group is reached; a retry can help
    |   `-- UnroutableError                  `mandatory`, and no group wants the key
    +-- PartialPublishError                  some messages of `publish_many` failed; lists them with their errors
    +-- PublishUnknownError                  the message may be in the broker; publish it again with the same id
    +-- PayloadError (ValueError)            the payload is not JSON
    |   +-- PayloadTooLargeError             it is larger than the backend declares
    |   `-- DecodeError                      a received body or envelope is malformed
    +-- GroupMissingError                    there is no such group: it was never declared, or it was deleted
    +-- LeaseLostError                       the broker has delivered the message again, or will
    +-- AlreadySettledError                  the message was settled the opposite way before
    `-- UnsupportedCapabilityError           the backend does not have this capability

Every error says whether the same call may succeed later (`retryable`) and whether the broker may have accepted the message
(`maybe_accepted`); the client library's own error, if there is one, is its ``__cause__``. Providers add subclasses, no second tree.
"""

from collections.abc import Sequence
from typing import Self


class AbeError(Exception):
    """The root of the tree."""

    retryable: bool = False
    """Whether the same call may succeed later, with nothing changed by the caller."""

    maybe_accepted: bool = False
    """Whether the broker may have accepted the message, so that publishing it again may duplicate it."""


class ConfigurationError(AbeError, ValueError):
    """A setting is wrong. The text names it, and describes a valid value."""


class InvalidNameError(ConfigurationError):
    """A key, group, namespace, header or pattern is not valid on every backend."""


class PermissionDeniedError(ConfigurationError):
    """The broker refuses the credentials, or an operation for lack of rights. A retry does not help."""


class BackendNotFoundError(AbeError, RuntimeError):
    """No installed provider has that name, or it could not be imported."""


class BackendConnectionError(AbeError):
    """The broker cannot be reached, or the connection to it broke."""

    retryable = True


class BackendClosedError(AbeError, RuntimeError):
    """The backend or the subscription was closed."""


class EventLoopError(AbeError, RuntimeError):
    """A backend was used outside of the event loop, or the process, in which it was first used."""


class PublishRejectedError(AbeError):
    """The message was not published: it is certainly absent."""

    retryable = True


class BackpressureError(PublishRejectedError):
    """The broker, or the group's `max_backlog`, is full. Nothing was stored, and nothing was dropped to make room."""


class UnroutableError(PublishRejectedError):
    """Groups exist, none of them wants the key, and the caller passed ``mandatory=True``."""

    retryable = False


class PublishUnknownError(AbeError):
    """The broker may or may not have the message: no confirm arrived. Publish again with the same id."""

    retryable = True
    maybe_accepted = True


class PartialPublishError(AbeError):
    """Some messages of a `publish_many` were not published; the others were.

    Attributes:
        failures: The position in the call and the error of each failed message.
        total: How many messages there were.
        retryable: Whether a retry can help all of the failed ones.
        maybe_accepted: Whether the broker may have any of the failed ones.
    """

    def __init__(self, failures: Sequence[tuple[int, AbeError]], total: int) -> None:
        shown = "; ".join(f"#{index}: {error}" for index, error in failures[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        super().__init__(f"{len(failures)} of {total} messages failed: {shown}{more}")
        self.failures: tuple[tuple[int, AbeError], ...] = tuple(failures)
        self.total = total
        self.retryable: bool = all(error.retryable for _, error in failures)
        self.maybe_accepted: bool = any(error.maybe_accepted for _, error in failures)

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[tuple[int, AbeError], ...], int]]:
        return type(self), (self.failures, self.total)


class PayloadError(AbeError, ValueError):
    """The payload is outside the JSON model. Nothing was sent."""


class PayloadTooLargeError(PayloadError):
    """The encoded payload is larger than the backend's `max_payload_bytes`. Nothing was sent."""


class DecodeError(PayloadError):
    """A received body or envelope cannot be decoded."""


class GroupMissingError(AbeError):
    """There is no such group: it was never declared, or it was deleted. `declare`, or a first consumer, makes it."""


class LeaseLostError(AbeError):
    """The lease on the message ran out before it was settled: another consumer may have it by now."""


class AlreadySettledError(AbeError):
    """The message was already settled, in the opposite way."""


class UnsupportedCapabilityError(AbeError):
    """The backend does not have this capability."""
