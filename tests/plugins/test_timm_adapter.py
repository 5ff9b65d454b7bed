import sys

import pytest
import torch

from backboned.plugins import timm_adapter
from backboned.plugins.timm_chain import NotAChain, chain
from backboned.registry import BackbonedError, Catalogue, ErrorKind, check_backbone

timm = pytest.importorskip("timm", reason="needs the extra timm")


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    catalogue = Catalogue()
    catalogue.add(timm_adapter, "timm adapter")
    return catalogue


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", ("stem", "layer1", "layer2", "layer3", "layer4", "pool")),
        ("mobilenetv3_small_100", ("stem", *(f"blocks.{i}" for i in range(6)), "pool")),
        ("convnext_atto", ("stem", *(f"stages.{i}" for i in range(4)), "pool")),
        ("vit_tiny_patch16_224", ("embed", *(f"blocks.{i}" for i in range(12)), "pool")),
        ("regnety_002", ("stem", "s1", "s2", "s3", "s4", "pool")),
    ],
)
def test_a_network_of_timm_conforms_with_stages_by_its_own_names(
    catalogue: Catalogue, name: str, stages: tuple[str, ...]
) -> None:
    backbone = catalogue.get(f"timm/{name}")
    assert backbone.stage_names == stages
    report = check_backbone(backbone)
    assert report.passed, str(report)


def test_preprocessing_is_that_of_timms_evaluation_transform(catalogue: Catalogue) -> None:
    preprocessing = catalogue.get("timm/vit_tiny_patch16_224").preprocessing
    assert (preprocessing.resize_size, preprocessing.crop_size) == (248, 224)  # crop_pct 0.9
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixer_s16_224", "something other than a module happens between norm and head_drop"),
        ("swin_tiny_patch4_window7_224", "buffers outside its state_dict"),
        ("deit_tiny_distilled_patch16_224", "its classifier is a tuple"),
    ],
)
def test_a_network_that_is_no_chain_is_refused_with_what_is_in_the_way(
    catalogue: Catalogue, name: str, reason: str
) -> None:
    with pytest.raises(BackbonedError, match=rf"timm/{name} can't be used.*{reason}") as caught:
        catalogue.get(f"timm/{name}")
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_an_unknown_network_gets_the_nearest_names(catalogue: Catalogue) -> None:
    with pytest.raises(BackbonedError, match=r"unknown timm model 'resnet_50'; did you mean 'resnet50'") as caught:
        catalogue.get("timm/resnet_50")
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_without_timm_the_family_is_there_and_its_use_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python itself does for a module that can't be imported
    catalogue = Catalogue()
    catalogue.add(timm_adapter, "timm adapter")
    assert list(catalogue.families[0].names()) == []
    with pytest.raises(BackbonedError, match=r"pip install 'backboned\[timm\]'") as caught:
        catalogue.get("timm/resnet18")
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION


class Residual(torch.nn.Module):
    """Two modules around which something is added: no chain of them."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"module": "body"}]
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12))
        self.fc = torch.nn.Linear(12, 5)

    def get_classifier(self) -> torch.nn.Linear:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.body(x) + 1)
        return logits


def test_arithmetic_between_modules_is_never_lost_silently() -> None:
    with torch.device("meta"):
        model = Residual()
    with pytest.raises(NotAChain, match="something other than a module happens between body and fc"):
        chain(model, (3, 2, 2))
