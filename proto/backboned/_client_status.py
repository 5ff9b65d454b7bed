"""What a failed call says: its status, one line, and the field at fault."""

from collections.abc import Mapping
from typing import cast

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet


class ClientError(Exception):
    """A call that failed: its gRPC status `code`, a one-line `message`, and the request `field` at fault, if any.

    `retry_delay_seconds` is how long to wait before it is tried again, where the daemon says so.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        field: str | None = None,
        *,
        retry_delay_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_delay_seconds = retry_delay_seconds

    @classmethod
    def of(cls, error: grpc.RpcError, address: str) -> "ClientError":
        """The error that gRPC raised for a call to `address`."""
        call = cast(grpc.Call, error)
        message = " ".join((call.details() or call.code().name).split())
        trailers = dict(call.trailing_metadata() or ())
        if call.code() is grpc.StatusCode.UNAVAILABLE and not trailers and "connect" in message.lower():
            cause = message.rsplit(": ", 1)[-1]
            message = f"no daemon answers at {address} ({cause}); start one with: backboned serve"
        status = trailers.get("grpc-status-details-bin", b"")
        field = violated_field(status) if isinstance(status, bytes) else None
        return cls(call.code(), message, field, retry_delay_seconds=_delay(trailers))


def full_for_seconds(error: Exception) -> float | None:
    """After how long a call that was refused for want of room should be tried again; None for any other error."""
    if isinstance(error, ClientError):
        code, delay = error.code, error.retry_delay_seconds
    elif isinstance(error, grpc.RpcError):
        call = cast(grpc.Call, error)
        code, delay = call.code(), _delay(dict(call.trailing_metadata() or ()))
    else:
        return None
    return delay if code is grpc.StatusCode.RESOURCE_EXHAUSTED else None


def _delay(trailers: Mapping[str, str | bytes]) -> float | None:
    told = trailers.get("grpc-retry-pushback-ms", "")
    return int(told) / 1000 if isinstance(told, str) and told.isdecimal() else None


def violated_field(status: bytes) -> str | None:
    """The first field that a serialised `google.rpc.Status` blames in a `BadRequest`, if it blames one.

    Reads the wire format as unknown fields, since the classes of `google.rpc` are in a package of their own:
    Status.details = 3; Any.type_url = 1, value = 2; BadRequest.field_violations = 1; FieldViolation.field = 1.
    """
    for detail in _fields(status, 3):
        if _fields(detail, 1) == [b"type.googleapis.com/google.rpc.BadRequest"]:
            for violation in _fields(b"".join(_fields(detail, 2)), 1):
                return b"".join(_fields(violation, 1)).decode() or None
    return None


def _fields(message: bytes, number: int) -> list[bytes]:
    """The length-delimited fields `number` of a serialised message."""
    fields = UnknownFieldSet(Empty.FromString(message))
    known = (fields[i] for i in range(len(fields)))
    return [field.data for field in known if field.field_number == number and field.wire_type == 2]
