"""What a version makes of images, for judging it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backboned.registry.answers import Answers
from backboned.registry.backbone import Backbone
from backboned.registry.task import Task
from backboned.registry.weights import StageWeights
from backboned.server.training.familiarity import Familiarity
from backboned.server.training.judging import Outputs, answers_of
from backboned.server.training.network import Network
from backboned.server.training.precision import Precision
from backboned.server.training.splits import Split

_BATCH = 64
_MOST_TRAINING_IMAGES = 1000


class Judge:
    """Runs weights above the freezing boundary over a job's images. For one thread."""

    def __init__(
        self,
        backbone: Backbone,
        trainable: tuple[str, ...],
        precision: Precision,
        train: Split,
        validation: Split,
        *,
        check: Callable[[], None],
    ) -> None:
        """`trainable` are the stages above the boundary that the splits' features are of."""
        self._backbone = backbone
        self._trainable = trainable
        self._precision = precision
        self._train, self._validation = train, validation
        self._check = check
        self._network: Network | None = None

    def answers(self, task: Task, classes: int, stages: Mapping[str, StageWeights]) -> Answers:
        """What serving needs to know to give answers worth trusting, for these weights.

        How familiar an image is, is told by a thousand training images at most.
        """
        count = len(self._train)
        step = max(1, -(-count // _MOST_TRAINING_IMAGES))
        some = torch.arange(0, count, step)
        train = self.outputs(stages, self._train, some)
        familiarity = Familiarity.of(task, train.features, train.targets, classes)
        return answers_of(task, self.outputs(stages, self._validation), familiarity)

    @torch.no_grad()
    def outputs(self, stages: Mapping[str, StageWeights], split: Split, some: Tensor | None = None) -> Outputs:
        """What these weights make of a part's images, or of `some`, by position."""
        network = self._with_weights(stages)
        chosen = torch.arange(len(split)) if some is None else some
        logits, features = [], []
        for batch in chosen.split(_BATCH):
            with self._precision():
                read = network.features(split.served(batch))
            logits.append(network.logits(read).cpu())
            features.append((read.flatten(2).mean(2) if read.dim() > 2 else read).cpu())
            self._check()
        return Outputs(torch.cat(logits), split.targets.cpu()[chosen], torch.cat(features))

    def _with_weights(self, stages: Mapping[str, StageWeights]) -> Network:
        if self._network is None:
            self._network = Network.build(self._backbone, stages, self._trainable, self._precision.device)
            self._network.train(False)
        own = {key: tensor for weights in stages.values() for key, tensor in weights.tensors.items()}
        for key, tensor in self._network.trained().items():
            if key in own:  # all but BatchNorm's counters
                tensor.copy_(own[key])
        return self._network
