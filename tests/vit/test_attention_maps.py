"""Attention maps: softmaxes over named tokens, the same in both graphs; and which modules tools see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.vit import forward, slots
from fastprompt.vit.weights import Dense

BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pre-norm": {"pre_norm": True, "reg_tokens": 2},
    "qk-norm": {"qk_norm": True},
    "rotary": {
        "kind": Eva,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "num_reg_tokens": 2,
        "global_pool": "token",
    },
    "relative bias": {"kind": Beit, "use_rel_pos_bias": True, "init_values": 0.5, "global_pool": "token"},
}


@pytest.fixture
def model_of(
    make_vit: Callable[..., VisionTransformer],
    configs: dict[str, PromptConfig],
    randomised: Callable[..., nn.Module],
) -> Callable[..., fp.PromptedViT]:
    def build(method: str, backbone: str = "plain", **options: object) -> fp.PromptedViT:
        theirs = make_vit(**BACKBONES[backbone])
        vit = fp.FrozenViT(theirs)
        model = fp.PromptedViT(vit, configs[method], num_classes=2, **options)  # type: ignore[arg-type]
        if model.generator is not None:
            randomised(model.generator)
        object.__setattr__(model, "timm_vit", theirs)  # no part of the model
        return model.double().eval()

    return build


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "method", ["pgn", "v2apt", "vapt", "vpt-deep", "vpt-shallow", "vpt-partial", "free", "pixel", "linear"]
)
def test_both_graphs_attend_alike(
    method: str, backbone: str, model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor
) -> None:
    """Every query that the rewritten graph computes has the weights of the papers' graph."""
    model = model_of(method, backbone)
    papers = model.attention_maps(tiny_images.double(), "papers")
    rewritten = model.attention_maps(tiny_images.double())
    assert len(papers) == len(rewritten) == 3
    for i, (theirs, ours) in enumerate(zip(papers, rewritten, strict=True)):
        assert theirs.keys.keys() == ours.keys.keys() == theirs.queries.keys()
        assert "cls" in ours.queries
        assert i == 2 or "patches" in ours.queries
        for query in ours.queries:
            for key in ours.keys:
                torch.testing.assert_close(ours.between(query, key), theirs.between(query, key), rtol=1e-9, atol=1e-12)
        for each in (theirs, ours):
            torch.testing.assert_close(each.weights.sum(-1), torch.ones_like(each.weights[..., 0]))
            assert sum(at.stop - at.start for at in each.keys.values()) == each.weights.shape[3]
            assert sum(at.stop - at.start for at in each.queries.values()) == each.weights.shape[2]


@pytest.mark.parametrize("backbone", ["rotary", "relative bias"])
def test_positions_are_part_of_the_weights(
    backbone: str, model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor
) -> None:
    """The weights are those with which timm's own block attends."""
    model, weights = model_of("linear", backbone), list[Tensor]()
    [first, *_] = model.attention_maps(tiny_images.double(), "papers")
    original = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * options.get("scale", q.shape[-1] ** -0.5)
        weights.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return original(q, k, v, attn_mask=attn_mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        model.timm_vit.double()(tiny_images.double())
    torch.testing.assert_close(first.weights, weights[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["vqt", "cvpt"])
def test_prompts_outside_the_sequence_have_no_maps(
    method: str, model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor
) -> None:
    with pytest.raises(ValueError, match=f"tokens of the sequence, those of '{method}' are not"):
        model_of(method).attention_maps(tiny_images.double())


def test_the_rows_are_those_that_the_graph_computes(
    model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor
) -> None:
    deep = model_of("vpt-deep").attention_maps(tiny_images.double())
    assert [tuple(each.queries) for each in deep] == [("cls", "patches"), ("cls", "patches"), ("cls",)]
    assert [tuple(each.weights.shape) for each in deep] == [(4, 3, 17, 20), (4, 3, 17, 20), (4, 3, 1, 20)]
    kept = model_of("pgn", readout="prompts").attention_maps(tiny_images.double())
    assert [tuple(each.queries) for each in kept] == [("cls", "patches", "prompts")] * 2 + [("prompts",)]
    papers = model_of("vpt-deep").attention_maps(tiny_images.double(), "papers")
    assert papers[1].between("prompts", "patches").shape == (4, 3, 3, 16)
    with pytest.raises(ValueError, match=r"query must be one of \('cls',\) in this block, got 'prompts'"):
        deep[2].between("prompts", "patches")


def test_rows_in_slots_as_on_a_gpu(
    model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("pgn", "pre-norm")
    expected = model.attention_maps(tiny_images.double())
    for module in (slots, forward):
        monkeypatch.setattr(module, "in_slots", lambda x: True)
    for ours, theirs in zip(model.attention_maps(tiny_images.double()), expected, strict=True):
        for key in theirs.keys:
            torch.testing.assert_close(ours.between("cls", key), theirs.between("cls", key), rtol=1e-9, atol=1e-12)


def test_the_weights_are_the_formula(make_vit: Callable[..., VisionTransformer], tiny_images: Tensor) -> None:
    """Block 0 of an unprompted ViT by hand, from timm's own module."""
    vit = make_vit()
    [first, *_] = fp.PromptedViT(fp.FrozenViT(vit), fp.LinearProbeConfig(), 2).eval().attention_maps(tiny_images)
    x = torch.cat([vit.cls_token.expand(4, -1, -1), vit.patch_embed(tiny_images)], 1) + vit.pos_embed
    block = vit.blocks[0]
    qkv = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias).view(4, 17, 3, 3, 16)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(first.weights, (q @ k.transpose(-1, -2) / 4).softmax(-1))


def test_what_has_no_maps_is_refused(
    model_of: Callable[..., fp.PromptedViT], tiny_swin: Callable[..., nn.Module], tiny_images: Tensor
) -> None:
    model = model_of("vpt-deep")
    with pytest.raises(ValueError, match="graph must be one of"):
        model.attention_maps(tiny_images.double(), "fast")
    with pytest.raises(ValueError, match="model must be in eval mode"):
        model.train().attention_maps(tiny_images.double())
    swin = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VPTConfig(num_prompts=2), num_classes=2).eval()
    with pytest.raises(ValueError, match="model must attend to all tokens"):
        swin.attention_maps(tiny_images)


@pytest.mark.parametrize("swin", [False, True])
def test_blocks_and_linears_of_the_papers_graph_are_called(
    swin: bool,
    model_of: Callable[..., fp.PromptedViT],
    tiny_swin: Callable[..., nn.Module],
    tiny_images: Tensor,
) -> None:
    """So that forward hooks fire, see whole sequences, and may change them; opted in by `set_graph`."""
    model = model_of("vpt-deep")
    if swin:
        model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VPTConfig(num_prompts=3), num_classes=2).double().eval()
    seen: dict[str, tuple[int, ...]] = {}
    for name, module in model.backbone.named_modules():
        if type(module).__name__ in ("Block", "SwinBlock", "Dense", "Norm"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: tuple(out.shape)}))
    names = {name for name, module in model.backbone.named_modules() if module._forward_hooks}
    expected = model(tiny_images.double())
    assert "blocks.0" not in seen
    model.set_graph("papers")
    torch.testing.assert_close(model(tiny_images.double()), expected, rtol=1e-9, atol=1e-12)
    assert seen.keys() == names
    assert seen["blocks.0"] == (4, 3 + 64, 8) if swin else (4, 20, 48)
    model.backbone.blocks[0].register_forward_hook(lambda m, args, out: out * 0)
    assert not torch.allclose(model(tiny_images.double()), expected)
    model.set_graph("rewritten")
    torch.testing.assert_close(model(tiny_images.double()), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="graph must be one of"):
        model.set_graph("reference")


def test_an_engine_computes_the_rewritten_graph(
    model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("vpt-deep").float()
    model.set_graph("papers")
    monkeypatch.setattr(fp.PromptedViT, "_papers_features", None)  # cannot be called
    with fp.Engine(model, batch_sizes=(4,), backend="eager", dtype=torch.float32) as engine:
        assert engine(tiny_images).shape == (4, 2)
    with pytest.raises(TypeError):
        model(tiny_images)


def test_torchinfo_sees_the_modules(model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor) -> None:
    torchinfo = pytest.importorskip("torchinfo")
    model = model_of("vpt-deep").float()

    def blocks_seen() -> int:
        layers = torchinfo.summary(model, input_data=tiny_images, verbose=0).summary_list
        return sum(layer.class_name == "Block" and layer.output_size == [4, 20, 48] for layer in layers)

    assert blocks_seen() == 0
    model.set_graph("papers")
    assert blocks_seen() == 3


def test_weights_that_torchao_quantises_are_used(model_of: Callable[..., fp.PromptedViT], tiny_images: Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("vpt-deep").float()
    with torch.no_grad():
        expected = model(tiny_images)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model.backbone, config, filter_fn=lambda module, name: isinstance(module, Dense))
    model.set_graph("papers")
    with torch.no_grad():
        found = model(tiny_images)
    error = float((found - expected).norm() / expected.norm())
    assert 1e-6 < error < 0.05
