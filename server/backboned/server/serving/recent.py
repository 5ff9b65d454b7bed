"""The newest images of each model's serving version, for their drift."""

from collections.abc import Callable, Mapping, Sequence

from backboned.registry.reference import Reference
from backboned.server.serving.calls import Prediction
from backboned.server.serving.drift import Drift, Window
from backboned.server.serving.snapshot import KnownModel, LoadedModel, Snapshot

_Version = tuple[int, str]
"""Its number and its checkpoint's digest: a better epoch begins anew."""


class Recent:
    """A window for each model whose serving version has a reference. `answered` is for one event loop.

    The rest may be asked from any thread. Nothing is kept on disk: windows are empty after a restart.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._windows: dict[str, tuple[_Version, Window]] = {}

    def answered(self, model: LoadedModel, predictions: Sequence[Prediction]) -> None:
        """Count images that `model` has answered, if it is what serves."""
        name, reference = model.manifest.model, _reference(model)
        known = self._snapshot().models.get(name)
        if reference is None or known is None or known.default is not model:
            return
        version, window = self._windows.get(name, (None, None))
        if window is None or version != _version(model):
            window = self._begin(model, reference)
        for told in predictions:
            if told.certainty is not None and told.distance is not None:
                window.add(told.certainty, told.distance, uncertain=told.uncertain, unfamiliar=told.unfamiliar)

    def drift(self, model: KnownModel) -> Drift | None:
        """That of the version that serves; None if there is none, or nothing to compare its images with."""
        if model.default is None or _reference(model.default) is None:
            return None
        version, window = self._windows.get(model.name, (None, None))
        return window.drift() if window is not None and version == _version(model.default) else Drift(0)

    def shifts(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        """By model and kind (`confidence`, `features`): its distance, and that by chance. Only what can be told."""
        models = self._snapshot().models
        found = {}
        for name in list(self._windows):
            drift = self.drift(models[name]) if name in models else None
            if drift is not None and drift.confidence is not None and drift.features is not None:
                kinds = {"confidence": drift.confidence, "features": drift.features}
                found[name] = {kind: (shift.distance, shift.by_chance) for kind, shift in kinds.items()}
        return found

    def _begin(self, model: LoadedModel, reference: Reference) -> Window:
        for gone in self._windows.keys() - self._snapshot().models.keys():
            del self._windows[gone]
        window = Window(reference)
        self._windows[model.manifest.model] = (_version(model), window)
        return window


def _version(model: LoadedModel) -> _Version:
    return model.manifest.version, model.sha256


def _reference(model: LoadedModel) -> Reference | None:
    return None if model.answers is None else model.answers.reference
