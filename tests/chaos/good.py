"""The good files that are mutated: the smallest backbone, with a head of three classes."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from backboned.plugins import digits
from backboned.registry import Catalogue
from backboned.registry.answers import Answers
from backboned.registry.manifest import EpochMetrics, Manifest
from backboned.registry.task import Task
from backboned.registry.version import VersionWriter
from backboned.registry.weights import StageWeights, seeded_state
from tests.chaos.mutation import Good

CLASSES = ("ant", "bee", "wasp")


def catalogue() -> Catalogue:
    made = Catalogue()
    made.add(digits, "the plugin itself")
    return made


def state() -> dict[str, Tensor]:
    """A whole `state_dict`, of which the daemon has the body's weights."""
    backbone = catalogue().get("digits")
    generator = torch.Generator().manual_seed(1)
    head = {
        "fc.weight": torch.randn(len(CLASSES), backbone.feature_size, generator=generator),
        "fc.bias": torch.randn(len(CLASSES), generator=generator),
    }
    return seeded_state(backbone, 0) | head


def head() -> dict[str, Tensor]:
    return {k: t for k, t in state().items() if k.startswith("fc.")}


def saved(content: Any, **options: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def write_version(folder: Path) -> Manifest:
    """A version as a FineTune leaves it in `folder`, which is MODEL/NUMBER; returns its manifest."""
    backbone = catalogue().get("digits")
    folder.mkdir(parents=True)
    manifest = Manifest(
        model=folder.parent.name,
        version=int(folder.name),
        backbone=backbone.name,
        task=Task.SINGLE_LABEL,
        classes=CLASSES,
        stages={},
        preprocessing=backbone.preprocessing,
        epochs=(),
        best_epoch=0,
        complete=True,
        trained=("head",),
    )
    generator = torch.Generator().manual_seed(2)
    writer = VersionWriter(folder, manifest)
    writer.write(
        1,
        head(),
        stages={name: StageWeights.of(part).digest for name, part in backbone.split(state()).items()},
        optimizer_state={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        loss=0.5,
        metrics=EpochMetrics(train_loss=0.5, val_loss=0.6),
        best=True,
        answers=Answers(
            temperature=1.5,
            uncertain_below=0.6,
            unfamiliar_beyond=3.0,
            centres=torch.randn(len(CLASSES), backbone.feature_size, generator=generator).half(),
            scale=torch.rand(backbone.feature_size, generator=generator) + 0.5,
        ),
    )
    return writer.manifest


def good(folder: Path) -> Good:
    """The good files; `folder` is for the writing of one of them."""
    write_version(folder / "m" / "1")
    told = {"classes": list(CLASSES), "epoch": 3}
    whole = {"state_dict": state(), **told}
    part = {"backbone": "digits", "state_dict": head(), **told}
    old = {"_use_new_zipfile_serialization": False}
    return Good(
        full=saved(whole),
        head=saved(part),
        trained=(folder / "m" / "1" / "epoch-0001.pt").read_bytes(),
        safetensors=save_safetensors(state()),
        safetensors_head=save_safetensors(head(), metadata={"backbone": "digits"}),
        legacy=saved(whole, **old),
        legacy_head=saved(part, **old),
    )


def renamed(manifest: Manifest, folder: Path) -> Manifest:
    """The same manifest for a copy of the version at `folder`."""
    return replace(manifest, model=folder.parent.name, version=int(folder.name))
