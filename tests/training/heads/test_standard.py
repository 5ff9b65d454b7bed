import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backboned.server.training.heads.standard import Standard


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def features(*shape: int) -> torch.Tensor:
    """Features of very different means and deviations."""
    scale = torch.logspace(-2, 2, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return 3 * scale + scale * torch.randn(*shape, generator=generator())


def head(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {f"fc.{k}": torch.randn(t.shape, generator=generator()) for k, t in layer.state_dict().items()} | {
        "other.weight": torch.ones(2)
    }


@pytest.mark.parametrize("shape", [(40, 7), (10, 7, 3, 3)])
def test_mean_and_deviation_are_over_images_and_positions(shape: tuple[int, ...]) -> None:
    values = features(*shape)
    standard = Standard.over(values.split(9))
    flat = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(standard.mean, flat.mean(1))
    torch.testing.assert_close(standard.deviation, flat.std(1, correction=0), rtol=1e-4, atol=0)
    standardised = standard(values).transpose(0, 1).flatten(1)
    torch.testing.assert_close(standardised.mean(1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(1, correction=0), torch.ones(7), atol=1e-4, rtol=0)


def test_what_bfloat16_could_not_tell_is_not_magnified() -> None:
    values = torch.tensor([[512.0, 1.0, 0.0], [512.1, 3.0, 0.0]])
    standard = Standard.over([values])
    assert standard.deviation.tolist() == pytest.approx([2, 1, 1], rel=1e-3)
    assert standard(values).abs().amax(0).tolist() == pytest.approx([0.025, 1, 0], abs=1e-3)


@pytest.mark.parametrize("layer", [nn.Linear(7, 3), nn.Conv2d(7, 3, 1)])
def test_a_folded_head_gives_on_plain_features_what_it_gave_on_standardised_ones(layer: nn.Module) -> None:
    values = features(10, 7) if isinstance(layer, nn.Linear) else features(10, 7, 3, 3)
    standard, tensors = Standard.over([values]), head(layer)
    folded = standard.fold(tensors, "fc")
    run = F.linear if isinstance(layer, nn.Linear) else F.conv2d
    expected = run(standard(values), tensors["fc.weight"], tensors["fc.bias"])
    torch.testing.assert_close(run(values, folded["fc.weight"], folded["fc.bias"]), expected, atol=1e-4, rtol=1e-4)
    assert folded["other.weight"] is tensors["other.weight"]


@pytest.mark.parametrize("layer", [nn.Linear(7, 3), nn.Conv2d(7, 3, 1)])
def test_unfolding_undoes_folding(layer: nn.Module) -> None:
    standard, tensors = Standard.over([features(10, 7)]), head(layer)
    for again in (
        standard.unfold(standard.fold(tensors, "fc"), "fc"),
        standard.fold(standard.unfold(tensors, "fc"), "fc"),
    ):
        for key, tensor in tensors.items():
            torch.testing.assert_close(again[key], tensor, atol=1e-3, rtol=1e-4)


def test_none_changes_nothing() -> None:
    values, tensors = features(4, 7), head(nn.Linear(7, 3))
    standard = Standard.none(7, torch.device("cpu"))
    assert torch.equal(standard(values), values)
    assert all(torch.equal(t, tensors[k]) for k, t in standard.fold(tensors, "fc").items())
