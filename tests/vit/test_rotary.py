"""The rotation of queries and keys, and what it leaves of the rewritten graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.vit import forward, reference, rotary
from fastprompt.vit.weights import Dense, Turns

DINOV3: dict[str, Any] = {
    "kind": Eva,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "num_reg_tokens": 2,
    "qkv_bias": False,
    "init_values": 0.5,
    "dynamic_img_size": True,
    "use_fc_norm": False,
    "global_pool": "token",
}


def turns(heads: int, patches: int, first: int) -> Turns:
    angles = torch.randn(heads, patches, 4, dtype=torch.float64)
    return Turns(angles.sin(), angles.cos(), first)


def neighbours(x: Tensor) -> Tensor:
    """Move the channels of each pair from i and i + d / 2 next to each other."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def apart(x: Tensor) -> Tensor:
    """Undo `neighbours`."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def ours_of(q: Tensor, of: Turns, interleaved: bool) -> Tensor:
    return apart(rotary.rotated(neighbours(q), of, True)) if interleaved else rotary.rotated(q, of)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_queries_and_keys_rotate_as_in_the_papers_graph(heads: int, interleaved: bool) -> None:
    q = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    of = turns(heads, 5, 2)
    plain, ours = reference.rotated(q, of), ours_of(q, of, interleaved)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(q)
    gradients = [torch.autograd.grad((out * weights).sum(), q)[0] for out in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    pair = torch.stack([q[..., :4], q[..., 4:]])
    torch.testing.assert_close(  # lengths stay
        torch.stack([ours[..., :4], ours[..., 4:]]).norm(dim=0), pair.norm(dim=0), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(ours[:, :, [0, 1, 7, 8]], q[:, :, [0, 1, 7, 8]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_projections_rotate_without_their_values(dtype: torch.dtype) -> None:
    packed = torch.randn(2, 9, 3, 3, 8, dtype=dtype, requires_grad=True)
    of = turns(3, 5, 2)
    q, k, v = packed.double().permute(2, 0, 3, 1, 4).unbind(0)
    expected = torch.stack([reference.rotated(q, of), reference.rotated(k, of), v]).permute(1, 3, 0, 2, 4)
    paired = torch.cat([neighbours(packed[:, :, :2]), packed[:, :, 2:]], dim=2)  # values stay
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.03, "atol": 0.03}
    for given, interleaved in ((packed, False), (paired, True)):
        for rotate in (rotary.rotated, rotary._plain):
            angles = of if rotate is rotary.rotated else Turns(of.sin.to(dtype), of.cos.to(dtype), of.first)
            ours = rotate(given, angles, interleaved)
            ours = torch.cat([apart(ours[:, :, :2]), ours[:, :, 2:]], dim=2) if interleaved else ours
            torch.testing.assert_close(ours.double(), expected, **near)
            weights = torch.randn_like(expected)
            gradients = [
                torch.autograd.grad((out * weights).sum(), packed, retain_graph=True)[0] for out in (ours, expected)
            ]
            torch.testing.assert_close(*gradients, **near)


@torch.no_grad()
def test_neighbours_are_rotated_where_they_are() -> None:
    for shape, dim in (((2, 3, 9, 8), 2), ((2, 9, 3, 3, 8), 1)):
        x, of = torch.randn(shape), turns(1, 5, 2)
        before = x.clone()
        assert rotary.rotated(x, of, interleaved=True) is x
        rows = torch.tensor([0, 1, 7, 8])
        assert torch.equal(x.index_select(dim, rows), before.index_select(dim, rows))
        assert not torch.equal(x, before)


def test_gradients_of_any_layout_are_rotated_back() -> None:
    q, of = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True), turns(1, 5, 2)
    (found,) = torch.autograd.grad(rotary.rotated(q, of, interleaved=True).sum(), q)
    (expected,) = torch.autograd.grad(rotary._plain(q, of, interleaved=True).sum(), q)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 4), slice(2, None), slice(0, 8), slice(7, None)])
def test_some_rows_rotate_as_they_do_among_all(rows: slice) -> None:
    q, of = torch.randn(2, 3, 9, 8, dtype=torch.float64), turns(1, 5, 2)
    for interleaved in (False, True):
        some = rotary.rotated(q[:, :, rows].clone(), of.of(rows), interleaved)
        torch.testing.assert_close(some, rotary.rotated(q.clone(), of, interleaved)[:, :, rows])


@pytest.fixture
def dinov3(make_vit: Callable[..., Any]) -> fp.FrozenViT:
    return fp.FrozenViT(make_vit(depth=2, **DINOV3)).double()


@pytest.mark.parametrize("method", ["vpt-deep", "v2apt", "pgn"])
@torch.no_grad()
def test_other_sizes_equal_the_papers_graph(
    dinov3: fp.FrozenViT, configs: dict[str, PromptConfig], method: str
) -> None:
    model = fp.PromptedViT(dinov3, configs[method]).eval()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config", [fp.VQTConfig(2), fp.CVPTConfig(2, first_block=1), fp.VPTConfig(2, first_block=1)], ids=lambda c: c.kind
)
@pytest.mark.parametrize("keep", ["inputs", "keys"])
@torch.no_grad()
def test_constants_know_the_grid_of_their_images(dinov3: fp.FrozenViT, config: PromptConfig, keep: str) -> None:
    model = fp.PromptedViT(dinov3, config).eval()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    kept = model.constants(images, keep)
    torch.testing.assert_close(model.from_constants(kept), model.reference_forward(images), rtol=1e-10, atol=1e-10)


def test_one_query_projects_keys_but_no_values(
    dinov3: fp.FrozenViT, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, products = fp.PromptedViT(dinov3, fp.VPTConfig(3)).eval(), []
    linear, outputs_of = forward.linear, forward.outputs_of

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        products.append((x.shape[1], len(weight)))
        return linear(x, weight, bias)

    def of_dense(dense: Dense, x: torch.Tensor, outputs: slice) -> torch.Tensor:
        products.append((x.shape[1], len(dense.weight[outputs])))
        return outputs_of(dense, x, outputs)

    monkeypatch.setattr(forward, "linear", watched)
    monkeypatch.setattr(forward, "outputs_of", of_dense)
    with torch.no_grad():
        model(tiny_images[:2].double())
    assert products == [(3, 96), (1, 48), (19, 48), (3, 48)]  # block 0's prompts; the query, keys of rows and prompts


@pytest.mark.parametrize("method", ["vpt-deep", "vapt", "v2apt", "pgn", "vqt", "cvpt"])
def test_adapters_are_saved_loaded_and_served(
    dinov3: fp.FrozenViT, configs: dict[str, PromptConfig], tiny_images: Tensor, tmp_path: Path, method: str
) -> None:
    model = fp.PromptedViT(dinov3.float(), configs[method], num_classes=4).eval()
    model.save_pretrained(tmp_path)
    again = fp.PromptedViT.from_pretrained(dinov3, tmp_path)
    images = tiny_images[:3]
    expected = model.reference_forward(images).detach()
    torch.testing.assert_close(again(images).detach(), expected, rtol=1e-4, atol=1e-5)
    engine = fp.Engine(model, batch_sizes=(1, 4), dtype=torch.float32, backend="eager")
    torch.testing.assert_close(engine(images), expected, rtol=1e-4, atol=1e-5)
    engine.release()


def test_an_adapter_refuses_a_backbone_with_other_frequencies(make_vit: Callable[..., Any], tmp_path: Path) -> None:
    fp.PromptedViT(fp.FrozenViT(make_vit(depth=2, **DINOV3)), fp.VPTConfig(3)).save_pretrained(tmp_path)
    fp.PromptedViT.from_pretrained(fp.FrozenViT(make_vit(depth=2, **DINOV3)), tmp_path)
    other = fp.FrozenViT(make_vit(depth=2, **DINOV3, rope_temperature=100.0))
    with pytest.raises(ValueError, match="backbone"):
        fp.PromptedViT.from_pretrained(other, tmp_path)


def test_the_rotation_compiles_and_exports(dinov3: fp.FrozenViT, tiny_images: Tensor) -> None:
    model = fp.PromptedViT(dinov3.float(), fp.VPTConfig(3), num_classes=4).eval()
    with torch.no_grad():
        expected = model(tiny_images)
        exported = torch.export.export(model, (tiny_images,)).module()
        torch.testing.assert_close(exported(tiny_images), expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_leaves_the_angles(dinov3: fp.FrozenViT, tiny_images: Tensor) -> None:
    model = fp.PromptedViT(dinov3, fp.FullFineTuneConfig(), num_classes=4).train()
    out, plain = model(tiny_images.double()), model.reference_forward(tiny_images.double())
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    out.sum().backward()
    assert not any("rotary" in name for name, _ in model.named_parameters())
    assert model.backbone.blocks[0].qkv.weight.grad.any()
