"""Where keys are trusted, what is read is what they have signed, and what it says of itself."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from backboned.registry import BackbonedError, Catalogue
from backboned.registry.adoption import Before
from backboned.registry.digest import file_digest
from backboned.registry.directory import CheckpointDirectory
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.recognise import Recogniser
from backboned.registry.refusal import IncompleteFile
from backboned.registry.signatures import Signer, Trust, read_signature, signature_path, write_signature
from backboned.registry.task import Task
from backboned.registry.version import VersionReader, VersionWeights, VersionWriter
from backboned.registry.weights import StageWeights, WeightStore

MakeDigits = Callable[..., nn.Module]
MakeKey = Callable[..., tuple[Path, Path]]
CLASSES = ("ant", "bee", "wasp")


class Vault:
    """A checkpoint directory with the model `flowers`, a key that signs, and a reader that trusts it alone."""

    def __init__(self, root: Path, catalogue: Catalogue, weights: Path, keys: tuple[Path, Path]) -> None:
        self.folder = root / "flowers"
        self.folder.mkdir()
        self.directory = CheckpointDirectory(root)
        self.digits = catalogue.get("digits")
        self.recogniser = Recogniser(catalogue)
        self.weights = WeightStore(catalogue, {"digits": weights})
        self.signer = Signer(keys[0])
        self.trust = Trust([keys[1]])
        self.reader = VersionReader(self.directory, self.recogniser, self.weights, self.trust)
        self.heedless = VersionReader(self.directory, self.recogniser, self.weights)

    def write(self, network: nn.Module, signer: Signer | None, epoch: int = 1) -> Manifest:
        """Write a version as a trainer does, its head trained."""
        folder = self.folder / "1"
        folder.mkdir(exist_ok=True)
        manifest = Manifest(
            model="flowers",
            version=1,
            backbone="digits",
            task=Task.SINGLE_LABEL,
            classes=CLASSES,
            stages={},
            preprocessing=self.digits.preprocessing,
            epochs=(),
            best_epoch=0,
            complete=True,
            trained=("head",),
        )
        writer = VersionWriter(folder, manifest, signer)
        head = {k: t for k, t in network.state_dict().items() if k.startswith("fc.")}
        stages = {n: w.digest for n, w in self.weights.stages("digits").items()} | {
            "head": StageWeights.of(head).digest
        }
        writer.write(
            epoch, head, stages=stages, optimizer_state={}, loss=0.5, metrics=EpochMetrics(val_loss=0.5), best=True
        )
        return writer.manifest

    def drop(self, content: Mapping[str, Any], name: str = "mine.pt", *, signed: bool = True) -> Path:
        """Drop a file, and its signature."""
        path = self.folder / name
        torch.save(content, path)
        if signed:
            self.sign(path)
        return path

    def sign(self, path: Path) -> None:
        write_signature(path, self.signer.sign(path.name, file_digest(path)))

    def adopt(
        self, name: str = "mine.pt", previous: Manifest | None = None, reader: VersionReader | None = None
    ) -> VersionWeights | None:
        """Adopt what was dropped under a name."""
        return (reader or self.reader).adopt(self.directory.scan().drops[self.folder / name], Before(previous))

    def refusal(self, manifest: Manifest | None = None) -> str:
        """Why a version isn't read, or what was dropped not adopted."""
        with pytest.raises(BackbonedError) as caught:
            self.adopt() if manifest is None else self.reader.read(manifest)
        return caught.value.message

    def epoch(self, version: int = 1) -> Path:
        """The checkpoint of a version that has one."""
        (path,) = (self.folder / str(version)).glob("epoch-*[!g]")
        return path


@pytest.fixture
def vault(tmp_path: Path, catalogue: Catalogue, make_digits: MakeDigits, make_key: MakeKey) -> Vault:
    torch.save(make_digits().state_dict(), tmp_path / "digits.pth")
    (tmp_path / "checkpoints").mkdir()
    return Vault(tmp_path / "checkpoints", catalogue, tmp_path / "digits.pth", make_key("ours"))


@pytest.fixture
def network(make_digits: MakeDigits) -> nn.Module:
    return make_digits(3, head=1)


def classes_of(version: VersionWeights | None) -> tuple[str, ...]:
    assert version is not None
    return version.manifest.classes


# What a trainer writes.


def test_a_signed_version_is_read(vault: Vault, network: nn.Module) -> None:
    manifest = vault.write(network, vault.signer)
    found = vault.reader.read(manifest).stages["head"].tensors
    assert all(found[k].equal(network.state_dict()[k]) for k in found)


def test_a_checkpoint_is_signed_before_the_manifest_tells_of_it(vault: Vault, network: nn.Module) -> None:
    (vault.folder / "1" / "manifest.json").mkdir(parents=True)  # which can't be written then
    with pytest.raises(OSError, match=r"manifest\.json"):
        vault.write(network, vault.signer)
    vault.trust.check("it", file_digest(vault.epoch()), read_signature(vault.epoch()))


def test_what_the_manifest_says_of_a_file_is_what_was_written(vault: Vault, network: nn.Module) -> None:
    best = vault.write(network, None).best
    assert (best.sha256, best.size_bytes) == (file_digest(vault.epoch()), vault.epoch().stat().st_size)


def test_a_signature_of_an_earlier_attempt_is_replaced(
    vault: Vault, network: nn.Module, make_digits: MakeDigits
) -> None:
    vault.write(make_digits(3, head=2), vault.signer)
    vault.reader.read(vault.write(network, vault.signer))


def test_a_version_without_a_signature_is_refused_until_it_is_signed(vault: Vault, network: nn.Module) -> None:
    manifest = vault.write(network, None)
    assert vault.refusal(manifest).startswith("epoch-0001.pt is not signed")
    assert vault.heedless.read(manifest).manifest == manifest
    vault.sign(vault.epoch())
    assert vault.reader.read(manifest).manifest == manifest


def test_a_version_signed_by_another_key_is_refused(vault: Vault, network: nn.Module, make_key: MakeKey) -> None:
    manifest = vault.write(network, Signer(make_key("other")[0]))
    assert "signed by a key that is not trusted" in vault.refusal(manifest)


def test_an_altered_file_is_refused_whatever_the_manifest_says_of_it(vault: Vault, network: nn.Module) -> None:
    manifest = vault.write(network, vault.signer)
    content = torch.load(vault.epoch())
    content["model_state_dict"]["fc.bias"] += 1
    torch.save(content, vault.epoch())
    assert "doesn't match the sha256" in vault.refusal(manifest)
    forged = replace(manifest.best, sha256=file_digest(vault.epoch()), size_bytes=vault.epoch().stat().st_size)
    manifest = replace(manifest, epochs=(forged,))
    assert "it isn't the file that was signed" in vault.refusal(manifest)
    assert vault.heedless.read(manifest).manifest == manifest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", ("wasp", "bee", "ant")),
        ("task", Task.MULTI_LABEL),
        ("backbone", "resnet18"),
        ("preprocessing", None),
        ("stages", None),
    ],
)
def test_a_manifest_that_says_otherwise_than_the_signed_file_is_refused(
    vault: Vault, network: nn.Module, field: str, value: Any
) -> None:
    manifest = vault.write(network, vault.signer)
    if field == "preprocessing":
        value = replace(manifest.preprocessing, crop_size=manifest.preprocessing.crop_size + 1)
    if field == "stages":
        value = {**manifest.stages, "head": manifest.stages["stem"]}
    said = vault.refusal(replace(manifest, **{field: value}))
    assert said.startswith(f"manifest.json isn't signed, and its {field} is not what the signed file says")


def test_a_version_signed_on_other_weights_than_those_given_is_refused_whatever_the_manifest_says(
    vault: Vault, network: nn.Module, make_digits: MakeDigits, catalogue: Catalogue, tmp_path: Path
) -> None:
    manifest = vault.write(network, vault.signer)
    torch.save(make_digits(body=1).state_dict(), tmp_path / "other.pth")
    other = WeightStore(catalogue, {"digits": tmp_path / "other.pth"})
    reader = VersionReader(vault.directory, vault.recogniser, other, vault.trust)
    stages = {name: weights.digest for name, weights in other.stages("digits").items()}
    forged = replace(manifest, stages={**stages, "head": manifest.stages["head"]})
    for told in (manifest, forged):
        with pytest.raises(BackbonedError, match="start the daemon with the weights"):
            reader.read(told)


# What is dropped.


def test_a_signed_drop_is_adopted_with_its_signature_and_read_again_under_its_new_name(
    vault: Vault, network: nn.Module
) -> None:
    path = vault.drop({"epoch": 7, "state_dict": network.state_dict(), "classes": list(CLASSES)})
    adopted = vault.adopt()
    assert classes_of(adopted) == CLASSES
    assert vault.epoch().name == "epoch-0007.pt"
    assert read_signature(vault.epoch()) == read_signature(path)
    assert classes_of(vault.reader.read(Manifest.read(vault.folder / "1"))) == CLASSES


def test_a_drop_without_a_signature_is_waited_for(vault: Vault, network: nn.Module) -> None:
    path = vault.drop({"state_dict": network.state_dict()}, signed=False)
    before = vault.directory.scan().drops[path]
    with pytest.raises(IncompleteFile, match="it is not signed"):
        vault.reader.adopt(before)
    assert sorted(p.name for p in vault.folder.iterdir()) == ["mine.pt"]
    vault.sign(path)
    assert vault.directory.scan().drops[path] != before
    assert vault.adopt() is not None


def test_a_drop_whose_signature_came_before_all_of_it_is_waited_for(vault: Vault, network: nn.Module) -> None:
    path = vault.drop({"state_dict": network.state_dict()})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IncompleteFile, match="truncated or altered"):
        vault.adopt()
    path.write_bytes(whole)
    signature = signature_path(path).read_bytes()
    signature_path(path).write_bytes(signature[: len(signature) // 2])
    with pytest.raises(IncompleteFile, match="signature that can't be read"):
        vault.adopt()
    signature_path(path).write_bytes(signature)
    assert vault.adopt() is not None


def test_what_stands_beside_a_signed_drop_may_say_nothing_that_it_does_not(vault: Vault, network: nn.Module) -> None:
    vault.drop({"state_dict": network.state_dict(), "classes": list(CLASSES)})
    (vault.folder / "classes.txt").write_text("wasp\nbee\nant\n")
    assert vault.refusal().startswith("what stands beside it isn't signed, and says classes that the file doesn't")
    (vault.folder / "classes.txt").write_text("\n".join(CLASSES))
    assert classes_of(vault.adopt()) == CLASSES


def test_all_that_can_stand_beside_a_drop_can_be_in_it(vault: Vault, network: nn.Module) -> None:
    preprocessing = replace(vault.digits.preprocessing, resize_size=20).to_dict()
    told = {"task": "multi_label", "classes": list(CLASSES), "preprocessing": preprocessing}
    vault.drop({"backbone": "digits", "state_dict": network.state_dict(), "backboned": told})
    save_file(
        dict(network.state_dict()),
        vault.folder / "safe.safetensors",
        metadata={"backbone": "digits", "backboned": json.dumps(told)},
    )
    vault.sign(vault.folder / "safe.safetensors")
    for name in ("mine.pt", "safe.safetensors"):
        adopted = vault.adopt(name)
        assert adopted is not None
        manifest = vault.reader.read(adopted.manifest).manifest
        assert (manifest.task, manifest.classes) == (Task.MULTI_LABEL, CLASSES)
        assert manifest.preprocessing.to_dict() == preprocessing


def test_a_drop_that_is_signed_anew_hands_its_signature_on(vault: Vault, network: nn.Module, make_key: MakeKey) -> None:
    """As after a change of keys, or where files came to be signed after they were adopted."""
    path = vault.drop({"state_dict": network.state_dict()}, signed=False)
    adopted = vault.adopt(reader=vault.heedless)
    assert adopted is not None and read_signature(vault.epoch()) is None
    assert "is not signed" in vault.refusal(adopted.manifest)
    vault.sign(path)
    assert vault.adopt(previous=adopted.manifest) is None
    assert vault.reader.read(adopted.manifest).manifest == adopted.manifest


def test_a_signature_goes_along_where_nobody_asks_for_one(vault: Vault, network: nn.Module) -> None:
    vault.drop({"state_dict": network.state_dict()})
    adopted = vault.adopt(reader=vault.heedless)
    assert adopted is not None
    assert vault.reader.read(adopted.manifest).manifest == adopted.manifest


def test_an_epoch_can_be_dropped_elsewhere_with_its_signature(vault: Vault, network: nn.Module) -> None:
    vault.write(network, vault.signer)
    for path in (vault.epoch(), signature_path(vault.epoch())):
        shutil.copy(path, vault.folder / path.name.replace("epoch-0001", "mine"))
    assert classes_of(vault.adopt()) == CLASSES


def test_a_deleted_version_leaves_no_signature(vault: Vault, network: nn.Module) -> None:
    vault.write(network, vault.signer)
    vault.directory.remove("flowers", 1)
    assert list((vault.folder / "1").glob("*.sig")) == []


def test_the_key_of_an_unsigned_drop_tells_of_no_signature(vault: Vault, network: nn.Module) -> None:
    path = vault.drop({"state_dict": network.state_dict()}, signed=False)
    drop = vault.directory.scan().drops[path]
    own = drop.signature
    assert drop.key.split() == [f"{own.size_bytes}@{own.mtime_ns}@{own.ctime_ns}", *"-----"]


def test_what_is_changed_between_the_check_and_the_reading_is_not_read(
    vault: Vault, network: nn.Module, make_digits: MakeDigits, make_key: MakeKey
) -> None:
    manifest = vault.write(network, vault.signer)
    other = {k: t for k, t in make_digits(3, head=2).state_dict().items() if k.startswith("fc.")}

    class ThenChanged(Trust):
        """Someone changes the file, in place, as soon as it is checked."""

        def check(self, name: str, sha256: str, signature: bytes | None) -> None:
            super().check(name, sha256, signature)
            changed = torch.load(vault.epoch()) | {"model_state_dict": other}
            with vault.epoch().open("wb") as file:
                torch.save(changed, file)

    reader = VersionReader(vault.directory, vault.recogniser, vault.weights, ThenChanged([make_key("ours")[1]]))
    found = reader.read(manifest).stages["head"].tensors
    assert all(found[k].equal(network.state_dict()[k]) for k in found)
    assert "doesn't match the sha256" in vault.refusal(manifest)
