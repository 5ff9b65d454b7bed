from pathlib import Path

import pytest

from backboned.server.training.events import EpochDone
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.trainer_process import TrainerProcess

SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (SHARED / "data" / "flower_photos").is_dir(), reason="../shared/data/flower_photos is absent")
async def test_a_head_on_real_photos_reaches_ninety_percent_with_default_options(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "flowers" / "1").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    spec = TrainerSpec(
        model="flowers",
        version=1,
        backbone="mobilenet_v2",
        dataset=SHARED / "data" / "flower_photos",
        data_roots=(SHARED / "data",),
        options=TrainingOptions(),
        checkpoint_dir=tmp_path / "checkpoints",
        work_dir=tmp_path / "work",
        weight_files={"mobilenet_v2": SHARED / "weights" / "mobilenet_v2.pth"},
        plugin_modules=(),
        device="cpu",
        threads=2,
        max_image_pixels=10**8,
        feature_budget_bytes=2**30,
    )
    process = await TrainerProcess.start(spec)
    try:
        epochs = [event async for event in process.events() if isinstance(event, EpochDone)]
        assert await process.ended() == "the trainer process ended with code 0"
    finally:
        process.kill()
    best = [epoch for epoch in epochs if epoch.best][-1]
    assert best.val_accuracy >= 0.90
