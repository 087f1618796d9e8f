"""The client's errors made ours."""

import socket
import traceback
from typing import Any, cast

import botocore.exceptions as native
import pytest
from aiohttp import ClientConnectorError, ClientOSError
from botocore.parsers import ResponseParserError
from botocore.retries.standard import ThrottledRetryableChecker, TransientRetryableChecker

from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    LeaseLostError,
    PermissionDeniedError,
    PublishUnknownError,
)
from abe_backend_sqs._errors import (
    ClockError,
    EntryRefusedError,
    QueueExistsError,
    QueueMissingError,
    SqsError,
    ThrottledError,
    translate,
    translate_entry,
    translate_send,
    translated,
)


def answered(code: str, status: int = 400, text: str = "m") -> native.ClientError:
    return native.ClientError(
        {"Error": {"Code": code, "Message": text}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "SendMessageBatch",
    )


def unreached(error: Exception) -> native.EndpointConnectionError:
    """Return what the client makes of aiohttp's error, be it of a connection that could not be made or of one that was lost."""
    return native.EndpointConnectionError(endpoint_url="http://x", error=error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered("AccessDenied", 403), PermissionDeniedError),
        (answered("InvalidClientTokenId", 403), PermissionDeniedError),
        (answered("ThrottlingException"), ThrottledError),
        (answered("AWS.SimpleQueueService.NonExistentQueue"), QueueMissingError),
        (answered("com.amazonaws.sqs#QueueDoesNotExist"), QueueMissingError),
        (answered("QueueNameExists"), QueueExistsError),
        (answered("ReceiptHandleIsInvalid"), LeaseLostError),
        (answered("InternalError", 500), BackendConnectionError),
        (answered("Whatever"), SqsError),
        (answered("Whatever", 429), ThrottledError),
        (answered("429", 429), ThrottledError),
        (answered("Whatever", 408), BackendConnectionError),
        (answered("RequestTimeout"), BackendConnectionError),
        (answered("RequestTimeoutException"), BackendConnectionError),
        (answered("PriorRequestNotComplete"), ThrottledError),
        (answered("KMSThrottlingException"), ThrottledError),
        (answered("KMS.ThrottlingException"), ThrottledError),
        (answered("KMSAccessDenied"), PermissionDeniedError),
        (answered("RequestExpired"), ClockError),
        (answered("RequestTimeTooSkewed", 403), ClockError),
        (
            answered("InvalidSignatureException", 403, "Signature expired: 20240101T000000Z is now earlier than"),
            ClockError,
        ),
        (answered("SignatureDoesNotMatch", 403, "Signature not yet current: 20240101T000000Z"), ClockError),
        (answered("SignatureDoesNotMatch", 403), PermissionDeniedError),
        (ResponseParserError("no XML"), BackendConnectionError),
        (KeyError("QueueUrl"), BackendConnectionError),
        (native.NoCredentialsError(), PermissionDeniedError),
        (native.NoRegionError(), ConfigurationError),
        (native.ProfileNotFound(profile="p"), ConfigurationError),
        (native.EndpointConnectionError(endpoint_url="http://x"), BackendConnectionError),
        (native.ReadTimeoutError(endpoint_url="http://x"), BackendConnectionError),
        (ConnectionResetError(), BackendConnectionError),
    ],
)
def test_each_error_has_its_kind(error: BaseException, kind: type[AbeError]) -> None:
    found = translate(error, "here")
    assert type(found) is kind
    assert "here" in str(found)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (unreached(ClientConnectorError(cast("Any", None), OSError(111, "refused"))), BackendConnectionError),
        (unreached(socket.gaierror(-2, "no such name")), BackendConnectionError),
        (unreached(ClientOSError(104, "reset")), PublishUnknownError),
        (answered("404", 404), PublishUnknownError),
        (answered("403", 403), PublishUnknownError),
        (native.ConnectTimeoutError(endpoint_url="http://x"), BackendConnectionError),
        (native.CredentialRetrievalError(provider="p", error_msg="m"), BackendConnectionError),
        (native.ReadTimeoutError(endpoint_url="http://x"), PublishUnknownError),
        (native.ConnectionClosedError(endpoint_url="http://x"), PublishUnknownError),
        (answered("InternalError", 500), PublishUnknownError),
        (answered("ServiceUnavailable", 503), PublishUnknownError),
        (answered("408", 408), PublishUnknownError),
        (answered("RequestTimeout"), PublishUnknownError),
        (answered("RequestTimeoutException"), PublishUnknownError),
        (ResponseParserError("no XML"), PublishUnknownError),
        (KeyError("PublishBatchResult"), PublishUnknownError),
        (answered("429", 429), ThrottledError),
        (answered("PriorRequestNotComplete"), ThrottledError),
        (answered("RequestExpired"), ClockError),
        (answered("ThrottlingException", 503), ThrottledError),
        (answered("BatchRequestTooLong"), EntryRefusedError),
        (answered("AccessDenied", 403), PermissionDeniedError),
    ],
)
def test_a_failed_send_says_whether_it_may_have_been_stored(error: BaseException, kind: type[AbeError]) -> None:
    found = translate_send(error, "here")
    assert type(found) is kind
    assert found.maybe_accepted is (kind is PublishUnknownError)


def test_the_entries_of_a_batch_fail_each_in_its_way() -> None:
    refused = translate_entry({"Id": "0", "Code": "InvalidMessageContents", "SenderFault": True}, "here")
    later = translate_entry({"Id": "1", "Code": "InternalError", "SenderFault": False}, "here")
    assert (type(refused), refused.retryable) == (EntryRefusedError, False)
    assert (type(later), later.retryable) == (BackendConnectionError, True)


def test_the_client_s_error_is_the_cause() -> None:
    error = answered("AccessDenied", 403)
    with pytest.raises(PermissionDeniedError) as caught, translated("here"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("code", cast("Any", ThrottledRetryableChecker)._THROTTLED_ERROR_CODES)
def test_what_the_client_knows_as_throttling_is_tried_again_and_was_not_stored(code: str) -> None:
    assert type(translate_send(answered(code), "here")) is ThrottledError
    assert type(translate_entry({"Code": code, "SenderFault": True}, "here")) is ThrottledError


@pytest.mark.parametrize("code", cast("Any", TransientRetryableChecker)._TRANSIENT_ERROR_CODES)
def test_what_the_client_knows_as_passing_is_tried_again(code: str) -> None:
    assert translate(answered(code), "here").retryable
    assert translate_send(answered(code), "here").retryable


@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "InvalidSignatureException", "IncompleteSignature"])
def test_the_headers_that_aws_repeats_are_not_shown(code: str) -> None:
    text = "The canonical string should have been 'POST / host:x x-amz-security-token:swordfish-8061'"
    with pytest.raises(PermissionDeniedError, match="AWS_SECRET_ACCESS_KEY") as caught, translated("here"):
        raise answered(code, 403, text)
    assert "swordfish" not in "".join(traceback.format_exception(caught.value))
    assert code in str(caught.value)


def test_the_password_of_a_proxy_is_not_shown() -> None:
    native_error = native.ProxyConnectionError(
        proxy_url="http://user:***@proxy", error=OSError("407, http://app:s3cret@proxy")
    )
    try:
        try:
            raise OSError("407, http://app:s3cret@proxy")
        except OSError as exc:
            raise native_error from exc
    except native.ProxyConnectionError as exc:
        error = translate(exc, "a")
        error.__cause__ = exc
    assert "s3cret" not in "".join(traceback.format_exception(error)) + repr(vars(native_error))


def test_a_clock_that_is_wrong_is_named() -> None:
    assert "clock" in str(translate(answered("RequestTimeTooSkewed", 403), "here"))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (native.NoCredentialsError(), PermissionDeniedError, "AWS_ACCESS_KEY_ID"),
        (native.NoRegionError(), ConfigurationError, "AWS_REGION"),
        (native.InvalidRegionError(region_name="eu west"), ConfigurationError, "AWS_REGION"),
        (native.ProfileNotFound(profile="p"), ConfigurationError, "AWS_PROFILE"),
        (unreached(socket.gaierror(-2, "no such name")), BackendConnectionError, "AWS_REGION"),
        (native.SSLError(endpoint_url="https://x", error="WRONG_VERSION_NUMBER"), ConfigurationError, "http://"),
        (answered("400", 400, "The plain HTTP request was sent to HTTPS port"), ConfigurationError, "https://"),
        (native.ConnectionClosedError(endpoint_url="http://x"), BackendConnectionError, "https://"),
        (answered("KmsDisabled"), ConfigurationError, "KmsDisabled"),
    ],
)
def test_the_text_names_what_would_be_right(error: BaseException, kind: type[AbeError], says: str) -> None:
    found = translate(error, "here")
    assert type(found) is kind
    assert says in str(found)
