"""Which implementation runs for each op of a model, and why not a faster one."""

from __future__ import annotations

import dataclasses

import torch

from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import Choice
from fastprompt.model import PromptedViT


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, one line for each op.

    Attributes:
        ops: the implementation of each op that ran, and the reason why it is not a faster one.
    """

    ops: dict[str, Choice]

    def __str__(self) -> str:
        if not self.ops:
            return "no op of fastprompt.kernels runs in this model"
        width = max(map(len, self.ops))
        return "\n".join(f"{op:{width}}  {backend}" + (f": {reason}" if reason else "")
                         for op, (backend, reason) in self.ops.items())


def explain(model: PromptedViT) -> Explanation:
    """Run one blank image through the model, as inference does, and tell which implementation each op took.

    Modes and statistics of the model stay as they are; `use_backend` is respected.

    Raises:
        TypeError: `model` is no PromptedViT.
    """
    if not isinstance(model, PromptedViT):
        raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
    backbone, before = model.backbone, dict(dispatch.choices)
    modes = [(module, module.training) for module in model.modules()]
    dispatch.choices.clear()
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, 3, *backbone.image_size, dtype=backbone.dtype, device=backbone.device))
        return Explanation(dict(dispatch.choices))
    finally:
        dispatch.choices.update({**before, **dispatch.choices})
        for module, training in modes:
            module.training = training
