"""FrozenSwin: its attributes, its fingerprint, its constants, and the images it takes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.vit import FrozenSwin


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_attributes(tiny_swin: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(tiny_swin())
    assert type(backbone) is FrozenSwin
    assert isinstance(backbone, fp.FrozenViT)
    assert (backbone.width, backbone.depth, backbone.num_heads) == ((8, 16, 32), (2, 2, 1), (1, 2, 4))
    assert backbone.grid == ((8, 8), (4, 4), (2, 2))
    assert (backbone.patch_size, backbone.image_size, backbone.num_patches, backbone.num_prefix) == (4, (32, 32), 64, 0)
    assert (backbone.feature_width, backbone.stages) == (32, (0, 0, 1, 1, 2))
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (backbone.dtype, backbone.device) == (torch.float32, torch.device("cpu"))
    assert [b.shift for b in backbone.blocks] == [(0, 0), (2, 2), (0, 0), (0, 0), (0, 0)]
    assert [b.window for b in backbone.blocks] == [(4, 4)] * 4 + [(2, 2)]
    assert "width=(8, 16, 32)" in repr(backbone)


def test_a_vit_stays_a_frozen_vit(tiny_vit: VisionTransformer) -> None:
    assert type(fp.FrozenViT(tiny_vit)) is fp.FrozenViT
    with pytest.raises(ValueError, match=r"module must be a Swin transformer for FrozenSwin, got VisionTransformer"):
        FrozenSwin(tiny_vit)


def test_from_timm_builds_by_name_and_size() -> None:
    small = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 0}
    backbone = fp.FrozenViT.from_timm("swin_tiny_patch4_window7_224", image_size=56, **small)
    assert (backbone.grid, backbone.spec.name) == (((14, 14), (7, 7)), "swin_tiny_patch4_window7_224")
    assert backbone(torch.zeros(1, 3, 56, 56)).shape == (1, 24)


def test_nothing_trains_and_eval_is_sticky(tiny_swin: Callable[..., nn.Module], images: Tensor) -> None:
    backbone = fp.FrozenViT(tiny_swin()).train()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(m.training for m in backbone.modules())
    assert not backbone(images).requires_grad


def test_uint8_is_normalised(tiny_swin: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(tiny_swin(), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    by_hand = (raw / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(backbone(raw), backbone(by_hand))


def test_fingerprint_is_of_tensors_and_windows(tiny_swin: Callable[..., nn.Module]) -> None:
    module = tiny_swin()
    backbone = fp.FrozenViT(module)
    assert fp.FrozenViT(copy.deepcopy(module)).fingerprint == backbone.fingerprint
    assert fp.FrozenViT(tiny_swin(seed=1)).fingerprint != backbone.fingerprint
    assert fp.FrozenViT(tiny_swin(always_partition=True)).fingerprint != backbone.fingerprint
    before = backbone.fingerprint
    assert backbone.to(torch.bfloat16).fingerprint == before


def test_constants_follow_the_tensors(tiny_swin: Callable[..., nn.Module], images: Tensor) -> None:
    backbone, other = fp.FrozenViT(tiny_swin()), fp.FrozenViT(tiny_swin(seed=1))
    assert not any("constant" in name or "rows" in name for name in backbone.state_dict())
    backbone.load_state_dict(other.state_dict())
    assert torch.equal(backbone(images), other(images))
    assert backbone.fingerprint == other.fingerprint


def test_tensors_load_into_a_backbone_without_memory(tiny_swin: Callable[..., nn.Module], images: Tensor) -> None:
    backbone = fp.FrozenViT(tiny_swin())
    empty = copy.deepcopy(backbone).to("meta")
    empty.load_state_dict(backbone.state_dict(), assign=True)
    for config in (fp.LinearProbeConfig(), fp.VPTConfig(num_prompts=2)):
        ours, theirs = (fp.PromptedViT(b, config).eval() for b in (empty, backbone))
        theirs.load_adapter_state_dict(ours.adapter_state_dict())
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["copy", "pickle"])
def test_copies_are_whole(tiny_swin: Callable[..., nn.Module], images: Tensor, duplicate: Any) -> None:
    backbone = fp.FrozenViT(tiny_swin())
    again = duplicate(backbone)
    assert type(again) is FrozenSwin
    assert again.fingerprint == backbone.fingerprint
    assert torch.equal(again(images), backbone(images))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(tiny_swin: Callable[..., nn.Module], images: Tensor, batch: int) -> None:
    backbone = fp.FrozenViT(tiny_swin())
    torch.testing.assert_close(backbone(images[:batch]), backbone(images)[:batch], rtol=1e-5, atol=1e-6)


def test_other_sizes_are_refused(tiny_swin: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="images must be 32 x 32 pixels for this backbone, got 64 x 64"):
        fp.FrozenViT(tiny_swin())(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="multiples of the patch size 4, got 30 x 32"):
        fp.FrozenViT(tiny_swin(strict_img_size=False))(torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize("options", [{}, {"img_size": (52, 36)}, {"img_size": (36, 44)}], ids=str)
def test_layouts_lead_from_the_image_through_every_window(
    tiny_swin: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    """Numbers laid out as a picture come through all orders to where timm's roll, pad and partition put them."""
    backbone = fp.FrozenViT(tiny_swin(**options))
    height, width = backbone.grid[0]
    order = torch.arange(height * width)  # the number on each place
    for block, merge in zip(backbone.blocks, backbone.merges, strict=True):
        layout = block.layout
        if merge is not None:  # a merged patch takes the number of its first corner
            height, width = block.grid
            corner = torch.cat([order, torch.tensor([-1])])[layout.rows].view(-1, 4)[:, 0]
            order = corner.argsort().argsort()  # numbers of the smaller picture, in the picture's order
        elif layout.rows is not None:
            order = order[layout.rows]
        picture = torch.arange(height * width).view(height, width)
        rolled = picture.roll((-block.shift[0], -block.shift[1]), (0, 1))
        h, w = block.window
        rolled = nn.functional.pad(rolled, (0, -width % w, 0, -height % h), value=-1)
        expected = torch.cat([t.flatten() for rows in rolled.split(h, 0) for t in rows.split(w, 1)])
        placed = order if layout.windows is None else torch.cat([order, torch.tensor([-1])])[layout.windows]
        assert torch.equal(placed, expected)
        if layout.places is not None:
            assert torch.equal(placed[layout.places], order)


def test_full_fine_tuning_trains_the_bias_tables(tiny_swin: Callable[..., nn.Module], images: Tensor) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.FullFineTuneConfig(), num_classes=2)
    before = model(images)
    model(images).sum().backward()
    tables = [block.bias_table for block in model.backbone.blocks]
    assert all(table.grad.abs().sum() > 0 for table in tables)
    with torch.no_grad():
        tables[0].add_(1.0 + torch.rand_like(tables[0]))
    assert not torch.allclose(model(images), before)
    assert torch.equal(model(images), model.reference_forward(images))
