"""The drift of all models, asked for whenever metrics are scraped."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Shifts = Mapping[str, Mapping[str, tuple[float, float]]]
"""By model and kind: how far the images that come are from those that validated, and how far by chance alone."""


class DriftCollector(Collector):
    """Series for the models that there is something to tell of now; those of a model go when that has gone."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.source: Callable[[], Shifts] = dict

    def describe(self) -> Iterable[Metric]:
        """The families, without series."""
        return self._families({})

    def collect(self) -> Iterable[Metric]:
        """The families as they are now. From any thread, as `source` has to allow."""
        return self._families(self.source())

    def _families(self, shifts: Shifts) -> Iterable[Metric]:
        drift = GaugeMetricFamily(
            f"{self._prefix}_serving_drift",
            "How far the images that come are from those that validated, 0-1.",
            labels=("model", "kind"),
        )
        by_chance = GaugeMetricFamily(
            f"{self._prefix}_serving_drift_by_chance",
            "What chance alone makes of it at most, but once in a thousand.",
            labels=("model", "kind"),
        )
        for model, kinds in shifts.items():
            for kind, (distance, chance) in kinds.items():
                drift.add_metric((model, kind), distance)
                by_chance.add_metric((model, kind), chance)
        return drift, by_chance
