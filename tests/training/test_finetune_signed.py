"""A trainer signs each epoch, also after it was ended, and doesn't go on from what nobody signed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backboned.registry import BackbonedError
from backboned.registry.digest import file_digest
from backboned.registry.manifest import Manifest
from backboned.registry.signatures import Trust, read_signature, write_signature
from backboned.server.training.finetune import finetune
from backboned.server.training.spec import TrainerSpec

Paint = Callable[..., Path]
MakeSpec = Callable[..., TrainerSpec]
MakeKey = Callable[..., tuple[Path, Path]]


@pytest.fixture
def colours(tmp_path: Path, paint: Paint) -> Path:
    return paint(tmp_path / "data" / "colours", {"red": 6, "blue": 6})


def folder(spec: TrainerSpec) -> Path:
    return spec.checkpoint_dir / spec.model / str(spec.version)


def test_every_epoch_is_signed_also_when_the_job_goes_on_after_its_trainer_was_ended(
    colours: Path, make_spec: MakeSpec, make_key: MakeKey
) -> None:
    private, public = make_key("trainer")
    spec = replace(make_spec(colours, max_epochs=4, patience=0), signing_key=private)

    def check() -> None:
        if (folder(spec) / "epoch-0002.pt").exists():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        finetune(spec, lambda _: None, check)
    write_signature(folder(spec) / "epoch-0003.pt", b"left of an earlier attempt, of which the checkpoint is gone")
    finetune(spec, lambda _: None, lambda: None)
    files = [folder(spec) / e.file for e in Manifest.read(folder(spec)).epochs]
    assert len(files) == 4
    for file in files:
        Trust([public]).check(file.name, file_digest(file), read_signature(file))


def test_a_warm_start_is_from_a_version_that_a_trusted_key_has_signed(
    colours: Path, make_spec: MakeSpec, make_key: MakeKey
) -> None:
    """Else what someone put there would get our signature."""
    private, public = make_key("trainer")

    def spec(**options: int) -> TrainerSpec:
        return replace(make_spec(colours, max_epochs=1, **options), signing_key=private, trusted_keys=(public,))

    first = spec()
    finetune(first, lambda _: None, lambda: None)
    finetune(spec(warm_start_version=1), lambda _: None, lambda: None)

    manifest = Manifest.read(folder(first))
    file = folder(first) / manifest.best.file
    content = torch.load(file)
    content["model_state_dict"]["fc.bias"] += 1
    torch.save(content, file)
    forged = replace(manifest.best, sha256=file_digest(file), size_bytes=file.stat().st_size)
    replace(manifest, epochs=(forged,)).write(folder(first))
    with pytest.raises(BackbonedError, match="it isn't the file that was signed"):
        finetune(spec(warm_start_version=1), lambda _: None, lambda: None)


def test_the_keys_reach_a_trainer(colours: Path, make_spec: MakeSpec, make_key: MakeKey) -> None:
    private, public = make_key("trainer")
    spec = replace(make_spec(colours), signing_key=private, trusted_keys=(public,))
    assert TrainerSpec.from_json(spec.to_json()) == spec
    assert TrainerSpec.from_json(make_spec(colours).to_json()).signing_key is None
