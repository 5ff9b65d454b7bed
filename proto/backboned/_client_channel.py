"""How a connection to the daemon behaves: what is retried, how large messages may be, how soon it reconnects."""

import json

_IDEMPOTENT = (
    "FineTune",  # by its request_id
    "GetJob",
    "ListJobs",
    "CancelJob",
    "ListCheckpoints",
    "Predict",
    "ListBackbones",
    "ListModels",
    "GetModel",
    "ReportOutcome",
    "GetReport",
    "ListDatasets",
)
# A server that stops answers CANCELLED, not UNAVAILABLE, to a call that crosses its word on the way (grpc/grpc#41785).
_TRANSIENT = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED")

# Once 500 attempts more have failed than succeeded, failures aren't retried: they would only add to an overload.
_THROTTLING = {"maxTokens": 1000, "tokenRatio": 1}


def channel_options(max_message_bytes: int) -> list[tuple[str, object]]:
    """gRPC options of a channel whose messages have at most so many bytes in either direction."""
    policy = {
        "name": [{"service": "backboned.v1.ModelService", "method": method} for method in _IDEMPOTENT],
        "retryPolicy": {
            "maxAttempts": 5,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": _TRANSIENT,
        },
    }
    return [
        ("grpc.service_config", json.dumps({"methodConfig": [policy], "retryThrottling": _THROTTLING})),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),  # larger requests than this are never retried
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
