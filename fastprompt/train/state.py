"""The state of a training run, in memory and in its state file."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.adapters import read_adapter, with_resampled, without_resampled
from fastprompt.kernels.stopwatch import Choices
from fastprompt.train.checkpoint import optimizer_state, rng_state, set_optimizer_state, set_rng_state
from fastprompt.train.evaluate import device_of
from fastprompt.train.loop import Totals
from fastprompt.train.recipes import RUNTIME_FIELDS, Recipe

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


@dataclass
class Progress:
    """The progress of a run, including the rows of its log.

    Attributes:
        epoch: epochs that are complete.
        best_val_accuracy: the score by which epochs are compared: accuracy, or what `Task.metric` names.
        rollbacks: times that the run went back to an earlier state. scale: factor of its learning rates since then.
        probe_accuracy: validation accuracy of a linear probe, if it is known.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_val_accuracy: float = -math.inf
    best_val_loss: float = float("inf")
    events: list[dict[str, Any]] = field(default_factory=list)
    train_images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    rollbacks: int = 0
    scale: float = 1.0
    probe_accuracy: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the last row of the log marks the run as finished."""
        return bool(self.events) and self.events[-1]["event"] == "end"


class RunState:
    """A run between two steps: weights, best weights, optimizer, random states, progress and identity.

    Attributes:
        name: random name of the run, which distinguishes its files from those of another run.
        identity: result of `run_identity`.
        environment: what else the last bits depend on (`fastprompt.train.log.environment`).
        best: `adapter_state_dict` of the best epoch; before the first epoch, the initial one.
        choices: implementations chosen by timing.
        part: what the current epoch has summed up, or None between epochs.
    """

    def __init__(
        self,
        model: PromptedViT,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        environment: dict[str, Any],
        measure: bool,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.name = secrets.token_hex(8)
        self.identity, self.environment = identity, environment
        self.progress = Progress()
        self.choices = Choices(measure=measure)
        self.best = self.weights()
        self.part: Totals | None = None

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the current weights of generator and head."""
        return {name: tensor.detach().clone() for name, tensor in self.model.adapter_state_dict().items()}

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and JSON values of the state file."""
        optimizer_tensors, optimizer_values = optimizer_state(self.optimizer)
        rng_tensors, rng_values = rng_state()
        tensors = {
            **{f"model.{name}": tensor for name, tensor in self.model.adapter_state_dict().items()},
            **{f"best.{name}": tensor for name, tensor in self.best.items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors.items()},
            **{f"rng.{name}": tensor for name, tensor in rng_tensors.items()},
        }
        part = {}
        if self.part is not None:
            started, states = self.part.rng
            tensors |= {f"epoch_rng.{name}": tensor for name, tensor in started.items()}
            tensors |= {"epoch.sums": self.part.sums, "epoch.units": self.part.units}
            done = {"steps": self.part.steps, "seconds": self.part.seconds, "has_kl": self.part.has_kl}
            part = {"epoch": {**done, "rng": states}}
        return with_resampled(tensors, self.model.backbone), {
            **part,
            "run": self.name,
            "identity": self.identity,
            "environment": self.environment,
            "choices": self.choices.made,
            "progress": vars(self.progress),
            "optimizer": optimizer_values,
            "rng": rng_values,
        }

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restore what `saved` returned in another process, except identity and environment.

        A state of an earlier version has no name, so the current one is kept.
        """
        self.name = values.get("run", self.name)
        self.progress = Progress(**values["progress"])
        self.best = _under(tensors, "best.")
        self.model.load_adapter_state_dict(_under(tensors, "model."))
        set_optimizer_state(self.optimizer, _under(tensors, "optimizer."), values["optimizer"])
        set_rng_state(_under(tensors, "rng."), values["rng"])
        self.part = None
        if "epoch" in values:
            done, device = values["epoch"], device_of(self.model)
            self.part = Totals(device, (_under(tensors, "epoch_rng."), done["rng"]))
            self.part.steps, self.part.seconds, self.part.has_kl = done["steps"], done["seconds"], done["has_kl"]
            self.part.sums, self.part.units = tensors["epoch.sums"].to(device), tensors["epoch.units"].to(device)


def best_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the best epoch from a state's tensors."""
    return _under(tensors, "best.")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def recorded_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity in a state's values; a state of an earlier version has only some parts.

    Recipe fields that the earlier version did not have take their defaults.
    """
    if "identity" in values:
        identity = dict(values["identity"])
    else:
        signature = values["signature"]
        identity = {key: signature[key] for key in ("config", "num_classes", "head", "readout", "backbone", "recipe")}
        identity["train"] = {"num_images": signature["num_train"], "labels": signature["train_labels"]}
        identity["val"] = {"labels": signature["val_labels"]}
    recipe = Recipe.from_dict(identity["recipe"]).to_dict()
    identity["recipe"] = {name: value for name, value in recipe.items() if name not in RUNTIME_FIELDS}
    return identity


def holds(directory: Path, weights: Mapping[str, Tensor]) -> bool:
    """Whether a directory holds a complete, undamaged adapter with exactly these tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found, _ = without_resampled(read_adapter(directory)[1])
        except (OSError, ValueError, Warning):
            return False
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
