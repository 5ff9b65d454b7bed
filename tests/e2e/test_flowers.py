"""The main job on real photos: fine-tune over gRPC, then ask the same daemon, never restarted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from backboned.client import Client
from backboned.server.commands.local_daemon import LocalDaemon
from backboned.v1 import model_service_pb2 as pb


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flowers_are_told_apart_and_the_served_answers_agree(
    shared: Path, tmp_path: Path, start_daemon: Callable[..., LocalDaemon], connect: Callable[[LocalDaemon], Client]
) -> None:
    photos = tmp_path / "flowers"
    for split, count in (("train", 80), ("val", 40)):
        for kind in sorted((shared / "data" / "flower_photos" / split).iterdir()):
            (photos / split / kind.name).mkdir(parents=True)
            for photo in sorted(kind.glob("*.jpg"))[:count]:
                shutil.copy(photo, photos / split / kind.name)
    weights = shared / "weights" / "mobilenet_v2.pth"
    client = connect(start_daemon(f"--data-root={tmp_path}", f"--weights=mobilenet_v2={weights}"))
    job = client.wait(client.fine_tune("flowers", "mobilenet_v2", photos).id)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
    assert job.best.val_accuracy >= 0.80
    assert job.best.size_bytes < 300_000  # the head alone, and its optimiser

    files = sorted((photos / "val").glob("*/*.jpg"))
    assert len(files) == 200
    right = 0
    for begin in range(0, len(files), 32):
        part = files[begin : begin + 32]
        response = client.predict("flowers", part, top_k=1, labels=[f.parent.name for f in part])
        assert response.version == job.version
        answers = [p.classes[0].label for p in response.predictions]
        right += sum(a == f.parent.name for a, f in zip(answers, part, strict=True))
    assert right / len(files) == pytest.approx(job.best.val_accuracy, abs=1.5 / len(files))
