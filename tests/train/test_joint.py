"""Several adapters in one forward give what each of them gives alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import fastprompt as fp
from fastprompt.arguments import ArgumentError
from fastprompt.train.joint import Part, check_joint, outputs

METHODS: dict[str, Any] = {
    "vpt": fp.VPTConfig(num_prompts=2),
    "vpt-dropout": fp.VPTConfig(num_prompts=2, prompt_dropout=0.3),
    "vpt-shallow": fp.VPTConfig(num_prompts=2, deep=False),
    "vpt-late": fp.VPTConfig(num_prompts=2, first_block=1),
    "free": fp.FreePromptsConfig(num_prompts=2),
    "pgn": fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8)),
    "pgn-late": fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8), first_block=1),
    "v2apt": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16),
    "v2apt-late": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16, first_block=1),
    "v2apt-samples": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16, inference_samples=2),
    "vapt": fp.VAPTConfig(num_prompts=2, hidden=4),
    "vapt-late": fp.VAPTConfig(num_prompts=2, hidden=4, first_block=1),
    "cvpt": fp.CVPTConfig(num_prompts=2),
    "vqt-late": fp.VQTConfig(num_queries=2, first_block=2, normalise=False),
    "vqt": fp.VQTConfig(num_queries=2, group_lasso=0.1),
    "linear": fp.LinearProbeConfig(),
}


def backbone() -> fp.FrozenViT:
    torch.manual_seed(0)
    return fp.FrozenViT(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0).double()
    )


def models_of(config: Any, vit: fp.FrozenViT, count: int = 3) -> list[Any]:
    found = [fp.PromptedViT(vit, config, num_classes=3) for _ in range(count)]
    for model in found:
        with torch.no_grad():
            for parameter in [p for _, p in model.trainable_parameters()]:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in METHODS), *((name, False) for name in ("vpt", "pgn", "v2apt-samples", "vqt-late"))],
)
def test_outputs_and_gradients_are_those_of_each_model_alone(name: str, training: bool) -> None:
    vit = backbone()
    models = [model.train(training) for model in models_of(METHODS[name], vit)]
    alone = copy.deepcopy(models, {id(vit): vit})
    images = [torch.randn(3, 3, 32, 32).double(), torch.rand(2, 3, 32, 32).double()]
    draws = [models[0].draw(len(each)) for each in images]
    found = outputs([Part(images[0], models[:2], draws[0]), Part(images[1], models[2:], draws[1])])
    expected = [
        model(images[i], return_aux=True, draws=draws[i] if training else None)
        for model, i in zip(alone, (0, 0, 1), strict=True)
    ]
    for (logits, aux), (of_alone, aux_alone) in zip(found, expected, strict=True):
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, of_alone.float(), atol=1e-6)
        assert aux.keys() == aux_alone.keys()
        assert all(torch.allclose(aux[key], aux_alone[key], rtol=1e-9) for key in aux)
    if training:
        total(found).backward()
        total(expected).backward()
    for model, other in zip(models, alone, strict=True):
        for (key, p), q in zip(model.trainable_parameters(), (q for _, q in other.trainable_parameters()), strict=True):
            assert p.grad is q.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-10), key
        for (key, p), q in zip(model.named_buffers(), other.buffers(), strict=True):  # batch norm statistics
            assert torch.allclose(p, q, rtol=1e-10), key
    assert all(parameter.grad is None for parameter in vit.parameters())


def total(found: Any) -> torch.Tensor:
    """A loss of several models, in which each output has a weight of its own."""
    terms = [(logits.float() * torch.arange(1.0, 4.0)).sum() for logits, _ in found]
    return torch.stack(
        terms + [aux[key].sum().float() for _, aux in found for key in ("kl", "penalty") if key in aux]
    ).sum()


@pytest.mark.parametrize("name", ["vpt", "vpt-late", "pgn"])
def test_blocks_are_computed_again_in_the_backward_if_asked(name: str) -> None:
    vit = backbone()
    models = models_of(METHODS[name], vit, 2)
    images, grads = torch.randn(3, 3, 32, 32).double(), []
    for enable in (False, True):
        models[0].set_grad_checkpointing(enable)
        total(outputs([Part(images, models)])).backward()
        grads.append([p.grad for model in models for _, p in model.trainable_parameters()])
        for model in models:
            model.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*grads, strict=True) if a is not None)


def test_a_swin_transformer_takes_several_adapters() -> None:
    torch.manual_seed(0)
    vit = fp.FrozenViT(
        SwinTransformer(
            img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
        )
    )
    models = models_of(fp.VPTConfig(num_prompts=2), vit, 2)
    images = torch.randn(2, 3, 32, 32)
    for (logits, _), model in zip(outputs([Part(images, models)]), models, strict=True):
        assert torch.allclose(logits, model(images), atol=1e-6)


@pytest.mark.parametrize("name", ["vpt", "vpt-late", "vqt", "linear"])
def test_what_the_adapters_share_is_computed_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pass the second block's MLP: of each adapter, or of the images alone."""
    vit = backbone()
    models = models_of(METHODS[name], vit)
    rows: dict[str, list[int]] = {"embedded": [], "block": []}
    from fastprompt.vit import reference

    embed, mlp, first = reference.embed_patches, reference.mlp, vit.folded().blocks[0].mlp

    def counted_embed(vit: Any, images: torch.Tensor, *rest: Any) -> Any:
        rows["embedded"].append(len(images))
        return embed(vit, images, *rest)

    def counted_mlp(own: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if own is first:
            rows["block"].append(x.numel() // x.shape[-1])
        return mlp(own, x, *rest)

    monkeypatch.setattr(reference, "embed_patches", counted_embed)
    monkeypatch.setattr(reference, "mlp", counted_mlp)
    outputs([Part(torch.randn(2, 3, 32, 32).double(), models)])
    assert rows["embedded"] == [2]
    tokens = 2 * 17
    asked = [2 * 3 * 2] if name == "vqt" else []
    assert sorted(rows["block"]) == sorted([tokens * (3 if name == "vpt" else 1), *asked])


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((fp.FullFineTuneConfig(),), "must leave the backbone frozen, of which 'full' trains a copy"),
        ((fp.PixelPromptConfig(border=2),), "must not change the images, as 'pixel' does"),
        ((fp.VPTConfig(num_prompts=2), fp.VPTConfig(num_prompts=3)), "must give all adapters one config"),
    ],
)
def test_models_that_do_not_fit_together_are_refused(configs: Any, message: str) -> None:
    vit = backbone()
    models = {str(i): fp.PromptedViT(vit, config, num_classes=3) for i, config in enumerate(configs)}
    with pytest.raises(ArgumentError, match=message):
        check_joint(models)


def test_models_of_several_backbones_are_refused() -> None:
    models = {str(i): fp.PromptedViT(backbone(), fp.VPTConfig(num_prompts=2), num_classes=3) for i in range(2)}
    with pytest.raises(ArgumentError, match="must use one backbone for all adapters, got another one for 1"):
        check_joint(models)
