"""The envelope's header as JSON, and dead letters made of what was stored.

The header is an array: ``[1, id, key, milliseconds]``, with the headers as a fifth element if there are any. The first element is the
version. A provider whose broker carries less beside a body adds elements at the end.
"""

from typing import Annotated, Final, Generic, TypeAlias, TypeVar

import msgspec

from abe.backends.message_queue.base.groups import DeadLetter
from abe.backends.message_queue.base.transport import Envelope, Metadata
from abe.errors import DecodeError

VERSION: Final = 1
MARK: Final = b"[%d," % VERSION
"""How a header of this version begins."""

UNKNOWN_VERSION: Final = "the envelope is of a version that is not known here"
"""The fault of a delivery whose header is of another version."""

Milliseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""Since the epoch, in a header."""


class Header(msgspec.Struct, array_like=True, frozen=True):
    """The elements that every header has."""

    version: int
    id: str
    key: str
    published_at: Milliseconds
    headers: dict[str, str] | None = None


_H = TypeVar("_H", bound=Header)

encode: Final = msgspec.json.Encoder().encode
"""Encodes the elements of a provider's header as JSON."""


def encode_header(envelope: Envelope) -> bytes:
    """Return the header of an envelope."""
    known = (VERSION, envelope.id, envelope.key, envelope.published_at)
    return encode(known if envelope.headers is None else (*known, envelope.headers))


class HeaderDecoder(Generic[_H]):
    """Reads headers, each a bytes object or a string.

    Args:
        kind: `Header`, or the provider's own with more elements.
    """

    def __init__(self, kind: type[_H]) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def __call__(self, header: bytes | str) -> _H:
        """Read a header.

        Raises:
            DecodeError: It has another version, or cannot be decoded.
        """
        try:
            if (header if isinstance(header, bytes) else header[: len(MARK)].encode()).startswith(MARK):
                return self._decode(header)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:  # the last: nested some thousand times
            raise DecodeError(f"the envelope cannot be read: {exc}") from exc
        raise DecodeError(UNKNOWN_VERSION)


def metadata_of(header: Header) -> Metadata:
    """Return the metadata of a header."""
    return Metadata(header.id, header.key, header.published_at, header.headers)


def dead_letter(
    metadata: Metadata, body: bytes, *, attempts: int, reason: str, error: str, dead_at: float
) -> DeadLetter:
    """Return a dead letter.

    Args:
        metadata: The message's metadata.
        body: The body.
        attempts: How often it was delivered.
        reason: Why it is dead.
        error: The last failure's traceback.
        dead_at: When it became a dead letter, in seconds since the epoch.
    """
    return DeadLetter(
        id=metadata.id,
        key=metadata.key,
        body=body,
        headers=metadata.headers or {},
        attempts=attempts,
        reason=reason,
        error=error,
        published_at=metadata.published_at / 1000,
        dead_at=dead_at,
    )
