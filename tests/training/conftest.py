from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from backboned.plugins import digits
from backboned.registry import Catalogue
from backboned.registry.weights import seeded_state
from backboned.server.training.features import Features
from backboned.server.training.options import TrainingOptions
from backboned.server.training.spec import TrainerSpec
from backboned.server.training.splits import Split

COLOURS = {"red": (200, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 200), "yellow": (200, 200, 60)}

Paint = Callable[[Path, Mapping[str, int]], Path]
MakeSpec = Callable[..., TrainerSpec]
MakeSplit = Callable[..., Split]


@dataclass
class GivenFeatures:
    """Stands for the features of images: `rows` `[images, views, …]`."""

    rows: Tensor
    cached: bool

    def batch(self, images: Tensor, views: Tensor) -> Tensor:
        return self.rows[images, views].clone()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products gain nothing from threads, and on a machine that is busy they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(colours: list[str], seed: int) -> bytes:
    """A noisy 20×20 PNG of a colour, or of the sum of several."""
    noise = torch.randint(-50, 50, (3, 20, 20), generator=torch.Generator().manual_seed(seed))
    total = torch.tensor([COLOURS[c] for c in colours] or [(20, 20, 20)]).sum(0).view(3, 1, 1)
    pixels = (total + noise).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    file = BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def paint() -> Paint:
    """Makes a folder of pictures for each colour, with so many of them, and returns the folder they are in."""

    def make(folder: Path, counts: Mapping[str, int]) -> Path:
        for number, (name, count) in enumerate(counts.items()):
            (folder / name).mkdir(parents=True)
            for i in range(count):
                (folder / name / f"{i:03}.png").write_bytes(picture([name], 1000 * number + i))
        return folder

    return make


@pytest.fixture(scope="session")
def make_split() -> MakeSplit:
    """Makes a split of `rows` `[images, …]`, or `[images, views, …]` where there are several views."""

    def make(rows: Tensor, targets: Tensor, *, views: int = 1, cached: bool = True) -> Split:
        rows = rows if views > 1 else rows[:, None]
        return Split(cast(Features, GivenFeatures(rows, cached)), torch.arange(len(rows)), targets, views)

    return make


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    catalogue = Catalogue()
    catalogue.add(digits, "the plugin itself")
    return catalogue


@pytest.fixture(scope="session")
def weights_file(catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(seeded_state(catalogue.get("digits"), seed=7), file)
    return file


@pytest.fixture
def make_spec(tmp_path: Path, weights_file: Path) -> MakeSpec:
    """The spec of a job on a dataset; each call reserves the model's next version."""
    versions: dict[str, int] = {}

    def make(
        dataset: Path,
        *,
        model: str = "colours",
        cache_bytes: int = 2**30,
        device: str = "cpu",
        **options: object,
    ) -> TrainerSpec:
        version = versions[model] = versions.get(model, 0) + 1
        (tmp_path / "checkpoints" / model / str(version)).mkdir(parents=True)
        work = tmp_path / f"work-{model}-{version}"
        work.mkdir()
        return TrainerSpec(
            model=model,
            version=version,
            backbone="digits",
            dataset=str(dataset),
            data_roots=(dataset.parent,),
            options=TrainingOptions(**options),  # type: ignore[arg-type]  # as the test gives them
            checkpoint_dir=tmp_path / "checkpoints",
            work_dir=work,
            weight_files={"digits": weights_file},
            plugin_modules=(),
            device=device,
            threads=1,
            max_image_pixels=10**6,
            precision="fp32",
            cache_dir=tmp_path / "features",
            cache_bytes=cache_bytes,
        )

    return make
