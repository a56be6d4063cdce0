"""The rewritten forward of Swin equals VPT's graph, in outputs and gradients, and leaves out what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.vit import swin, swin_forward
from fastprompt.vit.weights import Dense

METHODS = ["vpt-deep", "vpt-dropout", "vpt-shallow-project", "v2apt", "v2apt-per-layer", "free"]
SIZES: dict[str, dict[str, Any]] = {
    "whole windows": {},
    "padded windows": {"img_size": (52, 36)},
    "shrunken windows": {"img_size": (20, 28)},
    "padded single windows": {"img_size": (20, 28), "always_partition": True},
}
READOUTS = ("patches", "patches+prompts", "prompts")


@pytest.fixture
def config_of(configs: dict[str, PromptConfig]) -> Callable[[str, int], PromptConfig]:
    """`config_of(method, num_prompts=3)`: half of V2APT's prompts are the instance's."""

    def config(method: str, num_prompts: int = 3) -> PromptConfig:
        split = {"num_instance": max(1, num_prompts // 2)} if method.startswith("v2apt") else {}
        return dataclasses.replace(configs[method], num_prompts=num_prompts, **split)

    return config


def model_of(swin: nn.Module, config: Any, readout: str | None = None) -> fp.PromptedViT:
    model = fp.PromptedViT(fp.FrozenViT(swin).double(), config, readout=readout)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def images_for(model: fp.PromptedViT, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.backbone.image_size, dtype=torch.float64)


def assert_equal(model: fp.PromptedViT, images: Tensor) -> None:
    """Outputs and every gradient, at 1e-10 of their norm, with the same random tensors."""
    draws, outputs, gradients = model.draw(len(images)), [], []
    for run in (model, model.reference_forward):
        model.zero_grad()
        out = run(images, draws=draws)
        (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
        outputs.append(out)
        gradients.append([p.grad for p in model.generator.parameters()])
    assert (outputs[0] - outputs[1]).norm() <= 1e-10 * outputs[1].norm()
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is None or ours is None:
            assert theirs is None or theirs.abs().max() == 0
            assert ours is None or ours.abs().max() == 0
            continue
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_reference(
    config_of: Callable[..., PromptConfig],
    tiny_swin: Callable[..., nn.Module],
    method: str,
    size: str,
    version: int,
    train: bool,
) -> None:
    swin = tiny_swin(version, **SIZES[size])
    for num_prompts in (1, 10):
        for readout in READOUTS:
            model = model_of(swin, config_of(method, num_prompts), readout).train(train)
            assert_equal(model, images_for(model))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("method", ["vpt-dropout", "vpt-shallow-project", "v2apt"])
def test_equals_the_reference_with_50_prompts(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], method: str, version: int
) -> None:
    model = model_of(tiny_swin(version, depths=(2, 1), num_heads=(1, 2)), config_of(method, 50)).train()
    assert_equal(model, images_for(model))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (44, 60), (20, 4)])
def test_equals_the_reference_at_dynamic_sizes(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], version: int, size: tuple[int, int]
) -> None:
    for method in ("vpt-dropout", "vpt-shallow-project", "v2apt"):
        model = model_of(tiny_swin(version, strict_img_size=False), config_of(method)).train()
        assert_equal(model, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"qkv_bias": False, "img_size": 36}, {"depths": (1, 1, 2)}])
def test_equals_the_reference_with_other_parts(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    for method in ("vpt-dropout", "vpt-shallow-project"):
        model = model_of(tiny_swin(**options), config_of(method)).train()
        assert_equal(model, images_for(model))


@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1), (1, 3), (4,), (0, 3)])
@pytest.mark.parametrize("readout", ["patches", "patches+prompts"])
def test_generators_may_set_any_blocks(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], layers: tuple[int, ...], readout: str
) -> None:
    model = model_of(tiny_swin(), config_of("vpt-dropout"), readout).eval()
    model.generator.layers = layers
    images = images_for(model)
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_small_batches_and_strided_images(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], method: str
) -> None:
    model = model_of(tiny_swin(), config_of(method)).eval()
    images = images_for(model, 3)
    expected = model(images)
    for batch in (0, 1):
        torch.testing.assert_close(model(images[:batch]), expected[:batch], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(model.reference_forward(images[:batch]), expected[:batch], rtol=1e-10, atol=1e-12)
    strided = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    for same in (strided, images.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(model(same), expected, rtol=1e-10, atol=1e-12)
    model.train()
    model(images[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.generator.parameters())


def rows_seen(model: fp.PromptedViT, images: Tensor, monkeypatch: pytest.MonkeyPatch, forward: Any) -> dict[str, int]:
    """Rows of all images together that go through each kind of matrix, in all blocks."""
    kinds = {
        id(m): kind
        for b in model.backbone.blocks
        for kind, m in (("qkv", b.qkv), ("proj", b.proj), ("fc1", b.mlp.fc1), ("fc2", b.mlp.fc2))
    }
    kinds |= {id(b.qkv.weight): "qkv" for b in model.backbone.blocks}
    kinds |= {id(m.reduction): "merge" for m in model.backbone.merges if m is not None}
    rows = dict.fromkeys(("qkv", "kv", "proj", "fc1", "fc2", "merge"), 0)
    dense, linear = Dense.forward, swin_forward.F.linear

    def count_dense(self: Dense, x: Tensor) -> Tensor:
        rows[kinds[id(self)]] += x.shape[:-1].numel()
        return dense(self, x)

    def count_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight._base is not None and id(weight._base) in kinds:  # a part of a block's qkv
            rows["qkv" if 3 * weight.shape[1] == len(weight) else "kv"] += x.shape[:-1].numel()
        return linear(x, weight, bias)

    monkeypatch.setattr(Dense, "forward", count_dense)
    monkeypatch.setattr(nn.functional, "linear", count_linear)
    with torch.no_grad():
        forward(images)
    monkeypatch.undo()
    return rows


PATCHES = 2 * 64 + 2 * 16 + 4  # of all blocks of one image
DEEP, SHALLOW = 5 * 3, 5 * 3  # prompt rows of all blocks


@pytest.mark.parametrize(
    ("method", "readout", "qkv", "kv", "proj", "merge"),
    [
        # static prompts: keys and values once for both images; nobody reads a prompt row
        ("vpt-dropout", "patches", 2 * PATCHES, DEEP, 2 * PATCHES, 2 * 20),
        # the last block computes prompt rows, once per image
        ("vpt-dropout", "patches+prompts", 2 * PATCHES + 3, DEEP - 3, 2 * (PATCHES + 3), 2 * 20),
        # prompts that depend on the image
        ("v2apt", "patches", 2 * PATCHES, 2 * DEEP, 2 * PATCHES, 2 * 20),
        # shallow prompts are rows of every block, once per image and not once per window
        (
            "vpt-shallow-project",
            "patches",
            2 * PATCHES + 3 + 2 * 9,
            2 * 3,
            2 * (PATCHES + SHALLOW - 3),
            2 * (20 + 2 * 3),
        ),
        ("vpt-shallow-project", "prompts", 2 * PATCHES + 3 + 2 * 12, 0, 2 * (PATCHES + SHALLOW), 2 * (20 + 2 * 3)),
    ],
)
def test_rows_nobody_reads_are_not_computed(
    config_of: Callable[..., PromptConfig],
    tiny_swin: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    readout: str,
    qkv: int,
    kv: int,
    proj: int,
    merge: int,
) -> None:
    model = model_of(tiny_swin(), config_of(method), readout).eval()
    rows = rows_seen(model, images_for(model), monkeypatch, model)
    assert rows == {"qkv": qkv, "kv": kv, "proj": proj, "fc1": proj, "fc2": proj, "merge": merge}


def test_the_reference_projects_prompts_in_every_window(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_swin(), config_of("vpt-dropout"), "patches").eval()
    rows = rows_seen(model, images_for(model), monkeypatch, model.reference_forward)
    windows = 4 + 4 + 1 + 1 + 1
    assert rows["qkv"] == rows["proj"] == 2 * (PATCHES + 3 * windows)
    assert rows["merge"] == 2 * (16 + 4 + 2 * 3)


def test_patches_are_reordered_once_between_blocks(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into windows, into shifted windows, into the merged order; not where a stage is one window."""
    model, seen, original = model_of(tiny_swin(), config_of("vpt-dropout")), [], swin_forward.select_rows
    monkeypatch.setattr(swin_forward, "select_rows", lambda x, rows: seen.append(x.shape[1]) or original(x, rows))
    model.eval()(images_for(model))
    assert seen == [64, 64, 64, 16]


def test_constants_are_not_computed_again(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_swin(), config_of("vpt-dropout"))

    def never(*_: Any) -> None:
        raise AssertionError("computed again")

    for name in ("compute_layouts", "shift_mask", "relative_positions"):
        monkeypatch.setattr(swin, name, never)
    model(images_for(model)).sum().backward()
    model.reference_forward(images_for(model))


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_window_attention(shared: bool, needed: tuple[bool, bool, bool]) -> None:
    qkv = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)  # two windows of three patches
    prompts = torch.randn(2, 1 if shared else 2, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    tensors = [t.requires_grad_(n) for t, n in zip((qkv, prompts[0], prompts[1]), needed, strict=True)]
    assert torch.autograd.gradcheck(lambda *t: swin_forward.WindowAttention.apply(*t, bias, 0.7), tensors)


def test_compiles_and_exports_as_one_graph(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module]
) -> None:
    swin = tiny_swin(depths=(2, 1), num_heads=(1, 2))
    model = model_of(swin, config_of("vpt-dropout")).train()
    images, draws = images_for(model), model.draw(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images, draws=draws)
    torch.testing.assert_close(compiled, model(images, draws=draws))
    compiled.sum().backward()
    model = model_of(swin, config_of("vpt-shallow-project")).eval()
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_close(
    config_of: Callable[..., PromptConfig], tiny_swin: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    """No further from float64 than twice PyTorch's own graph in this dtype."""
    for method in ("vpt-dropout", "vpt-shallow-project"):
        model = model_of(tiny_swin(), config_of(method)).eval()
        images = images_for(model, 4)
        exact = model.reference_forward(images)
        model.set_backbone_dtype(dtype)
        ours, theirs = (f(images.to(dtype)).double() for f in (model, model.reference_forward))
        bound = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= bound
