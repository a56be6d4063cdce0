"""The rewritten forward equals the papers' graph, in outputs and gradients, and leaves out the dead rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm import layers as tl
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig, pgn
from fastprompt.kernels.library_prompts import library_prompts
from fastprompt.vit import forward, reference

BACKBONES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "pre-norm": {"pre_norm": True, "act_layer": "quick_gelu"},
    "layer scale": {"init_values": 0.5},
    "all norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "post-norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "gated mlp": {"mlp_layer": partial(tl.GluMlp, gate_last=False), "act_layer": nn.SiLU},
    "no biases": {"qkv_bias": False, "proj_bias": False, "norm_layer": tl.RmsNorm},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "map": {"global_pool": "map"},
    "pool prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "one block": {"depth": 1},
    "rotary": {"kind": Eva, "use_rot_pos_emb": True, "rope_type": "dinov3", "num_reg_tokens": 2, "init_values": 0.5},
    "rotary of each head": {
        "kind": Eva,
        "use_rot_pos_emb": True,
        "rope_type": "mixed",
        "qk_norm": True,
        "scale_attn_inner": True,
        "use_pre_transformer_norm": True,
    },
    "rotary without class token": {
        "kind": Eva,
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "class_token": False,
        "use_post_norm": True,
        "global_pool": "map",
    },
    "relative bias": {"kind": Beit, "use_rel_pos_bias": True, "init_values": 0.5, "global_pool": "token"},
    "relative bias without class token": {
        "kind": VisionTransformerRelPos,
        "block_fn": ResPostRelPosBlock,
        "class_token": False,
        "qk_norm": True,
        "rel_pos_type": "bias",
    },
    "distilled": {"kind": VisionTransformerDistilled},
}
CASES = [
    (name, readout)
    for name, options in BACKBONES.items()
    for readout in reference.READOUTS
    if (readout != "map" or options.get("global_pool") == "map")
    and (readout != "cls" or options.get("class_token", True))
    and (readout != "cls+dist" or name == "distilled")
]
TOKENS = ["vpt-dropout", "vpt-shallow", "vapt", "v2apt", "pgn", "free"]  # methods whose prompts are tokens
Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def model_of(make_vit: Callable[..., VisionTransformer], configs: dict[str, PromptConfig]) -> Build:
    """`model_of(method, backbone, readout)`: a model with random prompts; the method by name or configuration."""

    def build(method: str | PromptConfig, backbone: str, readout: str) -> fp.PromptedViT:
        config = configs[method] if isinstance(method, str) else method
        vit = make_vit(**{"depth": 2, **BACKBONES[backbone]})
        model = fp.PromptedViT(fp.FrozenViT(vit).double(), config, readout=readout)
        with torch.no_grad():
            for p in model.generator.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return model

    return build


@pytest.mark.parametrize(("backbone", "readout"), CASES)
def test_equals_the_reference(model_of: Build, tiny_images: Tensor, backbone: str, readout: str) -> None:
    images = tiny_images[:2].double()
    for method in TOKENS:
        model = model_of(method, backbone, readout).train()
        draws, outputs, gradients = model.draw(2), [], []
        for run in (model, model.reference_forward):
            model.zero_grad()
            out = run(images, draws=draws)
            (out * torch.linspace(-1, 1, 48)).sum().backward()
            outputs.append(out)
            gradients.append([p.grad for p in model.generator.parameters()])
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(*gradients, strict=True):
            if theirs is None or ours is None:
                assert theirs is None or theirs.abs().max() == 0
                assert ours is None or ours.abs().max() == 0
                continue
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm() + 1e-13, method


POSITIONAL = [(backbone, readout) for backbone, readout in CASES if "rotary" in backbone or "bias" in backbone]


@pytest.mark.parametrize(
    ("backbone", "readout"), [(name, readout) for name, readout in POSITIONAL if "prompts" not in readout]
)
def test_prompts_outside_the_sequence_equal_the_reference(
    model_of: Build, tiny_images: Tensor, backbone: str, readout: str
) -> None:
    images = tiny_images[:2].double()
    for method in ("vqt", "vqt-late", "cvpt", "cvpt-late"):
        model = model_of(method, backbone, readout).train()
        trained = list(model.generator.parameters())
        found, plain = model(images), model.reference_forward(images)
        torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(out.cos().sum(), trained) for out in (found, plain)]
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm(), method
        model.eval()
        for keep in ("inputs", "keys"):
            if not model.has_constants():
                kept = model.constants(images, keep)
                torch.testing.assert_close(model.from_constants(kept), plain, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for _ in range(2):  # the second time with what is known of the prompts
                torch.testing.assert_close(model(images), plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backbone", ["rotary", "relative bias"])
@torch.no_grad()
def test_prompts_outside_the_sequence_have_no_place_in_the_image(
    model_of: Build, tiny_images: Tensor, backbone: str
) -> None:
    asked, crossed = (model_of(method, backbone, "cls") for method in ("vqt", "cvpt"))
    vit, block, images = asked.backbone, asked.backbone.blocks[0], tiny_images[:2].double()
    x, (heads, d) = reference.embed(vit, images).tokens, (block.num_heads, block.head_dim)
    turns = vit.turns(vit.spec.grid, x.dtype)[0]

    def projected(rows: Tensor) -> Tensor:
        return block.qkv(block.norm1(rows)).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, d)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(2, 3) / d**0.5).softmax(dim=3)
        return block.proj((weights @ v).transpose(1, 2).flatten(2)) * block.ls1

    def finished(rows: Tensor) -> Tensor:
        return rows + reference.mlp(block.mlp, block.norm2(rows)) * block.ls2

    _, k, v = projected(x)
    if turns is not None:  # (a + i b) e^{iθ}, for patches alone
        turned = torch.complex(k[..., : d // 2], k[..., d // 2 :])
        turned[:, :, vit.num_prefix :] *= torch.complex(turns.cos, turns.sin)
        k = torch.cat([turned.real, turned.imag], dim=-1)
    queries = asked.generator(layer=0).expand(2, -1, -1)
    answers = finished(queries + attended(projected(queries)[0], k, v))
    whole = reference.encode(vit, images, asked.generator)
    torch.testing.assert_close(whole.answers[0], answers, rtol=1e-10, atol=1e-10)

    x = x + reference.attention(block, block.norm1(x), turns) * block.ls1
    prompts_of_block = crossed.generator(layer=0).expand(2, -1, -1)
    prompts = projected(prompts_of_block)
    x = finished(x + attended(projected(x)[0], *prompts[1:]))
    of_block = reference.run_cross_block(block, reference.embed(vit, images).tokens, prompts_of_block, turns)
    torch.testing.assert_close(of_block, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_prompts", [1, 10, 50])
@pytest.mark.parametrize(
    "backbone", ["plain", "registers", "pre-norm", "layer scale", "all norms", "rotary", "relative bias"]
)
@pytest.mark.parametrize("method", TOKENS)
def test_equals_the_reference_at_inference(
    configs: dict[str, PromptConfig], model_of: Build, tiny_images: Tensor, method: str, backbone: str, num_prompts: int
) -> None:
    split = {"num_instance": (num_prompts + 1) // 2} if method == "v2apt" else {}
    config = dataclasses.replace(configs[method], num_prompts=num_prompts, **split)
    images = tiny_images[:2].double()
    for readout in ("cls", "patches", "patches+prompts"):
        model = model_of(config, backbone, readout).eval()
        plain = model.reference_forward(images)
        torch.testing.assert_close(model(images), plain, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for _ in range(2):  # the second time with keys and values made before
                torch.testing.assert_close(model(images), plain, rtol=1e-10, atol=1e-10)
            kept = model.kept_prefixes() or {}
        deep = method == "vpt-dropout"
        assert len(kept) == (
            model.backbone.depth - ((readout != "patches" and backbone != "all norms") or readout == "patches+prompts")
            if deep
            else 0
        )


@pytest.mark.parametrize(
    "backbone",
    ["plain", "registers", "pre-norm", "all norms", "post-norm", "map", "one block", "rotary", "relative bias"],
)
def test_groups_of_images_equal_each_alone(model_of: Build, tiny_images: Tensor, backbone: str) -> None:
    readouts = ["cls", "patches", "prompts", "patches+prompts", "cls", "patches"]
    models = [model_of(m, backbone, r) for m, r in zip(TOKENS, readouts, strict=True)]
    vit, images = models[0].backbone, torch.cat([tiny_images] * 2)[: 2 + len(models)].double()
    sizes, groups = [2, 1, 2, 1, 1, 1], []
    owned = list(torch.arange(len(images)).split(sizes))
    embedded = forward.embed(vit, images, images, vit.folded())
    for model, own in zip(models, owned, strict=True):
        context = model.eval().prompt_context(images[own], embedded.patches[own], {})
        groups.append(forward.Group(model.generator, context, {}, model.readout, None, len(own)))
    together = forward.features(vit, embedded, groups, vit.folded())
    for model, own, ours in zip(models, owned, together, strict=True):
        theirs = model.reference_forward(images[own])
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        parameters = list(model.generator.parameters())
        weights = torch.linspace(-1, 1, 48)
        for x, y in zip(
            torch.autograd.grad((ours * weights).sum(), parameters, retain_graph=True, allow_unused=True),
            torch.autograd.grad((theirs * weights).sum(), parameters, allow_unused=True),
            strict=True,
        ):
            if x is None or y is None:
                assert all(g is None or g.abs().max() == 0 for g in (x, y))
            else:
                assert (x - y).norm() <= 1e-10 * y.norm() + 1e-13


def rows_seen(model: fp.PromptedViT, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of each block's MLP are computed."""
    rows, original = [], reference.mlp
    monkeypatch.setattr(reference, "mlp", lambda module, x, *rest: rows.append(x.shape[1]) or original(module, x))
    model.eval()(images)
    return rows


@pytest.mark.parametrize(
    ("method", "readout", "rows"),
    [
        ("vpt-dropout", "cls", [17, 1]),
        ("vpt-dropout", "patches", [17, 16]),
        ("vpt-dropout", "patches+prompts", [17, 19]),
        ("vpt-dropout", "prompts", [17, 3]),
        ("vapt", "cls", [17, 1]),
        ("v2apt", "cls", [17, 1]),
        ("vpt-shallow", "cls", [20, 1]),
        ("pgn", "cls", [20, 1]),
        ("free", "patches", [20, 16]),
    ],
)
def test_rows_nobody_reads_are_not_computed(
    model_of: Build,
    tiny_images: Tensor,
    method: str,
    readout: str,
    rows: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(method, "plain", readout)
    assert rows_seen(model, tiny_images.double(), monkeypatch) == rows


def test_static_prompts_are_projected_once_not_once_per_image(
    model_of: Build, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, original = model_of("vpt-dropout", "plain", "patches").train(), [], forward.prompt_keys
    monkeypatch.setattr(
        forward, "prompt_keys", lambda block, prompts: seen.append(prompts.shape[0]) or original(block, prompts)
    )
    model.draw = lambda batch: {}  # no dropout
    model(tiny_images.double())
    assert seen == [1, 1]


def test_keys_and_values_of_an_adapter_are_made_once_and_again_when_it_changes(
    model_of: Build, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen, original = model_of("vpt-dropout", "plain", "patches").eval(), [], forward.prompt_keys
    monkeypatch.setattr(
        forward, "prompt_keys", lambda block, prompts: seen.append(prompts.shape[0]) or original(block, prompts)
    )
    images = tiny_images.double()
    with torch.no_grad():
        first = model(images)
        torch.testing.assert_close(model(images), first, rtol=0, atol=0)
        assert seen == [1, 1]
        for change in (
            lambda: next(model.generator.parameters()).mul_(2),
            lambda: model.backbone.blocks[0].qkv.weight.mul_(2),
            lambda: model.load_adapter_state_dict({k: 3 * v for k, v in model.adapter_state_dict().items()}),
        ):
            change()
            after = model(images)
            assert (after - first).abs().max() > 1e-6
            torch.testing.assert_close(after, model.reference_forward(images), rtol=1e-10, atol=1e-10)
            first = after
    assert len(seen) == 8


@pytest.mark.parametrize("readout", ["cls", "patches", "patches+prompts"])
@pytest.mark.parametrize("layers", [(0, 2), (1,), (0, 1), (1, 2), (2,)])
def test_generators_may_set_any_blocks(
    tiny_vit: VisionTransformer, tiny_images: Tensor, layers: tuple[int, ...], readout: str
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit).double(), fp.VPTConfig(num_prompts=3), readout=readout).eval()
    model.generator.layers = layers
    images = tiny_images[:2].double()
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", TOKENS)
def test_the_first_block_needs_no_gradient_of_its_tokens(
    model_of: Build, tiny_images: Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, needed = model_of(method, "plain", "cls").train(), []
    original = forward.prefix_attention
    monkeypatch.setattr(
        forward,
        "prefix_attention",
        lambda q, k, v, *rest, **options: (
            needed.append((q if k is None else k).requires_grad) or original(q, k, v, *rest, **options)
        ),
    )
    model(tiny_images[:2].double())
    assert needed == [False]  # the last block has one query and no keys


@pytest.mark.parametrize("readout", ["cls", "patches"])
def test_the_last_block_has_no_key_and_value_product_for_one_query(
    model_of: Build, tiny_images: Tensor, readout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, original = model_of("vpt-dropout", "plain", readout).eval(), [], forward.prefix_attention
    monkeypatch.setattr(forward, "prefix_attention", lambda *a, **o: calls.append(1) or original(*a, **o))
    model(tiny_images[:2].double())
    assert len(calls) == (1 if readout == "cls" else 2)


@pytest.mark.parametrize("backbone", ["plain", "pre-norm", "pre-norm without affine"])
def test_the_mixture_leaves_its_op_with_the_pre_norm_applied(
    model_of: Build, tiny_images: Tensor, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("pgn", backbone.removesuffix(" without affine"), "patches").train()
    vit, seen, normed = model.backbone, [], []
    if "without" in backbone:
        vit.norm_pre.bias = None  # no LayerNorm as the op takes it
    monkeypatch.setattr(
        pgn, "library_prompts", lambda *a, **o: seen.append(o.get("pre_norm")) or library_prompts(*a, **o)
    )
    if vit.norm_pre is not None:
        vit.norm_pre.register_forward_hook(lambda module, args, out: normed.append(args[0].shape[1]))
    images = tiny_images[:2].double()
    ours = torch.autograd.grad(model(images).square().sum(), model.generator.library)[0]
    if backbone == "pre-norm":
        assert seen[0].weight is vit.norm_pre.weight
        assert seen[0].bias is vit.norm_pre.bias
        assert seen[0].eps == vit.norm_pre.eps
        assert normed == [17]  # class token and patches alone
    else:
        assert seen == [None]
        assert normed == ([3, 17] if vit.norm_pre is not None else [])
    theirs = torch.autograd.grad(model.reference_forward(images).square().sum(), model.generator.library)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
