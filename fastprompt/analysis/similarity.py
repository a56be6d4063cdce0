"""How much prompts resemble the patches that they join (VAPT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fastprompt.analysis.features import recorded
from fastprompt.arguments import ArgumentError
from fastprompt.train.evaluate import evaluation_mode

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


def similarity_maps(model: PromptedViT, images: Tensor) -> dict[int, Tensor]:
    """Return the cosine similarity of every prompt with every patch that enters the same block, computed by the
    papers' graph in eval mode.

    Args:
        images: (B, 3, H, W), uint8 or normalised.

    Returns:
        block -> (B, P, rows, columns), on the CPU, for each block whose prompts the method sets. A prompt of zeros, as
        VAPT's are before training, has similarity 0.

    Raises:
        ValueError: the method has no prompt tokens, or the backbone is no ViT.
    """
    if model.generator is None or model.generator.num_prompts == 0:
        raise ArgumentError("model", f"must have prompt tokens, got {model.config.kind!r}")
    if model.backbone.staged:
        raise ArgumentError("model", "must be a ViT: on a Swin transformer the patches of a block are several windows")
    with evaluation_mode(model):
        found = recorded(model, images.to(model.backbone.device))
    maps = {}
    for block, prompts, patches in found:
        prompts = prompts.to(patches.dtype).expand(len(patches), -1, -1)
        cosine = F.normalize(prompts, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)  # (B, P, N)
        maps[block] = cosine.unflatten(-1, model.backbone.spec.grid).float().cpu()
    return maps
