"""One epoch of training, and one pass over the validation data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.generators.v2apt import ACTIVE_UNIT_NATS
from fastprompt.train.batches import Batches
from fastprompt.train.evaluate import evaluation_mode
from fastprompt.train.optimizer import set_learning_rates
from fastprompt.train.recipes import Recipe

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        epoch: counted from 1.
        step: step within the epoch, counted from 1; 0 during validation.
        lr: learning rate at that step.
    """

    def __init__(self, what: str, epoch: int, step: int, lr: float) -> None:
        self.what, self.epoch, self.step, self.lr = what, epoch, step, lr
        place = f"step {step}" if step else "validation"
        super().__init__(
            f"training diverged: the {what} at epoch {epoch}, {place}, with lr={lr:g}. Use a lower learning "
            f"rate (for example a third of it), a longer warmup or clip_grad=1.0; the model holds the best weights "
            f"of the previous epochs"
        )


class Loop:
    """Trains a model on batches of training data, and validates it.

    Args:
        features: whether the batches hold cached features for the head instead of images (linear probe).
    """

    def __init__(
        self,
        model: PromptedViT,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        train: Batches,
        val: Batches,
        features: bool,
    ) -> None:
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.train_batches, self.val_batches, self.features = train, val, features
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.beta = float(getattr(model.config, "beta", 0.0))

    def train(self, epoch: int, bar: Any, said: str = "") -> dict[str, Any]:
        """Train for one epoch.

        Args:
            epoch: counted from 1.
            bar: a tqdm bar over images.
            said: text that the bar shows after loss and accuracy.

        Returns:
            "train_loss" (mean, nats), "train_accuracy", "lr" (of the last step), "grad_norm" (mean, before clipping);
            with a KL term also "kl" (mean, nats), "beta" (of the last step) and "active_units".

        Raises:
            TrainingDiverged: the loss or gradient norm is NaN or infinite.
        """
        recipe, steps = self.recipe, len(self.train_batches)
        self.model.train()
        total_loss = total_kl = total_norm = 0.0
        correct = seen = 0
        lr = recipe.lr
        has_kl = False
        units: Tensor | None = None
        for index, (images, labels) in enumerate(self.train_batches.epoch(epoch - 1)):
            step = (epoch - 1) * steps + index
            factor = recipe.lr_factor(step, steps)
            lr = recipe.lr * factor
            set_learning_rates(self.optimizer, factor)
            logits, aux = self._forward(images)
            loss = self._cross_entropy(logits, labels, recipe.label_smoothing)
            if "kl" in aux:
                has_kl = True
                kl = aux["kl"].float().mean()
                loss = loss + self.beta * recipe.kl_factor(step, steps) * kl
                total_kl += float(kl.detach()) * len(labels)
            if "kl_units" in aux:
                of_batch = aux["kl_units"].detach().sum(0).cpu().double()
                units = of_batch if units is None else units + of_batch
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingDiverged(f"loss is {value}", epoch, index + 1, lr)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(
                torch.nn.utils.clip_grad_norm_(
                    self.parameters, float("inf") if recipe.clip_grad is None else recipe.clip_grad
                )
            )
            if not math.isfinite(norm):
                raise TrainingDiverged(f"gradient norm is {norm}", epoch, index + 1, lr)
            self.optimizer.step()
            total_loss += value * len(labels)
            total_norm += norm
            correct += self._correct(logits.detach(), labels)
            seen += len(labels)
            bar.set_postfix_str(
                f"epoch {epoch}/{recipe.epochs} loss {total_loss / seen:.3f} acc {correct / seen:.3f}{said}",
                refresh=False,
            )
            bar.update(len(labels))
        self.optimizer.zero_grad(set_to_none=True)
        record = {
            "train_loss": total_loss / seen,
            "train_accuracy": correct / seen,
            "lr": lr,
            "grad_norm": total_norm / steps,
        }
        if has_kl:
            record["kl"] = total_kl / seen
            record["beta"] = self.beta * recipe.kl_factor(epoch * steps - 1, steps)
        if units is not None:
            record["active_units"] = int((units / seen > ACTIVE_UNIT_NATS).sum())
        return record

    def validate(self, epoch: int) -> tuple[float, float]:
        """Return mean cross-entropy (nats) and accuracy on the validation data, in eval mode.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
        """
        total, correct, seen = 0.0, 0, 0
        with evaluation_mode(self.model):
            for images, labels in self.val_batches.epoch(epoch - 1):
                logits, _ = self._forward(images)
                total += float(self._cross_entropy(logits, labels)) * len(labels)
                correct += self._correct(logits, labels)
                seen += len(labels)
        loss = total / seen
        if not math.isfinite(loss):
            raise TrainingDiverged(f"validation loss is {loss}", epoch, 0, self.optimizer.param_groups[0]["lr"])
        return loss, correct / seen

    def _forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return float32 logits and the auxiliary tensors for the loss."""
        if self.features:
            assert self.model.head is not None
            return self.model.head(images).float(), {}
        logits, aux = self.model(images, return_aux=True)
        return logits.float(), aux

    def _cross_entropy(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy; with a head for each domain, over the classes of the label's domain."""
        if self.model.domains is None:
            return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return self.model.domains.cross_entropy(logits, labels, label_smoothing)

    def _correct(self, logits: Tensor, labels: Tensor) -> int:
        """Return the number of images whose most likely class, of those that the loss compares, is the label."""
        if self.model.domains is not None:
            logits = self.model.domains.of_its_domain(logits, labels)
        return int((logits.argmax(-1) == labels).sum())
