"""How the images that come differ from those that validated, for people."""

from collections.abc import Iterator

from backboned.v1 import model_service_pb2 as pb


def drifted(model: pb.Model) -> Iterator[str]:
    """Lines on the images that the serving version answered."""
    drift, version = model.drift, model.serving_version
    if not drift.images:
        return
    yield (
        f"version {version}, its newest {drift.images} images: {100 * drift.uncertain:.1f} % uncertain, "
        f"{100 * drift.unfamiliar:.1f} % unfamiliar"
    )
    if not drift.HasField("confidence"):
        yield "whether images have drifted is told from 100 on"
        return
    what = "differ from those that validated" if drift.drifted else "are like those that validated, or nearly so"
    yield (
        f"they {what}: by confidence {_shift(drift.confidence, 'less certain', 'more certain')}, "
        f"by features {_shift(drift.features, 'nearer', 'further off')}"
    )


def _shift(shift: pb.Shift, lower: str, higher: str) -> str:
    direction = f", {lower if shift.lower else higher}" if shift.drifted else ""
    return f"{shift.distance:.2f} (by chance up to {shift.by_chance:.2f}{direction})"
