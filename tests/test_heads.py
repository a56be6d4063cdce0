from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.heads import CLIP_LOGIT_SCALE, build_head


def backbone_with(randomised: Callable[..., nn.Module], outputs: int) -> tuple[VisionTransformer, fp.FrozenViT]:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=outputs)
    vit = randomised(vit).double().eval()
    return vit, fp.FrozenViT(vit)


def test_linear_is_an_affine_map_that_trains() -> None:
    head = fp.LinearHead(48, 500)
    assert (head.weight.shape, head.bias.shape) == ((500, 48), (500,))
    assert abs(head.weight.std() - 0.01) < 3e-4
    assert (head.bias == 0).all()
    with torch.no_grad():
        head.bias.normal_()
    x = torch.randn(3, 48)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)
    assert head(x.bfloat16()).dtype == torch.float32
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["weight", "bias"]


def test_linear_head_as_vpts_starts() -> None:
    head = fp.LinearHead(400, 100)
    head.reset()
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=3e-3)
    torch.testing.assert_close(head.bias, torch.full((100,), -4.59511985))
    assert torch.sigmoid(head.bias).mean().item() == pytest.approx(0.01)


def test_text_is_scaled_cosine_of_the_projected_features(
    randomised: Callable[..., nn.Module], tiny_images: Tensor
) -> None:
    vit, backbone = backbone_with(randomised, 7)
    texts, images = 5 * torch.randn(4, 7).double(), tiny_images.double()
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig(), 4, "text", class_embeddings=texts, logit_scale=20.0)
    projected = vit(images)
    expected = 20 * torch.cosine_similarity(projected[:, None], texts[None], dim=-1)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    assert list(model.trainable_parameters()) == []
    assert set(model.head.state_dict()) == {"class_embeddings", "classifier_weight", "classifier_bias"}
    assert model.head.class_embeddings.norm(dim=1).sub(1).abs().max() < 1e-6


def test_text_without_projection_compares_the_features_themselves(tiny_vit: VisionTransformer) -> None:
    head = fp.TextHead(torch.eye(3, 48), fp.FrozenViT(tiny_vit))
    assert head.logit_scale == CLIP_LOGIT_SCALE == 100.0
    features = torch.randn(2, 48)
    torch.testing.assert_close(head(features), 100 * features[:, :3] / features.norm(dim=1, keepdim=True))
    assert torch.isfinite(head(torch.zeros(1, 48))).all()


def test_label_map_reads_the_first_outputs_of_the_classifier(
    randomised: Callable[..., nn.Module], tiny_images: Tensor
) -> None:
    vit, backbone = backbone_with(randomised, 7)
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig(), 4, "label_map")
    torch.testing.assert_close(model(tiny_images.double()), vit(tiny_images.double())[:, :4], rtol=1e-9, atol=1e-9)
    assert list(model.trainable_parameters()) == []
    assert set(model.head.state_dict()) == {"classifier_weight", "classifier_bias"}


@pytest.mark.parametrize("head", ["label_map", "text"])
def test_an_adapter_brings_the_classifier_it_was_trained_with(
    randomised: Callable[..., nn.Module], tiny_images: Tensor, tmp_path: Path, head: str
) -> None:
    _, backbone = backbone_with(randomised, 7)
    options = {"class_embeddings": torch.randn(4, 7)} if head == "text" else {}
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 4, head, **options).eval()
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(backbone)
    assert other.head is not None
    other.head.weight.data.neg_()
    assert other.fingerprint == backbone.fingerprint
    loaded = fp.PromptedViT.from_pretrained(other, tmp_path)
    torch.testing.assert_close(loaded(tiny_images.double()), model(tiny_images.double()))


def test_prototypes_are_cosines() -> None:
    rows, x = torch.randn(4, 6), torch.randn(3, 6)
    torch.testing.assert_close(fp.PrototypeHead(rows)(x), torch.cosine_similarity(x[:, None], rows[None], dim=-1))
    assert list(fp.PrototypeHead(rows).parameters()) == []


def dino_head(prefix: str, weight: str = "last_layer.weight_v") -> dict[str, Tensor]:
    state = {
        "backbone.norm.weight": torch.ones(6),
        prefix + "mlp.0.weight": torch.randn(9, 6),
        prefix + "mlp.0.bias": torch.randn(9),
        prefix + "mlp.2.weight": torch.randn(9, 9),
        prefix + "mlp.2.bias": torch.randn(9),
        prefix + "mlp.4.weight": torch.randn(5, 9),
        prefix + "mlp.4.bias": torch.randn(5),
        prefix + "last_layer.weight_g": torch.ones(20, 1),
    }
    return {**state, prefix + weight: torch.randn(20, 5)}


@pytest.mark.parametrize("prefix", ["module.head.", "head.", ""])
@pytest.mark.parametrize("weight", ["last_layer.weight_v", "last_layer.weight"])
def test_dino_s_projection_head(prefix: str, weight: str) -> None:
    state, x = dino_head(prefix, weight), torch.randn(3, 6)
    head = fp.PrototypeHead.from_dino(state, 4)
    assert head.num_classes == 4
    mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 5))
    mlp.load_state_dict({k[len(prefix) + 4 :]: v for k, v in state.items() if k.startswith(prefix + "mlp.")})
    everything = torch.cosine_similarity(mlp(x)[:, None], state[prefix + weight][None], dim=-1)  # (3, 20)
    logits = head(x)
    chosen = [int((everything - logits[:, c : c + 1]).abs().sum(0).argmin()) for c in range(4)]
    assert len(set(chosen)) == 4
    torch.testing.assert_close(logits, everything[:, chosen], rtol=1e-5, atol=1e-6)
    assert torch.equal(fp.PrototypeHead.from_dino(state, 4).prototypes, head.prototypes)
    assert not torch.equal(fp.PrototypeHead.from_dino(state, 4, seed=1).prototypes, head.prototypes)


class DinoHead(nn.Module):
    """DINO's projection head: layers, initialisation and their order as in its code."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        sizes = [(width, hidden), (hidden, hidden), (hidden, bottleneck)]
        self.mlp = nn.Sequential(*(layer for pair in sizes for layer in (nn.Linear(*pair), nn.GELU())))[:-1]
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.last_layer.weight_g.data.fill_(1)


def test_rows_of_the_authors_are_stale_and_random() -> None:
    """What PGN's code gets: `.weight` after `load_state_dict`, before a forward, in which it would be computed."""
    released = {f"module.head.{k}": v for k, v in DinoHead(48, 64, 256, 3000).state_dict().items()}
    torch.manual_seed(7)
    theirs = DinoHead(48, 64, 256, 3000)
    theirs.load_state_dict({k.removeprefix("module.head."): v for k, v in released.items()})
    random.seed(7)
    chosen = random.sample(list(range(3000)), k=40)
    expected = theirs.last_layer.weight[chosen].detach()
    before = torch.get_rng_state()
    head = fp.PrototypeHead.from_dino(released, 40, seed=7, rows="authors")
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(head.prototypes, expected)
    assert 0.55 < head.prototypes.norm(dim=1).mean() < 0.61
    meant = released["module.head.last_layer.weight_v"][chosen]
    assert torch.cosine_similarity(head.prototypes, meant).abs().mean() < 0.1
    x = torch.randn(2, 48)
    torch.testing.assert_close(head(x), torch.nn.functional.normalize(theirs.mlp(x), dim=-1) @ expected.T)
    intended = fp.PrototypeHead.from_dino(released, 40, seed=7)
    torch.testing.assert_close(
        intended.prototypes, theirs.last_layer.weight_v[chosen] / meant.norm(dim=1, keepdim=True)
    )


def test_prototypes_keep_the_scale_that_was_trained() -> None:
    state = dino_head("head.") | {"head.last_layer.weight_g": torch.rand(20, 1) + 0.5}
    layer = nn.Linear(5, 20, bias=False)
    layer.weight.data = torch._weight_norm(state["head.last_layer.weight_v"], state["head.last_layer.weight_g"], 0)
    chosen = random.Random(2).sample(range(20), 6)
    torch.testing.assert_close(fp.PrototypeHead.from_dino(state, 6, seed=2).prototypes, layer.weight[chosen])


def test_label_map_trains_a_copy_of_the_classifier(
    randomised: Callable[..., nn.Module], tiny_images: Tensor, tmp_path: Path
) -> None:
    _, backbone = backbone_with(randomised, 7)
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig(), head=fp.LabelMapHead(backbone, 4, trainable=True))
    assert [name for name, _ in model.trainable_parameters()] == ["head.classifier_weight", "head.classifier_bias"]
    before = backbone.head.weight.clone()
    torch.optim.SGD(model.head.parameters(), 0.1).zero_grad()
    model(tiny_images.double()).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.head.parameters())
    with torch.no_grad():
        model.head.classifier_weight.neg_()
    assert torch.equal(backbone.head.weight, before)
    model.save_pretrained(tmp_path)
    loaded = fp.PromptedViT.from_pretrained(backbone, tmp_path)
    torch.testing.assert_close(loaded(tiny_images.double()), model.eval()(tiny_images.double()))
    assert len(list(loaded.trainable_parameters())) == 2


def test_bad_dino_heads_are_named() -> None:
    with pytest.raises(ValueError, match=r"must hold a DINO head: no single key ends in 'last_layer\.weight_v'"):
        fp.PrototypeHead.from_dino({"head.weight": torch.ones(3, 3)}, 2)
    with pytest.raises(ValueError, match=r"num_classes must be from 1 to the 20 prototypes, got 21"):
        fp.PrototypeHead.from_dino(dino_head(""), 21)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: fp.TextHead(torch.ones(3, 6), b), r"class_embeddings must have shape \(C, 7\)"),
        (lambda b: fp.TextHead(torch.ones(7), b), r"class_embeddings must have shape \(C, 7\).*got \(7,\)"),
        (
            lambda b: fp.TextHead(torch.zeros(3, 7), b),
            "class_embeddings must be finite, non-zero rows, got NaN, infinite or all-zero rows",
        ),
        (lambda b: fp.TextHead(torch.full((3, 7), float("nan")), b), "class_embeddings must be finite"),
        (
            lambda b: fp.TextHead(torch.ones(3, 7), b, logit_scale=0.0),
            r"logit_scale must be positive, got 0\.0",
        ),
        (
            lambda b: fp.TextHead(torch.ones(3, 7), b, logit_scale=float("nan")),
            "logit_scale must be positive",
        ),
        (
            lambda b: fp.TextHead(torch.ones(3, 7), b, logit_scale=float("inf")),
            "logit_scale must be positive",
        ),
        (lambda b: fp.TextHead(torch.ones(3, 7), b, logit_scale="1"), "logit_scale must be positive, got '1'"),
        (lambda b: fp.LabelMapHead(b, 8), "num_classes must be at most the 7 outputs"),
        (
            lambda b: fp.PrototypeHead(torch.zeros(2, 6)),
            r"prototypes must be finite, non-zero rows \(C, E\), got \(2, 6\)",
        ),
        (lambda b: fp.PrototypeHead(torch.ones(6)), r"prototypes must be finite, non-zero rows"),
        (
            lambda b: fp.PrototypeHead(torch.ones(2, 6), [(torch.ones(5, 9), None)]),
            "prototypes must have the width of the last of layers, 5, got 6",
        ),
        (
            lambda b: fp.PrototypeHead(torch.ones(2, 6), [(torch.ones(5, 9), None), (torch.ones(6, 4), None)]),
            r"layers\[1\] must be \(out, 5\) and \(out,\), got \(6, 4\)",
        ),
        (lambda b: build_head("cosine", b, 3), "head must be one of .* got 'cosine'"),
        (
            lambda b: build_head("prototypes", b, 3, prototypes=torch.ones(2, 4)),
            "prototypes must have one row for each of 3 classes, got 2 rows",
        ),
    ],
)
def test_bad_arguments_are_named(randomised: Callable[..., nn.Module], make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(backbone_with(randomised, 7)[1])


def test_prototypes_must_fit_the_features(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"head 'prototypes' reads features of width 47, those of the backbone have 48"
    ):
        fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.LinearProbeConfig(), 3, "prototypes", prototypes=torch.ones(3, 47))
    with pytest.raises(ValueError, match=r"head 'linear' reads features of width 47"):
        fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.LinearProbeConfig(), head=fp.LinearHead(47, 3))


def test_label_map_needs_a_classifier(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"needs a backbone with a pretrained classifier; this one has none"):
        fp.LabelMapHead(fp.FrozenViT(tiny_vit), 3)


def test_class_texts_are_filled_into_the_template_and_normalised() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> Tensor:
        seen.extend(texts)
        return torch.arange(2.0, 2.0 + 3 * len(texts)).view(len(texts), 3)

    embeddings = fp.encode_class_texts(["Ankle_Boot", "T-shirt"], encode)
    assert seen == ["This is a photo of a ankle boot", "This is a photo of a t-shirt"]
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings[0] * 29**0.5, torch.tensor([2.0, 3.0, 4.0]))
    fp.encode_class_texts(["cat"], encode, template="{}, a pet")
    assert seen[-1] == "cat, a pet"


def test_class_texts_by_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tower(nn.Module):
        def encode_text(self, tokens: Tensor) -> Tensor:
            assert not self.training
            return tokens.float().requires_grad_() + 1

    calls: list[Any] = []
    monkeypatch.setitem(
        sys.modules,
        "open_clip",
        SimpleNamespace(
            create_model=lambda name, pretrained: calls.append((name, pretrained)) or Tower(),
            get_tokenizer=lambda name: lambda texts: torch.tensor([[len(t), 1] for t in texts]),
        ),
    )
    embeddings = fp.encode_class_texts(["a", "bb"], "ViT-B-16", pretrained="openai")
    assert calls == [("ViT-B-16", "openai")]
    assert embeddings.shape == (2, 2)
    assert not embeddings.requires_grad


def test_class_texts_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tower(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(text_embeds=input_ids.float())

    monkeypatch.setitem(
        sys.modules,
        "transformers",
        SimpleNamespace(
            AutoTokenizer=SimpleNamespace(
                from_pretrained=lambda name: (
                    lambda texts, padding, return_tensors: {"input_ids": torch.tensor([[len(t), 3] for t in texts])}
                )
            ),
            CLIPTextModelWithProjection=SimpleNamespace(from_pretrained=lambda name: Tower()),
        ),
    )
    embeddings = fp.encode_class_texts(["a", "bb"], "openai/clip", library="transformers", template="{}")
    torch.testing.assert_close(embeddings, nn.functional.normalize(torch.tensor([[1.0, 3.0], [2.0, 3.0]])))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], len), {}, "class_names must be a list of names"),
        (("cat", len), {}, "class_names must be a list of names"),
        (([1], len), {}, "class_names must be a list of names"),
        ((["a"], len), {"template": "a photo"}, r"template must have one \{\}"),
        (
            (["a"], "ViT-B-16"),
            {"library": "clip"},
            "library must be 'open_clip' or 'transformers', got 'clip'",
        ),
        ((["a", "b"], lambda t: torch.ones(3, 4)), {}, r"encode must return \(2, E\), got \(3, 4\)"),
        (
            (["a"], lambda t: torch.full((1, 4), float("nan"))),
            {},
            "encode must return finite, non-zero rows",
        ),
    ],
)
def test_bad_class_texts_are_named(arguments: tuple, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.encode_class_texts(*arguments, **options)


def test_weights_at_random_encode_nothing() -> None:
    with pytest.raises(ValueError, match=r"pretrained must name the weights of open_clip's 'ViT-B-16'"):
        fp.encode_class_texts(["a"], "ViT-B-16")


def test_what_cannot_encode_is_named() -> None:
    with pytest.raises(TypeError, match=r"encode must be a function or the name of a model, got NoneType"):
        fp.encode_class_texts(["a"], None)


def test_a_template_may_have_other_braces() -> None:
    seen: list[str] = []
    fp.encode_class_texts(["a"], lambda texts: seen.extend(texts) or torch.ones(1, 2), template="{x} {}")
    assert seen == ["{x} a"]


@pytest.mark.parametrize("values", ["abc", object(), [[1.0], [1.0, 2.0]]])
def test_what_is_no_array_is_named(tiny_vit: VisionTransformer, values: object) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    for make, name in (
        (lambda: fp.TextHead(values, backbone), "class_embeddings"),
        (lambda: build_head("text", backbone, 3, class_embeddings=values), "class_embeddings"),
        (lambda: fp.PrototypeHead(values), "prototypes"),
        (lambda: fp.PrototypeHead(torch.ones(2, 3), [(values, None)]), r"layers\[0\]\[0\]"),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be an array of numbers"):
            make()


def test_rows_may_be_lists_tensors_or_arrays(tiny_vit: VisionTransformer) -> None:
    backbone, rows = fp.FrozenViT(tiny_vit), torch.randn(3, 48)
    expected = fp.TextHead(rows, backbone).class_embeddings
    for values in (list(rows), rows.tolist(), rows.numpy()):
        assert torch.equal(build_head("text", backbone, 3, class_embeddings=values).class_embeddings, expected)


def test_a_missing_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"open_clip"):
        fp.encode_class_texts(["a"], "ViT-B-16", pretrained="openai")
