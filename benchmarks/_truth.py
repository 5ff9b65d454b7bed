"""What models must answer: worked out here, eagerly, in fp32, one photo at a time."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from backboned.registry.backbone import Backbone
from backboned.server.compute.device import Device
from benchmarks._network import prepared, stacked

Answers = Iterable[tuple[str, int, Sequence[float]]]
"""Model, number of the photo, probabilities in the order of the classes."""

_FULL = Device(torch.device("cpu"), torch.float32)


class Truth:
    """Answers of models that stand on the weights `base` of a backbone. For one thread."""

    def __init__(self, backbone: Backbone, base: Mapping[str, Tensor], photos: Sequence[bytes]) -> None:
        self._backbone = backbone
        self._base = base
        self._photos = photos
        self._head_keys = {f"{backbone.head.layer}.weight", f"{backbone.head.layer}.bias"}
        self._features: dict[int, Tensor] = {}

    @torch.inference_mode()
    def features(self, photo: int) -> Tensor:
        """What the frozen backbone makes of a photo: `[1, feature_size, …]`."""
        if photo not in self._features:
            self._features[photo] = self._body(self._network(self._base), photo)
        return self._features[photo]

    def largest_error(self, models: Mapping[str, Mapping[str, Tensor]], answers: Answers) -> float:
        """How far probabilities are from the truth at most; `models` are their own tensors, by name."""
        return max(
            (
                (self._probabilities(models[m], photo) - torch.tensor(row)).abs().max().item()
                for m, photo, row in answers
            ),
            default=0.0,
        )

    @torch.inference_mode()
    def _probabilities(self, state: Mapping[str, Tensor], photo: int) -> Tensor:
        network = self._network({**self._base, **state})
        x = self.features(photo) if state.keys() <= self._head_keys else self._body(network, photo)
        return self._backbone.head.forward(network, x).flatten(1).softmax(1)[0]

    def _network(self, state: Mapping[str, Tensor]) -> nn.Module:
        classes = len(state[f"{self._backbone.head.layer}.weight"])
        network = self._backbone.module(classes, device="meta").eval()
        network.load_state_dict(state, assign=True)
        return network

    def _body(self, network: nn.Module, photo: int) -> Tensor:
        preprocessing = self._backbone.preprocessing
        x = stacked([prepared(self._photos[photo], preprocessing)], preprocessing, _FULL)
        for stage in self._backbone.stages:
            x = stage.forward(network, x)
        return x
