"""What a failed call says: its status, one line, and the field at fault."""

from typing import cast

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet


class ClientError(Exception):
    """A call that failed: its gRPC status `code`, a one-line `message`, and the request `field` at fault, if any."""

    def __init__(self, code: grpc.StatusCode, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field

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
        return cls(call.code(), message, violated_field(status) if isinstance(status, bytes) else None)


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
