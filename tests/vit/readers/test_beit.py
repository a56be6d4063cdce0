"""The readers of timm's models with a relative position bias, and of its distilled DeiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import layers as tl
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import fastprompt as fp

FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "beit": (Beit, {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}),
    "beit pretraining": (Beit, {"use_shared_rel_pos_bias": True, "global_pool": "token"}),
    "both biases": (Beit, {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True, "qkv_bias": False}),
    "beit without bias": (Beit, {"swiglu_mlp": True, "scale_mlp": True, "init_values": 0.1}),
    "relpos": (VisionTransformerRelPos, {"rel_pos_type": "bias"}),
    "relpos mlp": (VisionTransformerRelPos, {"rel_pos_type": "mlp", "rel_pos_dim": 8, "qk_norm": True}),
    "relpos swin mlp": (VisionTransformerRelPos, {"rel_pos_type": "mlp_swin", "fc_norm": True}),
    "relpos cls": (VisionTransformerRelPos, {"rel_pos_type": "bias", "class_token": True, "global_pool": "token"}),
    "relpos mlp cls": (VisionTransformerRelPos, {"rel_pos_type": "mlp", "class_token": True, "init_values": None}),
    "relpos shared": (VisionTransformerRelPos, {"rel_pos_type": "mlp", "shared_rel_pos": True}),
    "relpos res-post-norm": (VisionTransformerRelPos, {"block_fn": ResPostRelPosBlock, "rel_pos_type": "bias"}),
    "distilled deit": (VisionTransformerDistilled, {}),
}


def build(randomise: Callable[..., nn.Module], form: str, **options: Any) -> Any:
    """A tiny model of 3 x 4 patches whose parameters and buffers are all random."""
    kind, own = FORMS[form]
    sizes = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = randomise(kind(**{**sizes, **own, **options}))
    with torch.no_grad():
        for name, value in model.named_buffers():
            if value.is_floating_point():
                assert name.endswith(("k_bias", "rel_coords_log"))
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.double().eval()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_match_timm(randomised: Callable[..., nn.Module], form: str) -> None:
    model = build(randomised, form)
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    backbone, expected = fp.FrozenViT(model), model(images)
    assert (backbone(images) - expected).norm() <= 1e-10 * expected.norm()
    assert (backbone.blocks[0].bias is not None) == (form not in ("beit without bias", "distilled deit"))


@torch.no_grad()
def test_sizes_that_timm_resampled_match_timm(randomised: Callable[..., nn.Module]) -> None:
    model = build(randomised, "beit")
    model.set_input_size((40, 24))
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    expected = model(images)
    assert (fp.FrozenViT(model)(images) - expected).norm() <= 1e-10 * expected.norm()


def test_other_sizes_are_refused(randomised: Callable[..., nn.Module]) -> None:
    model = build(randomised, "beit")
    with pytest.raises(ValueError, match="image_size must be 24 x 32 for this model with a relative position bias"):
        fp.FrozenViT(model, image_size=32)
    backbone = fp.FrozenViT(model)
    with pytest.raises(ValueError, match="takes images of one size: it has a relative position bias"):
        backbone.any_size()
    with pytest.raises(ValueError, match="images must be 24 x 32"):
        backbone(torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_other_blocks_and_positions_are_refused(randomised: Callable[..., nn.Module]) -> None:
    model = build(randomised, "relpos")
    model.blocks[0].attn.rel_pos = tl.RelPosBias((3, 4), 4).requires_grad_(False)
    fp.FrozenViT(model)
    model.blocks[0].attn.rel_pos = nn.Identity()
    with pytest.raises(ValueError, match="relative position is Identity"):
        fp.FrozenViT(model)
    model.blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match="block is Identity"):
        fp.FrozenViT(model)


@pytest.mark.parametrize("form", ["beit", "distilled deit"])
def test_adapters_are_saved_loaded_and_served(randomised: Callable[..., nn.Module], tmp_path: Path, form: str) -> None:
    backbone = fp.FrozenViT(build(randomised, form).float())
    model = fp.PromptedViT(backbone, fp.VPTConfig(3), num_classes=4).eval()
    assert model.readout == ("patches+prompts" if form == "beit" else "cls+dist")
    model.save_pretrained(tmp_path)
    images = torch.randn(3, 3, 24, 32)
    expected = model.reference_forward(images).detach()
    again = fp.PromptedViT.from_pretrained(fp.FrozenViT(build(randomised, form).float()), tmp_path)
    torch.testing.assert_close(again(images).detach(), expected, rtol=1e-4, atol=1e-5)
    engine = fp.Engine(model, batch_sizes=(1, 4), dtype=torch.float32, backend="eager")
    torch.testing.assert_close(engine(images), expected, rtol=1e-4, atol=1e-5)
    engine.release()
    other = build(randomised, form)
    with torch.no_grad():
        (other.blocks[1].attn.relative_position_bias_table if form == "beit" else other.dist_token)[0, 0] += 0.1
    with pytest.raises(ValueError, match="backbone"):
        fp.PromptedViT.from_pretrained(fp.FrozenViT(other.float()), tmp_path)


def test_the_bias_trains_with_the_backbone(randomised: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(build(randomised, "beit"))
    model, images = fp.PromptedViT(backbone, fp.FullFineTuneConfig(), 4).train(), torch.randn(2, 3, 24, 32).double()
    gradients: list[Tensor] = []
    for run in (model, model.reference_forward):
        model.zero_grad()
        run(images).square().sum().backward()
        table = model.backbone.blocks[1].bias.table
        assert table.grad is not None
        gradients.append(table.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].any()


def test_the_bias_is_written_out_once(randomised: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = fp.FrozenViT(build(randomised, "beit"))
    whole = [block.bias.whole for block in backbone.folded().blocks]
    assert [tuple(bias.shape) for bias in whole] == [(1, 4, 13, 13)] * 2
    model, images = fp.PromptedViT(backbone, fp.VPTConfig(3)).eval(), torch.randn(2, 3, 24, 32).double()
    with torch.no_grad():
        first = model(images)
        backbone.blocks[1].bias.table.mul_(2)
        assert (model(images) - first).abs().max() > 1e-6
        torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


def test_two_classifiers_are_no_label_map(randomised: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(build(randomised, "distilled deit"))
    with pytest.raises(ValueError, match="'label_map' reads one pretrained classifier"):
        fp.PromptedViT(backbone, fp.PGNConfig(3), num_classes=4, head="label_map")
    with pytest.raises(ValueError, match="needs a distillation token"):
        fp.PromptedViT(fp.FrozenViT(build(randomised, "beit")), fp.VPTConfig(3), readout="cls+dist")
    plain = build(randomised, "distilled deit", num_classes=0)
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    torch.testing.assert_close(fp.FrozenViT(plain)(images), plain(images), rtol=1e-10, atol=1e-10)
