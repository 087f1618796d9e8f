"""SQS's errors made ours: the only module that knows the client's exceptions."""

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
    """SQS answered with an error that nothing here expects."""


class QueueMissingError(BackendConnectionError):
    """There is no such queue or topic, or not any more."""


class ThrottledError(BackendConnectionError):
    """SQS is asked too often, or does something for us already."""


class QueueExistsError(ConfigurationError):
    """There is a queue of this name, with other attributes."""


class ClockError(BackendConnectionError):
    """The time that a request was signed with is not AWS's time, so that it did nothing.

    It passes where the process or its machine slept between the signature and the request, or once the clock is set right after a long
    sleep, so it is tried again like a lost connection. Where the clock stays wrong, the text of what is given up in the end says so.
    """


class EntryRefusedError(PublishRejectedError):
    """SQS refuses this message as it is. It was not stored, and would not be next time."""

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
    # What is wrong with the queue's key, or its endpoint, is wrong for every message until somebody mends it.
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
"""A server waited for a request for too long, or for what it asked for it: it may have had all of it."""

_SIGNATURES: Final = (
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidSignatureException",
    "SignatureDoesNotMatch",
)
"""The texts of these repeat headers of the request, its session token or what it was signed with included."""

_SKEWED: Final = ("Signature expired", "Signature not yet current")
"""How the text of a refused signature begins where the time is the reason."""

Failure = tuple[type[Exception], ...]
GARBLED: Final[Failure] = (FormError, ResponseParserError, KeyError)
"""What an answer that is not one of the service's (a proxy's page, a body that is empty) ends in."""

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
"""What certainly happened before the request left."""

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
    (QueueMissingError, "it was deleted, or never made"),
)
"""What may help, by the client's error or by ours; the first that fits."""

_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
"""What TLS calls an answer that is none of its own."""
_WANTS_TLS: Final = ("plain http request", "client sent an http request to an https server")
"""How servers say so."""

CLIENT_ERRORS: Final[Failure] = (native.ClientError, native.BotoCoreError, *GARBLED, OSError)
"""All that the client may raise."""


def code(error: BaseException) -> str:
    """Return SQS's code of an error, without its namespace; empty where it is another error."""
    if not isinstance(error, native.ClientError):
        return ""
    found = cast("Mapping[str, Mapping[str, str]]", error.response).get("Error", {}).get("Code", "")
    return _plain(found)


def translate(exc: BaseException, address: str) -> AbeError:
    """Return our error for one of the client's, whose text loses what must not be shown: it is the cause of ours."""
    if isinstance(exc, native.ClientError):
        kind = _answered(exc)
        if code(exc) in _SIGNATURES:
            _conceal(exc)
    else:
        kind = next((ours for theirs, ours in _BY_TYPE if isinstance(exc, theirs)), SqsError)
    if hint := _about_tls(exc):
        kind = ConfigurationError
    else:
        hint = _hint(exc, kind)
    what = f"the answer is not one of its own: {exc!r}" if isinstance(exc, GARBLED) else exc
    return kind(f"SQS at {address}: {what}{hint and f' ({hint})'}")


def _about_tls(exc: BaseException) -> str:
    """Return what would be right where one side speaks TLS and the other does not, or where the certificate is not for this address."""
    if isinstance(exc, native.SSLError):
        if isinstance(exc.kwargs.get("error"), ClientConnectorCertificateError):
            return "AWS_ENDPOINT_URL_SQS must name a host of the certificate, and AWS_CA_BUNDLE who signed it, where that is not public"
        if any(name in str(exc) for name in _NO_TLS):
            return "what answers there speaks no TLS: let AWS_ENDPOINT_URL_SQS begin with http://"
    if isinstance(exc, native.ClientError) and any(text in _text(exc).lower() for text in _WANTS_TLS):
        return "what answers there speaks TLS: let AWS_ENDPOINT_URL_SQS begin with https://"
    return ""


def _hint(exc: BaseException, kind: type[AbeError]) -> str:
    if isinstance(exc, native.ConnectionClosedError) and str(exc.kwargs.get("endpoint_url", "")).startswith("http:"):
        return "where it stays so, what answers there may speak TLS: let AWS_ENDPOINT_URL_SQS begin with https://"
    return next((hint for known, hint in _HINTS if isinstance(exc, known) or issubclass(kind, known)), "")


def translate_send(exc: BaseException, address: str) -> AbeError:
    """The same for a request that stores messages: says whether it may have."""
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
    """Return the kind of our error for an answer that is an error."""
    name = code(exc)
    if name in _SIGNATURES and _text(exc).startswith(_SKEWED):
        return ClockError
    if (known := _BY_CODE.get(name)) is not None:
        return known
    if _status(exc) == HTTPStatus.TOO_MANY_REQUESTS:
        return ThrottledError
    return BackendConnectionError if _unfinished(exc) else SqsError


def _unfinished(exc: native.ClientError) -> bool:
    """Whether the server, or one before it, gave up in the middle: what was asked for may have been done."""
    status = _status(exc)
    if code(exc) in _BY_CODE or status == HTTPStatus.TOO_MANY_REQUESTS:
        return False
    # A code that is a number is the status of an answer that is not SQS's own, but that of something on the way to it.
    return (
        code(exc).isdigit()
        or code(exc) in _TIMED_OUT
        or status == HTTPStatus.REQUEST_TIMEOUT
        or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    )


def _conceal(exc: native.ClientError) -> None:
    """Replace the text that AWS sent, which whoever logs the error would show with its cause."""
    response = cast("dict[str, Any]", exc.response)
    text = (
        "the signature is refused; AWS_SECRET_ACCESS_KEY must be the access key's, AWS_REGION the region of the address, and nothing may "
        "change requests on their way"
    )
    exc.args = (f"An error occurred ({code(exc)}) when calling the {exc.operation_name} operation: {text}",)
    exc.response = cast("Any", {**response, "Error": {**response["Error"], "Message": text}})


def _unsent(exc: BaseException) -> bool:
    """Whether it certainly happened before the request left. The client calls a connection that was reset meanwhile by the name of one that
    could not be made."""
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
