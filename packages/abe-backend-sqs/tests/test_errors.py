"""The client's errors made ours."""

import botocore.exceptions as native
import pytest

from abe.errors import (
    AbeError,
    BackendConnectionError,
    ConfigurationError,
    LeaseLostError,
    PermissionDeniedError,
    PublishUnknownError,
)
from abe_backend_sqs._errors import (
    EntryRefusedError,
    QueueMissingError,
    SqsError,
    translate,
    translate_entry,
    translate_send,
    translated,
)


def answered(code: str, status: int = 400) -> native.ClientError:
    return native.ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
        "SendMessageBatch",
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (answered("AccessDenied", 403), PermissionDeniedError),
        (answered("InvalidClientTokenId", 403), PermissionDeniedError),
        (answered("ThrottlingException"), BackendConnectionError),
        (answered("AWS.SimpleQueueService.NonExistentQueue"), QueueMissingError),
        (answered("com.amazonaws.sqs#QueueDoesNotExist"), QueueMissingError),
        (answered("QueueNameExists"), ConfigurationError),
        (answered("ReceiptHandleIsInvalid"), LeaseLostError),
        (answered("InternalError", 500), BackendConnectionError),
        (answered("Whatever"), SqsError),
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
        (native.EndpointConnectionError(endpoint_url="http://x"), BackendConnectionError),
        (native.ConnectTimeoutError(endpoint_url="http://x"), BackendConnectionError),
        (native.ReadTimeoutError(endpoint_url="http://x"), PublishUnknownError),
        (native.ConnectionClosedError(endpoint_url="http://x"), PublishUnknownError),
        (answered("InternalError", 500), PublishUnknownError),
        (answered("ThrottlingException", 503), BackendConnectionError),
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
