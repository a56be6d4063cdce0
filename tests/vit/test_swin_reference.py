"""The plain graph of a prompted Swin: the authors' outputs and gradients, and a loop over images and windows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import fastprompt as fp

SHALLOW = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "vpt_swin_shallow.safetensors"
DEEP_ONES = ["deep_prompt_embeddings_1", "deep_prompt_embeddings_2", "deep_prompt_embeddings_3"]


def official_backbone(data: dict[str, Tensor]) -> fp.FrozenViT:
    """The goldens' backbone; the original Swin merges at the end of a stage, timm at the start of the next."""
    swin = SwinTransformer(
        img_size=128,
        patch_size=4,
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        num_classes=0,
    )
    state = {k[len("backbone.") :]: v for k, v in data.items() if k.startswith("backbone.")}
    stage = r"layers\.(\d)\.downsample"
    moved = {re.sub(stage, lambda m: f"layers.{int(m[1]) + 1}.downsample", name): v for name, v in state.items()}
    swin.load_state_dict(moved)
    return fp.FrozenViT(swin).double()


def by_stage(data: dict[str, Tensor], kind: str) -> list[Tensor]:
    """The authors' prompt tensors, or gradients, one (blocks, P, width) for each stage."""
    first = data[f"{kind}.prompt_embeddings"]
    if f"{kind}.deep_prompt_embeddings_0" not in data:
        return [first]
    return [
        torch.cat([first, data[f"{kind}.deep_prompt_embeddings_0"]]),
        *(data[f"{kind}.{name}"] for name in DEEP_ONES),
    ]


def check_golden(data: dict[str, Tensor], deep: bool) -> None:
    model = fp.PromptedViT(official_backbone(data), fp.VPTConfig(num_prompts=5, deep=deep)).eval()
    assert model.readout == "patches+prompts"
    parameters = list(model.generator.parameters())
    with torch.no_grad():
        for p, value in zip(parameters, by_stage(data, "prompt"), strict=True):
            p.copy_(value)
    for forward in (model.reference_forward, model.forward):
        model.zero_grad()
        features, expected = forward(data["images"].double()), data["features"].double()
        assert (features - expected).norm() <= 1e-6 * expected.norm()
        (features * data["loss_weights"].double()).sum().backward()
        for p, gradient in zip(parameters, by_stage(data, "grad"), strict=True):
            for ours, theirs in zip(p.grad, gradient.double(), strict=True):
                assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_golden_deep(golden: Callable[[str], dict[str, Tensor]]) -> None:
    check_golden(golden("vpt_swin_deep"), deep=True)


@pytest.mark.skipif(not SHALLOW.is_file(), reason="the golden file of VPT-shallow on Swin is not on this machine")
def test_golden_shallow() -> None:
    check_golden(load_file(SHALLOW), deep=False)


def attend(block: nn.Module, prompts: Tensor, window: Tensor, mask: Tensor | None) -> Tensor:
    """timm's attention of one window (N, C) of one image with prompts (P, C) before it."""
    attn, p = block.attn, len(prompts)
    x = torch.cat([prompts, window])
    second = hasattr(attn, "logit_scale")
    qkv = attn.qkv(x) + (torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if second else 0)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3)
    if second:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * attn.logit_scale.exp()
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads))
    else:
        scores, table = q @ k.mT / q.shape[-1] ** 0.5, attn.relative_position_bias_table
    scores[:, p:, p:] += table[attn.relative_position_index].permute(2, 0, 1)
    if mask is not None:
        scores[:, p:, p:] += mask
    return attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def by_hand(swin: nn.Module, image: Tensor, prompts: dict[int, Tensor], num_prompts: int) -> tuple[Tensor, Tensor]:
    """Patches and prompts (P, C) behind the last block, for one image (3, H, W), window by window."""
    x, index, flowing = swin.patch_embed(image[None])[0], 0, None  # (H, W, C)
    for stage in swin.layers:
        if not isinstance(stage.downsample, nn.Identity):
            x, fourfold = stage.downsample(x[None])[0], torch.cat([flowing] * 4, dim=-1)[None, None]
            merge = stage.downsample
            first_norm = merge.norm.weight.shape[0] == fourfold.shape[-1]
            flowing = merge.reduction(merge.norm(fourfold)) if first_norm else merge.norm(merge.reduction(fourfold))
            flowing = flowing[0, 0]
        for block in stage.blocks:
            flowing = prompts.get(index, flowing)
            second = hasattr(block.attn, "logit_scale")
            norm1 = block.norm1 if not second else lambda t: t
            (h, w), (sh, sw), (height, width) = block.window_size, block.shift_size, x.shape[:2]
            rolled = norm1(x).roll((-sh, -sw), (0, 1))
            rolled = F.pad(rolled, (0, 0, 0, -width % w, 0, -height % h))
            out, seen = torch.zeros_like(rolled), []
            windows = [(r, c) for r in range(0, rolled.shape[0], h) for c in range(0, rolled.shape[1], w)]
            for i, (r, c) in enumerate(windows):
                mask = None if block.attn_mask is None else block.attn_mask[i]
                y = attend(block, norm1(flowing), rolled[r : r + h, c : c + w].flatten(0, 1), mask)
                out[r : r + h, c : c + w] = y[num_prompts:].view(h, w, -1)
                seen.append(y[:num_prompts])
            change = (out[:height, :width].roll((sh, sw), (0, 1)), torch.stack(seen).mean(0))
            x, flowing = (t + (block.norm1(d) if second else d) for t, d in zip((x, flowing), change, strict=True))
            x, flowing = (
                t + (block.norm2(block.mlp(t)) if second else block.mlp(block.norm2(t))) for t in (x, flowing)
            )
            index += 1
    return swin.norm(x).flatten(0, 1), swin.norm(flowing)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
@pytest.mark.parametrize("options", [{}, {"img_size": (52, 36)}, {"img_size": (20, 28)}], ids=str)
@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_equals_a_loop_over_images_and_windows(
    tiny_swin: Callable[..., nn.Module], version: int, options: dict, deep: bool
) -> None:
    """Also at batch 2, where a shallow prompt's mean is over the windows of its own image."""
    swin = tiny_swin(version, **options).double()
    backbone = fp.FrozenViT(swin)
    images = torch.randn(2, 3, *backbone.image_size, dtype=torch.float64)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3, deep=deep), readout="patches+prompts").eval()
    prompts = {i: model.generator(layer=i)[0] for i in model.generator.layers}
    pairs = [by_hand(swin, image, prompts, 3) for image in images]
    expected = {
        "patches": torch.stack([patches.mean(0) for patches, _ in pairs]),
        "prompts": torch.stack([p.mean(0) for _, p in pairs]),
        "patches+prompts": torch.stack([torch.cat(pair).mean(0) for pair in pairs]),
    }
    for readout, features in expected.items():
        model.readout = readout
        for forward in (model.reference_forward, model.forward):
            torch.testing.assert_close(forward(images), features, rtol=1e-10, atol=1e-12)
