"""What outcomes, and answers without outcomes, say of versions, as messages."""

from backboned.server.serving.comparison import Interval, Sums, Tally
from backboned.server.serving.drift import Drift, Shift
from backboned.v1 import model_service_pb2 as pb


def comparison_message(tally: Tally) -> pb.Comparison:
    """A tally as a message."""
    return pb.Comparison(
        outcomes=tally.serving.count,
        serving=_figures(tally.serving),
        shadow=_figures(tally.shadow),
        gain=_estimate(tally.gain) if tally.shadow.count else None,
        answers=tally.answers,
        agreements=tally.agreements,
    )


def drift_message(drift: Drift) -> pb.Drift:
    """A drift as a message."""
    return pb.Drift(
        images=drift.images,
        confidence=_shift(drift.confidence),
        features=_shift(drift.features),
        uncertain=drift.uncertain,
        unfamiliar=drift.unfamiliar,
        drifted=drift.drifted,
    )


def _shift(shift: Shift | None) -> pb.Shift | None:
    if shift is None:
        return None
    return pb.Shift(distance=shift.distance, by_chance=shift.by_chance, lower=shift.lower, drifted=shift.drifted)


def _figures(sums: Sums) -> pb.Figures | None:
    return pb.Figures(loss=_estimate(sums.loss), accuracy=_estimate(sums.accuracy)) if sums.count else None


def _estimate(interval: Interval) -> pb.Estimate:
    return pb.Estimate(value=interval.value, low=interval.low, high=interval.high)
