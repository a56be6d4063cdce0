"""int8 on the kinds of blocks that backbones have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm import layers as tl
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

import fastprompt as fp
from fastprompt.int8.training import running_in_int8
from fastprompt.int8.weights import relative_error

KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "layer scale, registers": (VisionTransformer, {"init_values": 0.5, "reg_tokens": 3}),
    "quick gelu": (VisionTransformer, {"act_layer": "quick_gelu", "pre_norm": True}),
    "q/k norm": (VisionTransformer, {"qk_norm": True}),
    "inner norms": (VisionTransformer, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "post-norm": (VisionTransformer, {"block_fn": ResPostBlock, "init_values": 0.5}),
    "gated": (VisionTransformer, {"mlp_layer": partial(tl.GluMlp, gate_last=False), "act_layer": "silu"}),
    "rms, no biases": (VisionTransformer, {"qkv_bias": False, "proj_bias": False, "norm_layer": tl.RmsNorm}),
    "patches alone": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "rotary": (Eva, {"use_rot_pos_emb": True, "rope_type": "dinov3", "qkv_bias": False, "num_reg_tokens": 1}),
}


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_served_and_trained_close_to_float32(
    randomised: Callable[..., nn.Module], kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, options = KINDS[kind]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    backbone = fp.FrozenViT(randomised(made(**{**sizes, **options})))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    weights = fp.Int8Weights.calibrate(backbone, images, activation_bits=bits)
    assert weights.error <= 1.5 * weights.bfloat16_error
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3), num_classes=4).eval()
    gradients, outputs = [], []

    def run() -> None:
        model.zero_grad()
        outputs.append(model(images))
        outputs[-1].square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.generator.parameters()]))

    run()
    engine = fp.Engine(model, (16,), "int8", "eager", int8=weights)
    assert 0 < relative_error(engine(images), outputs[0].detach()) < 0.05
    with running_in_int8(backbone, weights):
        run()
    assert 0 < relative_error(outputs[1].detach(), outputs[0].detach()) < 0.05
    assert 0 < float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.15
