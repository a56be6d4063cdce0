"""A folded block is the same function with fewer constants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm import layers as tl
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.vit import forward, reference
from fastprompt.vit.folding import fold, shared
from fastprompt.vit.weights import Block, Norm

BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "quick gelu": {"act_layer": "quick_gelu"},
    "q/k norm": {"qk_norm": True},
    "inner norms": {"scale_attn_norm": True, "scale_mlp_norm": True, "act_layer": "quick_gelu"},
    "post-norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "gate first": {"mlp_layer": partial(tl.GluMlp, gate_last=False), "act_layer": "quick_gelu"},
    "gate last": {"mlp_layer": partial(tl.GluMlp, gate_last=True), "act_layer": "quick_gelu"},
    "rms, no biases": {"qkv_bias": False, "proj_bias": False, "norm_layer": tl.RmsNorm},
}


def frozen(randomised: Callable[..., nn.Module], kind: Any = VisionTransformer, **options: Any) -> fp.FrozenViT:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    return fp.FrozenViT(randomised(kind(**{**sizes, **options}))).double()


@pytest.mark.parametrize("rewrite", [fold, shared])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_folded_block_computes_the_same(
    randomised: Callable[..., nn.Module], name: str, rewrite: Callable[[Block], Block]
) -> None:
    block = frozen(randomised, **BLOCKS[name]).blocks[1]
    x = torch.randn(2, 7, 48, dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(1, 4, 48, dtype=torch.float64, requires_grad=True)
    results = []
    for candidate in (block, rewrite(block)):
        read = forward.Reads(prefix=forward.prompt_keys(candidate, prompts))
        out = forward.run_block(candidate, forward.Rows(x), [read]).data
        results.append((out, *torch.autograd.grad((out * out.detach().cos()).sum(), (x, prompts))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    alone = forward.run_block(rewrite(block), forward.Rows(x), [forward.Reads()]).data
    torch.testing.assert_close(reference.run_block(block, x), alone, rtol=1e-10, atol=1e-11)


def test_a_rotation_keeps_the_key_bias(randomised: Callable[..., nn.Module]) -> None:
    options = {"use_rot_pos_emb": True, "rope_type": "dinov3", "qkv_bias": False, "num_reg_tokens": 1}
    backbone = frozen(randomised, kind=Eva, **options)
    block, turns = backbone.blocks[1], backbone.turns(backbone.grid, torch.float64)[1]
    folded, x = fold(block), torch.randn(2, 18, 48, dtype=torch.float64)
    assert folded.qkv.bias[48:96].any()  # the norm's bias, as key bias
    alone = forward.run_block(folded, forward.Rows(x), [forward.Reads(turns=turns)]).data
    torch.testing.assert_close(alone, reference.run_block(block, x, turns), rtol=1e-10, atol=1e-11)
    folded.qkv.bias.data[48:96] = 0
    without = forward.run_block(folded, forward.Rows(x), [forward.Reads(turns=turns)]).data
    assert (without - alone).abs().max() > 1e-6


def affines(block: nn.Module) -> set[str]:
    """The norms of a block that still have a weight or a bias."""
    return {name for name, m in block.named_modules() if isinstance(m, Norm) and list(m.parameters())}


def test_nothing_that_can_move_is_left_behind(randomised: Callable[..., nn.Module]) -> None:
    inner = 48
    for name, left in (
        ("layer scale", set()),
        ("inner norms", set()),
        ("q/k norm", {"q_norm", "k_norm"}),
        ("post-norm", {"norm1", "norm2"}),
    ):
        folded = fold(frozen(randomised, **BLOCKS[name]).blocks[0])
        assert affines(folded) == left, name
        assert folded.ls1 is None
        assert folded.ls2 is None
        assert folded.scale == 1
        assert folded.qkv.bias is not None
        key_bias, value_bias = folded.qkv.bias[inner : 2 * inner], folded.qkv.bias[2 * inner :]
        assert bool(key_bias.any()) == (name == "q/k norm")
        assert bool(value_bias.any()) == (name == "inner norms")  # a norm between values and projection
    assert fold(frozen(randomised, **BLOCKS["quick gelu"]).blocks[0]).mlp.act == "silu"
    assert fold(frozen(randomised, **BLOCKS["inner norms"]).blocks[0]).mlp.act == "quick_gelu"


def test_unchanged_weights_are_shared_and_no_state(randomised: Callable[..., nn.Module]) -> None:
    vit = frozen(randomised)
    names, fingerprint = list(vit.state_dict()), vit.fingerprint
    folded = vit.folded()
    assert folded is not None
    assert folded.blocks[0].mlp.fc2.weight is vit.blocks[0].mlp.fc2.weight
    assert folded.blocks[0].qkv.weight is not vit.blocks[0].qkv.weight
    assert list(vit.state_dict()) == names
    assert vit.fingerprint == fingerprint
    assert vit.folded() is folded


def test_one_copy_of_the_weights(randomised: Callable[..., nn.Module]) -> None:
    """Nothing is copied, outputs and gradients stay; engines fold all the same."""
    model = fp.PromptedViT(frozen(randomised, **BLOCKS["layer scale"]), fp.VPTConfig(num_prompts=2), num_classes=3)
    vit, images = model.backbone, torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for copies in ("folded", "none", "folded"):
        vit.set_copies(copies)
        folded = vit.folded()
        assert folded is not None
        own = {p.data_ptr() for p in vit.parameters()}
        copied = [name for name, p in folded.blocks[0].named_parameters() if p.ndim > 1 and p.data_ptr() not in own]
        assert bool(copied) == (copies == "folded")
        model.zero_grad()
        y = model(images)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.generator.parameters())])
    for found, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    vit.set_copies("none")
    engine = fp.Engine(model, dtype=torch.float32)
    assert engine._backbone.folded().blocks[0].ls1 is None
    assert vit.folded().blocks[0].ls1 is not None


@pytest.mark.parametrize("change", ["cast", "load", "assign", "in place"])
def test_folds_again_when_the_weights_change(randomised: Callable[..., nn.Module], change: str) -> None:
    vit = frozen(randomised)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = fp.PromptedViT(vit, fp.VPTConfig(num_prompts=2)).eval()
    before = model(images)
    if change == "cast":
        vit.to(torch.bfloat16)
        assert all(b.qkv.weight.dtype == torch.bfloat16 for b in vit.folded().blocks)
        vit.to(torch.float64)  # now the float64 values of bfloat16 weights
    elif change in ("load", "assign"):
        vit.load_state_dict({k: 1.1 * v for k, v in vit.state_dict().items()}, assign=change == "assign")
    else:
        with torch.no_grad():
            vit.blocks[1].norm1.weight.mul_(1.1)
    after = model(images)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, model.reference_forward(images), rtol=1e-10, atol=1e-10)


def test_weights_that_train_are_not_folded(randomised: Callable[..., nn.Module]) -> None:
    model = fp.PromptedViT(frozen(randomised), fp.FullFineTuneConfig(), num_classes=3)
    assert model.backbone.folded() is None
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)
    model(images).sum().backward()
    assert model.backbone.blocks[0].norm1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_raw_pixels_go_through_one_folded_embedding(
    randomised: Callable[..., nn.Module], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = frozen(randomised, embed_layer=partial(tl.PatchEmbed, bias=bias))
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain = reference.embed(vit, vit.normalise(raw).double())
    torch.testing.assert_close(
        forward.embed(vit, raw, vit.normalise(raw), vit.folded()).tokens, plain.tokens, rtol=1e-10, atol=1e-11
    )
    model, seen, original = fp.PromptedViT(vit, fp.VPTConfig(num_prompts=2)).eval(), [], reference.embed
    monkeypatch.setattr(reference, "embed", lambda v, x, *p: seen.append(float(x.max())) or original(v, x, *p))
    model(raw)
    assert seen == [float(raw.max())]  # pixels, not normalised ones


def test_padded_images_are_normalised_first(randomised: Callable[..., nn.Module]) -> None:
    vit = frozen(randomised, dynamic_img_size=True, dynamic_img_pad=True)
    raw = torch.randint(0, 256, (2, 3, 30, 27), dtype=torch.uint8)
    model = fp.PromptedViT(vit, fp.VPTConfig(num_prompts=2)).eval()
    torch.testing.assert_close(model(raw), model.reference_forward(raw), rtol=1e-10, atol=1e-10)


def test_bfloat16_is_as_close_as_the_plain_graph(randomised: Callable[..., nn.Module]) -> None:
    vit = frozen(randomised, depth=3, act_layer="quick_gelu", init_values=0.5).to(torch.bfloat16)
    model = fp.PromptedViT(vit, fp.VPTConfig(num_prompts=4)).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        ours, plain = model(images).double(), model.reference_forward(images).double()
        exact: Tensor = model.double().reference_forward(images.to(torch.bfloat16).double())
    eps = torch.finfo(torch.bfloat16).eps
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + eps * exact.abs().max()


def test_inductor_freezes_the_folded_weights(
    randomised: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config, freezing

    left, original = [], freezing.freeze

    def freeze(*args: object, **kwargs: object) -> tuple[torch.fx.GraphModule, list[int]]:
        graph, indices = original(*args, **kwargs)
        left.extend(node for node in graph.graph.nodes if node.op == "placeholder")
        return graph, indices

    monkeypatch.setattr(freezing, "freeze", freeze)
    torch._dynamo.reset()
    model = fp.PromptedViT(frozen(randomised).float(), fp.VPTConfig(num_prompts=2)).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad(), config.patch(freezing=True, fx_graph_cache=False):
        out = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-4)
    assert [tuple(node.meta["val"].shape) for node in left] == [(2, 3, 32, 32)]
