"""The head alone, over frozen features: candidates side by side, epoch by epoch, and the best of them chosen."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from backboned.registry.backbone import Backbone
from backboned.server.compute.stages import Templates
from backboned.server.training.epochs import Progress, Trained, diverged, schedule
from backboned.server.training.events import EpochDone
from backboned.server.training.heads.adamw import StackedAdamW
from backboned.server.training.heads.candidates import FOLDS, PENALTIES, Grid, folds, spread
from backboned.server.training.heads.probe import Probes, fits, row_weights
from backboned.server.training.heads.stacked import StackedHeads
from backboned.server.training.heads.standard import Standard
from backboned.server.training.objective import Objective
from backboned.server.training.options import TrainingOptions
from backboned.server.training.splits import Split
from backboned.server.training.temperature import calibrated_losses

_MOST_PARAMETERS = 2**25
_MOST_LOGITS = 2**25
_ROWS_AT_ONCE = 64
Check = Callable[[], None]


class HeadTrainer:
    """Trains many heads on the same features. Equal seeds give equal bits on the CPU.

    Which candidate an epoch is judged by, and which epoch is best, is chosen by the loss on validation images after
    calibration; where few images train, by cross-validation over these, so that validation has had no part in it. For
    one thread; seeds torch's generators, so it wants a process of its own.
    """

    def __init__(  # noqa: PLR0917 - what a training consists of
        self,
        backbone: Backbone,
        start: Mapping[str, Tensor],
        objective: Objective,
        options: TrainingOptions,
        train: Split,
        validation: Split,
        *,
        warm: bool,
        threads: int = 1,
    ) -> None:
        """`start` are the tensors that the head begins from; `warm`: they are learned ones, and kept near.

        With two `threads`, candidates that are fitted are so beside those that are trained.
        """
        self._stage = backbone.head
        self._objective = objective
        self._options = options
        self._threads = threads
        self._train, self._validation = train, validation
        for split in (train, validation):
            split.load()
        device = objective.weights.device
        tensors = {k: t.to(device) for k, t in start.items()}
        sample = train.served(torch.tensor([0]))
        heads = StackedHeads(self._stage, Templates().fill(backbone, self._stage, tensors).to(device), sample)
        self._standard = Standard.none(sample.shape[1], device)
        if heads.reads_first:
            self._standard = Standard.over(self._all_rows())
            if warm:
                tensors = self._standard.unfold(tensors, heads.layer)
        self._heads = heads
        self._fold = folds(train.targets.cpu(), options.seed)
        sets = 1 if self._fold is None else 1 + FOLDS
        size = sum(t.numel() for t in tensors.values()) * sets
        rows = train.resident
        probe = (
            rows is not None
            and heads.is_linear
            and fits(len(rows), sample.shape[1], len(tensors[f"{heads.layer}.bias"]), len(PENALTIES) * sets)
        )
        self._grid = Grid.of(options, probe=probe, most=max(1, _MOST_PARAMETERS // size))
        self._kept = [torch.ones(len(train), dtype=torch.bool)]
        if self._fold is not None:
            self._kept += [self._fold != fold for fold in range(FOLDS)]
        torch.manual_seed(options.seed)
        self._order = torch.Generator().manual_seed(options.seed)
        copies = len(self._grid.rates) * sets
        self._parameters = {k: t.repeat(copies, *[1] * t.dim()).requires_grad_() for k, t in tensors.items()}
        rates, decays = zip(*self._grid.rates, strict=True)
        like = next(iter(tensors.values()))
        self._adamw = StackedAdamW(self._parameters, spread(rates, sets, like), spread(decays, sets, like))
        self._probes = (
            self._make_probes(rows, tensors, warm=warm) if self._grid.penalties and rows is not None else None
        )
        self._steps = 0
        self._progress = Progress()

    @property
    def cross_validated(self) -> bool:
        """Whether cross-validation chooses."""
        return self._fold is not None

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on: plain values and tensors."""
        return {
            "progress": self._progress.state_dict(),
            "parameters": {k: p.detach() for k, p in self._parameters.items()},
            "adamw": self._adamw.state_dict(),
            "probes": self._probes.state_dict() if self._probes else None,
            "steps": self._steps,
            "order": self._order.get_state(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._progress.load_state_dict(state["progress"])
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(state["parameters"][key])
        self._adamw.load_state_dict(state["adamw"])
        if self._probes:
            self._probes.load_state_dict(state["probes"])
        self._steps = state["steps"]
        self._order.set_state(state["order"])
        torch.set_rng_state(state["random"])

    def epochs(self, check: Check) -> Iterator[Trained]:
        """Train, and yield after each epoch, until the last one or until `patience` epochs brought nothing better.

        `check` is called after every batch; what it raises ends the training. Raises `BackbonedError`
        `FAILED_PRECONDITION` if no candidate's loss is finite.
        """
        while not self._progress.ended(self._options.max_epochs, self._options.patience):
            yield self._epoch(check)

    def _epoch(self, check: Check) -> Trained:
        start = time.monotonic()
        losses, rights, rate = self._train_all(check)
        seconds = time.monotonic() - start
        validation = self._logits(self._validation, check)
        chosen, loss = self._choose(validation, check)
        epoch = self._progress.epoch + 1
        figures = (losses[chosen], rights[chosen]) if chosen < len(losses) else self._probe_figures(chosen)
        value, accuracy = (float(figure) for figure in figures)
        best = validation[chosen : chosen + 1]
        target = self._validation.targets
        val_loss = float(calibrated_losses(self._objective, best, target))
        if not all(map(math.isfinite, (loss, value, val_loss))):
            raise diverged(epoch, self._options.learning_rate)
        right = self._objective.rights(best[0], target)
        done = EpochDone(
            epoch=epoch,
            train_loss=value,
            train_accuracy=accuracy,
            val_loss=val_loss,
            val_accuracy=float(right.mean()),
            learning_rate=rate * self._grid.rates[chosen][0] if chosen < len(losses) else 0.0,
            images_per_second=len(self._train) / max(seconds, 1e-9),
            best=self._progress.step(loss),
        )
        return Trained(
            done, {self._stage.name: self._head(chosen)}, {"candidate": self._grid.name(chosen)}, right.cpu()
        )

    def _train_all(self, check: Check) -> tuple[Tensor, Tensor, float]:
        """An epoch of all candidates; what `_pass` tells of those that AdamW trains."""
        if self._probes is None:
            return self._pass(check)
        if self._threads == 1:
            self._probes.run(check)
            return self._pass(check)
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as aside:
            fitted = aside.submit(self._probes.run, check)
            told = self._pass(check)
            fitted.result()
        return told

    def _pass(self, check: Check) -> tuple[Tensor, Tensor, float]:
        """One pass of AdamW: the mean loss and accuracy of each of its candidates as it went, and the last factor."""
        order = torch.randperm(len(self._train), generator=self._order)
        views = torch.randint(self._train.views, (len(order),), generator=self._order)
        batches = math.ceil(len(order) / self._options.batch_size)
        kept = torch.stack(self._kept).to(self._objective.weights.device)
        sums, factor = torch.zeros(2, len(self._grid.rates), dtype=torch.float64), 0.0
        for chosen, view in zip(order.tensor_split(batches), views.tensor_split(batches), strict=True):
            at = chosen.to(kept.device)
            target = self._train.targets[at]
            logits = self._heads.logits(
                self._parameters, self._standard(self._train.inputs(chosen, view)), training=True
            )
            weights = kept[:, at].float().repeat_interleave(len(self._grid.rates), 0)
            losses = self._objective.losses(logits, target, weighted=True)
            total = ((losses * weights).sum(1) / weights.sum(1).clamp_min(1)).sum()
            gradients = torch.autograd.grad(total, list(self._parameters.values()))
            factor = schedule(self._steps, batches * self._options.max_epochs)
            self._adamw.step(dict(zip(self._parameters, gradients, strict=True)), factor)
            self._steps += 1
            own = logits.detach()[: len(self._grid.rates)]
            figures = torch.stack([self._objective.losses(own, target), self._objective.rights(own, target)])
            sums += figures.sum(2).cpu().double()
            check()
        losses_sum, rights_sum = sums / len(order)
        return losses_sum, rights_sum, factor

    def _choose(self, validation: Tensor, check: Check) -> tuple[int, float]:
        """The candidate to go by, and its loss on images that it hasn't learned from."""
        count = len(self._grid)
        logits, target = validation[:count], self._validation.targets
        if self._fold is not None:
            every = self._logits(self._train, check).unflatten(0, (-1, count))
            fold = self._fold.to(every.device)
            logits = every[1 + fold, :, torch.arange(len(fold), device=fold.device)].transpose(0, 1)
            target = self._train.targets
        if logits.numel() > _MOST_LOGITS:
            losses = self._objective.losses(logits, target).mean(1)
        else:
            losses = calibrated_losses(self._objective, logits, target)
        losses = torch.where(losses.isfinite(), losses, math.inf)
        chosen = int(losses.argmin())
        return chosen, float(losses[chosen])

    @torch.no_grad()
    def _logits(self, split: Split, check: Check) -> Tensor:
        """Of all candidates, and of their copies on each fold: `[sets × candidates, n, outputs]`."""
        parts = []
        for chosen in split.batches(_ROWS_AT_ONCE if split.resident is None else 1024):
            features = self._standard(split.served(chosen))
            logits = self._heads.logits(self._parameters, features).unflatten(0, (len(self._kept), -1))
            if self._probes:
                weight, bias = self._probes.heads()
                fitted = (features @ weight.transpose(1, 2) + bias[:, None]).unflatten(0, (len(self._kept), -1))
                logits = torch.cat([logits, fitted], dim=1)
            parts.append(logits)
            check()
        return torch.cat(parts, dim=2).flatten(0, 1)

    @torch.no_grad()
    def _probe_figures(self, chosen: int) -> tuple[Tensor, Tensor]:
        """The mean loss and accuracy of a fitted candidate on the training images."""
        assert self._probes is not None
        weight, bias = (part[chosen - len(self._grid.rates)] for part in self._probes.heads())
        features = self._standard(self._train.served(torch.arange(len(self._train))))
        logits = (features @ weight.T + bias)[None]
        target = self._train.targets
        return self._objective.losses(logits, target).mean(), self._objective.rights(logits, target).mean()

    def _head(self, chosen: int) -> dict[str, Tensor]:
        """A candidate's tensors, for plain features."""
        if chosen < len(self._grid.rates):
            tensors = {k: p.detach()[chosen] for k, p in self._parameters.items()}
        else:
            assert self._probes is not None
            weight, bias = (part[chosen - len(self._grid.rates)] for part in self._probes.heads())
            tensors = {f"{self._heads.layer}.weight": weight, f"{self._heads.layer}.bias": bias}
        return self._standard.fold(tensors, self._heads.layer)

    def _make_probes(self, rows: Tensor, tensors: Mapping[str, Tensor], *, warm: bool) -> Probes:
        weight, bias = (tensors[f"{self._heads.layer}.{name}"] for name in ("weight", "bias"))
        start = (weight, bias) if warm else (torch.zeros_like(weight), torch.zeros_like(bias))
        weights = row_weights(self._kept, len(self._grid.penalties), self._train.views)
        target = self._train.targets.repeat_interleave(self._train.views, 0)
        return Probes(
            self._standard(rows),
            weights.to(rows.device),
            spread(self._grid.penalties, len(self._kept), rows),
            start,
            lambda logits: self._objective.losses(logits, target, weighted=True),
        )

    def _all_rows(self) -> Iterator[Tensor]:
        """All training features, in all views."""
        if self._train.resident is not None:
            yield from self._train.resident.split(1024)
            return
        for chosen in self._train.batches(_ROWS_AT_ONCE):
            for view in range(self._train.views):
                yield self._train.inputs(chosen, torch.full_like(chosen, view))
