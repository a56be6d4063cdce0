"""The data of a run, as batches of images or of features, and what they are learned for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.arguments import ArgumentError
from fastprompt.train.batches import Batches, is_tensor_pair, num_images
from fastprompt.train.constants import Constants
from fastprompt.train.evaluate import device_of, evaluation_mode
from fastprompt.train.plan import Plan, make_plan
from fastprompt.train.ranks import Ranks, check_shares
from fastprompt.train.recipes import Recipe
from fastprompt.train.tasks import class_labels, kind_of_labels, make_task, needs_counts

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


class RunData:
    """Training and validation data of a run.

    Attributes:
        kind: of the labels (`kind_of_labels`). task: what the model's outputs are compared with.
        fixed: whether images are the same in every epoch. fixed_val: whether those of validation are.
        cached: whether the batches hold features for the head (a linear probe on images that never change).
        constants: whose records the batches hold; see `make_plan`.

    Raises:
        ValueError: recipe and labels do not fit each other.
    """

    def __init__(self, model: PromptedViT, train: Any, val: Any, recipe: Recipe, ranks: Ranks | None = None) -> None:
        assert model.head is not None
        self.ranks = Ranks() if ranks is None else ranks
        check_shares(model, self.ranks, recipe.batch_size, num_images(train, "train"))
        self.model, self.train, self.val, self.recipe = model, train, val, recipe
        self.num_classes, self.device = model.head.num_classes, device_of(model)
        self.kind = kind_of_labels(recipe.loss, train)
        counts = None
        self.weights: Tensor | None = None
        if needs_counts(recipe):
            labels = class_labels(train, self.num_classes)
            counts = torch.bincount(labels, minlength=self.num_classes)
            self.weights = 1 / counts[labels].double() if recipe.sampling == "balanced" else None
        self.task = make_task(recipe, self.kind, self.num_classes, counts, self.device, model.domains)
        changing = recipe.mixup or recipe.cutmix or recipe.random_erasing
        self.fixed_val = _same_every_epoch(val)
        self.fixed = not changing and _same_every_epoch(train) and self.fixed_val
        self.cached = self.fixed and model.generator is None and not model.full
        self.constants: Constants | None = None
        self._prepared: tuple[Any, Any] | None = None

    def make_plan(self, directory: Path | None, facts: Mapping[str, Any] | None) -> Plan:
        """Plan what this run computes once (`fastprompt.train.plan`), and keep to it.

        Args:
            directory: where constants are kept; None: in memory.
            facts: result of `data_identities`; needed with a directory.
        """
        data = {"train": self.train, "val": self.val}
        plan = make_plan(self.model, data, self.recipe, self.cached, self.fixed, directory, facts, self.kind)
        self.constants = plan.constants
        return plan

    def prepared(self) -> tuple[Any, Any]:
        """Return what training and validation read: images, or their features or constants, which this computes."""
        if self._prepared is None:
            train, val = self.features() if self.cached else (self.train, self.val)
            if self.constants is not None:
                train, val = self.constants.kept("train", train), self.constants.kept("val", val)
            self._prepared = train, val
        return self._prepared

    def share(self, other: RunData) -> None:
        """Read what another run on the same data and backbone has prepared."""
        self.constants, self._prepared = other.constants, other.prepared()

    def batches(self) -> tuple[Batches, Batches]:
        """Return the batches of training and validation, of what is `prepared`."""
        train, val = self.prepared()
        size, workers = self.recipe.batch_size, self.recipe.num_workers
        shuffled = self._batches(
            train,
            size,
            "train",
            seed=self.recipe.seed,
            merge_single=True,
            num_workers=workers,
            weights=self.weights,
            ranks=self.ranks,
        )
        return shuffled, self._batches(val, max(64, size), "val", num_workers=workers, ranks=self.ranks)

    def _batches(self, data: Any, batch_size: int, name: str, **options: Any) -> Batches:
        return Batches(
            data,
            batch_size,
            name=name,
            num_classes=self.num_classes,
            kind=self.kind,
            device=self.device,
            **options,
        )

    def features(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the features and labels of the training and of the validation images, in eval mode."""
        from fastprompt.train.probe import extract_features

        size, workers = self.recipe.batch_size, self.recipe.num_workers
        train, val = (
            extract_features(self.model, data, size, num_workers=workers, kind=self.kind)
            for data in (self.train, self.val)
        )
        return train, val

    def sampled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of the training images, shuffled by the recipe's seed, in this process alone."""
        options = {"seed": self.recipe.seed, "num_workers": self.recipe.num_workers}
        return self._batches(self.train, self.recipe.batch_size, "train", **options).epoch()

    def try_out(self) -> None:
        """Compute two images of each; raise an error for images that the model cannot take."""
        for name, data in (("train", self.train), ("val", self.val)):
            images, _ = next(iter(self._batches(data, 2, name).epoch()))
            channels = self.model.backbone.channels
            if images.shape[1] != channels:
                raise ArgumentError(
                    name, f"must have images of shape (N, {channels}, H, W), got {tuple(images.shape[1:])} each"
                )
            with evaluation_mode(self.model):
                self.model(images[:2])
        self._check_single_images()

    def _check_single_images(self) -> None:
        """Raise an error if there are batches of one image and the generator's batch norm cannot process them."""
        generator = self.model.generator
        size = self.train.batch_size if isinstance(self.train, DataLoader) else self.recipe.batch_size
        first = self._batches(self.train, 1, "train")
        if generator is None or generator.known_at != "image" or 1 not in (size, first.num_images):
            return
        images, _ = next(iter(first.epoch()))
        try:
            copy.deepcopy(generator).train()(self.model.backbone.normalise(images[:1]).float())
        except ValueError as error:
            raise ArgumentError(
                "batch_size",
                f"must be at least 2 and train must hold at least 2 images for {self.model.config.kind!r} "
                f"here, got {size} and {first.num_images}: its batch norm cannot process a single image ({error})",
            ) from error


def _same_every_epoch(data: Any) -> bool:
    """Whether the data are known to yield the same images in every epoch (no augmentation)."""
    if is_tensor_pair(data) or isinstance(data, TensorDataset):
        return True
    return not isinstance(data, DataLoader) and getattr(data, "augment", "unknown") in ("none", None, False)
