"""A version is written by a trainer or adopted from a dropped file, and read only as it was written."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backboned.registry import BackbonedError, Catalogue, ErrorKind, Preprocessing
from backboned.registry.adoption import Before
from backboned.registry.digest import file_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.recognise import Recogniser
from backboned.registry.refusal import IncompleteFile
from backboned.registry.task import Task
from backboned.registry.version import VersionReader, VersionWeights, VersionWriter
from backboned.registry.weights import StageWeights, WeightStore

MakeDigits = Callable[..., nn.Module]
CLASSES = ("ant", "bee", "wasp")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, make_digits: MakeDigits) -> Path:
    """The weights that the operator has given for `digits`: those of body 0."""
    file = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save(make_digits().state_dict(), file)
    return file


class Shelf:
    """A checkpoint directory with the model `flowers`, and what reads and writes it."""

    def __init__(self, root: Path, catalogue: Catalogue, recogniser: Recogniser, weights: Mapping[str, Path]) -> None:
        self.folder = root / "flowers"
        self.folder.mkdir(exist_ok=True)
        self.directory = CheckpointDirectory(root)
        self.store = WeightStore(catalogue, weights)
        self.reader = VersionReader(self.directory, recogniser, self.store)
        self.backbone = catalogue.get("digits")

    @cached_property
    def writer(self) -> VersionWriter:
        """Writes the first version, whose head is trained."""
        (self.folder / "1").mkdir()
        manifest = Manifest(
            model="flowers",
            version=1,
            backbone="digits",
            task=Task.SINGLE_LABEL,
            classes=CLASSES,
            stages={},
            preprocessing=self.backbone.preprocessing,
            epochs=(),
            best_epoch=0,
            complete=False,
            trained=("head",),
        )
        return VersionWriter(self.folder / "1", manifest)

    def write_epoch(self, head: Mapping[str, Tensor], epoch: int = 1, *, best: bool = True) -> Manifest:
        """Write one epoch of it."""
        own = {"head": StageWeights.of(head).digest}
        self.writer.write(
            epoch,
            head,
            stages={n: w.digest for n, w in self.store.stages("digits").items()} | own,
            optimizer_state={"state": {}, "param_groups": [{"lr": 0.1}]},
            loss=0.5,
            metrics=EpochMetrics(0.5, 0.75, 0.25, 0.875),
            best=best,
        )
        return self.writer.manifest

    def adopt(self, name: str = "mine.pt", previous: VersionWeights | None = None) -> VersionWeights | None:
        """Adopt what was dropped under a name."""
        drop = self.directory.scan().drops[self.folder / name]
        return self.reader.adopt(drop, Before(None if previous is None else previous.manifest))

    def refusal(self, manifest: Manifest | None = None) -> BackbonedError:
        """The error that reading a version ends in, or adopting what was dropped."""
        with pytest.raises(BackbonedError) as caught:
            self.adopt() if manifest is None else self.reader.read(manifest)
        return caught.value

    def names(self) -> list[str]:
        """All that is in the model's folder."""
        return sorted(p.name for p in self.folder.iterdir())


OpenShelf = Callable[..., Shelf]


@pytest.fixture
def open_shelf(tmp_path: Path, catalogue: Catalogue, recogniser: Recogniser, weights_file: Path) -> OpenShelf:
    """Opens the directory with the operator's weights, or with others."""
    return lambda **weights: Shelf(tmp_path, catalogue, recogniser, weights or {"digits": weights_file})


@pytest.fixture
def shelf(open_shelf: OpenShelf) -> Shelf:
    return open_shelf()


def head_of(network: nn.Module) -> dict[str, Tensor]:
    return {k: t for k, t in network.state_dict().items() if k.startswith("fc.")}


def is_of(version: VersionWeights | None, network: nn.Module) -> bool:
    """Whether a version has just the weights of a network."""
    assert version is not None
    expected = {k: t for k, t in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: t for stage in version.stages.values() for k, t in stage.tensors.items()}
    return found.keys() == expected.keys() and all(found[k].equal(t) for k, t in expected.items())


# What a trainer writes.


def test_a_written_head_is_read_on_the_stages_it_stands_on(shelf: Shelf, make_digits: MakeDigits) -> None:
    network = make_digits(3, head=1)
    shelf.write_epoch(head_of(network))
    assert not Manifest.read(shelf.folder / "1").complete
    shelf.writer.complete()
    manifest = Manifest.read(shelf.folder / "1")
    assert manifest == shelf.writer.manifest and manifest.complete
    version = shelf.reader.read(manifest)
    assert is_of(version, network)
    assert version.shared == ("stem", "layer1", "layer2", "layer3")
    assert {n: w.digest for n, w in version.stages.items()} == manifest.stages
    assert all(version.stages[n] is shelf.store.stages("digits")[n] for n in version.shared)
    assert sorted(p.name for p in (shelf.folder / "1").iterdir()) == ["epoch-0001.pt", "manifest.json"]


def test_a_checkpoint_is_the_dict_that_pytorch_scripts_know(shelf: Shelf, make_digits: MakeDigits) -> None:
    shelf.write_epoch(head_of(make_digits(3)), 4)
    content = torch.load(shelf.folder / "1" / "epoch-0004.pt", weights_only=True)
    assert list(content) == ["epoch", "model_state_dict", "optimizer_state_dict", "loss", "backbone", "backboned"]
    assert (content["epoch"], content["loss"], content["backbone"]) == (4, 0.5, "digits")
    assert list(content["model_state_dict"]) == ["fc.weight", "fc.bias"]


def test_only_what_was_trained_is_written(shelf: Shelf, make_digits: MakeDigits) -> None:
    part_of_a_large_tensor = torch.zeros(1_000_000)[:3]
    manifest = shelf.write_epoch(head_of(make_digits(3)) | {"fc.bias": part_of_a_large_tensor})
    assert manifest.best.size_bytes == (shelf.folder / "1" / "epoch-0001.pt").stat().st_size < 20_000


def test_the_best_epoch_is_read_and_any_other_if_asked(shelf: Shelf, make_digits: MakeDigits) -> None:
    several = [make_digits(3, head=i) for i in range(3)]
    for epoch, network in enumerate(several):
        manifest = shelf.write_epoch(head_of(network), epoch, best=epoch == 1)
    assert is_of(shelf.reader.read(manifest), several[1])
    assert is_of(shelf.reader.read(manifest, epoch=2), several[2])


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_a_file_that_is_not_what_the_manifest_says_is_refused(
    shelf: Shelf, make_digits: MakeDigits, damage: str
) -> None:
    manifest = shelf.write_epoch(head_of(make_digits(3)))
    path = shelf.folder / "1" / "epoch-0001.pt"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "remove":
        path.unlink()
    else:
        torch.save(head_of(make_digits(3, head=5)), path)
    error = shelf.refusal(manifest)
    assert error.kind is ErrorKind.DATA_LOSS
    assert ("epoch-0001.pt can't be read" if damage == "remove" else "doesn't match the sha256") in error.message


def test_a_head_is_not_served_on_other_weights_than_it_was_trained_on(
    shelf: Shelf, open_shelf: OpenShelf, make_digits: MakeDigits, tmp_path: Path
) -> None:
    manifest = shelf.write_epoch(head_of(make_digits(3)))
    torch.save(make_digits(body=9).state_dict(), tmp_path / "other.pth")
    message = open_shelf(digits=tmp_path / "other.pth").refusal(manifest).message
    assert "it stands on a stage 'stem' with digest" in message
    assert "start the daemon with the weights that it was trained on" in message
    error = open_shelf(digits=tmp_path / "missing.pth").refusal(manifest)
    assert error.kind is ErrorKind.FAILED_PRECONDITION


def test_a_version_whose_classes_are_the_same_twice_is_refused(shelf: Shelf, make_digits: MakeDigits) -> None:
    manifest = replace(shelf.write_epoch(head_of(make_digits(3))), classes=("ant", "bee", "ant"))
    assert "class names must differ" in shelf.refusal(manifest).message


def test_a_version_that_tells_no_digest_of_what_it_stands_on_is_refused(shelf: Shelf, make_digits: MakeDigits) -> None:
    torch.save({"backbone": "digits", "state_dict": head_of(make_digits(3))}, shelf.folder / "mine.pt")
    adopted = shelf.adopt()
    assert adopted is not None
    manifest = replace(adopted.manifest, stages={})
    assert "by what digest it stands on stage 'layer1'" in shelf.refusal(manifest).message


@pytest.mark.parametrize("kind", ["outside", "pipe", "folder"])
def test_a_version_whose_file_is_none_or_lies_elsewhere_is_refused(
    shelf: Shelf, make_digits: MakeDigits, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = shelf.write_epoch(head_of(make_digits(3)))
    file = shelf.folder / "1" / manifest.best.file
    outside = file.replace(tmp_path_factory.mktemp("outside") / "file.pt")
    if kind == "outside":
        file.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    told = "it is a link that leads out of the checkpoint directory" if kind == "outside" else "it is not a file"
    assert shelf.refusal(manifest).message == f"{file.name} can't be read: {told}"


def test_content_that_a_manifest_is_right_about_is_checked_all_the_same(shelf: Shelf, make_digits: MakeDigits) -> None:
    manifest = shelf.write_epoch(head_of(make_digits(3)))
    file = shelf.folder / "1" / manifest.best.file
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)
    record = replace(manifest.best, sha256=file_digest(file), size_bytes=file.stat().st_size)
    assert "compressed" in shelf.refusal(replace(manifest, epochs=(record,))).message


def test_outputs_that_do_not_fit_the_classes_are_refused(shelf: Shelf, make_digits: MakeDigits) -> None:
    manifest = shelf.write_epoch(head_of(make_digits(5)))
    assert shelf.refusal(manifest).message == "epoch-0001.pt has 5 outputs for 3 classes"


# What someone drops.


def save_bare(network: nn.Module, path: Path) -> None:
    torch.save(network.state_dict(), path)


def save_checkpoint(network: nn.Module, path: Path) -> None:
    torch.save({"epoch": 7, "model_state_dict": network.state_dict(), "loss": 0.25}, path)


def save_head(network: nn.Module, path: Path) -> None:
    torch.save({"backbone": "digits", "state_dict": head_of(network)}, path)


@pytest.mark.parametrize("save", [save_bare, save_checkpoint, save_head])
def test_a_dropped_file_becomes_the_next_version(
    shelf: Shelf, make_digits: MakeDigits, save: Callable[[nn.Module, Path], None]
) -> None:
    (shelf.folder / "4").mkdir()
    (shelf.folder / "classes.txt").write_text("\n".join(CLASSES))
    network = make_digits(3, head=2)
    save(network, shelf.folder / "mine.pt")
    version = shelf.adopt()
    assert version is not None and is_of(version, network)
    manifest = Manifest.read(shelf.folder / "5")
    assert manifest == version.manifest
    assert (manifest.version, manifest.classes, manifest.complete, manifest.adopted_from) == (
        5,
        CLASSES,
        True,
        "mine.pt",
    )
    epoch, loss = (7, 0.25) if save is save_checkpoint else (0, None)
    assert (manifest.best.file, manifest.best.metrics.train_loss) == (f"epoch-{epoch:04d}.pt", loss)
    assert shelf.names() == ["4", "5", "classes.txt", "mine.pt"]
    assert sorted(p.name for p in (shelf.folder / "5").iterdir()) == [manifest.best.file, "manifest.json"]
    again = shelf.reader.read(manifest)
    assert is_of(again, network)
    assert again.shared == ("stem", "layer1", "layer2", "layer3") or save is not save_head


def test_a_name_may_be_as_long_as_the_file_system_takes(shelf: Shelf, make_digits: MakeDigits) -> None:
    name = "x" * 252 + ".pt"
    save_head(make_digits(3), shelf.folder / name)
    version = shelf.adopt(name)
    assert version is not None and is_of(version, make_digits(3))


def test_a_file_larger_than_the_memory_is_refused_before_it_is_copied(shelf: Shelf) -> None:
    for start in (b"PK\x03\x04", b"", b"\x80\x02"):
        (shelf.folder / "mine.pt").write_bytes(start)
        os.truncate(shelf.folder / "mine.pt", 2**42)  # of holes
        assert "more than half of the memory here" in shelf.refusal().message
    assert shelf.names() == ["mine.pt"]


def test_it_is_kept_apart_from_what_was_dropped(shelf: Shelf, make_digits: MakeDigits) -> None:
    network = make_digits(3)
    save_file(network.state_dict(), shelf.folder / "mine.safetensors")
    version = shelf.adopt("mine.safetensors")
    assert version is not None and version.manifest.best.file == "epoch-0000.safetensors"
    with (shelf.folder / "mine.safetensors").open("r+b") as file:
        file.truncate(10)
    assert is_of(shelf.reader.read(version.manifest), network) and is_of(version, network)


def test_the_stages_that_are_the_backbones_own_are_told_as_shared(shelf: Shelf, make_digits: MakeDigits) -> None:
    shelf.store.stages("digits")
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    version = shelf.adopt()
    assert version is not None and version.shared == ("stem", "layer1", "layer2", "layer3", "pool")
    save_bare(make_digits(3, body=9), shelf.folder / "other.pt")
    version = shelf.adopt("other.pt")
    assert version is not None and version.shared == ("pool",)


def test_the_same_content_again_says_nothing_new(shelf: Shelf, make_digits: MakeDigits) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    first = shelf.adopt()
    assert first is not None
    (shelf.folder / "mine.pt").touch()
    assert shelf.adopt(previous=first) is None
    assert shelf.directory.versions("flowers") == [1]


@pytest.mark.parametrize(
    "told",
    [
        {"classes": CLASSES},
        {"task": "multi_label"},
        {"preprocessing": Preprocessing(20, 16).to_dict()},
        {"classes": CLASSES, "backbone": "digits"},
    ],
)
def test_the_same_content_told_otherwise_is_a_new_version(
    shelf: Shelf, make_digits: MakeDigits, told: dict[str, Any]
) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    first = shelf.adopt()
    assert first is not None
    (shelf.folder / "mine.json").write_text(json.dumps(told))
    second = shelf.adopt(previous=first)
    assert second is not None and second.manifest.version == 2
    assert shelf.adopt(previous=second) is None


def test_other_content_under_the_same_name_is_a_new_version(shelf: Shelf, make_digits: MakeDigits) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    first = shelf.adopt()
    save_bare(make_digits(3, head=1), shelf.folder / "mine.pt")
    assert is_of(shelf.adopt(previous=first), make_digits(3, head=1))


def test_a_checkpoint_of_our_own_keeps_what_it_says_of_itself(shelf: Shelf, make_digits: MakeDigits) -> None:
    told = {"task": Task.MULTI_LABEL, "preprocessing": Preprocessing(20, 16)}
    shelf.writer.manifest = replace(shelf.writer.manifest, **told)  # type: ignore[arg-type]
    shelf.write_epoch(head_of(make_digits(3)), 2)
    shutil.copy(shelf.folder / "1" / "epoch-0002.pt", shelf.folder / "mine.pt")
    version = shelf.adopt()
    assert version is not None and version.manifest.best_epoch == 2
    found = version.manifest
    assert (found.classes, found.task, found.preprocessing) == (CLASSES, *told.values())
    (shelf.folder / "classes.txt").write_text("one\ntwo\nthree")  # a person's word counts for more
    version = shelf.adopt(previous=version)
    assert version is not None and version.manifest.classes == ("one", "two", "three")
    assert version.manifest.task is Task.MULTI_LABEL


def test_a_checkpoint_of_our_own_is_not_adopted_onto_other_weights(
    shelf: Shelf, open_shelf: OpenShelf, make_digits: MakeDigits, tmp_path: Path
) -> None:
    shelf.write_epoch(head_of(make_digits(3)))
    shutil.copy(shelf.folder / "1" / "epoch-0001.pt", shelf.folder / "mine.pt")
    torch.save(make_digits(body=9).state_dict(), tmp_path / "other.pth")
    assert "it stands on a stage 'stem' with digest" in open_shelf(digits=tmp_path / "other.pth").refusal().message
    assert shelf.names() == ["1", "mine.pt"]


def test_class_names_that_do_not_fit_are_refused_and_leave_nothing(shelf: Shelf, make_digits: MakeDigits) -> None:
    state = make_digits(3).state_dict()
    torch.save({"state_dict": state, "classes": 3}, shelf.folder / "mine.pt")
    assert shelf.refusal().message == "what it says of itself can't be used: expected class names, got a int"
    (shelf.folder / "classes.txt").write_text("ant\nbee")
    assert shelf.refusal().message == "2 class names for a head with 3 outputs: give 3, one a line"
    (shelf.folder / "classes.txt").write_text("ant\nbee\nwasp")
    assert shelf.adopt() is not None  # nor does what the file says of itself stand in the way
    assert shelf.names() == ["1", "classes.txt", "mine.pt"]


def test_a_truncated_file_may_be_mended_by_waiting(shelf: Shelf, make_digits: MakeDigits) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    with (shelf.folder / "mine.pt").open("r+b") as file:
        file.truncate(5000)
    assert isinstance(shelf.refusal(), IncompleteFile)
    assert shelf.names() == ["mine.pt"]


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:1000])
    full_disk()


@pytest.mark.parametrize(
    ("target", "fails"), [("shutil.copyfile", half_a_copy), (f"{Manifest.__module__}.Manifest.write", full_disk)]
)
def test_a_full_disk_leaves_nothing_behind(
    shelf: Shelf, make_digits: MakeDigits, monkeypatch: pytest.MonkeyPatch, target: str, fails: Callable[..., None]
) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    with monkeypatch.context() as patch:
        patch.setattr(target, fails)
        with pytest.raises(OSError, match="No space left on device"):
            shelf.adopt()
    assert shelf.names() == ["mine.pt"]
    assert shelf.adopt() is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_an_os_error(shelf: Shelf, make_digits: MakeDigits) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    shelf.folder.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            shelf.adopt()
    finally:
        shelf.folder.chmod(0o755)
    assert shelf.names() == ["mine.pt"]


def test_a_file_that_is_gone_is_an_os_error(shelf: Shelf, make_digits: MakeDigits) -> None:
    save_bare(make_digits(3), shelf.folder / "mine.pt")
    (drop,) = shelf.directory.scan().drops.values()
    (shelf.folder / "mine.pt").unlink()
    with pytest.raises(FileNotFoundError):
        shelf.reader.adopt(drop)
    assert not shelf.names()
