"""A state_dict is recognised from its keys and shapes, in every form that PyTorch scripts write."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from backboned.registry import Backbone, BackbonedError, Catalogue, ErrorKind
from backboned.registry.payload import Payload
from backboned.registry.recognise import Recognised, Recogniser

MakeDigits = Callable[..., nn.Module]
State = dict[str, Tensor]


class Wrapper(nn.Module):
    """A tutorial's transfer-learning module: a backbone in an attribute, and a new layer that reads what it gives."""

    def __init__(self, backbone: nn.Module, linear: nn.Module, attribute: str = "backbone") -> None:
        super().__init__()
        self.add_module(attribute, backbone)
        self.linear_layers = linear
        self._attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear_layers(self.get_submodule(self._attribute)(x))
        return found


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """torchvision's own, with its 1000 logits, and with statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    network: nn.Module = models.resnet18()
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer), alpha=0.1)
    return network.eval()


@pytest.fixture
def state(make_digits: MakeDigits) -> State:
    """A bare state_dict of the smallest backbone, with three classes."""
    return dict(make_digits(3).state_dict())


def answers(found: Recognised, x: Tensor) -> Tensor:
    """What the backbone's own module gives with the weights that were found; for ones that miss nothing."""
    assert not found.missing
    network = found.backbone.module(found.outputs).eval()
    tensors = {key: tensor for stage in found.stages.values() for key, tensor in stage.items()}
    left = network.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys and all(k.endswith("num_batches_tracked") for k in left.missing_keys)
    with torch.inference_mode():
        return torch.as_tensor(network(x))


def own_answers(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(network.eval()(x))


def refusal(recogniser: Recogniser, state: Mapping[str, Tensor], name: str | None = None) -> str:
    with pytest.raises(BackbonedError) as caught:
        recogniser.recognise(Payload(state, backbone=name))
    assert caught.value.kind is ErrorKind.DATA_LOSS
    return caught.value.message


IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PHOTOS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [1, 2, 10, 37])
def test_a_bare_state_dict_with_any_number_of_classes(
    recogniser: Recogniser, make_digits: MakeDigits, classes: int
) -> None:
    network = make_digits(classes)
    found = recogniser.recognise(Payload(network.state_dict()))
    assert (found.backbone.name, found.outputs, found.missing) == ("digits", classes, ())
    assert list(found.stages) == [s.name for s in found.backbone.chain]
    assert answers(found, IMAGES).equal(own_answers(network, IMAGES))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_torchvision_networks_are_told_apart(recogniser: Recogniser, name: str) -> None:
    network = models.get_model(name, num_classes=4)
    found = recogniser.recognise(Payload(network.state_dict()))
    assert (found.backbone.name, found.outputs) == (name, 4)
    assert answers(found, PHOTOS).equal(own_answers(network, PHOTOS))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_data_parallel_and_compile_are_taken_off(recogniser: Recogniser, state: State, prefix: str) -> None:
    found = recogniser.recognise(Payload({prefix + k: t for k, t in state.items()}))
    assert (found.backbone.name, found.outputs) == ("digits", 3)


def test_a_prefix_of_an_attribute_is_taken_off(recogniser: Recogniser, state: State) -> None:
    assert recogniser.recognise(Payload({f"net.{k}": t for k, t in state.items()})).outputs == 3


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_on_the_thousand_logits_is_folded_into_the_head(
    recogniser: Recogniser, resnet18: nn.Module, outputs: int, bias: bool
) -> None:
    wrapper = Wrapper(resnet18, nn.Linear(1000, outputs, bias=bias), "vgg19")
    found = recogniser.recognise(Payload(wrapper.state_dict()))
    assert (found.backbone.name, found.outputs) == ("resnet18", outputs)
    torch.testing.assert_close(answers(found, PHOTOS), own_answers(wrapper, PHOTOS), atol=1e-5, rtol=1e-5)


def test_a_wrapped_one_may_be_in_data_parallel_and_its_layer_in_a_sequential(
    recogniser: Recogniser, make_digits: MakeDigits
) -> None:
    wrapper = Wrapper(make_digits(10), nn.Sequential(nn.Dropout(), nn.Linear(10, 2)))
    state = {f"module.{k}": t for k, t in wrapper.state_dict().items()}
    found = recogniser.recognise(Payload(state))
    torch.testing.assert_close(answers(found, IMAGES), own_answers(wrapper, IMAGES), atol=1e-5, rtol=1e-5)


def test_a_linear_layer_on_the_features_becomes_the_head(recogniser: Recogniser, make_digits: MakeDigits) -> None:
    network = make_digits()
    network.fc = nn.Identity()
    wrapper = Wrapper(network, nn.Linear(256, 4))
    found = recogniser.recognise(Payload(wrapper.state_dict()))
    assert (found.backbone.name, found.outputs) == ("digits", 4)
    assert answers(found, IMAGES).equal(own_answers(wrapper, IMAGES))


def test_the_same_without_a_bias_has_a_bias_of_zeros(recogniser: Recogniser, make_digits: MakeDigits) -> None:
    network = make_digits()
    network.fc = nn.Identity()
    wrapper = Wrapper(network, nn.Linear(256, 4, bias=False))
    found = recogniser.recognise(Payload(wrapper.state_dict()))
    assert answers(found, IMAGES).equal(own_answers(wrapper, IMAGES))


def test_a_head_that_is_a_convolution_is_recognised_and_replaced(recogniser: Recogniser) -> None:
    torch.manual_seed(0)
    network = models.squeezenet1_1()
    network.classifier[1] = nn.Conv2d(512, 3, 1)
    found = recogniser.recognise(Payload(network.state_dict()))
    assert (found.backbone.name, found.outputs) == ("squeezenet1_1", 3)
    assert found.stages["head"]["classifier.1.weight"].shape == (3, 512, 1, 1)
    assert answers(found, PHOTOS).equal(own_answers(network, PHOTOS))


def test_a_layer_on_the_logits_of_a_convolution_is_refused_with_the_remedy(recogniser: Recogniser) -> None:
    wrapper = Wrapper(models.squeezenet1_1(), nn.Linear(1000, 2))
    message = refusal(recogniser, wrapper.state_dict())
    assert message == (
        "the head of squeezenet1_1 isn't linear, so a layer on its logits can't be folded into it: "
        "replace 'classifier.1' instead"
    )


@pytest.mark.parametrize("stages", [(), ("layer3",), ("layer2", "layer3"), ("stem",)])
def test_a_part_beside_a_backbones_name_stands_on_its_other_stages(
    recogniser: Recogniser, state: State, stages: tuple[str, ...]
) -> None:
    part = {k: t for k, t in state.items() if k.partition(".")[0] in (*stages, "fc")}
    found = recogniser.recognise(Payload(part, backbone="digits"))
    assert set(found.stages) == {*stages, "pool", "head"}  # the pool has no weights to lack
    assert set(found.missing) == {"stem", "layer1", "layer2", "layer3"} - set(stages)
    assert found.outputs == 3


def test_the_name_may_also_come_from_outside(recogniser: Recogniser, state: State) -> None:
    part = {k: t for k, t in state.items() if k.startswith("fc.")}
    assert recogniser.recognise(Payload(part), "digits").missing
    assert recogniser.recognise(Payload(part, backbone="resnet18"), "digits").backbone.name == "digits"


def test_a_part_without_a_name_is_refused_with_the_remedy(recogniser: Recogniser, state: State) -> None:
    message = refusal(recogniser, {k: t for k, t in state.items() if k.startswith("fc.")})
    assert "a part of a state_dict needs the backbone's name" in message and '{"backbone": "resnet18"}' in message
    message = refusal(recogniser, {k: t for k, t in state.items() if not k.startswith("stem.")})
    assert message.startswith("it lacks 'stem.0.0.weight' of digits; for a part of a state_dict name the backbone")


def test_an_unknown_name_gets_the_nearest(recogniser: Recogniser, state: State) -> None:
    with pytest.raises(BackbonedError, match="unknown backbone 'digit'; did you mean 'digits'") as caught:
        recogniser.recognise(Payload(state, backbone="digit"))
    assert caught.value.kind is ErrorKind.NOT_FOUND


def without(key: str) -> Callable[[State], State]:
    return lambda state: {k: t for k, t in state.items() if k != key}


def having(key: str, tensor: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, key: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (having("layer1.body.0.0.weight", torch.zeros(16, 16, 5, 5)), "'layer1.body.0.0.weight' has shape [16, 16, 5,"),
        (having("layer1.body.0.0.weight", torch.zeros(16)), "digits needs [16, 16, 3, 3]"),
        (having("fc.weight", torch.zeros(3, 128)), "'fc.weight' has shape [3, 128], digits needs [10, 256]"),
        (having("fc.weight", torch.zeros(3, 256, 1, 1)), "'fc.weight' has shape [3, 256, 1, 1]"),
        (having("fc.bias", torch.zeros(4)), "the head's weight and bias don't agree on the number of classes (3)"),
        (having("fc.weight", torch.zeros(0, 256)), "don't agree on the number of classes (0)"),
        (without("fc.weight"), "it lacks 'fc.weight', the head of digits: save the head too"),
        (without("fc.bias"), "stage 'head' is there in part only: it lacks 'fc.bias'"),
        (without("layer2.body.0.1.running_var"), "stage 'layer2' is there in part only"),
        (having("fc.weight", torch.zeros(3, 256, dtype=torch.int8)), "'fc.weight' has type torch.int8, which digits"),
        (having("extra.weight", torch.zeros(1)), "not a state_dict of digits: it has 'extra.weight'"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_what_does_not_fit_is_told(
    recogniser: Recogniser, state: State, change: Callable[[State], State], message: str, named: bool
) -> None:
    assert message in refusal(recogniser, change(state), "digits" if named else None)


def test_a_wrapped_one_that_does_not_fit_is_told_by_its_inner_keys(
    recogniser: Recogniser, make_digits: MakeDigits
) -> None:
    state = Wrapper(make_digits(10), nn.Linear(10, 2)).state_dict()
    state["backbone.layer1.body.0.0.weight"] = torch.zeros(16, 16, 5, 5)
    assert refusal(recogniser, state).startswith("'layer1.body.0.0.weight' has shape [16, 16, 5, 5]")


@pytest.mark.parametrize(
    ("inner", "linear", "message"),
    [
        (10, nn.Linear(11, 2), "the added layer reads 11 values, digits gives 10"),
        (None, nn.Linear(255, 2), "the added layer reads 255 values, digits gives 256"),
        (10, nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 2)), "not a state_dict of digits: it has"),
        (10, nn.LayerNorm(10), "not a state_dict of digits: it has"),
    ],
)
def test_an_added_layer_that_does_not_fit_is_told(
    recogniser: Recogniser, make_digits: MakeDigits, inner: int | None, linear: nn.Module, message: str
) -> None:
    network = make_digits(inner or 10)
    if inner is None:
        network.fc = nn.Identity()
    assert message in refusal(recogniser, Wrapper(network, linear).state_dict())


def test_what_fits_two_backbones_is_refused_with_both_and_taken_with_a_name(digits: Backbone, state: State) -> None:
    catalogue = Catalogue()
    catalogue.add(digits, "here")
    catalogue.add(replace(digits, name="twin"), "there")
    recogniser = Recogniser(catalogue)
    message = refusal(recogniser, state)
    assert message.startswith("it fits several backbones: digits, twin; name one in a JSON file beside it")
    assert recogniser.recognise(Payload(state), "twin").backbone.name == "twin"


def test_what_fits_nothing_is_refused_with_a_few_of_its_keys(recogniser: Recogniser) -> None:
    state = {"k" * 5000: torch.zeros(1), "\ud800": torch.zeros(1), "c": torch.zeros(1), "d": torch.zeros(1)}
    message = refusal(recogniser, state)
    assert message.startswith(f"its keys ({'k' * 60}, \\ud800, c, …) and shapes fit no backbone that is known here")
    assert "fit no backbone that is known here (0 are)" in refusal(Recogniser(Catalogue()), {"a.b": torch.zeros(1)})


def test_an_empty_name_is_none_that_is_known(recogniser: Recogniser, state: State) -> None:
    with pytest.raises(BackbonedError, match="unknown backbone ''"):
        recogniser.recognise(Payload(state, backbone="digits"), "")


def test_thousands_of_keys_that_have_nothing_in_common_are_soon_refused(recogniser: Recogniser) -> None:
    state = {f"k{i}.weight": torch.zeros(1) for i in range(30_000)}
    assert "fit no backbone that is known here" in refusal(recogniser, state)


def test_counters_of_batches_make_no_difference(recogniser: Recogniser, state: State) -> None:
    without_counters = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    assert len(without_counters) < len(state)
    found = [recogniser.recognise(Payload(s)) for s in (state, without_counters)]
    assert found[0].stages.keys() == found[1].stages.keys()
    assert all(found[0].stages[n].keys() == found[1].stages[n].keys() for n in found[0].stages)
