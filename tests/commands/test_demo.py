"""The demo: what it makes of scikit-learn's digits, and the whole of it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from backboned.registry import Backbone, BackbonedError, Catalogue
from backboned.server.commands.demo.digits import Images, image_files, load, write_images
from backboned.server.commands.demo.folder import fresh_folder
from backboned.server.commands.demo.plain_training import Budget, train_from_scratch
from backboned.server.commands.demo.plot import save_plot


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the demo does: more threads would only wait for each other over so small a network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("digits")
    write_images(made, images_a_class=3, seed=0)
    return made


@pytest.fixture(scope="module")
def digits() -> Backbone:
    return Catalogue.from_entry_points().get("digits")


def test_no_image_is_in_two_places(folder: Path) -> None:
    names = [file.name for file in folder.rglob("*.png")]
    assert len(names) == len(set(names)) == 1797


def test_the_backbone_sees_the_first_digits_and_the_model_the_others(folder: Path) -> None:
    assert {file.parent.name for file in image_files(folder / "pretraining")} == set("01234")
    for place in ("labelled/train", "labelled/val"):
        assert [file.parent.name for file in image_files(folder / place)] == list("555666777888999")
    assert {file.parent.name for file in image_files(folder / "held-out")} == set("56789")


def test_images_are_loaded_as_the_backbone_reads_them(folder: Path, digits: Backbone) -> None:
    images = load(image_files(folder / "labelled" / "train"), digits.preprocessing)
    assert images.pixels.shape == (15, *digits.preprocessing.input_shape)
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_training_from_scratch_learns_and_repeats_itself(digits: Backbone) -> None:
    labels = torch.arange(2).repeat(8)
    pixels = labels.view(-1, 1, 1, 1) * 2.0 - 1 + torch.zeros(16, *digits.preprocessing.input_shape)
    images = Images(pixels, labels)
    budget = Budget(epochs=8, batch_size=4)
    first, second = (
        train_from_scratch(digits, images, images, images, budget, learning_rate=0.01, seed=1) for _ in range(2)
    )
    assert first.held_out_accuracy == 1
    assert len(first.val_loss) == 8
    assert (first.val_loss, first.val_accuracy) == (second.val_loss, second.val_accuracy)


def test_the_plot_is_a_picture(tmp_path: Path, digits: Backbone) -> None:
    images = Images(torch.zeros(4, *digits.preprocessing.input_shape), torch.arange(2).repeat(2))
    curve = train_from_scratch(digits, images, images, images, Budget(2, 2), learning_rate=0.01, seed=0)
    save_plot([curve], [curve], 3, 4, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 1000


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    mine = fresh_folder(tmp_path / "mine")
    (mine / "left.txt").touch()
    assert not (fresh_folder(mine) / "left.txt").exists()

    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "thesis.txt").touch()
    with pytest.raises(BackbonedError, match="isn't empty"):
        fresh_folder(tmp_path / "yours")
    assert (tmp_path / "yours" / "thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_runs_to_its_end_and_leaves_what_it_says(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backboned.server.commands", "demo", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for said in (
        "version 1 serves",
        "version 3 serves",
        "from scratch",
        'backboned_serving_loss_sum{model="digits-5-to-9"',
    ):
        assert said in done.stdout
    for left in ("transfer-learning.png", "digits.pth", "checkpoints/digits-5-to-9/3/manifest.json"):
        assert (tmp_path / "out" / left).is_file()
