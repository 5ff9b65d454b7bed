"""A real Prometheus scrapes a daemon that has trained and served; promtool finds nothing to say about its metrics."""

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from backboned.client import Client, ClientError
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

Fetch = Callable[[str], str]
Query = Callable[[str], dict[str, float]]


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module", autouse=True)
def traffic(client: Client, trained: pb.Job, data: Path) -> None:
    """What there is to count: a job that has ended, labelled images, and calls that failed."""
    for name in ("red", "blue"):
        files = sorted((data / "squares" / name).iterdir())
        client.predict("squares", files, labels=[name] * len(files))
    for model in ("zebras", "flowers"):
        with pytest.raises(ClientError):
            client.predict(model, b"no picture")


@pytest.fixture(scope="module")
def query(
    served: LocalDaemon,
    tmp_path_factory: pytest.TempPathFactory,
    fetch: Fetch,
    wait_for: Callable[[Callable[[], object]], None],
) -> Iterator[Query]:
    """Asks a Prometheus that scrapes the daemon: an expression's values by model."""
    binary, folder = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    target = served.http.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "backboned", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        binary,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'storage'}",
        f"--web.listen-address={address}",
    ]

    def ask(expression: str) -> dict[str, float]:
        reply = json.loads(fetch(f"http://{address}/api/v1/query?query={quote(expression)}"))
        found = reply.get("data", {}).get("result", [])
        return {series["metric"].get("model", ""): float(series["value"][1]) for series in found}

    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or "is Ready" in fetch(f"http://{address}/-/ready"))
        wait_for(lambda: process.poll() is not None or ask("up") == {"": 1.0})
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_prometheus_sees_which_versions_serve_and_both_losses(query: Query, trained: pb.Job) -> None:
    assert query("up") == {"": 1.0}
    versions = query("backboned_serving_version")
    assert (versions["flowers"], versions["scenes"], versions["squares"]) == (3.0, 1.0, trained.version)
    assert query('backboned_training_loss{split="val"}')["squares"] == pytest.approx(trained.best.val_loss, rel=1e-6)
    assert query("backboned_training_epoch")["squares"] == 2.0
    assert query('backboned_serving_loss_count{role="serving"}')["squares"] == 24.0
    assert query("backboned_serving_loss_sum / backboned_serving_loss_count")["squares"] < 0.7
    assert query('backboned_serving_outcomes_total{correct="true"}')["squares"] == 24.0
    assert query('backboned_training_jobs{state="succeeded"}')[""] >= 1.0


def test_prometheus_sees_failures_and_no_name_that_a_caller_made_up(query: Query) -> None:
    assert query('backboned_predict_requests_total{code="OK"}')["squares"] >= 2.0
    assert query('backboned_predict_requests_total{code="NOT_FOUND"}')[""] >= 1.0
    assert query('backboned_predict_requests_total{code="INVALID_ARGUMENT"}')["flowers"] >= 1.0
    assert "zebras" not in query("backboned_predict_requests_total")
    assert query("time() - backboned_checkpoint_last_scan_timestamp_seconds")[""] < 60.0


def test_promtool_has_nothing_to_say_about_the_metrics(served: LocalDaemon, fetch: Fetch) -> None:
    text = fetch(f"{served.http}/metrics")
    assert "backboned_serving_loss_sum{" in text and "backboned_training_loss{" in text
    check = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
