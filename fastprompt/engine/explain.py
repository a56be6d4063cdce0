"""Explain which implementation runs for each op of a model, and why a faster one does not."""

from __future__ import annotations

import dataclasses

import torch

from fastprompt.arguments import ArgumentTypeError
from fastprompt.engine.engine import Engine, Measured, Signature
from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import Choice
from fastprompt.model import PromptedViT


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`. It prints one line per op and, for an engine, one per batch size.

    Attributes:
        ops: the implementation of each op that ran, and the reason why it is not a faster one.
        batches: for an engine, for each signature (batch size, image size, image dtype): the chosen backend, the
            measured seconds, and why others cannot run.
        engine: for an engine, its dtype, batch sizes and number of adapters.
    """

    ops: dict[str, Choice]
    batches: dict[Signature, Measured] = dataclasses.field(default_factory=dict)
    engine: str = ""

    def __str__(self) -> str:
        lines = [self.engine] if self.engine else []
        lines += [_line(signature, measured) for signature, measured in self.batches.items()]
        lines += dict.fromkeys(
            f"not {name}: {reason}" for measured in self.batches.values() for name, reason in measured.reasons.items()
        )
        width = max(map(len, self.ops), default=0)
        lines += [
            f"{op:{width}}  {backend}" + (f": {reason}" if reason else "") for op, (backend, reason) in self.ops.items()
        ]
        return "\n".join(lines) or "no op of fastprompt.kernels runs in this model"


def _line(signature: Signature, measured: Measured) -> str:
    size, (height, width), dtype = signature
    times = sorted(measured.seconds.items(), key=lambda item: item[1])
    text = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in times)
    return f"batch of {size}, {height} x {width} px, {str(dtype).removeprefix('torch.')}: {measured.chosen}" + (
        f" ({text})" if text else ""
    )


def explain(model: PromptedViT | Engine) -> Explanation:
    """Explain which implementation each op of a model uses and, for an engine, which backend each batch size uses.

    One blank image runs through the model, as in inference. The model's modes and statistics stay unchanged, and
    `use_backend` is respected. For an engine it shows the measurements so far; there are none before its first batch.

    Raises:
        TypeError: `model` is neither a PromptedViT nor an Engine. RuntimeError: the engine was released.
    """
    if isinstance(model, Engine):
        with model.alone():
            return Explanation(_ops(model.model), model.measured, model.describe())
    if not isinstance(model, PromptedViT):
        raise ArgumentTypeError("model", f"must be a PromptedViT or an Engine, got {type(model).__name__}")
    return Explanation(_ops(model))


def _ops(model: PromptedViT) -> dict[str, Choice]:
    backbone, before = model.backbone, dict(dispatch.choices)
    modes = [(module, module.training) for module in model.modules()]
    dispatch.choices.clear()
    try:
        model.eval()
        with torch.no_grad():
            shape = (1, backbone.channels, *backbone.image_size)
            model(torch.zeros(shape, dtype=backbone.dtype, device=backbone.device))
        return dict(dispatch.choices)
    finally:
        dispatch.choices.update({**before, **dispatch.choices})
        for module, training in modes:
            module.training = training
