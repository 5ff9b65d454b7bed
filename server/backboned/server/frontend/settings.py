"""What a front end is told before it begins to serve."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class FrontendSettings:
    """Sizes and addresses. `daemon` is gRPC's address of the daemon's own server, `slot_bytes` the size of a slot."""

    host: str
    port: int
    daemon: str
    slot_bytes: int
    decode_threads: int
    max_message_bytes: int
    max_image_pixels: int

    def to_json(self) -> bytes:
        """As a frame carries it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "FrontendSettings":
        """What `to_json` made."""
        return cls(**json.loads(content))
