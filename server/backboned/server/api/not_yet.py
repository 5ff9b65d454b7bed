"""RPCs that are in the API and not in this version of the daemon: each says what to do instead."""

from typing import Any, NoReturn

import grpc

from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.v1 import model_service_pb2 as pb
from backboned.v1 import model_service_pb2_grpc as pb_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class NotYet(pb_grpc.ModelServiceServicer):
    """The part of the service that answers UNIMPLEMENTED."""

    async def ReportOutcome(self, request: pb.ReportOutcomeRequest, context: Context) -> NoReturn:
        """Not yet."""
        _refuse("ReportOutcome", "send `labels` with Predict")


def _refuse(rpc: str, instead: str) -> NoReturn:
    raise BackbonedError(ErrorKind.UNIMPLEMENTED, f"{rpc} is not in this version of the daemon: {instead}")
