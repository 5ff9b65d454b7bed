"""Everything that Prometheus sees, in the words of the domain.

Metrics have a registry of their own, so that each daemon, and each test, counts from zero. A version is a value and
never a label; a model that isn't known is counted under the empty label; a model's series go when it goes.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from backboned.server.ops.drift import DriftCollector, Shifts
from backboned.server.training.events import JobState
from backboned.server.troubles import TroubleKind

PREFIX = "backboned"
_Metric = TypeVar("_Metric", bound=MetricWrapperBase)
_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LOAD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_JOB_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Registry(CollectorRegistry):
    """A registry that leaves out `_created` series: they double the series and tell nothing that an alert needs."""

    def collect(self) -> Iterable[Metric]:
        """All metrics without their `_created` samples."""
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Metrics:
    """What the daemon counts. Each method may be called from any thread; none blocks or raises for odd values.

    `registry` is what `/metrics` shows: ours, and the process's, Python's and the garbage collector's own.
    """

    def __init__(self, *, version: str, torch_version: str, device: str) -> None:
        self.registry = Registry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._of_models: list[MetricWrapperBase] = []
        self._add_training()
        self._add_serving()
        self._add_checkpoints()
        build = self._gauge("build_info", "Always 1; the labels say what runs.", ("version", "torch", "device"))
        build.labels(version, torch_version, device).set(1)

    # Training

    def training_epoch(  # noqa: PLR0917 - the figures of an epoch
        self,
        model: str,
        epoch: int,
        train_loss: float,
        train_accuracy: float,
        val_loss: float,
        val_accuracy: float,
    ) -> None:
        """An epoch of the model's newest job ended. Losses are means an image, accuracies are 0…1."""
        self._training_epoch.labels(model).set(epoch)
        self._training_loss.labels(model, "train").set(train_loss)
        self._training_loss.labels(model, "val").set(val_loss)
        self._training_accuracy.labels(model, "train").set(train_accuracy)
        self._training_accuracy.labels(model, "val").set(val_accuracy)

    def training_jobs(self, counts: Mapping[JobState, int]) -> None:
        """How many jobs are in each state; a state that is absent counts 0."""
        for state in JobState:
            self._training_jobs.labels(state.value).set(counts.get(state, 0))

    def job_duration(self, seconds: float) -> None:
        """A job's trainer ended, `seconds` after it started."""
        self._training_job_duration.observe(seconds)

    def feature_images(self, source: str, count: int) -> None:
        """Features of so many more images were `computed`, or found in the `cache`: that is the `source`."""
        self._training_feature_images.labels(source).inc(count)

    # Serving

    def predict_done(self, model: str, code: str) -> None:
        """A Predict call ended with a gRPC status `code` (`OK`, `NOT_FOUND`, …).

        `model` is empty where it isn't known: whatever a caller makes up never becomes a label.
        """
        self._predict_requests.labels(model, code).inc()

    def predict_phase(self, phase: str, seconds: float) -> None:
        """The time of an image or a call in a phase: `decode`, `queue`, `compute` or `total`."""
        self._predict_duration.labels(phase).observe(seconds)

    def batch(self, size: int) -> None:
        """The device ran a batch of `size` images."""
        self._predict_batch_size.observe(size)

    def watch_queue(self, depth: Callable[[], float]) -> None:
        """Ask `depth` for the number of images that wait, whenever metrics are scraped."""
        self._predict_queue_depth.set_function(depth)

    def serving_loss(self, model: str, role: str, loss: float, correct: bool) -> None:
        """A labelled image was scored in a `role` (`serving` or `shadow`), with this `loss`, and rightly or not."""
        self._serving_loss.labels(model, role).observe(loss)
        self._serving_outcomes.labels(model, role, str(correct).lower()).inc()

    def shadow_answers(self, model: str, agreeing: int, others: int) -> None:
        """So many answers of a version and its shadow said the same, and so many didn't."""
        self._shadow_answers.labels(model, "true").inc(agreeing)
        self._shadow_answers.labels(model, "false").inc(others)

    def decided(self, model: str, result: str) -> None:
        """By outcomes a version was `promoted`, `rejected` before it served, or `rolled_back`."""
        self._decisions.labels(model, result).inc()

    def serving_version(self, model: str, version: int) -> None:
        """`version` answers for `model` from now on."""
        self._serving_version.labels(model).set(version)

    def watch_drift(self, shifts: Callable[[], Shifts]) -> None:
        """Ask `shifts`, from any thread, for the drift of the models that serve, whenever metrics are scraped."""
        self._drift.source = shifts

    def watch_stages(self, loaded: Callable[[], tuple[int, int]], limit_bytes: int) -> None:
        """Ask `loaded` for the number of distinct stages in memory, and their bytes, whenever metrics are scraped.

        They may take up to `limit_bytes`.
        """
        self._memory_limit.set(limit_bytes)
        self._stages_loaded.set_function(lambda: loaded()[0])
        self._stage_memory.set_function(lambda: loaded()[1])

    def precision_deviation(self, model: str, deviation: float) -> None:
        """The model's newest load, in reduced precision, gave probabilities within `deviation` of float32's."""
        self._precision_deviation.labels(model).set(deviation)

    def watch_compiler(self, available: bool, compiled: Callable[[], float], pending: Callable[[], float]) -> None:
        """Tell whether stages can be compiled here; ask how many are, and how many will be, whenever scraped."""
        self._compiler_available.set(available)
        self._stages_compiled.set_function(compiled)
        self._stages_compiling.set_function(pending)

    # Checkpoints

    def checkpoint_load(self, result: str, seconds: float) -> None:
        """A checkpoint was `loaded`, `adopted` or `quarantined`, which took so many `seconds`."""
        self._checkpoint_loads.labels(result).inc()
        self._checkpoint_load_duration.observe(seconds)

    def evicted(self) -> None:
        """A version was taken out of memory because others were asked for later."""
        self._evictions.inc()

    def cold_call(self, seconds: float) -> None:
        """A call waited so long for a version that was loaded for it."""
        self._cold_calls.observe(seconds)

    def scanned(self, unix_seconds: float) -> None:
        """The checkpoint folder was scanned at this time."""
        self._checkpoint_last_scan.set(unix_seconds)

    def watch_troubles(self, now: Callable[[TroubleKind], bool]) -> None:
        """Ask `now`, for each kind of trouble, whether there is any, whenever metrics are scraped."""
        for kind in TroubleKind:
            self._trouble.labels(kind.value).set_function(partial(now, kind))

    def forget_model(self, model: str) -> None:
        """Remove every series of a model that is gone."""
        for metric in self._of_models:
            metric.remove_by_labels({"model": model})

    def _add_training(self) -> None:
        model_split = ("model", "split")
        self._training_loss = self._gauge(
            "training_loss", "Mean loss of an image in the last epoch of the model's newest job.", model_split
        )
        self._training_accuracy = self._gauge(
            "training_accuracy", "Accuracy (0-1) in the last epoch of the model's newest job.", model_split
        )
        self._training_epoch = self._gauge("training_epoch", "Last epoch of the model's newest job.", ("model",))
        self._training_jobs = self._gauge("training_jobs", "Jobs by state.", ("state",))
        self._training_job_duration = self._histogram(
            "training_job_duration_seconds", "From a trainer's start to its end.", _JOB_SECONDS
        )
        self._training_feature_images = self._counter(
            "training_feature_images_total", "Images whose frozen features were computed or cached.", ("source",)
        )
        self.training_jobs({})
        for source in ("computed", "cache"):
            self._training_feature_images.labels(source)

    def _add_serving(self) -> None:
        self._predict_requests = self._counter(
            "predict_requests_total", "Predict calls by gRPC status; no model if unknown or unread.", ("model", "code")
        )
        self._predict_duration = self._histogram(
            "predict_duration_seconds", "Time of a Predict call in each of its phases.", _CALL_SECONDS, ("phase",)
        )
        for phase in ("decode", "queue", "compute", "total"):
            self._predict_duration.labels(phase)
        self._predict_batch_size = self._histogram("predict_batch_size", "Images in a batch.", _BATCH_SIZES)
        self._predict_queue_depth = self._gauge("predict_queue_depth", "Images that wait for the device.")
        self._serving_loss = Summary(
            f"{PREFIX}_serving_loss",
            "Loss of served images with known labels.",
            ("model", "role"),
            registry=self.registry,
        )
        self._of_models.append(self._serving_loss)
        self._serving_outcomes = self._counter(
            "serving_outcomes_total", "Served images with known labels.", ("model", "role", "correct")
        )
        self._shadow_answers = self._counter(
            "shadow_answers_total", "Images that a shadow saw too, by whether both said the same.", ("model", "agrees")
        )
        self._decisions = self._counter(
            "version_decisions_total",
            "Versions that outcomes promoted, rejected before they served, or rolled back.",
            ("model", "result"),
        )
        self._drift = DriftCollector(PREFIX)
        self.registry.register(self._drift)
        self._serving_version = self._gauge("serving_version", "Version that answers by default.", ("model",))
        self._stages_loaded = self._gauge("stages_loaded", "Distinct stages in memory.")
        self._stage_memory = self._gauge("stage_memory_bytes", "Size of their tensors.")
        self._memory_limit = self._gauge("stage_memory_limit_bytes", "What stages may take, compiled code included.")
        self._stages_compiled = self._gauge("stages_compiled", "Stages in memory that run compiled.")
        self._stages_compiling = self._gauge("stages_compiling", "Stages that are being compiled, or wait for it.")
        self._compiler_available = self._gauge("compiler_available", "Whether stages can be compiled here (0 or 1).")
        self._precision_deviation = self._gauge(
            "precision_deviation",
            "Largest difference of a probability from fp32, over a few photos, at the model's newest load.",
            ("model",),
        )

    def _add_checkpoints(self) -> None:
        self._checkpoint_loads = self._counter("checkpoint_loads_total", "Checkpoints read, by result.", ("result",))
        self._checkpoint_load_duration = self._histogram(
            "checkpoint_load_duration_seconds", "Time to read, verify and warm a checkpoint.", _LOAD_SECONDS
        )
        self._checkpoint_last_scan = self._gauge(
            "checkpoint_last_scan_timestamp_seconds", "Unix time of the last scan of the checkpoint folder."
        )
        self._evictions = self._counter(
            "evictions_total", "Versions taken out of memory because others were asked for later."
        )
        self._cold_calls = self._histogram(
            "cold_call_wait_seconds", "How long calls waited for a version that was loaded for them.", _LOAD_SECONDS
        )
        for result in ("loaded", "adopted", "quarantined"):
            self._checkpoint_loads.labels(result)
        self._trouble = self._gauge("trouble", "Whether something is wrong now (0 or 1).", ("kind",))
        self.watch_troubles(lambda _: False)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return self._kept(Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry), labels)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return self._kept(Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return self._kept(Histogram(f"{PREFIX}_{name}", text, labels, registry=self.registry, buckets=buckets), labels)

    def _kept(self, metric: _Metric, labels: tuple[str, ...]) -> _Metric:
        if "model" in labels:
            self._of_models.append(metric)
        return metric
