"""What Prometheus is told."""

import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest
from prometheus_client.exposition import choose_encoder

from backboned.server.ops.metrics import Metrics
from backboned.server.serving.telemetry import ServingTelemetry
from backboned.server.training.events import JobState
from backboned.server.training.settings import TrainingTelemetry
from backboned.server.troubles import TroubleKind, Troubles

FAMILIES = {
    "training_loss": {"model", "split"},
    "training_accuracy": {"model", "split"},
    "training_epoch": {"model"},
    "training_jobs": {"state"},
    "training_job_duration_seconds": set(),
    "training_feature_images_total": {"source"},
    "serving_loss": {"model", "role"},
    "serving_outcomes_total": {"model", "role", "correct"},
    "shadow_answers_total": {"model", "agrees"},
    "version_decisions_total": {"model", "result"},
    "predict_requests_total": {"model", "code"},
    "predict_duration_seconds": {"phase"},
    "predict_batch_size": set(),
    "predict_queue_depth": set(),
    "checkpoint_loads_total": {"result"},
    "checkpoint_load_duration_seconds": set(),
    "cold_call_wait_seconds": set(),
    "evictions_total": set(),
    "serving_version": {"model"},
    "serving_drift": {"model", "kind"},
    "serving_drift_by_chance": {"model", "kind"},
    "checkpoint_last_scan_timestamp_seconds": set(),
    "trouble": {"kind"},
    "stages_loaded": set(),
    "stage_memory_bytes": set(),
    "stage_memory_limit_bytes": set(),
    "stages_compiled": set(),
    "stages_compiling": set(),
    "compiler_available": set(),
    "precision_deviation": {"model"},
    "build_info": {"version", "torch", "device"},
}
"""Every metric that the daemon promises, with its labels."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", torch_version="2.10.0", device="cpu")


@pytest.fixture
def busy(metrics: Metrics) -> Metrics:
    """After a little of everything."""
    metrics.training_epoch("cats", 4, train_loss=0.5, train_accuracy=0.75, val_loss=0.25, val_accuracy=0.875)
    metrics.training_jobs({JobState.RUNNING: 1, JobState.SUCCEEDED: 2})
    metrics.job_duration(12.0)
    metrics.feature_images("computed", 30)
    metrics.feature_images("cache", 70)
    metrics.predict_done("cats", "OK")
    metrics.predict_done("", "NOT_FOUND")
    metrics.predict_phase("total", 0.02)
    metrics.batch(8)
    metrics.watch_queue(lambda: 5)
    metrics.serving_loss("cats", "serving", 0.5, correct=True)
    metrics.serving_loss("cats", "serving", 1.5, correct=False)
    metrics.serving_loss("cats", "shadow", 0.25, correct=True)
    metrics.shadow_answers("cats", 3, 1)
    metrics.decided("cats", "promoted")
    metrics.serving_version("cats", 3)
    metrics.checkpoint_load("loaded", 0.1)
    metrics.scanned(1_700_000_000.0)
    metrics.watch_drift(lambda: {"cats": {"confidence": (0.25, 0.125), "features": (0.5, 0.125)}})
    metrics.watch_stages(lambda: (6, 94_000_000), 2**30)
    metrics.watch_compiler(True, lambda: 5, lambda: 2)
    metrics.precision_deviation("cats", 0.004)
    return metrics


def test_every_promised_metric_is_there_with_its_labels(busy: Metrics) -> None:
    found: dict[str, set[str]] = {}
    for family in busy.registry.collect():
        for sample in family.samples:
            name = re.sub(r"_(sum|count|bucket)$", "", sample.name).removeprefix("backboned_")
            if sample.name.startswith("backboned_"):
                found[name] = set(sample.labels) - {"le"}
    assert found == FAMILIES


def test_serving_and_training_can_tell_it_what_they_have_to_tell(metrics: Metrics) -> None:
    serving: ServingTelemetry = metrics
    training: TrainingTelemetry = metrics
    serving.batch(3)
    training.job_duration(1.0)
    assert metrics.registry.get_sample_value("backboned_predict_batch_size_sum") == 3


def test_every_metric_has_a_help_text(busy: Metrics) -> None:
    assert [family.name for family in busy.registry.collect() if not family.documentation.strip()] == []


@pytest.mark.parametrize(
    "line",
    [
        'backboned_training_loss{model="cats",split="val"} 0.25',
        'backboned_training_accuracy{model="cats",split="train"} 0.75',
        'backboned_training_epoch{model="cats"} 4.0',
        'backboned_training_jobs{state="running"} 1.0',
        'backboned_training_jobs{state="queued"} 0.0',
        'backboned_training_feature_images_total{source="cache"} 70.0',
        'backboned_predict_requests_total{code="NOT_FOUND",model=""} 1.0',
        'backboned_predict_duration_seconds_count{phase="total"} 1.0',
        "backboned_predict_batch_size_sum 8.0",
        "backboned_predict_queue_depth 5.0",
        'backboned_serving_loss_sum{model="cats",role="serving"} 2.0',
        'backboned_serving_loss_count{model="cats",role="serving"} 2.0',
        'backboned_serving_outcomes_total{correct="false",model="cats",role="serving"} 1.0',
        'backboned_serving_version{model="cats"} 3.0',
        'backboned_serving_drift{kind="features",model="cats"} 0.5',
        'backboned_serving_drift_by_chance{kind="confidence",model="cats"} 0.125',
        'backboned_checkpoint_loads_total{result="loaded"} 1.0',
        'backboned_checkpoint_loads_total{result="quarantined"} 0.0',
        "backboned_checkpoint_last_scan_timestamp_seconds 1.7e+09",
        "backboned_stages_loaded 6.0",
        "backboned_stages_compiled 5.0",
        "backboned_stages_compiling 2.0",
        "backboned_compiler_available 1.0",
        'backboned_precision_deviation{model="cats"} 0.004',
        'backboned_build_info{device="cpu",torch="2.10.0",version="1.2.3"} 1.0',
    ],
)
def test_what_happened_can_be_read(busy: Metrics, line: str) -> None:
    assert line in generate_latest(busy.registry).decode().splitlines()


def test_job_states_that_are_not_told_count_zero_again(busy: Metrics) -> None:
    busy.training_jobs({JobState.FAILED: 1})
    states = ("queued", "running", "succeeded", "failed", "cancelled")
    counts = {state: busy.registry.get_sample_value("backboned_training_jobs", {"state": state}) for state in states}
    assert counts == {"queued": 0, "running": 0, "succeeded": 0, "failed": 1, "cancelled": 0}


def test_the_series_of_a_model_go_when_it_goes(busy: Metrics) -> None:
    busy.predict_done("dogs", "OK")
    busy.forget_model("cats")
    busy.watch_drift(dict)  # it tells of models that are there
    text = generate_latest(busy.registry).decode()
    assert '"cats"' not in text
    assert 'model="dogs"' in text
    assert 'model=""' in text


def test_forgetting_a_model_that_was_never_seen_is_no_error(metrics: Metrics) -> None:
    metrics.forget_model("cats")


def test_there_are_no_series_of_when_metrics_were_made(busy: Metrics) -> None:
    assert "_created" not in generate_latest(busy.registry).decode()
    encode, _ = choose_encoder("application/openmetrics-text; version=1.0.0")
    assert "_created" not in encode(busy.registry).decode()


def test_the_process_and_python_are_told_too(metrics: Metrics) -> None:
    text = generate_latest(metrics.registry).decode()
    for name in ("process_resident_memory_bytes", "python_info", "python_gc_collections_total"):
        assert f"\n{name}" in text


def test_two_daemons_in_a_process_count_apart(metrics: Metrics) -> None:
    other = Metrics(version="1", torch_version="2", device="cpu")
    metrics.batch(1)
    assert other.registry.get_sample_value("backboned_predict_batch_size_count") == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_promtool_is_content(busy: Metrics) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(busy.registry), capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_kind_of_trouble_is_there_from_the_start(metrics: Metrics) -> None:
    troubles = Troubles()
    metrics.watch_troubles(troubles.has)
    assert 'backboned_trouble{kind="database"} 0.0' in generate_latest(metrics.registry).decode()
    troubles.tell(TroubleKind.DATABASE, "it is locked")
    text = generate_latest(metrics.registry).decode()
    assert 'backboned_trouble{kind="database"} 1.0' in text
    assert all(f'backboned_trouble{{kind="{kind.value}"}}' in text for kind in TroubleKind)
