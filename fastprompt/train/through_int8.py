"""`Recipe(backbone="int8")`: the frozen backbone of a run in int8 (`fastprompt.int8.training`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.evaluate import backbone_precision, compute_dtype, device_of
from fastprompt.train.ranks import Ranks
from fastprompt.train.recipes import Recipe
from fastprompt.train.sources import RunData

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


def prepare_int8(model: PromptedViT, train: Any, recipe: Recipe, ranks: Ranks | None = None) -> None:
    """Calibrate the int8 weights that a recipe asks for, on training images, unless the user cache holds them.

    Raises:
        TypeError, ValueError, RuntimeError: the backbone cannot run in int8 here; the message says why.
    """
    if recipe.backbone != "int8":
        return
    from fastprompt.int8.training import calibrated
    from fastprompt.int8.weights import check_backbone

    check_backbone(model.backbone)
    plain, before = recipe.replace(num_workers=0, sampling="shuffle"), rng_state()
    try:
        images = (batch for batch, _ in RunData(model, train, train, plain).sampled())
        (Ranks() if ranks is None else ranks).of_main(lambda: calibrated(model.backbone, images).digest)
    finally:
        set_rng_state(*before)


@contextlib.contextmanager
def backbone_of_run(model: PromptedViT, recipe: Recipe, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context with the backbone as the recipe trains on it; its own tensors are restored exactly at the end.

    Args:
        dtype: in which it computes; None: as the recipe says.
    """
    dtype = compute_dtype(recipe.computes_in, device_of(model)) if dtype is None else dtype
    with backbone_precision(model, dtype):
        if recipe.backbone != "int8":
            yield
            return
        from fastprompt.int8.training import running_in_int8
        from fastprompt.int8.weights import find_weights

        with running_in_int8(model.backbone, find_weights(model.backbone, None)):
            yield
