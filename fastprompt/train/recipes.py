"""Training recipes: the settings of a run, our defaults, and the papers' published settings."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators import method_of, published_recipes

if TYPE_CHECKING:
    from fastprompt.generators import PromptConfig

_CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "dtype": ("auto", "bfloat16", "float32"),
    "backbone": ("float", "int8"),
    "decay": ("matrices", "all", "all but head bias"),
    "schedule": ("step", "epoch"),
    "head_init": ("default", "probe", "vpt"),
    "prompt_init": ("default", "data"),
    "select_by": ("accuracy", "loss", "last"),
    "loss": ("cross_entropy", "bce", "mse", "l1"),
    "sampling": ("shuffle", "balanced"),
    "cache": ("auto", "inputs", "keys", "none"),
    "cache_dtype": ("auto", "bfloat16", "float32"),
}
_INTEGERS = {
    "epochs": 1,
    "min_steps": 0,
    "patience": 1,
    "batch_size": 1,
    "accumulate": 1,
    "rollbacks": 0,
    "seed": 0,
    "num_workers": 0,
}
"""Lowest values of integer fields."""
RUNTIME_FIELDS = ("num_workers", "checkpoint_every")
"""Fields that do not change the result."""
GRID_FIELDS = (
    "lr",
    "head_lr",
    "weight_decay",
    "decay",
    "optimizer",
    "momentum",
    "schedule",
    "warmup_epochs",
    "warmup_floor",
    "min_lr_ratio",
    "clip_grad",
    "label_smoothing",
    "kl_warmup_epochs",
    "select_by",
    "patience",
    "seed",
)
"""Fields of the recipe in which adapters may differ that take their steps together."""
_INTERVAL = re.compile(r"(\d+(?:\.\d+)?) *(steps?|min|minutes?)")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run. Every field is checked on construction.

    Attributes:
        epochs: passes over the training set.
        min_steps: lowest number of optimizer steps; for a small training set, `epochs` is raised to reach it
            (`with_enough_steps`). `replace` sets it to 0 if it changes `epochs`: a number that is asked for is kept.
        patience: stop after this many epochs without a better one, as `select_by` compares them; None never does.
        batch_size: images per step, over all processes. The last partial batch is kept; a last batch of one image is
            appended to the one before it (a generator's BatchNorm cannot normalise a single 1×1 map).
        accumulate: batches per optimizer step. k batches of b images give the step of one batch of k · b, up to
            rounding, except for what a model computes from a whole batch or draws for it: BatchNorm (PGN), dropout,
            latent noise, mixup and cutmix.
        lr: peak learning rate of the generator (and of the backbone in full fine-tuning), as passed to the optimizer.
            It is not scaled by the batch size; `Recipe.scaled_lr` does that as the papers do.
        head_lr: peak learning rate of the head; None is `lr`.
        backbone_lr: peak learning rate of a trained backbone; None is `lr`.
        weight_decay: strength of the weight decay.
        decay: trained tensors that decay: those with two or more axes ("matrices", so neither biases nor norms),
            "all", or "all but head bias".
        optimizer: "adamw" (betas 0.9, 0.999) or "sgd" (with `momentum`).
        momentum: SGD's momentum.
        schedule: whether the learning rate changes by "step" or by "epoch" (`lr_factor`).
        warmup_epochs: length of the linear warmup to lr, in epochs (fractions allowed). It starts from lr / steps by
            step, from 0 by epoch.
        warmup_floor: lowest learning rate of the warmup, as a fraction of lr.
        min_lr_ratio: the cosine after the warmup ends at `lr * min_lr_ratio`.
        clip_grad: maximum global gradient norm; None does not clip.
        loss: "cross_entropy"; "bce", binary cross-entropy averaged over the classes, for class labels or for rows of
            several labels per image (N, C); "mse" or "l1" for a regression with one head output per value.
        label_smoothing: probability mass spread over all classes in the training loss.
        class_weights: weights of the classes in the cross-entropy of training: one positive number per class,
            "balanced" (N / (C · n_c), with n_c of N training images in class c), or "none".
        sampling: "shuffle" shows every training image once an epoch. "balanced" draws as many with replacement, each
            class with the same probability.
        mixup, cutmix: parameter alpha of timm's Mixup (Zhang et al. 2018; Yun et al. 2019); 0 is off. With both, each
            batch is mixed in one of the two ways. Of an odd batch, the last image is not mixed.
        random_erasing: probability that a rectangle of an image becomes noise (timm's RandomErasing, Zhong et al.
            2020).
        kl_warmup_epochs: epochs over which the KL term's weight rises linearly from 0 to the configuration's `beta`.
        seed: seed of shuffling, dropout, latent noise and augmentation.
        dtype: dtype in which the frozen backbone computes: "auto" (bfloat16 if the device has bfloat16 instructions,
            else float32), "bfloat16" or "float32". Generator, head and losses are always float32.
        backbone: "float", or "int8": the frozen Linears of a ViT run in int8 on a CPU, forward and backward, so that
            prompts are trained for the backbone that `fp.Engine(model, dtype="int8")` serves. The weights are those in
            the user cache (`fp.Int8Weights.save()`); if there are none, they are calibrated on training images and kept
            there. Everything else computes in `dtype`, "auto" being float32.
        head_init: initial linear head: "default", "probe" (the L-BFGS probe, with C chosen on validation, of the
            features before the first step), or "vpt" (as VPT and VAPT do, `LinearHead.reset`). Other heads ignore it.
        prompt_init: initial prompts: "default", or "data" for prompts that are learned tokens themselves (VPT, free
            prompts, CVPT, VQT): means of the training images' tokens in front of the prompts' block, mixed with
            directions that those tokens lack (`fastprompt.train.prompt_init` has the formula).
        select_by: epoch to keep the weights of: the one with the highest validation "accuracy" (then the lower loss),
            with the lowest validation "loss", which is less noisy with few validation images, or the "last" one.
        rollbacks: number of times that a diverged run goes back to its last good state and on at a third of the
            learning rate. Then a mean loss of an epoch above three times that of the first counts as diverged, too.
        num_workers: number of processes that load images; 0 loads them in this process. It does not change the
            result without augmentation.
        checkpoint_every: interval between checkpoints within an epoch, as "N steps" or "N minutes"; "epoch" saves
            only after each epoch. It does not change the result.
        activation_bits: 8 or 2 keeps the derivatives of the frozen MLPs' activations for the backward in so many bits,
            which saves memory and makes gradients approximate. 0 keeps none of them and computes them again, which is
            exact and slower (`PromptedViT.set_activation_bits`). None keeps all.
        compile: train on what `torch.compile` makes of the model's forward and backward, on CUDA captured as graphs
            (mode "reduce-overhead"). The first step, and one of another batch size, take up to minutes; results differ
            by rounding, and dropout and latent noise are other draws. Validation and a head on cached features are not
            compiled.
        cache: what is kept of images without augmentation for all epochs, if it does not depend on what trains: with
            `VQTConfig` the "inputs" of every block or its "keys" and values, with `first_block` k what enters block k.
            "auto" is "inputs"; "none" keeps nothing. Results differ by rounding alone.
        cache_dtype: dtype of what is kept; "auto" is the dtype that the backbone computes in.
        cache_gib: nothing is kept if it takes more than this many GiB.
        deterministic: choose nothing by timing and use PyTorch's deterministic algorithms. If implementations of an op
            differ in their last bits, PyTorch's own is used. Two runs then end in the same bits with the same
            processor, threads and versions, at some cost in speed.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range; the message names it.
    """

    epochs: int = 30
    min_steps: int = 0
    patience: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    head_lr: float | None = None
    backbone_lr: float | None = None
    weight_decay: float = 1e-4
    decay: str = "matrices"
    optimizer: str = "adamw"
    momentum: float = 0.9
    schedule: str = "step"
    warmup_epochs: float = 3.0
    warmup_floor: float = 0.0
    min_lr_ratio: float = 0.0
    clip_grad: float | None = None
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | str = "none"
    sampling: str = "shuffle"
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0
    kl_warmup_epochs: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    backbone: str = "float"
    head_init: str = "default"
    prompt_init: str = "default"
    select_by: str = "accuracy"
    rollbacks: int = 0
    num_workers: int = 0
    checkpoint_every: str = "10 minutes"
    deterministic: bool = False
    activation_bits: int | None = None
    compile: bool = False
    cache: str = "auto"
    cache_dtype: str = "auto"
    cache_gib: float = 4.0

    def __post_init__(self) -> None:
        for name, low in _INTEGERS.items():
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(name, f"must be an integer, got {type(value).__name__} {value!r}")
            if not low <= value < 2**63:
                raise ArgumentError(name, f"must be at least {low}, got {value}")
        for name in ("deterministic", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(name, f"must be True or False, got {getattr(self, name)!r}")
        self._check_number("lr", low=0, open_low=True)
        self._check_number("head_lr", low=0, open_low=True, optional=True)
        self._check_number("backbone_lr", low=0, open_low=True, optional=True)
        self._check_number("weight_decay", low=0)
        self._check_number("momentum", low=0, high=1, open_high=True)
        self._check_number("warmup_epochs", low=0)
        self._check_number("warmup_floor", low=0, high=1)
        self._check_number("min_lr_ratio", low=0, high=1)
        self._check_number("clip_grad", low=0, open_low=True, optional=True)
        self._check_number("label_smoothing", low=0, high=1, open_high=True)
        self._check_number("kl_warmup_epochs", low=0)
        self._check_number("mixup", low=0)
        self._check_number("cutmix", low=0)
        self._check_number("random_erasing", low=0, high=1)
        self._check_number("cache_gib", low=0)
        if self.warmup_epochs > self.epochs:
            raise ArgumentError("warmup_epochs", f"must be at most epochs ({self.epochs}), got {self.warmup_epochs}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(
                    name, f"must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}"
                )
        if self.activation_bits not in (None, 8, 2, 0) or isinstance(self.activation_bits, (bool, float)):
            raise ArgumentError("activation_bits", f"must be 8, 2, 0 or None, got {self.activation_bits!r}")
        self._check_class_weights()
        self._check_combinations()

    @property
    def computes_in(self) -> str:
        """The dtype, "auto" decided as far as the recipe decides it."""
        return "float32" if self.backbone == "int8" and self.dtype == "auto" else self.dtype

    def _check_class_weights(self) -> None:
        weights = self.class_weights
        if isinstance(weights, list):  # from JSON
            object.__setattr__(self, "class_weights", weights := tuple(weights))
        if weights == "none" or weights == "balanced":
            return
        numbers = isinstance(weights, tuple) and all(
            isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights
        )
        if not numbers or not weights or not all(0 < float(w) < math.inf for w in weights):
            raise ArgumentError(
                "class_weights", f"must be 'none', 'balanced' or one positive number per class, got {weights!r}"
            )

    def _check_combinations(self) -> None:
        """Raise an error for fields that do not fit each other."""
        checkpoint_interval(self.checkpoint_every)
        if self.patience is not None and self.select_by == "last":
            raise ArgumentError("patience", f"must be None with select_by='last', got {self.patience}")
        for name, neutral in (("class_weights", "none"), ("label_smoothing", 0.0)):
            value = getattr(self, name)
            if self.loss != "cross_entropy" and value != neutral:
                raise ArgumentError(name, f"must be {neutral!r} with loss={self.loss!r}, got {value!r}")
        for name in ("mixup", "cutmix"):
            if self.loss in ("mse", "l1") and getattr(self, name):
                raise ArgumentError(name, f"must be 0 with loss={self.loss!r}, got {getattr(self, name)}")
        if self.backbone == "int8" and self.compile:
            raise ArgumentError("compile", "must be False with backbone='int8', whose products no compiler sees into")
        if self.loss in ("mse", "l1") and self.sampling != "shuffle":
            raise ArgumentError("sampling", f"must be 'shuffle' with loss={self.loss!r}, got {self.sampling!r}")

    def _check_number(
        self,
        name: str,
        *,
        low: float,
        high: float = math.inf,
        open_low: bool = False,
        open_high: bool = False,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(
                name, f"must be a number{' or None' if optional else ''}, got {type(value).__name__} {value!r}"
            )
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (math.isfinite(value) and above and below):
            interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"
            raise ArgumentError(name, f"must be in {interval}, got {value!r}")

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed. A change of `epochs` sets `min_steps` to 0 unless that is given.

        Raises:
            ValueError: a name is not a field.
        """
        if changes.get("epochs", self.epochs) != self.epochs:
            changes.setdefault("min_steps", 0)
        return Recipe.from_dict({**self.to_dict(), **changes})

    def adjusted(self, changes: Mapping[str, Any]) -> Recipe:
        """`replace`, but a change of `epochs` also scales the warmups, unless they are changed too."""
        changes, epochs = dict(changes), changes.get("epochs")
        if isinstance(epochs, int) and epochs > 0:
            for warmup in ("warmup_epochs", "kl_warmup_epochs"):
                changes.setdefault(warmup, getattr(self, warmup) * epochs / self.epochs)
            changes.setdefault("min_steps", 0)
        return self.replace(**changes)

    def with_enough_steps(self, batches: int) -> Recipe:
        """Return the recipe with `epochs` raised, and the warmups with it, to reach `min_steps`, which becomes 0.

        Args:
            batches: batches in one epoch.
        """
        epochs = math.ceil(self.min_steps / math.ceil(batches / self.accumulate))
        return self.adjusted({"epochs": epochs}) if epochs > self.epochs else self.replace(min_steps=0)

    def left_out(self, own: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields that are at the class's default and differ in a method's own recipe: name -> (mine, own).

        A recipe that was derived from another one (`replace`, `from_dict`, `default_recipe`, `paper_recipe`) leaves
        nothing out.
        """
        if getattr(self, "_derived", False):
            return {}
        default = Recipe()
        found = {name: both for name, both in self.differences(own).items() if both[0] == getattr(default, name)}
        if self.epochs != default.epochs:  # a number that is asked for needs no floor
            found.pop("min_steps", None)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: an unknown key; the message names it.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ArgumentError("recipe", f"must have known fields, got {key!r}; known are {', '.join(known)}")
        recipe = cls(**values)
        object.__setattr__(recipe, "_derived", True)
        return recipe

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ and change the result: name -> (mine, other's)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            name: (mine[name], theirs[name])
            for name in mine
            if name not in RUNTIME_FIELDS and mine[name] != theirs[name]
        }

    @staticmethod
    def scaled_lr(base_lr: float, batch_size: int) -> float:
        """Return `base_lr * batch_size / 256`, as VPT and VAPT scale their learning rates."""
        return base_lr * batch_size / 256

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor of the peak learning rates at one optimizer step.

        During the warmup, the factor is (t + 1) / W by step, where t is the step and W = warmup_epochs ·
        steps_per_epoch. By epoch it is t / W, where t is the epoch, 0 for the first, and W = warmup_epochs, so a
        first warmup epoch has rate 0. The factor is at least warmup_floor. After the warmup it is
        r + (1 − r) · (1 + cos(π (t − W) / (T − W))) / 2, with r = min_lr_ratio and a total of T steps or epochs.

        Args:
            step: 0 for the first step of the run.
            steps_per_epoch: optimizer steps in one epoch.
        """
        warmup: float
        if self.schedule == "epoch":
            now, warmup, total, first = step // steps_per_epoch, self.warmup_epochs, self.epochs, 0
        else:
            warmup = round(self.warmup_epochs * steps_per_epoch)
            now, total, first = step, self.epochs * steps_per_epoch, 1
        if now < warmup:
            return max(self.warmup_floor, (now + first) / warmup)
        progress = (now - warmup) / max(1, total - warmup)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def part_of(self, name: str) -> str:
        """Return which peak rate the named model parameter has: "head", "backbone" or "generator"."""
        part = name.partition(".")[0]
        return part if part == "head" or (part == "backbone" and self.backbone_lr is not None) else "generator"

    def peak_lr(self, name: str) -> float:
        """Return the peak learning rate of the named model parameter."""
        own = {"head": self.head_lr, "backbone": self.backbone_lr, "generator": None}[self.part_of(name)]
        return self.lr if own is None else own

    def decays(self, name: str, axes: int) -> bool:
        """Whether weight decay acts on the named model parameter with `axes` axes."""
        if self.decay == "matrices":
            return axes > 1
        return self.decay == "all" or name not in ("head.bias", "head.classifier_bias")

    def kl_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor of `beta` at one step; it rises linearly to 1 over `kl_warmup_epochs`."""
        warmup = round(self.kl_warmup_epochs * steps_per_epoch)
        return min(1.0, (step + 1) / warmup) if warmup else 1.0


def checkpoint_interval(text: str) -> tuple[float, str]:
    """Parse `Recipe.checkpoint_every` into (number, "steps" or "minutes"); "epoch" is (inf, "steps").

    Raises:
        TypeError, ValueError: the text is none of these, or the number is not positive.
    """
    takes = "must be 'epoch', 'N steps' or 'N minutes'"
    if not isinstance(text, str):
        raise ArgumentTypeError("checkpoint_every", f"{takes}, got {type(text).__name__} {text!r}")
    if text == "epoch":
        return math.inf, "steps"
    found = _INTERVAL.fullmatch(text.strip())
    if found is None or float(found[1]) == 0 or (found[2].startswith("step") and "." in found[1]):
        raise ArgumentError("checkpoint_every", f"{takes}, got {text!r}")
    return float(found[1]), "steps" if found[2].startswith("step") else "minutes"


COMMON_RECIPE: dict[str, Any] = {
    "epochs": 10,
    "min_steps": 200,
    "batch_size": 16,
    "warmup_epochs": 1.0,
    "head_lr": 1e-3,
    "label_smoothing": 0.1,
    "select_by": "loss",
}
"""The default recipe of every method; its registration may override fields."""


def default_recipe(config: PromptConfig | str, *, train_backbone: bool = False) -> Recipe:
    """Return the default recipe of `fp.fit`: AdamW, warmup and cosine, a learning rate per method.

    It was chosen for float32 prompts on a bfloat16 CLIP ViT-B/16 and a few hundred images: a new head with its own
    learning rate, label smoothing, and the epoch with the lowest validation loss (results/exploration.md). Choose
    your own learning rate on validation (`fastprompt.train.grid.select_learning_rate`). The recipe was tried with 300
    to 400 steps; far fewer hardly train a new head, so small sets get more epochs (`Recipe.min_steps`).

    Args:
        config: a method's configuration (fp.PGNConfig(), ...), its kind, or a method's name.
        train_backbone: also train the backbone, at the rate of full fine-tuning.

    Raises:
        TypeError, ValueError: no method is registered for `config`, or its recipe has an unknown or wrong field.
    """
    method = method_of(config)
    recipe = Recipe.from_dict({**COMMON_RECIPE, **method.recipe})
    if train_backbone and not method.config_class.trains_backbone:
        recipe = recipe.replace(backbone_lr=method_of("full").recipe["lr"])
    return recipe


def adjusted_recipe(config: PromptConfig | str, changes: Mapping[str, Any], *, train_backbone: bool = False) -> Recipe:
    """Return `default_recipe` with some fields changed (`Recipe.adjusted`).

    Raises:
        TypeError, ValueError: as `default_recipe`, or a name among `changes` is not a field.
    """
    return default_recipe(config, train_backbone=train_backbone).adjusted(changes)


def paper_recipe(
    config: PromptConfig | str,
    *,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    num_train: int | None = None,
    seed: int = 0,
) -> Recipe:
    """Return the exact settings that a method's authors published. All of them are float32.

    * VPT, VAPT (src/configs, tune_vtab.py): SGD, momentum 0.9, 100 epochs, of which 10 are warmup from 0, then cosine
      to 0. The rate changes by epoch, so the first epoch has rate 0. Batch 64, lr = base_lr · batch / 256, weight
      decay on all but the head's bias. The head is initialised Kaiming-normal with bias −log 99, and the last epoch
      is kept. The authors search base rate and weight decay for every task (`fastprompt.generators.Published`). The
      defaults are base_lr 1.0 and weight decay 1e-3 for VPT (demo.ipynb), 2.5 and 0.01 for VAPT (its CIFAR-100
      configuration).
    * PGN (pgn/scripts/*/train_*.py, cosine_with_warmup.py): SGD, momentum 0.9, lr 0.1 for any batch size, no weight
      decay, 100 epochs, of which 50 are warmup (the first at lr / 50), then cosine to lr / 100, by epoch. Their
      augmentation is `load_data(..., augment="pgn")`. "pgn-paper-adamw" is the scripts' other optimizer. Neither the
      batch size of the paper's runs (the script's default is 2) nor the rate for AdamW is known. Free prompts, PGN's
      control, use the same recipe.
    * V²APT: no published recipe. VPT's is used, with beta warmed up over the same 10 epochs.
    * Pixel prompt (hjbahng/visual_prompting): SGD, momentum 0.9, lr 40, no weight decay, 1000 epochs, batch 256, 1000
      warmup steps (which is why `num_train` is needed), by step.
    * Linear probe and full fine-tuning, in VPT's framework: SGD as above for the probe; AdamW with base_lr 1e-3 for
      full fine-tuning. Neither is published in this form: treat these two as ours.

    Args:
        config: a method's configuration, its kind or name, or the name of a published recipe ("vapt-paper").
        base_lr: the learning rate before the authors' scaling by the batch size, if they scale it.
        weight_decay, batch_size, seed: as in `Recipe`; None uses the authors' value.
        num_train: number of training images; required if the authors count the warmup in steps (the pixel prompt).

    Raises:
        TypeError, ValueError: `config` is unknown, its authors published nothing, or `num_train` is missing.
    """
    recipes = published_recipes()
    if isinstance(config, str) and config in recipes:
        name, published = config, recipes[config]
    else:
        method = method_of(config)
        if not method.published:
            raise ArgumentError(
                "config",
                f"must be a method with a published recipe, got {method.name!r}; there are {', '.join(recipes)}",
            )
        name, published = next(iter(method.published.items()))
    fields = {**published.recipe, "seed": seed}
    if base_lr is not None:
        fields["lr"] = base_lr
    if weight_decay is not None:
        fields["weight_decay"] = weight_decay
    if batch_size is not None:
        fields["batch_size"] = batch_size
    recipe = Recipe.from_dict(fields)
    if published.lr_per is not None:
        recipe = recipe.replace(lr=recipe.lr * recipe.batch_size / published.lr_per)
    if published.warmup_steps is not None:
        if num_train is None:
            raise ArgumentError(
                "num_train", f"must be given for {name!r}, which warms up for {published.warmup_steps} steps"
            )
        steps_per_epoch = math.ceil(num_train / recipe.batch_size)
        recipe = recipe.replace(warmup_epochs=published.warmup_steps / steps_per_epoch)
    return recipe


def named_recipe(name: str, changes: Mapping[str, Any], num_train: int | None = None) -> dict[str, Any]:
    """Return the fields of a published recipe with some of them changed. Any method can train with them.

    Args:
        name: name of the recipe, such as "vapt-paper".
        changes: fields of `Recipe`, or "base_lr", which is scaled by the batch size as the authors do; "lr" is not.
        num_train: as in `paper_recipe`.

    Raises:
        TypeError, ValueError: there is no such recipe, or a change is not a field.
    """
    if name not in published_recipes():
        raise ArgumentError(
            "recipe", f"must be KEY=VALUE or one of {', '.join(sorted(published_recipes()))}, got {name!r}"
        )
    changes = dict(changes)
    if "lr" in changes and "base_lr" in changes:
        raise ArgumentError("lr", "must not be given with base_lr, which sets it")
    arguments = {key: changes.pop(key) for key in ("base_lr", "weight_decay", "batch_size") if key in changes}
    fields = paper_recipe(name, num_train=num_train, **arguments).adjusted(changes).to_dict()
    return {key: value for key, value in fields.items() if key in changes or key not in ("seed", *RUNTIME_FIELDS)}
