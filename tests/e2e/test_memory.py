"""More models than fit into memory: each answers when it is asked, and what was asked for longest ago makes room."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import grpc
import pytest
import torch
from PIL import Image
from torch import nn

from backboned.client import Client, ClientError
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb

Truth = Callable[[str, int, Image.Image], dict[str, float]]
DIGITS_BYTES = 320_000
SQUEEZENET_BYTES = 2_900_000


@pytest.fixture
def start(
    start_daemon: Callable[..., LocalDaemon], networks: Mapping[tuple[str, int], nn.Module], tmp_path: Path
) -> Callable[[int], LocalDaemon]:
    """Starts a daemon on the four versions of `networks`, with so much memory for models."""

    def start_with(memory_bytes: int) -> LocalDaemon:
        for (model, version), network in networks.items():
            folder = tmp_path / "checkpoints" / model
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), folder / f"{version}.pt")
        flags = ("--precision=fp32", "--max-loaded-versions=1", f"--model-memory={memory_bytes}")
        return start_daemon(*flags)

    return start_with


def test_models_that_do_not_fit_together_take_turns_and_every_answer_is_right(  # noqa: PLR0917 - fixtures
    start: Callable[[int], LocalDaemon],
    connect: Callable[[LocalDaemon], Client],
    wait_for: Callable[[Callable[[], object]], None],
    fetch: Callable[[str], str],
    truth: Truth,
    photo: bytes,
) -> None:
    daemon = start(SQUEEZENET_BYTES + DIGITS_BYTES // 2)
    client = connect(daemon)
    wait_for(lambda: {m.name: m.serving_version for m in client.list_models()} == {"flowers": 3, "scenes": 1})
    picture = Image.open(BytesIO(photo)).convert("RGB")
    names = [("scenes", 1), ("flowers", 3), ("flowers", 1), ("flowers", 2)]
    expected = {key: sorted(truth(*key, picture).values()) for key in names}

    def ask(key: tuple[str, int]) -> None:
        model, version = key
        answer = client.predict(model, [photo], version=version if version < 3 else None)
        assert answer.version == version
        assert sorted(c.probability for c in answer.predictions[0].classes) == pytest.approx(expected[key], abs=1e-4)

    for key in names * 2:
        ask(key)
    with ThreadPoolExecutor(4) as callers:
        list(callers.map(ask, names * 10))

    ask(("flowers", 3))
    scenes = client.get_model("scenes")
    assert scenes.serving_version == 1 and not scenes.versions[0].loaded
    assert scenes.versions[0].checkpoint.state == pb.CHECKPOINT_STATE_AVAILABLE
    assert "it isn't in memory: it needs 2.9 MB" in scenes.versions[0].checkpoint.reason
    metrics = dict(
        line.rsplit(" ", 1) for line in fetch(f"{daemon.http}/metrics").splitlines() if line.startswith("backboned_")
    )
    assert float(metrics["backboned_stage_memory_bytes"]) <= float(metrics["backboned_stage_memory_limit_bytes"])
    assert float(metrics["backboned_evictions_total"]) >= 2
    assert float(metrics["backboned_cold_call_wait_seconds_count"]) >= 4


def test_a_model_that_never_fits_says_so_and_harms_no_other(
    start: Callable[[int], LocalDaemon],
    connect: Callable[[LocalDaemon], Client],
    wait_for: Callable[[Callable[[], object]], None],
    photo: bytes,
) -> None:
    client = connect(start(2 * DIGITS_BYTES))
    wait_for(lambda: {m.name: m.serving_version for m in client.list_models()} == {"flowers": 3, "scenes": 0})
    with pytest.raises(ClientError, match=r"it needs 2\.9 MB, and models may take 0\.6 MB") as refused:
        client.predict("scenes", [photo])
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert client.predict("flowers", [photo]).version == 3
