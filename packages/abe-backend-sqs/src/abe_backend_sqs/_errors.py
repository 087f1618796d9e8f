"""Translates the errors of SQS and SNS into ours: the only module that knows the client's exceptions."""

import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final, cast

import botocore.exceptions as native
from aiohttp import ClientConnectorCertificateError, ClientConnectorError
from botocore.parsers import ResponseParserError

from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    LeaseLostError,
    PermissionDeniedError,
    PublishRejectedError,
    PublishUnknownError,
)
from abe_backend_sqs._answers import FormError


class SqsError(AbeError):
    """SQS answered with an error that has no translation."""


class QueueMissingError(BackendConnectionError):
    """The queue or topic does not exist, or not any more."""


class ThrottledError(BackendConnectionError):
    """SQS throttles requests, or is still carrying out an earlier one."""


class QueueExistsError(ConfigurationError):
    """A queue of this name exists, with other attributes."""


class ClockError(BackendConnectionError):
    """A request was refused, as it was signed with a time that is not AWS's.

    A retry succeeds if the process or its machine slept between the signature and the request, or once the clock is set right after a
    long sleep, so it is retried like a lost connection. If the clock stays wrong, the text of the final error says so.
    """


class EntryRefusedError(PublishRejectedError):
    """SQS refuses this message as it is. It was not stored, and a retry would not help."""

    retryable = False


_CODES: Final[Mapping[type[AbeError], str]] = {
    PermissionDeniedError: """
        AccessDenied AccessDeniedException AuthFailure AuthorizationError AuthorizationErrorException ExpiredToken ExpiredTokenException
        IncompleteSignature IncompleteSignatureException InvalidAccessKeyId InvalidClientTokenId InvalidSignatureException
        KMS.AccessDeniedException KMSAccessDenied KMSAccessDeniedException KmsAccessDenied MissingAuthenticationToken
        MissingAuthenticationTokenException NotAuthorized OptInRequired SignatureDoesNotMatch UnrecognizedClientException
        """,
    ThrottledError: """
        BandwidthLimitExceeded ConcurrentAccess EC2ThrottledException KMS.ThrottlingException KMSThrottling KMSThrottlingException
        KmsThrottled LimitExceededException OverLimit PriorRequestNotComplete ProvisionedThroughputExceededException QueueDeletedRecently
        RequestLimitExceeded RequestThrottled RequestThrottledException SlowDown Throttled ThrottledException Throttling
        ThrottlingException TooManyRequestsException TransactionInProgressException
        """,
    ClockError: "RequestExpired RequestInTheFuture RequestTimeTooSkewed",
    QueueMissingError: "QueueDoesNotExist NonExistentQueue NotFound NotFoundException",
    LeaseLostError: "ReceiptHandleIsInvalid MessageNotInflight",
    # An error of the queue's key, or of its endpoint, affects every message until it is corrected.
    ConfigurationError: "InvalidAddress InvalidSecurity UnsupportedOperation",
    QueueExistsError: "QueueAlreadyExists QueueNameExists",
}
_BY_CODE: Final[dict[str, type[AbeError]]] = {
    **{code: kind for kind, codes in _CODES.items() for code in codes.split()},
    **{
        f"{kms}{what}{suffix}": ConfigurationError
        for kms in ("KMS", "Kms", "KMS.")
        for what in ("Disabled", "InvalidKeyUsage", "InvalidState", "NotFound", "OptInRequired")
        for suffix in ("", "Exception")
    },
}

_TIMED_OUT: Final = ("RequestTimeout", "RequestTimeoutException")
"""A server timed out waiting for the request, or for another server: it may have received all of it."""

_SIGNATURES: Final = (
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidSignatureException",
    "SignatureDoesNotMatch",
)
"""The texts of these repeat headers of the request, such as its session token, or what was signed."""

_SKEWED: Final = ("Signature expired", "Signature not yet current")
"""How the text of a refused signature begins if the time is the reason."""

Failure = tuple[type[Exception], ...]
GARBLED: Final[Failure] = (FormError, ResponseParserError, KeyError)
"""The errors of an answer that is not one of the service (a proxy's page, an empty body)."""

_BY_TYPE: Final[tuple[tuple[type[BaseException], type[AbeError]], ...]] = (
    (native.NoCredentialsError, PermissionDeniedError),
    (native.PartialCredentialsError, PermissionDeniedError),
    (native.CredentialRetrievalError, BackendConnectionError),
    (native.TokenRetrievalError, PermissionDeniedError),
    (native.UnauthorizedSSOTokenError, PermissionDeniedError),
    (native.SSLError, BackendConnectionError),
    (native.HTTPClientError, BackendConnectionError),
    (native.ConnectionError, BackendConnectionError),
    (native.NoRegionError, ConfigurationError),
    (native.ProfileNotFound, ConfigurationError),
    (native.BotoCoreError, ConfigurationError),
    *((each, BackendConnectionError) for each in GARBLED),
    (OSError, BackendConnectionError),
)

_UNSENT: Final = (
    native.ConnectTimeoutError,
    native.CredentialRetrievalError,
    native.ProxyConnectionError,
    native.SSLError,
    ConnectionRefusedError,
)
"""Errors that certainly came before the request was sent."""

_NO_CREDENTIALS: Final = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; an emulator takes any values"
_REGION: Final = "set AWS_REGION to a region such as eu-central-1"
_HINTS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (native.NoCredentialsError, _NO_CREDENTIALS),
    (native.PartialCredentialsError, _NO_CREDENTIALS),
    (native.NoRegionError, f"{_REGION}, or AWS_PROFILE to a profile that has one"),
    (native.InvalidRegionError, _REGION),
    (native.ProfileNotFound, "set AWS_PROFILE to one of those in the SDK's configuration files, or leave it out"),
    (native.EndpointConnectionError, "check AWS_REGION, or AWS_ENDPOINT_URL_SQS where it is set, and the network"),
    (native.ConnectTimeoutError, "check AWS_REGION, or AWS_ENDPOINT_URL_SQS where it is set, and the network"),
    (ClockError, "set this machine's clock right"),
    (PermissionDeniedError, "check the credentials, and what they allow"),
    (QueueMissingError, "it was deleted, or never created"),
)
"""Remedies, by the client's error or by ours; the first that fits."""

_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
"""TLS's names for an answer without TLS."""
_WANTS_TLS: Final = ("plain http request", "client sent an http request to an https server")
"""How servers answer a request without TLS."""

CLIENT_ERRORS: Final[Failure] = (native.ClientError, native.BotoCoreError, *GARBLED, OSError)
"""All exceptions of the client."""


def code(error: BaseException) -> str:
    """Return SQS's code of an error, without its namespace; empty for other errors."""
    if not isinstance(error, native.ClientError):
        return ""
    found = cast("Mapping[str, Mapping[str, str]]", error.response).get("Error", {}).get("Code", "")
    return _plain(found)


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's. As that is the cause of ours, its text loses what must not be shown."""
    if isinstance(exc, native.ClientError):
        kind = _answered(exc)
        if code(exc) in _SIGNATURES:
            _conceal(exc)
    else:
        if isinstance(exc, native.ProxyConnectionError):
            _forget_proxy(exc)
        kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), SqsError)
    if hint := _about_tls(exc):
        kind = ConfigurationError
    else:
        hint = _hint(exc, kind)
    what = f"the answer is not one of its own: {exc!r}" if isinstance(exc, GARBLED) else exc
    return kind(f"SQS at {address}: {what}{hint and f' ({hint})'}")


def _about_tls(exc: BaseException) -> str:
    """Return the remedy if one side speaks TLS and the other does not, or the certificate is not for this address; else empty."""
    if isinstance(exc, native.SSLError):
        if isinstance(exc.kwargs.get("error"), ClientConnectorCertificateError):
            return "AWS_ENDPOINT_URL_SQS must name a host of the certificate, and AWS_CA_BUNDLE its authority, if that is not public"
        if any(name in str(exc) for name in _NO_TLS):
            return "the server there does not use TLS: AWS_ENDPOINT_URL_SQS must begin with http://"
    if isinstance(exc, native.ClientError) and any(text in _text(exc).lower() for text in _WANTS_TLS):
        return "the server there uses TLS: AWS_ENDPOINT_URL_SQS must begin with https://"
    return ""


def _hint(exc: BaseException, kind: type[AbeError]) -> str:
    if isinstance(exc, native.ConnectionClosedError) and str(exc.kwargs.get("endpoint_url", "")).startswith("http:"):
        return "if this persists, the server there may use TLS: AWS_ENDPOINT_URL_SQS must begin with https:// then"
    return next((hint for known, hint in _HINTS if isinstance(exc, known) or issubclass(kind, known)), "")


def translate_send(exc: BaseException, address: str) -> AbeError:
    """Translate an error of a request that stores messages; `PublishUnknownError` if it may have stored them."""
    error = translate(exc, address)
    if isinstance(error, SqsError):
        return EntryRefusedError(str(error))
    finished = not _unfinished(exc) if isinstance(exc, native.ClientError) else _unsent(exc)
    unknown = isinstance(error, BackendConnectionError) and not finished
    return PublishUnknownError(f"{error}, before the confirm came") if unknown else error


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


def _answered(exc: native.ClientError) -> type[AbeError]:
    """Return the class of our error for an error that the service answered with."""
    name = code(exc)
    if name in _SIGNATURES and _text(exc).startswith(_SKEWED):
        return ClockError
    if (known := _BY_CODE.get(name)) is not None:
        return known
    if _status(exc) == HTTPStatus.TOO_MANY_REQUESTS:
        return ThrottledError
    return BackendConnectionError if _unfinished(exc) else SqsError


def _unfinished(exc: native.ClientError) -> bool:
    """Whether the server, or one before it, gave up in the middle: the request may have been carried out."""
    status = _status(exc)
    if code(exc) in _BY_CODE or status == HTTPStatus.TOO_MANY_REQUESTS:
        return False
    # A code that is a number is the status of an answer of an intermediary, not of SQS.
    return (
        code(exc).isdigit()
        or code(exc) in _TIMED_OUT
        or status == HTTPStatus.REQUEST_TIMEOUT
        or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    )


def _conceal(exc: native.ClientError) -> None:
    """Replace the text that AWS sent: as the cause of our error it would be logged with it."""
    response = cast("dict[str, Any]", exc.response)
    text = (
        "the signature is refused; AWS_SECRET_ACCESS_KEY must be the access key's, AWS_REGION the region of the address, and no proxy may "
        "change requests"
    )
    exc.args = (f"An error occurred ({code(exc)}) when calling the {exc.operation_name} operation: {text}",)
    exc.response = cast("Any", {**response, "Error": {**response["Error"], "Message": text}})


def _forget_proxy(exc: native.ProxyConnectionError) -> None:
    """Drop the error of the HTTP client, whose text has the proxy's URL with its password."""
    exc.__cause__ = exc.__context__ = None
    cast("dict[str, Any]", exc.kwargs).pop("error", None)


def _unsent(exc: BaseException) -> bool:
    """Whether the error certainly came before the request was sent. The client raises the same class for a connection that was reset, and
    for one that could not be made."""
    if isinstance(exc, native.EndpointConnectionError):
        return isinstance(exc.kwargs.get("error"), ClientConnectorError | socket.gaierror)
    return isinstance(exc, _UNSENT)


def _plain(name: str) -> str:
    return name.removeprefix("AWS.SimpleQueueService.").rpartition("#")[2]


def _status(exc: native.ClientError) -> int:
    metadata = cast("Mapping[str, Any]", exc.response).get("ResponseMetadata", {})
    return int(metadata.get("HTTPStatusCode", 0))


def _text(exc: native.ClientError) -> str:
    return str(cast("Mapping[str, Mapping[str, str]]", exc.response).get("Error", {}).get("Message", ""))
