"""Fixtures of the generators' tests: the goldens' backbone, and a small geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import Geometry

VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pre-norm, registers, LayerScale": {"pre_norm": True, "reg_tokens": 2, "init_values": 0.3},
    "q- and k-norm": {"qk_norm": True},
    "a norm behind attention": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no bias": {"qkv_bias": False},
}


@pytest.fixture(params=VITS.values(), ids=VITS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of `make_vit`, one kind of block after the other."""
    return dict(request.param)


@pytest.fixture
def small() -> Geometry:
    """Width 24, 3 blocks, a 3 x 4 grid of 8-pixel patches."""
    return Geometry(width=24, depth=3, grid=(3, 4), patch_size=8, image_size=(24, 32))


@pytest.fixture
def golden_backbone() -> Callable[[dict[str, Tensor], torch.dtype], fp.FrozenViT]:
    """The backbone of `vapt`, `vpt_deep` and `vpt_shallow`, in the given dtype."""

    def build(data: dict[str, Tensor], dtype: torch.dtype) -> fp.FrozenViT:
        vit = VisionTransformer(patch_size=16, embed_dim=48, depth=4, num_heads=3, num_classes=0)
        vit.load_state_dict({k[len("backbone.") :]: v for k, v in data.items() if k.startswith("backbone.")})
        return fp.FrozenViT(vit.eval()).to(dtype)

    return build


@pytest.fixture
def check_golden() -> Callable[..., None]:
    """`check_golden(model, data, names)`: both forwards, tokens and gradients against a golden file.

    names: the golden's name of a trained tensor -> ours, and the row of ours it is (None: all of it).
    """

    def relative(out: Tensor, expected: Tensor) -> float:
        expected = expected.double()
        return float((out.detach().double().view(expected.shape) - expected).norm() / expected.norm())

    def check(model: fp.PromptedViT, data: dict[str, Tensor], names: dict[str, tuple[str, slice | None]]) -> None:
        from fastprompt.vit import reference

        assert model.generator is not None
        dtype = next(model.generator.parameters()).dtype
        bound = 1e-6 if dtype == torch.float64 else 1e-5
        images = data["images"].to(dtype)
        own = dict(model.generator.named_parameters())
        with torch.no_grad():
            for theirs, (ours, rows) in names.items():
                target = own[ours] if rows is None else own[ours][rows]
                target.copy_(data["prompt." + theirs].view(target.shape))
        for forward in (model.forward, model.reference_forward):
            model.generator.zero_grad()
            out = forward(images)
            assert relative(out, data["cls"]) <= bound
            (out * data["loss_weights"].to(dtype)).sum().backward()
            for theirs, (ours, rows) in names.items():
                grad = own[ours].grad if rows is None else own[ours].grad[rows]
                assert relative(grad, data["grad." + theirs]) <= bound, theirs
        covered = {ours for ours, _ in names.values()}
        assert covered == set(own)
        assert {k[len("grad.") :] for k in data if k.startswith("grad.")} == set(names)
        tokens = reference.encode(model.backbone, images, model.generator).tokens
        assert relative(tokens, data["tokens"]) <= bound

    return check
