"""What serving tells about itself. The metrics room implements it; so does a test."""

from typing import Protocol


class ServingTelemetry(Protocol):
    """Called from the loader's thread, the engine's thread and the event loop; must be thread-safe and quick."""

    def predict_done(self, model: str, code: str) -> None:
        """A Predict call ended with a status code's name. `model` is empty for one that is unknown, or not told."""

    def predict_phase(self, phase: str, seconds: float) -> None:
        """An image's or a call's time in `decode`, `queue`, `compute` or `total`."""

    def batch(self, size: int) -> None:
        """A batch of `size` images was computed."""

    def serving_loss(self, model: str, role: str, loss: float, correct: bool) -> None:
        """The loss of one labelled prediction, and whether it was right."""

    def shadow_answers(self, model: str, agreeing: int, others: int) -> None:
        """So many answers of a version and its shadow said the same, and so many didn't."""

    def decided(self, model: str, result: str) -> None:
        """By outcomes a version was `promoted`, `rejected` before it served, or `rolled_back`."""

    def checkpoint_load(self, result: str, seconds: float) -> None:
        """A checkpoint was `loaded`, `adopted`, or found to be `quarantined`."""

    def evicted(self) -> None:
        """A version was taken out of memory because others were asked for later."""

    def cold_call(self, seconds: float) -> None:
        """A call waited so long for a version that was loaded for it."""

    def serving_version(self, model: str, version: int) -> None:
        """`version` now answers for `model` by default."""

    def precision_deviation(self, model: str, deviation: float) -> None:
        """The largest difference of a probability from float32's, over a few photos, of a version that was loaded."""

    def forget_model(self, model: str) -> None:
        """The model is gone."""

    def scanned(self, unix_seconds: float) -> None:
        """The checkpoint directory was looked at."""
