"""One epoch of training, and one pass over the validation data.

Within an epoch nothing waits for the device: losses, norms and the first number that is not finite are kept there, and
what the progress bar shows is read when it has arrived (`Totals.peek`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.generators.v2apt import ACTIVE_UNIT_NATS
from fastprompt.train.batches import Batches, grouped
from fastprompt.train.callbacks import Step
from fastprompt.train.checkpoint import RandomStates, rng_state
from fastprompt.train.constants import Constants
from fastprompt.train.evaluate import evaluation_mode
from fastprompt.train.mixing import Mixing
from fastprompt.train.optimizer import set_learning_rates
from fastprompt.train.ranks import Ranks, reduce_step
from fastprompt.train.recipes import Recipe
from fastprompt.train.tasks import Score, Task, wide

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

Forward = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
_SUMS = ("loss", "kl", "grad_norm", "correct", "images", "bad_step", "bad_loss", "bad_norm")


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        epoch: counted from 1.
        step: step within the epoch, counted from 1; 0 for an epoch as a whole and during validation.
        lr: learning rate at that step.
    """

    def __init__(self, what: str, epoch: int, step: int, lr: float, place: str = "validation") -> None:
        self.what, self.epoch, self.step, self.lr = what, epoch, step, lr
        place = f"step {step}" if step else place
        super().__init__(
            f"training diverged: the {what} at epoch {epoch}, {place}, with lr={lr:g}. Use a lower learning "
            f"rate (for example a third of it), a longer warmup, clip_grad=1.0 or rollbacks=3; the model holds the "
            f"best weights of the previous epochs"
        )


class Totals:
    """What an epoch has summed up so far, on the device; a checkpoint within the epoch holds it.

    Attributes:
        steps: optimizer steps that are done. seconds: time that they took.
        rng: random states before the first one.
        sums: (8,) of loss, KL and correct images over all images, gradient norms over steps, images, and step, loss
            and norm of the first step that was not finite (step 0: there was none).
        units: (latent,) KL of each latent unit, summed over images; empty if the method has none.
        has_kl: whether there was a KL term.
    """

    def __init__(self, device: torch.device, rng: RandomStates) -> None:
        self.steps, self.seconds, self.rng, self.has_kl = 0, 0.0, rng, False
        self.sums = torch.zeros(len(_SUMS), dtype=wide(device), device=device)
        self.units = torch.zeros(0, dtype=wide(device), device=device)
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, loss: Tensor, kl: Tensor, norm: Tensor, correct: Tensor, images: Tensor) -> None:
        """Add one step: sums over its images, and its gradient norm, all 0-dimensional tensors."""
        self.steps += 1
        step = torch.full((), self.steps, dtype=self.sums.dtype, device=self.sums.device)
        values = torch.stack([part.to(self.sums.dtype) for part in (loss, kl, norm, correct, images)])
        first = ~(torch.isfinite(loss) & torch.isfinite(norm)) & (self.sums[5] == 0)
        bad = torch.where(first, torch.stack([step, values[0], values[2]]), self.sums[5:])
        self.sums = torch.cat([self.sums[:5] + values, bad])

    def add_units(self, units: Tensor) -> None:
        """Add the KL of each latent unit, (latent,), summed over the images of a step."""
        of_batch = units.to(self.sums.dtype)
        self.units = self.units + of_batch if len(self.units) else of_batch

    def read(self) -> dict[str, float]:
        """Return the sums by name; on a GPU, this waits for it."""
        return dict(zip(_SUMS, self.sums.tolist(), strict=True))

    def peek(self) -> dict[str, float] | None:
        """Return sums that have already arrived from the device, None if there are none. On CUDA, this never waits."""
        if self.sums.device.type != "cuda":
            return self.read() if self.sums.device.type == "cpu" or self.steps % 50 == 0 else None
        found = None
        if self._arriving is not None and self._arriving[1].query():
            found = dict(zip(_SUMS, self._arriving[0].tolist(), strict=True))
            self._arriving = None
        if self._arriving is None:
            event, here = torch.cuda.Event(), torch.empty(len(_SUMS), dtype=self.sums.dtype, pin_memory=True)
            here.copy_(self.sums, non_blocking=True)
            event.record()
            self._arriving = here, event
        return found


class Begun:
    """An optimizer step that has begun: its batches and what they have summed up so far.

    Attributes:
        batches: (images, targets) of this process.
        factor: of the peak learning rates. beta: factor of the KL.
        divisor, num_images: of the whole step, over all processes, 0-dimensional tensors.
        loss, kl_sum, correct: 0-dimensional tensors. units: KL of each latent unit, (latent,), of each batch.
    """

    def __init__(
        self, batches: list[tuple[Tensor, Tensor]], factor: float, beta: float, divisor: Tensor, num_images: Tensor
    ) -> None:
        self.batches, self.factor, self.beta, self.divisor, self.num_images = batches, factor, beta, divisor, num_images
        self.loss = self.kl_sum = self.correct = torch.zeros((), device=divisor.device)
        self.units: list[Tensor] = []


class Loop:
    """Trains a model on batches of training data, and validates it.

    Args:
        features: whether the batches hold cached features for the head instead of images (linear probe).
        ranks: processes that share each batch. All of them then have the same totals.
        constants: whose records the batches hold instead of images.

    Attributes:
        steps: optimizer steps in one epoch.
        scale: factor of the recipe's learning rates; a rollback lowers it.
    """

    def __init__(
        self,
        model: PromptedViT,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        task: Task,
        train: Batches,
        val: Batches,
        features: bool,
        ranks: Ranks | None = None,
        constants: Constants | None = None,
    ) -> None:
        self.model, self.optimizer, self.recipe, self.task = model, optimizer, recipe, task
        self.train_batches, self.val_batches, self.features = train, val, features
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.beta = float(getattr(model.config, "beta", 0.0))
        self.steps = math.ceil(len(train) / recipe.accumulate)
        self.scale = 1.0
        self.ranks = Ranks() if ranks is None else ranks
        self.mixing = Mixing(recipe, task.num_outputs, model.backbone.normalise, train.device)
        self.constants = constants
        self._compiled = self._compile() if recipe.compile and not features else None

    def train(
        self,
        epoch: int,
        bar: Any,
        said: str = "",
        totals: Totals | None = None,
        after_step: Callable[[Totals, Step], Any] | None = None,
    ) -> dict[str, Any]:
        """Train for one epoch, or for the rest of it.

        Args:
            epoch: counted from 1.
            bar: a tqdm bar over images.
            said: text that the bar shows after loss and accuracy.
            totals: of the steps that were done before.
            after_step: called after each optimizer step.

        Returns:
            "train_loss" (mean, nats for a cross-entropy), "train_accuracy" (of class labels alone), "lr" (of the last
            step), "grad_norm" (mean, before clipping); with a KL term also "kl" (mean, nats), "beta" (of the last
            step) and "active_units".

        Raises:
            TrainingDiverged: a loss or gradient norm is NaN or infinite.
        """
        totals = Totals(self.train_batches.device, rng_state()) if totals is None else totals
        self.model.train()
        batches = self.train_batches.epoch(epoch - 1, totals.steps * self.recipe.accumulate, totals.rng)
        self.ranks.seed(self.recipe.seed, (epoch - 1) * self.steps + totals.steps)
        for group in grouped(batches, self.recipe.accumulate):
            step = self.step(epoch, group, totals)
            self.ranks.seed(self.recipe.seed, (epoch - 1) * self.steps + totals.steps)
            self._show(epoch, totals, bar, said)
            bar.update(sum(len(labels) for _, labels in group) * self.ranks.size)
            if after_step is not None:
                after_step(totals, step)
        self.optimizer.zero_grad(set_to_none=True)
        return self.record(epoch, totals)

    def step(self, epoch: int, group: list[tuple[Tensor, Tensor]], totals: Totals) -> Step:
        """Take one optimizer step on a group of batches, whose gradients add up to those of one batch of them all."""
        begun = self.begin(epoch, self.mixed(group), totals)
        for images, targets in begun.batches:
            self.loss(begun, self._forward(images), targets, totals).backward()
        return self.end(epoch, begun, totals)

    def mixed(self, group: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return the batches of a step as the recipe mixes and erases them, without empty ones."""
        return [self.mixing(images, labels) for images, labels in group if len(labels)]

    def begin(self, epoch: int, batches: list[tuple[Tensor, Tensor]], totals: Totals) -> Begun:
        """Begin the next step, on batches that are mixed already: `loss` of each and its backward, then `end`."""
        step = (epoch - 1) * self.steps + totals.steps
        factor = self.recipe.lr_factor(step, self.steps) * self.scale
        set_learning_rates(self.optimizer, factor)
        # The mean is over the images of all processes, so each process divides by what all of them have.
        device = self.train_batches.device
        here = [torch.zeros(2, device=device)]
        here += [torch.stack([self.task.divisor(t), torch.full((), len(t), device=device)]) for _, t in batches]
        divisor, num_images = self.ranks.sum(torch.stack(here).sum(0)).unbind()
        self.optimizer.zero_grad(set_to_none=True)
        return Begun(batches, factor, self.beta * self.recipe.kl_factor(step, self.steps), divisor, num_images)

    def loss(self, begun: Begun, outputs: tuple[Tensor, dict[str, Tensor]], targets: Tensor, totals: Totals) -> Tensor:
        """Return the share of one batch in the step's loss, from logits and auxiliary tensors."""
        logits, aux = outputs
        of_batch = self.task.training_loss(logits, targets) / begun.divisor
        if "kl" in aux:
            totals.has_kl = True
            kl = aux["kl"].float().sum()
            of_batch = of_batch + begun.beta * (kl / begun.num_images)
            begun.kl_sum = begun.kl_sum + kl.detach()
        if "penalty" in aux:  # of parameters, not of images: each part of the batch has its share
            of_batch = of_batch + aux["penalty"] * (len(targets) / begun.num_images)
        if "kl_units" in aux:
            begun.units.append(aux["kl_units"].detach().sum(0).float())
        begun.loss = begun.loss + of_batch.detach()
        begun.correct = begun.correct + self.task.num_correct(logits.detach(), targets)
        return of_batch

    def end(self, epoch: int, begun: Begun, totals: Totals) -> Step:
        """Change the weights by the gradients of all batches, and add the step to the totals."""
        device = self.train_batches.device
        of_units = torch.stack(begun.units).sum(0) if begun.units else torch.zeros(len(totals.units), device=device)
        sums = torch.cat([torch.stack([begun.loss, begun.kl_sum, begun.correct.float()]), of_units])
        sums = reduce_step(self.parameters, sums, self.ranks)
        loss, kl_sum, correct = sums[:3].unbind()
        limit = float("inf") if self.recipe.clip_grad is None else self.recipe.clip_grad
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        totals.add(loss * begun.num_images, kl_sum, norm, correct, begun.num_images)
        if len(sums) > 3:
            totals.add_units(sums[3:])
        return Step(epoch, totals.steps, self.steps, self.recipe.lr * begun.factor, loss, norm)

    def watch(self, epoch: int, totals: Totals) -> dict[str, float] | None:
        """Return what has arrived from the device, if anything (`Totals.peek`).

        Raises:
            TrainingDiverged: a step was not finite.
        """
        known = totals.peek()
        if known is None or (self.ranks.size > 1 and totals.sums.device.type != "cpu"):
            return None  # processes see a step at different times, and must end together
        self._require_finite(epoch, known)
        return known

    def _show(self, epoch: int, totals: Totals, bar: Any, said: str) -> None:
        """Show on the bar what has arrived from the device, and stop if it says that training diverged."""
        known = self.watch(epoch, totals)
        if known is None:
            return
        accuracy = f" acc {known['correct'] / known['images']:.3f}" if self.task.kind == "class" else ""
        bar.set_postfix_str(
            f"epoch {epoch}/{self.recipe.epochs} loss {known['loss'] / known['images']:.3f}{accuracy}{said}",
            refresh=False,
        )

    def require_finite(self, epoch: int, totals: Totals) -> None:
        """Raise `TrainingDiverged` if a step so far was not finite; on a GPU, this waits for it."""
        self._require_finite(epoch, totals.read())

    def _require_finite(self, epoch: int, known: dict[str, float]) -> None:
        step = int(known["bad_step"])
        if not step:
            return
        lr = self.recipe.lr * self.recipe.lr_factor((epoch - 1) * self.steps + step - 1, self.steps) * self.scale
        loss = not math.isfinite(known["bad_loss"])
        what = f"loss is {known['bad_loss']}" if loss else f"gradient norm is {known['bad_norm']}"
        raise TrainingDiverged(what, epoch, step, lr)

    def record(self, epoch: int, totals: Totals) -> dict[str, Any]:
        """Return what `train` returns, after the last step of an epoch; raise what it raises."""
        known = totals.read()
        self._require_finite(epoch, known)
        images, last = known["images"], epoch * self.steps - 1
        record: dict[str, Any] = {"train_loss": known["loss"] / images}
        if self.task.kind == "class":
            record["train_accuracy"] = known["correct"] / images
        record["lr"] = self.recipe.lr * self.recipe.lr_factor(last, self.steps) * self.scale
        record["grad_norm"] = known["grad_norm"] / self.steps
        if totals.has_kl:
            record["kl"] = known["kl"] / images
            record["beta"] = self.beta * self.recipe.kl_factor(last, self.steps)
        if len(totals.units):
            record["active_units"] = sum(kl / images > ACTIVE_UNIT_NATS for kl in totals.units.tolist())
        return record

    def validate(self, epoch: int, after_batch: Callable[[], Any] | None = None) -> tuple[float, float]:
        """Return mean loss, without smoothing or weights, and score (`Task.metric`) on validation, in eval mode.

        Args:
            epoch: counted from 1.
            after_batch: called after each batch.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
        """
        score = Score(self.task, self.val_batches.device, self.ranks)
        with evaluation_mode(self.model):
            for images, labels in self.val_batches.epoch(epoch - 1):
                if len(labels):
                    score.add(self._forward(images)[0], labels)
                if after_batch is not None:
                    after_batch()
        return self.scored(epoch, score)

    def scored(self, epoch: int, score: Score) -> tuple[float, float]:
        """Return what `validate` returns, after its last batch; raise what it raises."""
        loss, value = score.result()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"validation loss is {loss}", epoch, 0, self.optimizer.param_groups[0]["lr"])
        return loss, value

    def _compile(self) -> Forward:
        """Compile what `_forward` calls in training, at the first step."""
        mode = "reduce-overhead" if self.train_batches.device.type == "cuda" else None
        return torch.compile(self._from_images, mode=mode, dynamic=False)

    def _from_images(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and the auxiliary tensors for the loss, from images or their constants."""
        if self.constants is not None:
            return self.constants.forward(images)
        return self.model(images, return_aux=True)

    def _forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return float32 logits and the auxiliary tensors for the loss."""
        if self.features:
            assert self.model.head is not None
            return self.model.head(images).float(), {}
        forward = self._compiled if self._compiled is not None and self.model.training else self._from_images
        logits, aux = forward(images)
        return logits.float(), aux
