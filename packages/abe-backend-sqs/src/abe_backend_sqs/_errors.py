"""SQS's errors made ours: the only module that knows the client's exceptions."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

import botocore.exceptions as native

from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    LeaseLostError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
)


class SqsError(AbeError):
    """SQS answered with an error that nothing here expects."""


class QueueMissingError(BackendConnectionError):
    """There is no such queue or topic, or not any more."""


class EntryRefusedError(PublishRejectedError):
    """SQS refuses this message as it is. It was not stored, and would not be next time."""

    retryable = False


_BY_CODE: Final[dict[str, type[AbeError]]] = {
    **dict.fromkeys(
        (
            "AccessDenied",
            "AccessDeniedException",
            "AuthFailure",
            "AuthorizationError",
            "AuthorizationErrorException",
            "ExpiredToken",
            "ExpiredTokenException",
            "IncompleteSignature",
            "InvalidAccessKeyId",
            "InvalidClientTokenId",
            "KMS.AccessDeniedException",
            "KmsAccessDenied",
            "MissingAuthenticationToken",
            "NotAuthorized",
            "OptInRequired",
            "SignatureDoesNotMatch",
            "UnrecognizedClientException",
        ),
        PermissionDeniedError,
    ),
    **dict.fromkeys(
        (
            "KmsThrottled",
            "OverLimit",
            "QueueDeletedRecently",
            "RequestLimitExceeded",
            "RequestThrottled",
            "RequestThrottledException",
            "ServiceUnavailable",
            "SlowDown",
            "Throttled",
            "ThrottledException",
            "Throttling",
            "ThrottlingException",
            "TooManyRequestsException",
        ),
        BackendConnectionError,
    ),
    **dict.fromkeys(("QueueDoesNotExist", "NonExistentQueue", "NotFound", "NotFoundException"), QueueMissingError),
    **dict.fromkeys(("ReceiptHandleIsInvalid", "MessageNotInflight"), LeaseLostError),
    "QueueNameExists": ConfigurationError,
}

_BY_TYPE: Final[tuple[tuple[type[BaseException], type[AbeError]], ...]] = (
    (native.NoCredentialsError, PermissionDeniedError),
    (native.PartialCredentialsError, PermissionDeniedError),
    (native.CredentialRetrievalError, BackendConnectionError),
    (native.TokenRetrievalError, PermissionDeniedError),
    (native.UnauthorizedSSOTokenError, PermissionDeniedError),
    (native.SSLError, ConfigurationError),
    (native.HTTPClientError, BackendConnectionError),
    (native.ConnectionError, BackendConnectionError),
    (native.NoRegionError, ConfigurationError),
    (native.ProfileNotFound, ConfigurationError),
    (native.BotoCoreError, ConfigurationError),
    (OSError, BackendConnectionError),
)

_UNSENT: Final = (
    native.ConnectTimeoutError,
    native.EndpointConnectionError,
    native.ProxyConnectionError,
    native.SSLError,
    ConnectionRefusedError,
)
"""What certainly happened before the request left."""

_HINTS: Final[dict[type[AbeError], str]] = {
    PermissionDeniedError: "check the credentials, and what they allow",
    QueueMissingError: "it was deleted, or never made",
}

Failure = tuple[type[Exception], ...]
CLIENT_ERRORS: Final[Failure] = (native.ClientError, native.BotoCoreError, OSError)
"""All that the client may raise."""


def code(error: BaseException) -> str:
    """Return SQS's code of an error, without its namespace; empty where it is another error."""
    if not isinstance(error, native.ClientError):
        return ""
    found = cast("Mapping[str, Mapping[str, str]]", error.response).get("Error", {}).get("Code", "")
    return _plain(found)


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's."""
    kind = _BY_CODE.get(code(exc)) if isinstance(exc, native.ClientError) else None
    if kind is None and isinstance(exc, native.ClientError):
        kind = BackendConnectionError if _status(exc) >= 500 else SqsError
    kind = kind or next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), SqsError)
    hint = _HINTS.get(kind, "")
    return kind(f"SQS at {address}: {exc}{hint and f' ({hint})'}")


def translate_send(exc: BaseException, address: str) -> AbeError:
    """The same for a request that stores messages: says whether it may have."""
    error = translate(exc, address)
    if isinstance(error, SqsError):
        return EntryRefusedError(str(error))
    unknown = isinstance(exc, native.ClientError) and _status(exc) >= 500 and code(exc) not in _BY_CODE
    unsent = isinstance(exc, (native.ClientError, *_UNSENT))
    if unknown or (isinstance(error, BackendConnectionError) and not unsent):
        return PublishUnknownError(f"{error}, before the confirm came")
    return error


def translate_entry(failed: Mapping[str, Any], address: str) -> AbeError:
    """Return our error for the failed entry of a batch."""
    name = _plain(str(failed.get("Code", "")))
    text = f"SQS at {address}: {name}: {failed.get('Message', '')}"
    kind = _BY_CODE.get(name)
    if kind is None:
        kind = EntryRefusedError if failed.get("SenderFault") else BackendConnectionError
    return kind(text)


@contextmanager
def translated(address: str) -> Generator[None]:
    """Turn the client's errors into ours.

    Raises:
        AbeError: By the tables above.
    """
    try:
        yield
    except CLIENT_ERRORS as exc:
        raise translate(exc, address) from exc


def _plain(name: str) -> str:
    return name.removeprefix("AWS.SimpleQueueService.").rpartition("#")[2]


def _status(exc: native.ClientError) -> int:
    metadata = cast("Mapping[str, Any]", exc.response).get("ResponseMetadata", {})
    return int(metadata.get("HTTPStatusCode", 0))
