"""CVPT: the formula against a plain loop, folded or not, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import Geometry
from fastprompt.vit import cross


def by_hand(vit: VisionTransformer, images: Tensor, cvpt: nn.Module) -> Tensor:
    """The class token behind a loop over blocks, heads and prompts."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for i, block in enumerate(vit.blocks):
        attn, heads = block.attn, block.attn.num_heads
        x = x + block.ls1(attn(block.norm1(x)))
        if i in cvpt.layers:
            q = attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1))[:, :, 0]  # (B, T, heads, d)
            _, k, v = attn.qkv(block.norm1(cvpt(layer=i)[0])).unflatten(-1, (3, heads, -1)).unbind(1)
            q, k = attn.q_norm(q), attn.k_norm(k)  # k, v: (P, heads, d)
            read = []
            for h in range(heads):
                scores = torch.stack([(q[:, :, h] * key).sum(-1) for key in k[:, h]], dim=-1)
                read.append((scores / math.sqrt(q.shape[-1])).softmax(-1) @ v[:, h])
            x = x + block.ls1(attn.proj(attn.norm(torch.cat(read, dim=-1))))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.norm(x)[:, 0]


@pytest.mark.parametrize("config", [fp.CVPTConfig(3), fp.CVPTConfig(30, first_block=1)], ids=["3", "30"])
def test_values_and_gradients_are_those_of_a_plain_loop(
    make_vit: Callable[..., VisionTransformer],
    randomised: Callable[..., nn.Module],
    config: fp.CVPTConfig,
    options: dict,
) -> None:
    vit, images = make_vit(**options).double(), torch.randn(2, 3, 32, 32).double()
    model = fp.PromptedViT(fp.FrozenViT(vit), config, readout="cls").train()
    randomised(model.generator)
    block = model.backbone.folded().blocks[0]
    assert cross.folds(block, config.num_prompts) == (
        config.num_prompts == 3 and not {"qk_norm", "scale_attn_norm"} & set(options)
    )
    trained, expected = list(model.generator.parameters()), by_hand(vit, images, model.generator)
    gradients = torch.autograd.grad(expected.cos().sum(), trained)
    for forward in (model.forward, model.reference_forward):
        found = forward(images)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(found.cos().sum(), trained), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # the prompts' share of the work done once
        assert set(model.eval().kept_prefixes()) == set(model.generator.layers)
        torch.testing.assert_close(model(images), expected.detach(), rtol=1e-10, atol=1e-10)


def test_a_block_without_prompts_is_the_backbone_s(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    """Prompts in the last block change the class token there, and nothing before."""
    backbone = fp.FrozenViT(tiny_vit)
    model = fp.PromptedViT(backbone, fp.CVPTConfig(2, first_block=2)).eval()
    entering: list[Tensor] = []
    prompts = model.generator.prompts
    model.generator.prompts = lambda i, context, x, draws: entering.append(x) or prompts(i)
    features = model(tiny_images)
    assert not torch.allclose(features, backbone.forward_features(tiny_images), atol=1e-3)
    x = tiny_vit._pos_embed(tiny_vit.patch_embed(tiny_images))
    torch.testing.assert_close(entering[0], tiny_vit.blocks[1](tiny_vit.blocks[0](x))[:, 1:], rtol=1e-4, atol=1e-4)


def test_parameters_and_errors(small: Geometry, tiny_swin: Callable[..., nn.Module]) -> None:
    assert fp.CVPT().num_parameters() == fp.CVPT().paper_num_parameters() == 12 * 10 * 768
    assert fp.CVPT(num_prompts=3, first_block=2, geometry=small).layers == (2,)
    with pytest.raises(ValueError, match=r"CVPTConfig\.num_prompts must be at least 1, got 0"):
        fp.CVPTConfig(num_prompts=0)
    with pytest.raises(ValueError, match=r"CVPTConfig\.first_block must be less than the 3 blocks, got 3"):
        fp.CVPT(first_block=3, geometry=small)
    with pytest.raises(ValueError, match="CVPTConfig is not defined on Swin transformers"):
        fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.CVPTConfig())
