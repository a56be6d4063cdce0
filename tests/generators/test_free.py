from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.vit import reference


def test_alone() -> None:
    free = fp.FreePrompts(num_prompts=500, width=48)
    assert free.known_at == "static"
    assert free().shape == (1, 500, 48)
    assert abs(free().std() - 0.02) < 4e-4
    assert free.num_parameters() == free.paper_num_parameters() == 500 * 48
    with pytest.raises(ValueError, match=r"layer must be one of \(0,\)"):
        free(layer=1)


def test_prompts_join_last_before_the_pre_norm_and_flow_on(
    pre_norm_vit: VisionTransformer, tiny_images: Tensor
) -> None:
    vit, images = pre_norm_vit.double(), tiny_images.double()
    model = fp.PromptedViT(fp.FrozenViT(vit), fp.FreePromptsConfig(num_prompts=4), readout="prompts")
    x = torch.cat([vit._pos_embed(vit.patch_embed(images)), model.generator.tokens.expand(4, -1, -1)], dim=1)
    x = vit.norm(vit.blocks(vit.norm_pre(x)))
    torch.testing.assert_close(model(images), x[:, 19:].mean(dim=1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        reference.encode(model.backbone, images, model.generator).tokens, x, rtol=1e-10, atol=1e-10
    )
    model.readout = "cls"
    torch.testing.assert_close(model(images), x[:, 0], rtol=1e-10, atol=1e-10)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"FreePromptsConfig\.num_prompts must be at least 1, got -2"):
        fp.FreePromptsConfig(num_prompts=-2)
