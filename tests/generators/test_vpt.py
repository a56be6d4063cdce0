from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import Geometry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_deep(golden: Callable, golden_backbone: Callable, check_golden: Callable, dtype: torch.dtype) -> None:
    data = golden("vpt_deep")
    model = fp.PromptedViT(golden_backbone(data, dtype), fp.VPTConfig(num_prompts=10))
    check_golden(model, data, {"first": ("static.embeddings", slice(0, 1)), "deep": ("static.embeddings", slice(1, 4))})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_shallow(
    golden: Callable, golden_backbone: Callable, check_golden: Callable, dtype: torch.dtype
) -> None:
    data = golden("vpt_shallow")
    model = fp.PromptedViT(golden_backbone(data, dtype), fp.VPTConfig(num_prompts=10, deep=False))
    check_golden(model, data, {"first": ("static.embeddings", None)})


def test_parameter_counts() -> None:
    assert fp.VPT().num_parameters() == fp.VPT().paper_num_parameters() == 92_160
    assert fp.VPT(num_prompts=200).num_parameters() == 1_843_200
    shallow = fp.VPT(num_prompts=5, deep=False)
    assert shallow.num_parameters() == shallow.paper_num_parameters() == 3_840
    projected = fp.VPT(num_prompts=10, project=16)
    assert projected.num_parameters() == 12 * 10 * 16 + 16 * 768 + 768


def test_uniform_initialisation_within_the_authors_bound() -> None:
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert bound == 0.0625
    values = fp.VPT(num_prompts=50).static.embeddings.detach()
    assert 0.99 * bound < values.abs().max() <= bound
    assert abs(values.var() - bound**2 / 3) < 0.02 * bound**2
    narrow = fp.VPT(num_prompts=50, project=32).static.embeddings.detach()
    assert 0.99 * math.sqrt(6 / (768 + 32)) < narrow.abs().max() <= math.sqrt(6 / (768 + 32))


def test_alone(small: Geometry) -> None:
    vpt = fp.VPT(num_prompts=2, geometry=small)
    assert vpt.known_at == "static"
    assert vpt().shape == (1, 2, 24)
    for layer in range(3):
        assert torch.equal(vpt(layer=layer)[0], vpt.static.embeddings[layer])
    with pytest.raises(ValueError, match=r"layer must be one of \(0, 1, 2\), got 3"):
        vpt(layer=3)
    with pytest.raises(ValueError, match=r"layer must be one of \(0,\), got 1"):
        fp.VPT(deep=False, geometry=small)(layer=1)


def test_projection_maps_narrow_prompts(small: Geometry) -> None:
    vpt = fp.VPT(num_prompts=2, project=5, geometry=small).double()
    assert vpt.static.embeddings.shape == (3, 2, 5)
    projection = vpt.static.projection
    expected = vpt.static.embeddings[1] @ projection.weight.T + projection.bias
    torch.testing.assert_close(vpt(layer=1)[0], expected)
    assert vpt().shape == (1, 2, 24)


def test_dropout_masks_are_per_image_and_only_in_training(small: Geometry) -> None:
    vpt = fp.VPT(num_prompts=4, prompt_dropout=0.25, geometry=small)
    mask = vpt.draw(50)["prompts"]
    assert mask.shape == (3, 50, 4, 24)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.75).item()}
    assert abs((mask == 0).float().mean() - 0.25) < 0.02
    assert not torch.equal(mask[0, 0], mask[0, 1])
    torch.manual_seed(5)
    first = vpt.draw(2)["prompts"]
    torch.manual_seed(5)
    assert torch.equal(vpt.draw(2)["prompts"], first)
    assert torch.equal(vpt.prompts(1, draws={"prompts": first}), vpt.static.embeddings[1] * first[1])
    assert vpt.eval().draw(2) == {}
    assert fp.VPT(geometry=small).draw(2) == {}


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_stand_behind_prefix_and_registers_and_the_pre_norm(
    pre_norm_vit: VisionTransformer, tiny_images: Tensor, deep: bool
) -> None:
    vit = pre_norm_vit.double()
    model = fp.PromptedViT(fp.FrozenViT(vit), fp.VPTConfig(num_prompts=4, deep=deep), readout="patches+prompts")
    images = tiny_images.double()
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    prompts = model.generator.static.embeddings
    for i, block in enumerate(vit.blocks):
        if i == 0:
            x = torch.cat([x[:, :3], prompts[0].expand(4, -1, -1), x[:, 3:]], dim=1)
        elif deep:
            x = torch.cat([x[:, :3], prompts[i].expand(4, -1, -1), x[:, 7:]], dim=1)
        x = block(x)
    expected = vit.norm(x)[:, 3:].mean(dim=1)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.reference_forward(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_prompts": 0}, ValueError, "VPTConfig.num_prompts must be at least 1, got 0"),
        ({"num_prompts": 2.0}, TypeError, "VPTConfig.num_prompts must be int, got 2.0"),
        ({"num_prompts": True}, TypeError, "VPTConfig.num_prompts must be int, got True"),
        ({"deep": 1}, TypeError, "VPTConfig.deep must be bool, got 1"),
        ({"prompt_dropout": 1.0}, ValueError, "VPTConfig.prompt_dropout must be at most 0.999"),
        (
            {"prompt_dropout": float("nan")},
            ValueError,
            "VPTConfig.prompt_dropout must be at least 0, got nan",
        ),
        ({"project": 0}, ValueError, "VPTConfig.project must be at least 1"),
        ({"project": "16"}, TypeError, "VPTConfig.project must be int"),
        ({"deep_layers": 0}, ValueError, "VPTConfig.deep_layers must be at least 1"),
        ({"deep_layers": 2, "deep": False}, ValueError, "VPTConfig.deep_layers must be None without deep, got 2"),
        ({"dropout_per": "prompt"}, ValueError, "VPTConfig.dropout_per must be one of"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.VPTConfig(**options)


STAGES = {"width": 24, "depth": 5, "patch_size": 4, "stages": ((24, 2), (48, 1), (96, 2))}


def test_prompts_have_the_width_of_their_block_s_stage() -> None:
    vpt = fp.VPT(num_prompts=3, **STAGES)
    assert {name: tuple(p.shape) for name, p in vpt.named_parameters()} == {
        "static.embeddings.0": (2, 3, 24),
        "static.embeddings.1": (1, 3, 48),
        "static.embeddings.2": (2, 3, 96),
    }
    for layer, (stage, index) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]):
        assert torch.equal(vpt(layer=layer), vpt.static.embeddings[stage][index : index + 1])
    for embeddings in vpt.static.embeddings:
        bound = (6 / (3 * 16 + embeddings.shape[2])) ** 0.5
        assert 0.8 * bound < embeddings.abs().max() <= bound
    assert vpt.paper_num_parameters() == vpt.num_parameters() == 3 * (2 * 24 + 48 + 2 * 96)


def test_shallow_prompts_have_the_width_of_the_first_stage() -> None:
    vpt = fp.VPT(num_prompts=3, deep=False, project=5, **STAGES)
    assert vpt.static.embeddings.shape == (1, 3, 5)
    assert vpt().shape == (1, 3, 24)
    assert vpt.paper_num_parameters() == 72


def test_masks_of_several_stages_are_drawn_per_image() -> None:
    vpt = fp.VPT(num_prompts=30, prompt_dropout=0.25, **STAGES).train()
    draws = vpt.draw(4)
    assert {name: tuple(mask.shape) for name, mask in draws.items()} == {
        "prompts.0": (2, 4, 30, 24),
        "prompts.1": (1, 4, 30, 48),
        "prompts.2": (2, 4, 30, 96),
    }
    torch.testing.assert_close(vpt.prompts(4, draws=draws), vpt.eval()(layer=4) * draws["prompts.2"][1])
    assert 0.2 < (draws["prompts.2"] == 0).float().mean() < 0.3


@pytest.mark.parametrize("k", [1, 2, 3])
def test_partial_depth_by_hand(tiny_vit: VisionTransformer, tiny_images: Tensor, k: int) -> None:
    """The authors' loop: block i < k drops the former prompt rows and inserts its own, later blocks keep them."""
    vit, images = tiny_vit.double(), tiny_images.double()
    model = fp.PromptedViT(fp.FrozenViT(vit), fp.VPTConfig(num_prompts=4, deep_layers=k), readout="prompts").eval()
    vpt = model.generator
    assert (vpt.layers, vpt.num_parameters(), vpt.paper_num_parameters()) == (tuple(range(k)), k * 4 * 48, k * 4 * 48)
    x = vit._pos_embed(vit.patch_embed(images))
    x = torch.cat([x[:, :1], x.new_zeros(len(x), 4, 48), x[:, 1:]], dim=1)
    for i, block in enumerate(vit.blocks):
        if i < k:
            own = vpt.static.embeddings[i].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 5:]], dim=1)
        x = block(x)
    expected = vit.norm(x)[:, 1:5].mean(1)
    for forward in (model, model.reference_forward):
        torch.testing.assert_close(forward(images), expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    by_hand, vpt.static.embeddings.grad = vpt.static.embeddings.grad, None
    model(images).square().sum().backward()
    torch.testing.assert_close(vpt.static.embeddings.grad, by_hand, rtol=1e-9, atol=1e-9)


def test_more_deep_layers_than_blocks_are_refused(small: Geometry) -> None:
    with pytest.raises(ValueError, match=r"VPTConfig\.deep_layers must be at most the 3 blocks, got 4"):
        fp.VPT(deep_layers=4, geometry=small)


def test_partial_depth_on_a_swin_transformer(tiny_swin: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(tiny_swin()).double()
    images = torch.randn(2, 3, 32, 32).double()
    for k in (1, 3, 4):
        model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3, deep_layers=k)).eval()
        torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


def test_dropout_masks_may_be_shared_by_a_batch() -> None:
    """As on the authors' Swin: those of block 0 are each image's own, later blocks have one for all images."""
    vpt = fp.VPT(num_prompts=30, prompt_dropout=0.25, dropout_per="batch", **STAGES).train()
    draws = vpt.draw(4)
    shapes = {"prompts.0": (2, 1, 30, 24), "prompts.1": (1, 1, 30, 48), "prompts.2": (2, 1, 30, 96)}
    assert {name: tuple(mask.shape) for name, mask in draws.items()} == {**shapes, "first": (1, 4, 30, 24)}
    assert not torch.equal(draws["first"][0, 0], draws["first"][0, 1])
    plain = [vpt.static(layer, None) for layer in range(5)]
    torch.testing.assert_close(vpt.prompts(0, draws=draws), plain[0] * draws["first"][0])
    for layer, (name, index) in enumerate([("prompts.0", 1), ("prompts.1", 0), ("prompts.2", 0), ("prompts.2", 1)], 1):
        found = vpt.prompts(layer, draws=draws)
        assert len(found) == 1
        torch.testing.assert_close(found, plain[layer] * draws[name][index])
        assert 0.15 < (found == 0).float().mean() < 0.35


def test_a_projection_fits_one_width_only() -> None:
    with pytest.raises(ValueError, match=r"project must be None if prompts have several widths \(24, 48, 96\)"):
        fp.VPT(project=5, **STAGES)
