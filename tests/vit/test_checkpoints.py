"""FrozenViT.from_checkpoint: the layouts in which MAE, MoCo-v3, DINO, Swin, CLIP and Google publish weights."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.runs.execute import backbone_at

ARCH = "vit_tiny_patch16_224"
SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
D = 48
State = dict[str, Tensor]
Randomised = Callable[..., nn.Module]


@pytest.fixture
def vit(randomised: Randomised) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        sizes = {**SIZES, "img_size": 32, "num_classes": 0, **options}
        return randomised(timm.create_model(ARCH, pretrained=False, **sizes)).eval()

    return build


def load(path: Path, image_size: Any = 32, **options: Any) -> fp.FrozenViT:
    return fp.FrozenViT.from_checkpoint(path, ARCH, image_size, **{**SIZES, **options})


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def noise(state: State) -> State:
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


PROJECTION = {"head.0.weight": torch.randn(9, D), "head.1.weight": torch.ones(9), "head.1.running_mean": torch.ones(9)}
DINO_HEAD = {"mlp.0.weight": torch.randn(9, D), "last_layer.weight_g": torch.ones(7, 1)}
SETTINGS = argparse.Namespace(arch="vit_small", lr=np.float64(0.1), output_dir=Path("out"))
WRAPPED: dict[str, Callable[[State], Any]] = {
    "timm": lambda s: s,
    "mae pretrain": lambda s: {
        "model": {**s, "mask_token": torch.ones(1, 1, 9), "decoder_pos_embed": torch.ones(1, 17, 9)}
        | {"decoder_embed.weight": torch.ones(9, D), "decoder_blocks.0.norm1.weight": torch.ones(9)}
    },
    "moco-v3 encoder": lambda s: {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": prefixed({**s, **PROJECTION}, "module.base_encoder.")
        | prefixed(noise({**s, **PROJECTION}), "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.ones(3, 9)},
        "optimizer": {"state": {}, "param_groups": []},
    },
    "dino backbone": lambda s: s,
    "dino full checkpoint": lambda s: {
        "student": prefixed(noise(s), "module.backbone.") | prefixed(DINO_HEAD, "module.head."),
        "teacher": prefixed(s, "backbone.") | prefixed(DINO_HEAD, "head."),
        "epoch": 800,
        "args": SETTINGS,
        "dino_loss": {"center": torch.zeros(1, 7)},
    },
    "parallel": lambda s: {"state_dict": prefixed(s, "module."), "best_acc1": np.float64(77.5)},
    "compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "averaged": lambda s: {"state_dict": noise(s), "state_dict_ema": s, "args": SETTINGS},
    "averaged, deit": lambda s: {"model": noise(s), "model_ema": prefixed(s, "module.")},
    "averaged, by another name": lambda s: {"model_state_dict": noise(s), "ema": {"step": 3, **s}},
    "under an unknown name": lambda s: {"weights": s, "optimizer": {"state": {}, "param_groups": []}, "step": 3},
    "half precision": lambda s: {"model": {name: tensor.half() for name, tensor in s.items()}},
    "within a model": lambda s: {"state_dict": prefixed(s, "model.backbone.") | {"model.neck.weight": torch.ones(2)}},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_layouts(tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor, layout: str) -> None:
    model = vit()
    torch.save(WRAPPED[layout](model.state_dict()), tmp_path / "weights.pth.tar")
    backbone = load(tmp_path / "weights.pth.tar")
    assert backbone.dtype == torch.float32
    assert backbone.head is None
    exact = {"rtol": 0.02, "atol": 0.02} if layout == "half precision" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(backbone(tiny_images), model(tiny_images), **exact)


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"state_dict": prefixed(s, "module.")}])
def test_a_linear_classifier_comes_along_or_not(
    tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor, wrap: Callable[[State], Any]
) -> None:
    """MoCo-v3's linear files, and fine-tuned models."""
    model = vit(num_classes=7)
    torch.save(wrap(model.state_dict()), tmp_path / "linear.pth")
    backbone = load(tmp_path / "linear.pth")
    torch.testing.assert_close(backbone(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)
    assert load(tmp_path / "linear.pth", num_classes=0).head is None
    assert load(tmp_path / "linear.pth", num_classes=0).fingerprint == backbone.fingerprint
    with pytest.raises(ValueError, match="num_classes must be 0 or the 7 outputs of the file's classifier, got 5"):
        load(tmp_path / "linear.pth", num_classes=5)


def test_a_classifier_beside_the_backbone(tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor) -> None:
    model = vit(num_classes=7)
    state = {("" if n.startswith("head.") else "backbone.") + n: t for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    torch.testing.assert_close(load(tmp_path / "a.pth")(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)


def test_mae_with_and_without_the_norm_behind_the_mean(
    tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Pre-trained files have `norm`, fine-tuned ones `fc_norm`, which VPT and VAPT start anew on the former."""
    model = vit()
    torch.save({"model": model.state_dict()}, tmp_path / "pretrain.pth")
    with caplog.at_level(logging.INFO, "fastprompt.vit.checkpoints"):
        averaged = load(tmp_path / "pretrain.pth", global_pool="avg")
    assert "left out norm.bias, norm.weight" in caplog.text
    model.norm = nn.Identity()
    expected = nn.functional.layer_norm(model.forward_features(tiny_images)[:, 1:].mean(1), (D,), eps=1e-6)
    torch.testing.assert_close(averaged(tiny_images), expected, rtol=1e-4, atol=1e-5)
    assert fp.PromptedViT(averaged, fp.VAPTConfig(num_prompts=2)).readout == "patches+prompts"
    assert load(tmp_path / "pretrain.pth", global_pool="token").spec.pool == "cls"

    tuned = vit(global_pool="avg", num_classes=5)
    assert "norm.weight" not in tuned.state_dict()
    torch.save({"model": tuned.state_dict()}, tmp_path / "finetune.pth")
    for options in ({}, {"global_pool": "avg"}):
        backbone = load(tmp_path / "finetune.pth", **options)
        torch.testing.assert_close(backbone(tiny_images), tuned(tiny_images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"lacks norm\.bias, norm\.weight"):
        load(tmp_path / "finetune.pth", global_pool="token")


@pytest.mark.parametrize(("key", "sign"), [(None, 1), ("student", -1), ("teacher", 1), ("base_encoder", None)], ids=str)
def test_which_network_of_several(
    tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor, key: str | None, sign: int | None
) -> None:
    model = vit()
    other = {name: -tensor for name, tensor in model.state_dict().items()}
    torch.save(
        {
            "teacher": prefixed(model.state_dict(), "backbone."),
            "student": prefixed(other, "module.backbone."),
        },
        tmp_path / "full.pth",
    )
    if sign is None:
        with pytest.raises(ValueError, match="checkpoint_key must name a network of the file, got 'base_encoder'"):
            load(tmp_path / "full.pth", checkpoint_key=key)
        return
    backbone = load(tmp_path / "full.pth", checkpoint_key=key)
    assert torch.equal(backbone.patch_weight, sign * model.patch_embed.proj.weight)


def test_networks_that_no_rule_chooses_between(tmp_path: Path, vit: Callable[..., nn.Module]) -> None:
    state = vit().state_dict()
    torch.save({"a": state, "b": noise(state)}, tmp_path / "dicts.pth")
    with pytest.raises(ValueError, match=r"checkpoint_key must say which state dict to read: .*\['a', 'b'\]"):
        load(tmp_path / "dicts.pth")
    assert torch.equal(load(tmp_path / "dicts.pth", checkpoint_key="a").patch_weight, state["patch_embed.proj.weight"])
    torch.save(prefixed(state, "a.") | prefixed(noise(state), "b."), tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"checkpoint_key must say which network to read: .*\['a\.', 'b\.'\]"):
        load(tmp_path / "two.pth")
    backbone = load(tmp_path / "two.pth", checkpoint_key="a")
    assert torch.equal(backbone.patch_weight, state["patch_embed.proj.weight"])


def test_safetensors(tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor) -> None:
    model = vit()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors")(tiny_images), model(tiny_images))


@pytest.mark.parametrize("image_size", [48, (32, 48)])
def test_position_embeddings_of_other_sizes_are_resampled(
    tmp_path: Path, vit: Callable[..., nn.Module], image_size: Any
) -> None:
    model = vit(img_size=32)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    backbone = load(tmp_path / "a.pth", image_size)
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    grid = [side // 8 for side in sides]
    assert (backbone.image_size, backbone.grid) == (sides, tuple(grid))
    expected = resample_abs_pos_embed(model.pos_embed.detach(), new_size=grid, old_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.pos_embed.detach(), expected)
    assert backbone(torch.zeros(1, 3, *sides)).shape == (1, D)


def google(model: nn.Module, classes: int = 0, stem: str = "") -> dict[str, np.ndarray]:
    """The model's tensors as in Google's ViT-B_16.npz: (in, out) kernels, queries of (D, heads, d)."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    out = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            out[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights = np.split(state[f"{ours}attn.qkv.weight"], 3)
        biases = np.split(state[f"{ours}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{attention}{name}/kernel"] = weight.T.reshape(D, heads, D // heads)
            out[f"{attention}{name}/bias"] = bias.reshape(heads, D // heads)
        out[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, D // heads, D)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for j in (0, 1):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}mlp.fc{j + 1}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}mlp.fc{j + 1}.bias"]
    if classes:
        out["head/kernel"], out["head/bias"] = state["head.weight"].T, state["head.bias"]
    return {stem + name: array for name, array in out.items()}


@pytest.mark.parametrize("stem", ["", "opt/target/"])
@pytest.mark.parametrize("classes", [0, 7])
def test_google_s_npz(
    tmp_path: Path, vit: Callable[..., nn.Module], tiny_images: Tensor, classes: int, stem: str
) -> None:
    model = vit(num_classes=classes)
    np.savez(tmp_path / "imagenet21k_ViT-B_16.npz", **google(model, classes, stem))
    backbone = load(tmp_path / "imagenet21k_ViT-B_16.npz")
    assert (backbone.head is None) == (classes == 0)
    torch.testing.assert_close(backbone(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)
    larger = load(tmp_path / "imagenet21k_ViT-B_16.npz", 48)
    expected = resample_abs_pos_embed(model.pos_embed.detach(), new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed.detach(), expected)


def test_a_head_that_reads_a_representation_layer_is_left_out(
    tmp_path: Path, vit: Callable[..., nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    arrays = google(vit(num_classes=7), 7) | {"pre_logits/kernel": np.ones((D, D), "f4"), "pre_logits/bias": np.ones(D)}
    np.savez(tmp_path / "a.npz", **arrays)
    with caplog.at_level(logging.INFO, "fastprompt.vit.checkpoints"):
        assert load(tmp_path / "a.npz").head is None
    assert "left out pre_logits, head" in caplog.text


def test_swin_as_its_authors_publish_it(tmp_path: Path, randomised: Randomised, tiny_images: Tensor) -> None:
    """Patch merging stands at the end of a stage, timm has it at the start of the next; the classifier is `head`."""
    arch = "swin_tiny_patch4_window7_224"
    sizes = {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}
    model = randomised(timm.create_model(arch, img_size=32, num_classes=5, **sizes)).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head.")
        state[name] = tensor
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({"model": state}, tmp_path / "swin.pth")
    backbone = fp.FrozenViT.from_checkpoint(tmp_path / "swin.pth", arch, 32, **sizes)
    torch.testing.assert_close(backbone(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)


def test_clip_as_openai_publishes_it(tmp_path: Path, randomised: Randomised, tiny_images: Tensor) -> None:
    arch, sizes = "vit_base_patch16_clip_quickgelu_224", {**SIZES, "num_heads": 3}
    model = randomised(timm.create_model(arch, img_size=32, num_classes=7, **sizes)).eval()
    model.head.bias.data.zero_()
    state = {"logit_scale": torch.tensor(4.6), "visual.proj": model.head.weight.detach().T.contiguous()}
    renamed = {
        "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "blocks.": "transformer.resblocks.",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        name = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        name = f"ln_post.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        state[f"visual.{name}"] = tensor.squeeze() if name in ("class_embedding", "positional_embedding") else tensor
    torch.save(state, tmp_path / "clip.pt")
    backbone = fp.FrozenViT.from_checkpoint(tmp_path / "clip.pt", arch, 32, num_classes=7, **sizes)
    torch.testing.assert_close(backbone(tiny_images), model(tiny_images), rtol=1e-4, atol=1e-5)
    assert fp.FrozenViT.from_checkpoint(tmp_path / "clip.pt", arch, 32, num_classes=0, **sizes).head is None


def test_what_does_not_fit_is_named(tmp_path: Path, vit: Callable[..., nn.Module]) -> None:
    state, path = vit().state_dict(), tmp_path / "a.pth"

    def refused(content: Any, message: str, **options: Any) -> None:
        torch.save(content, path)
        with pytest.raises((ValueError, TypeError), match=message):
            load(path, **options)

    refused({**state, "blocks.0.gate": torch.ones(1)}, "has no place for blocks.0.gate")
    refused({n: t for n, t in state.items() if "qkv.bias" not in n}, r"it lacks blocks\.0\.attn\.qkv\.bias")
    refused(state, r"does not fit arch .*lacks blocks\.2\.", depth=3)
    refused(state, r"does not fit arch .*no place for blocks\.1\.", depth=1)
    refused(state, r"other shapes: .*\(48, 3, 8, 8\) instead of \(24, 3, 8, 8\)", embed_dim=24)
    refused(state, "arch must have the patches of the file, 8 x 8 pixels, got 16", patch_size=16)
    refused(
        {**state, "pos_embed": torch.ones(1, 15, D)}, "has a position embedding for 14 patches, which are no square"
    )
    refused({**state, "norm.bias": torch.full((D,), float("nan"))}, r"path: norm\.bias contains NaN")
    refused({"fc.weight": torch.ones(2, 2)}, "holds no vision transformer that is known")
    refused({"model": {"epoch": 3}}, "path must be a state dict of tensors, it holds none")
    refused([1], "path must be a path or a state dict")


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice"),))


def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": vit().state_dict(), "x": Malice()}, "a.pth")
    np.savez("a.npz", **google(vit()), x=np.array([Malice()], dtype=object))
    for name in ("a.pth", "a.npz"):
        with pytest.raises(ValueError, match=rf"path {name} cannot be read as"):
            load(Path(name))
    assert not Path("malice").exists()


def test_files_and_names_that_are_none(tmp_path: Path, vit: Callable[..., nn.Module]) -> None:
    with pytest.raises(FileNotFoundError, match=r"path .*nothing\.pth does not exist"):
        load(tmp_path / "nothing.pth")
    torch.save(vit().state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="arch must be a timm model name, got 'vit_none'"):
        fp.FrozenViT.from_checkpoint(tmp_path / "a.pth", "vit_none")
    with pytest.raises(ValueError, match=r"arch must be a VisionTransformer or a Swin transformer .* ResNet"):
        fp.FrozenViT.from_checkpoint(tmp_path / "a.pth", "resnet18")
    with pytest.raises(ValueError, match=r"timm does not build 'vit_tiny_patch16_224' with .*nonsense"):
        load(tmp_path / "a.pth", nonsense=1)
    with pytest.raises(ValueError, match="mean must be three numbers"):
        load(tmp_path / "nothing.pth", mean=0.5)
    np.savez(tmp_path / "a.npz", **{name: a for name, a in google(vit()).items() if not name.endswith("query/bias")})
    with pytest.raises(ValueError, match=r"does not fit arch .*query/bias"):
        load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="arch must have the file's 2 blocks"):
        load(tmp_path / "a.npz", depth=3)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match=r"cannot be read as arrays of numbers \(NumPy\)"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_adapters_find_the_file_again(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    """Also by the name that the command line takes."""
    arch = "test_vit"  # timm's smallest
    torch.save({"model": randomised(timm.create_model(arch, num_classes=0)).state_dict()}, tmp_path / "mae.pth")
    monkeypatch.chdir(tmp_path)
    options = {"global_pool": "avg"} if pool == "avg" else {}
    backbone = fp.FrozenViT.from_checkpoint("mae.pth", arch, 64, mean=(0.5, 0.5, 0.5), **options)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3).eval()
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir("/")
    loaded, pixels = fp.PromptedViT.from_pretrained(tmp_path / "adapter"), torch.randint(0, 256, (1, 3, 64, 64)).byte()
    assert (loaded.backbone.mean, loaded.readout) == ((0.5, 0.5, 0.5), model.readout)
    torch.testing.assert_close(loaded(pixels), model(pixels))
    name = f"checkpoint:{arch}:{tmp_path / 'mae.pth'}"
    assert backbone.source.backbone_name == (name if pool == "token" else None)
    if pool == "token":
        assert backbone_at(name, 64).fingerprint == backbone.fingerprint == backbone_at(name, 64, False).fingerprint
    with pytest.raises(ValueError, match="name must be 'checkpoint:ARCH:PATH'"):
        fp.load_backbone("checkpoint:mae.pth")
    with pytest.raises(ValueError, match="a file of weights is 'checkpoint:ARCH:"):
        fp.load_backbone(str(tmp_path / "mae.pth"))
