from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import Geometry
from fastprompt.generators.v2apt import active_units
from fastprompt.kernels.vae_prompts import reference as vae_reference

SIZES = {"num_prompts": 5, "num_instance": 3, "latent": 4, "hidden": 6}


def trained(target: fp.V2APT) -> fp.V2APT:
    """Random values in the zero-initialised decoder, as after some training."""
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return target


def prompted(tiny_vit: VisionTransformer, **options: Any) -> fp.PromptedViT:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit).double(), fp.V2APTConfig(**{**SIZES, **options}), num_classes=4)
    with torch.no_grad():
        model.head.weight.normal_()
    trained(model.generator)
    return model.eval()


def by_hand(v2apt: fp.V2APT, embeddings: Tensor, layer: int) -> Tensor:
    """[domain, instance] at the latent's mean."""
    x = F.layer_norm(embeddings, (24,), v2apt.norm.weight, v2apt.norm.bias, 1e-5).mean(dim=1)
    stats = v2apt.to_stats(F.gelu(v2apt.encoder(x)))
    d = v2apt.decoders[layer if len(v2apt.decoders) > 1 else 0]
    instance = d.fc2(F.gelu(d.fc1(stats[:, :4]))).view(-1, 3, 24)
    return torch.cat([v2apt.domain.embeddings[layer].expand(len(x), -1, -1), instance], dim=1)


@pytest.mark.parametrize("share", ["all", "per_layer"])
def test_alone_at_the_mean(small: Geometry, share: str) -> None:
    v2apt = trained(fp.V2APT(geometry=small, share=share, **SIZES)).double().eval()
    assert v2apt.known_at == "embeddings"
    embeddings = torch.randn(2, 12, 24).double()
    for layer in range(3):
        prompts = v2apt(embeddings, layer=layer)
        assert prompts.shape == (2, 5, 24)
        torch.testing.assert_close(prompts, by_hand(v2apt, embeddings, layer))
    assert torch.equal(v2apt(embeddings), v2apt(embeddings, layer=0))


def test_share_all_gives_every_block_the_same_instance_prompts_and_its_own_domain(small: Geometry) -> None:
    embeddings = torch.randn(2, 12, 24).double()
    shared = trained(fp.V2APT(geometry=small, share="all", **SIZES)).double().eval()
    separate = trained(fp.V2APT(geometry=small, share="per_layer", **SIZES)).double().eval()
    assert (len(shared.decoders), len(separate.decoders)) == (1, 3)
    a, b = shared(embeddings, layer=0), shared(embeddings, layer=2)
    assert torch.equal(a[:, 2:], b[:, 2:])
    assert not torch.allclose(a[:, :2], b[:, :2])
    assert not torch.allclose(separate(embeddings, layer=0)[:, 2:], separate(embeddings, layer=2)[:, 2:])


def test_parameter_counts() -> None:
    v2apt = fp.V2APT()
    decoder = (64 * 64 + 64) + (64 * 5 * 768 + 5 * 768)
    rest = 12 * 5 * 768 + 2 * 768 + (768 * 64 + 64) + (64 * 128 + 128)
    assert v2apt.num_parameters() == rest + decoder
    assert fp.V2APT(share="per_layer").num_parameters() == rest + 12 * decoder


def test_instance_prompts_start_at_zero_and_domain_prompts_as_vpt_s(small: Geometry) -> None:
    v2apt = fp.V2APT(geometry=small, **SIZES)
    prompts = v2apt(torch.randn(2, 12, 24), layer=1)
    assert torch.equal(prompts[:, 2:], torch.zeros(2, 3, 24))
    bound = (6 / (3 * 64 + 24)) ** 0.5
    assert 0.8 * bound < prompts[:, :2].abs().max() <= bound


def test_only_instance_prompts(small: Geometry) -> None:
    v2apt = trained(fp.V2APT(geometry=small, num_prompts=3, num_instance=3)).eval()
    assert v2apt.domain.embeddings.shape == (3, 0, 24)
    assert v2apt(torch.randn(2, 12, 24)).shape == (2, 3, 24)


def test_kl_comes_out_with_the_logits(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    model, images = prompted(tiny_vit), tiny_images.double()
    generator, vit = model.generator, tiny_vit.double()
    embeddings = vit._pos_embed(vit.patch_embed(images))[:, 1:]
    mu, logvar = generator.stats(embeddings).chunk(2, dim=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0, 1))
    for mode in (True, False):
        model.train(mode)
        logits, aux = model(images, return_aux=True)
        assert logits.shape == (4, 4)
        torch.testing.assert_close(aux["kl"], expected.sum(1))
        torch.testing.assert_close(aux["kl_units"], expected)
        assert aux["kl"].requires_grad
        assert not aux["kl_units"].requires_grad
    assert active_units(aux["kl_units"]) == 4
    assert active_units(torch.tensor([[0.0, 0.03, 0.5], [0.0, 0.0, 0.5]])) == 2


def test_encoder_reads_the_patches_that_enter_block_0(pre_norm_vit: VisionTransformer, tiny_images: Tensor) -> None:
    vit = pre_norm_vit.double()
    model, images = fp.PromptedViT(fp.FrozenViT(vit), fp.V2APTConfig(**SIZES)).eval(), tiny_images.double()
    trained(model.generator)
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    embeddings = x[:, 3:]
    for i, block in enumerate(vit.blocks):
        x = torch.cat([x[:, :3], model.generator(embeddings, layer=i), x[:, 3 if i == 0 else 8 :]], dim=1)
        x = block(x)
    torch.testing.assert_close(model(images), vit.norm(x)[:, 0], rtol=1e-10, atol=1e-10)


def test_inference_is_deterministic_training_samples(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    model, images = prompted(tiny_vit), tiny_images.double()
    assert torch.equal(model(images), model(images))
    mean = model(images)
    model.train()
    torch.manual_seed(1)
    first, second = model(images), model(images)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, mean)
    torch.manual_seed(1)
    assert torch.equal(model(images), first)
    draws = model.draw(4)
    assert draws["noise"].dtype == torch.int64
    torch.testing.assert_close(
        model(images, draws=draws), model.reference_forward(images, draws=draws), rtol=1e-10, atol=1e-10
    )


def test_samples_of_the_images_are_independent(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    model = prompted(tiny_vit).train()
    same = tiny_images[:1].double().expand(3, -1, -1, -1)
    logits = model(same)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_features_are_of_the_samples_that_the_model_predicts_by(
    tiny_vit: VisionTransformer, tiny_images: Tensor, samples: int
) -> None:
    model, images = prompted(tiny_vit, inference_samples=samples), tiny_images.double()
    features, logits = model.forward_features(images), model(images)
    if samples < 2:
        torch.testing.assert_close(model.head(features), logits)
    each = [model._features(images, draws)[0] for draws in model.generator.inference_draws()]
    torch.testing.assert_close(features, torch.stack(each).mean(0))
    model.head = None
    torch.testing.assert_close(model(images), features)


def test_inference_samples_average_probabilities(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    model, images = prompted(tiny_vit, inference_samples=3), tiny_images.double()
    draws = model.generator.inference_draws()
    assert [d["epsilon"].shape for d in draws] == [(4,)] * 3
    singles = [model(images, draws=d).softmax(-1) for d in draws]
    assert not torch.allclose(singles[0], singles[1])
    logits, aux = model(images, return_aux=True)
    torch.testing.assert_close(logits.softmax(-1), sum(singles) / 3, rtol=1e-9, atol=1e-12)
    mean_model = prompted(tiny_vit)
    mean_model.load_adapter_state_dict(model.adapter_state_dict())
    torch.testing.assert_close(aux["kl"], mean_model(images, return_aux=True)[1]["kl"])
    assert not torch.allclose(logits.softmax(-1), mean_model(images).softmax(-1))
    # deterministic, and an image's prediction does not depend on its neighbours
    assert torch.equal(model(images), model(images))
    torch.testing.assert_close(model(images[2:3]), model(images)[2:3], rtol=1e-10, atol=1e-10)


def test_samples_follow_the_latent_s_standard_deviation(small: Geometry, monkeypatch: pytest.MonkeyPatch) -> None:
    v2apt = fp.V2APT(geometry=small, num_prompts=1, num_instance=1, latent=1, hidden=1).double().train()
    with torch.no_grad():
        v2apt.to_stats.weight.zero_()
        v2apt.to_stats.bias.copy_(torch.tensor([0.5, -2.0]))
    z, original = [], vae_reference.decode
    monkeypatch.setattr(vae_reference, "decode", lambda d, latent, w: z.append(latent) or original(d, latent, w))
    v2apt(torch.randn(4000, 1, 24).double())
    assert abs(z[0].mean() - 0.5) < 0.03
    assert abs(z[0].std() - torch.tensor(-1.0).exp()) < 0.02


@pytest.mark.parametrize("share", ["all", "per_layer"])
def test_prompts_of_several_stages(share: str) -> None:
    """One latent; with "all" the blocks of a stage share instance prompts, with "per_layer" each has its own."""
    widths = (24, 24, 48, 96, 96)
    stages = Geometry(24, 5, (3, 4), 8, (24, 32), ((24, 2), (48, 1), (96, 2)))
    v2apt = trained(fp.V2APT(geometry=stages, share=share, **SIZES)).double().eval()
    embeddings = torch.randn(2, 12, 24).double()
    prompts = [v2apt(embeddings, layer=layer) for layer in range(5)]
    assert [tuple(p.shape) for p in prompts] == [(2, 5, width) for width in widths]
    z = v2apt.stats(embeddings).chunk(2, dim=-1)[0]
    for layer, (stage, index) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]):
        decoder = v2apt.decoders[0 if share == "all" else layer]
        output = decoder.fc2[stage] if share == "all" else decoder.fc2
        instance = output(F.gelu(decoder.fc1(z))).view(2, 3, widths[layer])
        domain = v2apt.domain.embeddings[stage][index].expand(2, -1, -1)
        torch.testing.assert_close(prompts[layer], torch.cat([domain, instance], dim=1))
    assert torch.equal(prompts[0][:, 2:], prompts[1][:, 2:]) == (share == "all")


@pytest.mark.parametrize("share", ["all", "per_layer"])
def test_several_stages_train_from_one_noise(share: str) -> None:
    stages = Geometry(24, 3, (3, 4), 8, (24, 32), ((24, 1), (48, 2)))
    v2apt = fp.V2APT(geometry=stages, share=share, **SIZES)
    instance = v2apt(torch.randn(2, 12, 24), layer=2)[:, 2:]
    assert torch.equal(instance, torch.zeros(2, 3, 48))
    trained(v2apt).train()
    context = v2apt.context(torch.randn(2, 12, 24), v2apt.draw(2))
    sum((v2apt.prompts(layer, context) ** 2).sum() for layer in range(3)).backward()
    assert all(p.grad is not None and p.grad.any() for p in v2apt.parameters())
    assert context.kl.shape == (2,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_instance": 11}, ValueError, "num_instance must be at most num_prompts \\(10\\), got 11"),
        ({"num_instance": 0}, ValueError, "num_instance must be at least 1"),
        ({"latent": 0}, ValueError, "latent must be at least 1"),
        ({"hidden": 1.5}, TypeError, "hidden must be int"),
        ({"beta": -1.0}, ValueError, "beta must be at least 0"),
        ({"share": "none"}, ValueError, "share must be one of"),
        ({"inference_samples": -1}, ValueError, "inference_samples must be at least 0"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"V2APTConfig\.{message}"):
        fp.V2APTConfig(**options)
