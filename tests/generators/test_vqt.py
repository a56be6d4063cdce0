"""VQT: the formula against a plain loop, frozen features, selection of features, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine.cuda_graph import cross_entropy
from fastprompt.generators import Geometry
from fastprompt.vit import queries


def by_hand(vit: VisionTransformer, images: Tensor, vqt: nn.Module) -> Tensor:
    """[z, Z'_1, ..., Z'_M] by a loop over images, blocks, heads and queries."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    outputs: list[list[Tensor]] = [[] for _ in images]
    for i, block in enumerate(vit.blocks):
        attn, heads = block.attn, block.attn.num_heads
        if i in vqt.layers:
            learned = vqt(layer=i)[0]  # (P, D)
            for b in range(len(images)):
                _, k, v = attn.qkv(block.norm1(x[b])).unflatten(-1, (3, heads, -1)).unbind(1)  # (T, heads, d)
                q = attn.qkv(block.norm1(learned)).unflatten(-1, (3, heads, -1))[:, 0]
                q, k = attn.q_norm(q), attn.k_norm(k)
                for j in range(len(learned)):
                    read = []
                    for h in range(heads):
                        weights = (k[:, h] @ q[j, h] / math.sqrt(q.shape[-1])).softmax(0)
                        read.append(weights @ v[:, h])
                    z = learned[j] + block.ls1(attn.proj(attn.norm(torch.cat(read))))
                    z = z + block.ls2(block.mlp(block.norm2(z)))
                    if vqt.config.normalise:
                        z = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt()
                    outputs[b].append(z)
        x = block(x)
    return torch.cat([vit.norm(x)[:, 0], torch.stack([torch.cat(of_image) for of_image in outputs])], dim=1)


@pytest.mark.parametrize("config", [fp.VQTConfig(), fp.VQTConfig(3, normalise=False, first_block=1)], ids=["1", "3"])
def test_values_and_gradients_are_those_of_a_plain_loop(
    make_vit: Callable[..., VisionTransformer],
    randomised: Callable[..., nn.Module],
    config: fp.VQTConfig,
    options: dict,
) -> None:
    vit, images = make_vit(**options).double(), torch.randn(2, 3, 32, 32).double()
    model = fp.PromptedViT(fp.FrozenViT(vit), config, readout="cls").train()
    randomised(model.generator)
    trained = list(model.generator.parameters())
    expected = by_hand(vit, images, model.generator)
    width = 48 * (1 + config.num_queries * (3 - config.first_block))
    assert expected.shape == (2, width)
    assert model.feature_width == width
    gradients = torch.autograd.grad(expected.cos().sum(), trained)
    for forward in (model.forward, model.reference_forward, model.forward_features):
        found = forward(images)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(found.cos().sum(), trained), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    with torch.no_grad():  # with the queries' share of the work done once
        torch.testing.assert_close(model.eval()(images), expected.detach(), rtol=1e-10, atol=1e-10)
        block = model.backbone.folded().blocks[1]
        rows, tokens = torch.randn(2, 5, 48).double(), model.generator(layer=1).detach()
        torch.testing.assert_close(
            queries.answers_from_keys(block, tokens, *queries.keys_and_values(block, rows)),
            queries.answers(block, tokens, rows),
            rtol=1e-10,
            atol=1e-10,
        )


def test_the_frozen_features_stay_and_nothing_of_the_backbone_is_kept(
    tiny_vit: VisionTransformer, tiny_images: Tensor
) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    model = fp.PromptedViT(backbone, fp.VQTConfig(2)).train()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        features = model(tiny_images)
    torch.testing.assert_close(features[:, :48], backbone.forward_features(tiny_images), rtol=1e-5, atol=1e-5)
    rows = {x.shape for x in saved if x.ndim == 3 and x.shape[1] == 17}
    assert rows <= {(4, 17, 48)}  # the normed rows, which the queries' gradients read; no keys, values or MLP of them
    assert not any(x.shape[:2] == (4, 17) and x.shape[-1] > 48 for x in saved)


def test_group_lasso_and_the_features_it_leaves(
    tiny_vit: VisionTransformer, tiny_images: Tensor, tmp_path: Path
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VQTConfig(1, group_lasso=0.5), num_classes=3).train()
    _, aux = model(tiny_images, return_aux=True)
    head = model.head
    by_feature = torch.stack([head.weight[:, f].square().sum().sqrt() for f in range(192)])
    torch.testing.assert_close(aux["penalty"], 0.5 * by_feature.sum())
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    loss = cross_entropy(model)(logits, labels, aux)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels) + aux["penalty"])
    assert "penalty" not in model.eval()(tiny_images, return_aux=True)[1]
    features = model.forward_features(tiny_images)
    model.select_features(0.25)
    kept = by_feature.topk(48).indices.sort().values
    assert torch.equal(model.head.selected, kept)
    assert model.head.weight.shape == (3, 48)
    expected = features[:, kept] @ head.weight[:, kept].T + head.bias
    torch.testing.assert_close(model(tiny_images), expected, rtol=1e-5, atol=1e-5)
    model.select_features(10)
    assert set(model.head.selected.tolist()) == set(by_feature.topk(10).indices.tolist())
    model.save_pretrained(tmp_path)
    loaded = fp.PromptedViT.from_pretrained(model.backbone, tmp_path)
    assert torch.equal(loaded(tiny_images), model(tiny_images))
    result = fp.fit_linear_probe(
        loaded, (tiny_images, torch.tensor([0, 1, 2, 0])), (tiny_images[:2], torch.tensor([0, 1])), [1.0]
    )
    assert result.weight.shape == (3, 10)
    torch.testing.assert_close(loaded(tiny_images[:2]).argmax(1), torch.tensor([0, 1]))


def test_the_penalty_trains_features_away(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    data = (tiny_images, torch.tensor([0, 1, 2, 0]))
    norms = []
    for penalty in (0.0, 0.05):
        torch.manual_seed(0)
        model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VQTConfig(1, group_lasso=penalty), num_classes=3)
        fp.fit(model, data, data, epochs=30, lr=0.01, head_lr=0.01, select_by="last", progress=False)
        norms.append(float(model.head.weight.detach().norm(dim=0).quantile(0.5)))
    assert norms[1] < 0.5 * norms[0]


def test_parameters(small: Geometry) -> None:
    assert fp.VQT().num_parameters() == fp.VQT().paper_num_parameters() == 12 * 768
    vqt = fp.VQT(num_queries=3, first_block=1, geometry=small)
    assert vqt.layers == (1, 2)
    assert vqt(layer=2).shape == (1, 3, 24)
    assert vqt.feature_width(24) == 24 * (1 + 2 * 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_queries": 0}, ValueError, "VQTConfig.num_queries must be at least 1, got 0"),
        ({"normalise": 1}, TypeError, "VQTConfig.normalise must be bool, got 1"),
        ({"group_lasso": -1.0}, ValueError, "VQTConfig.group_lasso must be at least 0, got -1.0"),
        ({"first_block": 0.5}, TypeError, "VQTConfig.first_block must be int, got 0.5"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.VQTConfig(**options)


def test_what_does_not_fit_is_refused(
    tiny_vit: VisionTransformer, tiny_swin: Callable[..., nn.Module], tiny_images: Tensor, small: Geometry
) -> None:
    with pytest.raises(ValueError, match=r"VQTConfig\.first_block must be less than the 3 blocks, got 3"):
        fp.VQT(first_block=3, geometry=small)
    with pytest.raises(ValueError, match="VQTConfig is not defined on Swin transformers"):
        fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VQTConfig())
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VQTConfig(group_lasso=1.0)).train()
    with pytest.raises(ValueError, match=r"VQTConfig\.group_lasso must be 0 without a linear head"):
        model(tiny_images)
    with pytest.raises(ValueError, match="model must have a linear head to select features, got None"):
        model.select_features(0.5)
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VQTConfig(), num_classes=2)
    for keep, error in ((0.0, ValueError), (1.5, ValueError), (193, ValueError), (True, TypeError), ("all", TypeError)):
        with pytest.raises(error, match=r"keep must be a share in \(0, 1\] or"):
            model.select_features(keep)
    for indices in ([3, 2], [0, 192], [], [-1, 4]):
        with pytest.raises(ValueError, match="selected must be"):
            fp.LinearHead(192, 2, torch.tensor(indices, dtype=torch.int64))
