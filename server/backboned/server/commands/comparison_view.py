"""How a version and its shadow do, for people."""

from collections.abc import Iterator

from backboned.v1 import model_service_pb2 as pb


def compared(model: pb.Model) -> Iterator[str]:
    """Lines on what outcomes say."""
    told, serving, shadow = model.comparison, model.serving_version, model.shadow_version
    if told.outcomes:
        yield f"version {serving}: {_figures(told.serving)} over {told.outcomes} outcomes"
    if not shadow:
        return
    if told.HasField("shadow"):
        gain = told.gain
        how = "lower" if gain.value >= 0 else "higher"
        low, high = (gain.low, gain.high) if gain.value >= 0 else (-gain.high, -gain.low)
        yield (
            f"version {shadow}, its shadow: {_figures(told.shadow)} on the same; its loss is {how} by "
            f"{abs(gain.value):.3f} ({low:.3f} to {high:.3f})"
        )
    else:
        yield f"version {shadow} is its shadow; there are no outcomes of both yet"
    if told.answers:
        share = 100 * told.agreements / told.answers
        yield f"they agree on {share:.1f} % of {told.answers} images"


def _figures(figures: pb.Figures) -> str:
    loss, accuracy = figures.loss, figures.accuracy
    return (
        f"loss {loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f}), accuracy {100 * accuracy.value:.1f} % "
        f"({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} %)"
    )
