"""load_official: every layout of the authors' checkpoints, and a clear error for everything else."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp

State = dict[str, Tensor]
D, P, L = 48, 3, 3


@pytest.fixture
def backbone(tiny_vit: VisionTransformer) -> fp.FrozenViT:
    return fp.FrozenViT(tiny_vit)


def vpt_state(deep: bool = True, project: int | None = None) -> State:
    k = project or D
    state = {"prompt_embeddings": torch.randn(1, P, k)}
    if deep:
        state["deep_prompt_embeddings"] = torch.randn(L - 1, P, k)
    if project:
        state |= {"prompt_proj.weight": torch.randn(D, k), "prompt_proj.bias": torch.randn(D)}
    return state


def vapt_state(
    *,
    static: int = 1,
    kernel: int | None = 2,
    padding: int = 0,
    channels: int = 1,
    shared: bool = True,
    scale: bool = False,
    projector: bool = True,
    grid: tuple[int, int] = (4, 4),
    depth: int = L,
    width: int = D,
    hidden: int = 5,
) -> State:
    state = {"prompt_embeddings": torch.randn(1, P, width)}
    if static > 1:
        state["deep_prompt_embeddings"] = torch.randn(static - 1, P, width)
    grow = 0 if kernel is None else 2 * padding - kernel + 1
    positions = (grid[0] + grow) * (grid[1] + grow)
    for j in range(depth - static):
        state |= {
            f"deep_prompt_norm.{j}.weight": torch.randn(width),
            f"deep_prompt_norm.{j}.bias": torch.randn(width),
            # without a convolution the authors' layer is a plain Linear, with it a module of two
            f"deep_prompt_downsample.{j}.{'' if kernel is None else 'linear.'}weight": torch.randn(P, positions),
            f"deep_prompt_downsample.{j}.{'' if kernel is None else 'linear.'}bias": torch.randn(P),
        }
        if kernel is not None:
            state[f"deep_prompt_downsample.{j}.conv.kernel"] = torch.randn(channels, 1, kernel, kernel)
    if projector:
        for stem in [""] if shared else [f"{j}." for j in range(depth - static)]:
            state[f"deep_prompt_embeddings_mlp.{stem}block.0.weight"] = torch.randn(hidden, width)
            state[f"deep_prompt_embeddings_mlp.{stem}block.2.weight"] = torch.randn(width, hidden)
            if scale:
                state[f"deep_prompt_embeddings_mlp.{stem}scale"] = torch.tensor(0.7)
    return state


def adaptive_by_hand(
    state: State,
    j: int,
    tokens: Tensor,
    grid: tuple[int, int] = (4, 4),
    padding: int = 0,
    act: Callable[[Tensor], Tensor] = F.relu,
) -> Tensor:
    """Prompts of adaptive block j as the authors' code computes them, from their own names."""
    x = F.layer_norm(
        tokens,
        (tokens.shape[2],),
        state[f"deep_prompt_norm.{j}.weight"],
        state[f"deep_prompt_norm.{j}.bias"],
        1e-5,
    ).transpose(1, 2)
    stem = f"deep_prompt_downsample.{j}."
    if stem + "conv.kernel" in state:
        channels = x.shape[1]
        kernel = state[stem + "conv.kernel"].expand(channels, -1, -1, -1)
        x = F.conv2d(x.unflatten(2, grid), kernel, padding=padding, groups=channels).flatten(2)
        stem += "linear."
    x = F.linear(x, state[stem + "weight"], state[stem + "bias"]).transpose(1, 2)
    for mlp in ("deep_prompt_embeddings_mlp.", f"deep_prompt_embeddings_mlp.{j}."):
        if mlp + "block.0.weight" in state:
            hidden = act(F.linear(x, state[mlp + "block.0.weight"]))
            return F.linear(hidden, state[mlp + "block.2.weight"]) * state.get(mlp + "scale", 1.0) + x
    return x


def full_model(state: State, prefix: str = "enc.transformer.", classes: int = 4) -> State:
    """The state dict of the authors' whole model around the prompts."""
    inner = {
        **state,
        "embeddings.cls_token": torch.zeros(1, 1, D),
        "embeddings.position_embeddings": torch.zeros(1, 17, D),
        "embeddings.patch_embeddings.bias": torch.zeros(D),
        "encoder.layer.0.attn.query.weight": torch.zeros(D, D),
        "encoder.encoder_norm.weight": torch.ones(D),
    }
    outer = prefix[: -len("enc.transformer.")]
    return {
        **{prefix + k: v for k, v in inner.items()},
        outer + "head.last_layer.weight": torch.randn(classes, D),
        outer + "head.last_layer.bias": torch.randn(classes),
    }


def pgn_state(trunk: str = "resnet10") -> State:
    pgn = fp.PGN(num_prompts=2, library_size=5, widths=(4, 8), width=D, trunk=trunk)
    renamed = (
        {
            "trunk.stem.": "model.input_net.",
            "trunk.fc.": "model.output_net.2.",
            "trunk.": "model.",
            ".body.": ".net.",
            ".skip.": ".downsample.",
        }
        if trunk == "resnet10"
        else {"trunk.": "model."}
    )
    state = {}
    for name, tensor in pgn.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        state["tl_vectors" if name == "library" else name] = torch.rand_like(tensor.float()).to(tensor.dtype)
    return state


@pytest.mark.parametrize("prefix", ["", "enc.transformer.", "module.enc.transformer."])
@pytest.mark.parametrize("deep", [True, False])
def test_vpt(backbone: fp.FrozenViT, deep: bool, prefix: str) -> None:
    state = vpt_state(deep)
    model = fp.load_official({prefix + k: v for k, v in state.items()}, backbone)
    assert isinstance(model, fp.PromptedViT)
    assert model.config == fp.VPTConfig(num_prompts=P, deep=deep)
    assert (model.num_classes, model.training) == (None, False)
    assert torch.equal(model.generator(), state["prompt_embeddings"])
    for i in range(1, L if deep else 1):
        assert torch.equal(model.generator(layer=i)[0], state["deep_prompt_embeddings"][i - 1])


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_with_projection(backbone: fp.FrozenViT, deep: bool) -> None:
    state = vpt_state(deep, project=6)
    vpt = fp.load_official(state, backbone).generator
    assert vpt.config.project == 6
    expected = F.linear(state["prompt_embeddings"], state["prompt_proj.weight"], state["prompt_proj.bias"])
    torch.testing.assert_close(vpt(), expected)


def test_vpt_without_backbone() -> None:
    vpt = fp.load_official(vpt_state())
    assert isinstance(vpt, fp.VPT)
    assert (vpt.geometry.width, vpt.geometry.depth) == (D, L)


def test_vpt_with_partial_depth(make_vit: Callable[..., VisionTransformer], tiny_images: Tensor) -> None:
    """Prompts for the first blocks; those of the last of them flow on, so that the features depend on them."""
    state = vpt_state()
    model = fp.load_official(state, fp.FrozenViT(make_vit(depth=5)))
    assert model.config == fp.VPTConfig(num_prompts=P, deep_layers=L)
    assert model.generator.layers == (0, 1, 2)
    assert torch.equal(model.generator(layer=2)[0], state["deep_prompt_embeddings"][1])
    torch.testing.assert_close(model(tiny_images), model.reference_forward(tiny_images), rtol=1e-4, atol=1e-4)
    alone = fp.load_official(state, depth=5)
    assert (alone.config.deep_layers, alone.geometry.depth) == (L, 5)
    saved = {"shallow_prompt": state["prompt_embeddings"], "deep_prompt": state["deep_prompt_embeddings"]}
    assert fp.load_official(saved, fp.FrozenViT(make_vit(depth=5))).config == model.config
    assert fp.load_official(state).config.deep_layers is None
    with pytest.raises(ValueError, match="depth must be that of the backbone, 5, got 4"):
        fp.load_official(state, fp.FrozenViT(make_vit(depth=5)), depth=4)
    with pytest.raises(ValueError, match="deep_layers=2 contradicts the checkpoint"):
        fp.load_official(state, depth=5, deep_layers=2)


VAPT_LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "kernel 3": ({"kernel": 3}, {"kernel": 3}),
    "kernel 3 padded": ({"kernel": 3, "padding": 1}, {"kernel": 3, "padding": 1}),
    "kernel 1": ({"kernel": 1}, {"kernel": 1}),
    "no convolution": ({"kernel": None}, {"conv": False}),
    "kernel per channel": ({"channels": D}, {"channelwise": False}),
    "projector per layer": ({"shared": False}, {"share_projector": False}),
    "projector per layer, scaled": (
        {"shared": False, "scale": True},
        {"share_projector": False, "learnable_scale": True},
    ),
    "shared, scaled": ({"scale": True}, {"learnable_scale": True}),
    "no projector": ({"projector": False}, {"feature_projector": False}),
    "two static layers": ({"static": 2}, {"static_layers": 2}),
    "wide projector": ({"hidden": 16}, {"hidden": 16}),
}


@pytest.mark.parametrize("prefix", ["", "enc.transformer."])
@pytest.mark.parametrize(("layout", "options"), VAPT_LAYOUTS.values(), ids=VAPT_LAYOUTS)
def test_vapt(backbone: fp.FrozenViT, layout: dict[str, Any], options: dict[str, Any], prefix: str) -> None:
    state = vapt_state(**layout)
    vapt = fp.load_official({prefix + k: v for k, v in state.items()}, backbone).generator
    hidden = 8 if not layout.get("projector", True) else 5
    assert vapt.config == fp.VAPTConfig(**{"num_prompts": P, "hidden": hidden, **options})
    tokens, static = torch.randn(2, 16, D), layout.get("static", 1)
    assert torch.equal(vapt(layer=0), state["prompt_embeddings"])
    for i in range(1, static):
        assert torch.equal(vapt(layer=i)[0], state["deep_prompt_embeddings"][i - 1])
    for i in range(static, L):
        expected = adaptive_by_hand(state, i - static, tokens, padding=layout.get("padding", 0))
        torch.testing.assert_close(vapt(tokens, layer=i), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("alone", [False, True], ids=["on a backbone", "alone"])
def test_vapt_on_mae_keeps_embeddings_that_nothing_reads(backbone: fp.FrozenViT, alone: bool) -> None:
    """Their MAE variant with VPT_DEPTH 2 saves L − 1 deep embeddings, of which block 1 reads the first."""
    depth = 6 if alone else L
    state = vapt_state(static=2, depth=depth)
    kept = state["deep_prompt_embeddings"][0]
    state["deep_prompt_embeddings"] = torch.cat([kept[None], torch.randn(depth - 2, P, D)])
    vapt = fp.load_official(state, grid=(4, 4)) if alone else fp.load_official(state, backbone).generator
    assert (vapt.config.static_layers, vapt.geometry.depth) == (2, depth)
    assert torch.equal(vapt(layer=1)[0], kept)
    tokens = torch.randn(1, 16, D)
    torch.testing.assert_close(vapt(tokens, layer=2), adaptive_by_hand(state, 0, tokens), rtol=1e-4, atol=1e-3)


def test_input_independent_vectors_of_pgn(backbone: fp.FrozenViT, tiny_images: Tensor, tmp_path: Path) -> None:
    vectors = torch.randn(5, D)
    torch.save({"state_dict": {"pgn.pgn_vectors": vectors}}, tmp_path / "iip.pt")
    model = fp.load_official(tmp_path / "iip.pt", backbone)
    assert isinstance(model.generator, fp.FreePrompts)
    assert torch.equal(model.generator()[0], vectors)
    assert model(tiny_images).shape == (4, D)
    with pytest.raises(ValueError, match="a network beside it"):
        fp.load_official({"pgn_vectors": vectors, "model.fc.weight": vectors})


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_prompts_that_vpt_saves_alone(backbone: fp.FrozenViT, tmp_path: Path, deep: bool) -> None:
    """`prompt_ep100.pth` holds NumPy arrays, `shallow_prompt` and, of VPT-deep, `deep_prompt`."""
    arrays = {"shallow_prompt": np.random.rand(1, P, D).astype(np.float32)}
    if deep:
        arrays["deep_prompt"] = np.random.rand(L - 1, P, D).astype(np.float32)
    torch.save(arrays, tmp_path / "prompt_ep100.pth")
    vpt = fp.load_official(tmp_path / "prompt_ep100.pth", backbone).generator
    assert isinstance(vpt, fp.VPT)
    assert vpt.config == fp.VPTConfig(num_prompts=P, deep=deep)
    for i, expected in enumerate([arrays["shallow_prompt"][0], *arrays.get("deep_prompt", [])]):
        assert torch.equal(vpt(layer=i)[0], torch.from_numpy(expected))


@pytest.mark.parametrize(("grid", "given"), [((14, 14), {}), ((16, 16), {}), ((7, 7), {}), ((5, 9), {"grid": (5, 9)})])
@pytest.mark.parametrize("padding", [0, 1])
def test_vapt_without_backbone_infers_grid_and_padding(grid: tuple[int, int], given: dict, padding: int) -> None:
    if grid == (16, 16) or (grid == (7, 7) and padding):  # else taken for another padding of a 14 x 14 grid
        given = {"padding": padding}
    state = vapt_state(grid=grid, kernel=3, padding=padding, width=8, depth=2)
    vapt = fp.load_official(state, **given)
    assert vapt.config.padding == padding
    assert vapt.geometry.grid == grid
    tokens = torch.randn(1, grid[0] * grid[1], 8)
    torch.testing.assert_close(vapt(tokens), adaptive_by_hand(state, 0, tokens, grid, padding), rtol=1e-4, atol=1e-3)


def test_activation_and_dropouts_are_arguments(backbone: fp.FrozenViT) -> None:
    state, tokens = vapt_state(), torch.randn(2, 16, D)
    vapt = fp.load_official(state, backbone, activation="gelu", channel_dropout=0.0).generator
    assert (vapt.config.activation, vapt.config.channel_dropout) == ("gelu", 0.0)
    torch.testing.assert_close(
        vapt(tokens, layer=2), adaptive_by_hand(state, 1, tokens, act=F.gelu), rtol=1e-4, atol=1e-3
    )


def test_vapt_with_attention_for_an_activation(backbone: fp.FrozenViT) -> None:
    state, tokens = vapt_state(), torch.randn(2, 16, D)
    vapt = fp.load_official(state, backbone, activation="attention").generator
    expected = adaptive_by_hand(state, 1, tokens, act=lambda x: x.softmax(dim=-1))
    torch.testing.assert_close(vapt(tokens, layer=2), expected, rtol=1e-4, atol=1e-3)


def test_what_the_authors_do_and_no_tensor_says(golden: Callable[[str], State]) -> None:
    assert fp.load_official(pgn_state(), resolution=16).config.resize == "short_side"
    assert fp.load_official(pgn_state(), resize="square").config.resize == "square"
    assert fp.load_official(swin_state(golden), patch_size=4).config.dropout_per == "batch"
    assert fp.load_official(vpt_state()).config.dropout_per == "image"


@pytest.mark.parametrize("prefix", ["enc.transformer.", "module.enc.transformer."])
@pytest.mark.parametrize("make", [vpt_state, vapt_state])
def test_full_model_brings_its_head(
    backbone: fp.FrozenViT, tiny_images: Tensor, make: Callable[[], State], prefix: str
) -> None:
    state = full_model(make(), prefix)
    model = fp.load_official(state, backbone)
    outer = prefix[: -len("enc.transformer.")]
    weight, bias = state[outer + "head.last_layer.weight"], state[outer + "head.last_layer.bias"]
    assert model.num_classes == 4
    torch.testing.assert_close(model(tiny_images), F.linear(model.forward_features(tiny_images), weight, bias))
    without = fp.load_official(
        {k: v for k, v in state.items() if not k.endswith("bias")}
        | {prefix + k: v for k, v in make().items() if k.endswith("bias")},
        backbone,
    )
    assert (without.head.bias == 0).all()


def test_a_checkpoint_of_another_backbone_warns(backbone: fp.FrozenViT, recwarn: pytest.WarningsRecorder) -> None:
    state = full_model(vpt_state())
    key = "enc.transformer.embeddings.patch_embeddings.weight"
    fp.load_official({**state, key: backbone.patch_weight.detach()}, backbone)
    assert len(recwarn) == 0
    with pytest.warns(UserWarning, match=r"carries the weights of another backbone"):
        fp.load_official({**state, key: torch.randn(D, 3, 8, 8)}, backbone)


@pytest.mark.parametrize(
    ("trunk", "prefix"),
    [("resnet10", ""), ("resnet10", "pgn."), ("resnet10", "model.pgn."), ("resnet18", "pgn.")],
)
def test_pgn(backbone: fp.FrozenViT, trunk: str, prefix: str) -> None:
    state = pgn_state(trunk)
    pgn = fp.load_official({prefix + k: v for k, v in state.items()})
    assert isinstance(pgn, fp.PGN)
    assert (pgn.config.trunk, pgn.config.num_prompts, pgn.config.library_size) == (trunk, 2, 5)
    if trunk == "resnet10":
        assert pgn.config.widths == (4, 8)
    assert torch.equal(pgn.library, state["tl_vectors"])
    ours = sorted(t.double().sum().item() for t in pgn.state_dict().values())
    assert ours == sorted(t.double().sum().item() for t in state.values())
    model = fp.load_official(state, backbone, activation="sigmoid", stem_pool=trunk != "resnet10")
    assert model.config.activation == "sigmoid"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, D)


def test_golden_pgn_through_the_loader(golden: Callable[[str], State]) -> None:
    data = golden("pgn_tiny")
    pgn = fp.load_official({k[6:]: v for k, v in data.items() if k.startswith("state.")}).double()
    out, expected = pgn(data["images"].double()), data["eval.prompts"].double()
    assert (out - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["vapt", "vpt_deep", "vpt_shallow"])
def test_golden_prompts_under_the_authors_names(golden: Callable[[str], State], name: str) -> None:
    data = golden(name)
    vit = VisionTransformer(patch_size=16, embed_dim=48, depth=4, num_heads=3, num_classes=0)
    vit.load_state_dict({k[9:]: v for k, v in data.items() if k.startswith("backbone.")})
    state = {}
    for key, tensor in data.items():
        layer, _, rest = key.removeprefix("prompt.").partition(".")
        if key == "prompt.first":
            state["prompt_embeddings"] = tensor
        elif key == "prompt.deep":
            state["deep_prompt_embeddings"] = tensor
        elif key.startswith("prompt.feature_projector."):
            state[f"deep_prompt_embeddings_mlp.block.{0 if rest == 'w1' else 2}.weight"] = tensor
        elif key.startswith("prompt."):
            rest = rest.replace("token_projector", "linear")
            stem = "deep_prompt_norm" if rest.startswith("norm.") else "deep_prompt_downsample"
            state[f"{stem}.{int(layer) - 1}.{rest.removeprefix('norm.')}"] = tensor
    model = fp.load_official(state, fp.FrozenViT(vit)).double()
    out, expected = model(data["images"].double()), data["cls"].double()
    assert (out - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {
            "state_dict": {"pgn." + k: v for k, v in s.items()},
            "epoch": 3,
            "hyper_parameters": {"lr": 0.1},
        },
        lambda s: {"model": s, "optimizer": {"lr": 1}},
        lambda s: {**s, "epoch": 7},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_files_and_wrappers(tmp_path: Path, wrap: Callable[[State], Any], suffix: str) -> None:
    state = pgn_state()
    torch.save(wrap(state), tmp_path / f"a{suffix}")
    for source in (tmp_path / f"a{suffix}", str(tmp_path / f"a{suffix}"), wrap(state)):
        assert torch.equal(fp.load_official(source).library, state["tl_vectors"])


def test_safetensors_files_and_float64(tmp_path: Path) -> None:
    state = {k: v.double() for k, v in vpt_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    vpt = fp.load_official(tmp_path / "a.safetensors")
    assert torch.equal(vpt()[0], state["prompt_embeddings"][0])


class Malice:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("malice"),))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**vpt_state(), "x": Malice()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps({"x": Malice()}, protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"source {name} cannot be read as plain tensors \(weights_only=True\)"):
            fp.load_official(name)
    assert not Path("malice").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"abc", b"PK\x03\x04 no zip", b"\x80\x02}q\x00", bytes(1000)])
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, TypeError), match=r"source"):
        fp.load_official(tmp_path / name)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    torch.save(pgn_state(), tmp_path / "a.pt")
    save_file(vpt_state(), tmp_path / "a.safetensors")
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in (100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=rf"source .*{path.name}"):
                fp.load_official(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist"):
        fp.load_official(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError):
        fp.load_official(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "source must be a path or a state dict"),
        ([1], TypeError, "source must be a path or a state dict"),
        ({}, TypeError, "source must be"),
        ({"a": 1}, TypeError, "source must be a state dict of tensors, it holds none"),
        ({1: torch.ones(1)}, TypeError, "source must be"),
        (nn.Linear(2, 2), TypeError, "got Linear"),
        (
            {"fc.weight": torch.ones(2, 2)},
            ValueError,
            r"is no published PGN, VPT or VAPT checkpoint.*\['fc\.weight'\]",
        ),
        (nn.Linear(2, 2).state_dict(), ValueError, "none of 'tl_vectors', 'pgn_vectors', 'prompt_embeddings'"),
    ],
)
def test_other_sources_are_refused(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.load_official(source)


def without(state: State, *names: str) -> State:
    assert set(names) <= set(state)
    return {k: v for k, v in state.items() if k not in names}


BAD: dict[str, tuple[Callable[[], State], str]] = {
    "pgn: missing tensor": (
        lambda: without(pgn_state(), "model.blocks.0.net.3.weight"),
        "missing .*blocks.0.body.3",
    ),
    "pgn: missing statistics": (
        lambda: without(pgn_state(), "model.input_net.1.running_var"),
        "missing .*running_var",
    ),
    "pgn: extra tensor": (
        lambda: {**pgn_state(), "model.extra.weight": torch.ones(1)},
        "unknown .*extra.weight",
    ),
    "pgn: misshapen": (
        lambda: {**pgn_state(), "model.output_net.2.bias": torch.ones(3)},
        r"fc.bias has shape \(3,\)",
    ),
    "pgn: no network": (lambda: {"tl_vectors": torch.ones(5, D)}, "no known network"),
    "pgn: no head": (
        lambda: without(pgn_state(), "model.output_net.2.weight"),
        r"lacks 'model\.output_net\.2\.weight'",
    ),
    "pgn: library": (
        lambda: {**pgn_state(), "tl_vectors": torch.ones(4, D)},
        "10 outputs are no multiple of .* 4",
    ),
    "pgn: empty library": (
        lambda: {**pgn_state(), "tl_vectors": torch.ones(0, D)},
        "10 outputs are no multiple of .* 0",
    ),
    "pgn: library 1-d": (
        lambda: {**pgn_state(), "tl_vectors": torch.ones(5)},
        "tl_vectors must have 2 dimensions",
    ),
    "pgn: NaN": (
        lambda: {**pgn_state(), "tl_vectors": torch.full((5, D), float("nan"))},
        "tl_vectors contains NaN",
    ),
    "vpt: inf": (
        lambda: {"prompt_embeddings": torch.full((1, 2, D), float("inf"))},
        "prompt_embeddings contains NaN or inf",
    ),
    "vpt: 2-d": (lambda: {"prompt_embeddings": torch.ones(2, D)}, "prompt_embeddings must have 3 dimensions"),
    "vpt: batch": (lambda: {"prompt_embeddings": torch.ones(2, P, D)}, r"do not fit \(1, P, k\)"),
    "vpt: deep of other length": (
        lambda: {**vpt_state(), "deep_prompt_embeddings": torch.ones(2, P + 1, D)},
        "do not fit",
    ),
    "vpt: no projection bias": (
        lambda: without(vpt_state(project=6), "prompt_proj.bias"),
        r"lacks 'prompt_proj\.bias'",
    ),
    "vpt: projection of other width": (
        lambda: {**vpt_state(project=6), "prompt_proj.weight": torch.ones(D, 7)},
        r"projection.weight has shape \(48, 7\), expected \(48, 6\)",
    ),
    "vpt: unknown prompt tensor": (
        lambda: {**vpt_state(), "prompt_gate": torch.ones(1)},
        r"does not have: \['prompt_gate'\]",
    ),
    "swin: a stage missing": (
        lambda: {"prompt_embeddings": torch.ones(1, P, D), "deep_prompt_embeddings_1": torch.ones(2, P, 2 * D)},
        "lacks 'deep_prompt_embeddings_0'",
    ),
    "swin: other prompt count": (
        lambda: {
            "prompt_embeddings": torch.ones(1, P, D),
            "deep_prompt_embeddings_0": torch.ones(1, P, D),
            "deep_prompt_embeddings_1": torch.ones(2, P + 1, 2 * D),
        },
        "do not fit",
    ),
    "swin: projection": (
        lambda: {
            "prompt_embeddings": torch.ones(1, P, 6),
            "deep_prompt_embeddings_0": torch.ones(1, P, 6),
            "prompt_proj.weight": torch.ones(D, 6),
        },
        r"does not have: \['prompt_proj.weight'\]",
    ),
    "two sets": (
        lambda: {"a.tl_vectors": torch.ones(1, 1), "b.tl_vectors": torch.ones(1, 1)},
        "more than one 'tl_vectors'",
    ),
    "vapt: no norm": (
        lambda: without(vapt_state(), "deep_prompt_norm.1.bias"),
        r"lacks 'deep_prompt_norm\.1\.bias'",
    ),
    "vapt: a kernel missing": (
        lambda: without(vapt_state(), "deep_prompt_downsample.1.conv.kernel"),
        "lacks .*1.conv.kernel",
    ),
    "vapt: a layer missing": (
        lambda: {k: v for k, v in vapt_state().items() if ".0." not in k or "mlp" in k},
        "lacks",
    ),
    "vapt: half a projector": (
        lambda: without(vapt_state(), "deep_prompt_embeddings_mlp.block.2.weight"),
        "lacks .*block.2",
    ),
    "vapt: projector without dimensions": (
        lambda: {**vapt_state(), "deep_prompt_embeddings_mlp.block.0.weight": torch.ones(())},
        "block.0.weight must have 2 dimensions",
    ),
    "vapt: positions": (
        lambda: {**vapt_state(), "deep_prompt_downsample.0.linear.weight": torch.ones(P, 10)},
        "reads 10 positions, which no padding gives on a grid of",
    ),
    "vapt: other layer misshapen": (
        lambda: {**vapt_state(), "deep_prompt_downsample.1.linear.weight": torch.ones(P, 8)},
        r"adaptive.1.projector.weight has shape \(3, 8\)",
    ),
    "vapt: kernel not square": (
        lambda: {**vapt_state(), "deep_prompt_downsample.0.conv.kernel": torch.ones(1, 1, 3, 2)},
        "kernel has shape",
    ),
    "vapt: unknown tensor": (
        lambda: {**vapt_state(), "deep_prompt_gate.0.weight": torch.ones(1)},
        "deep_prompt_gate",
    ),
    "vapt: layer name": (
        lambda: {**vapt_state(), "deep_prompt_downsample.x.linear.weight": torch.ones(1)},
        "deep_prompt_downsample.x",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_tensors_that_do_not_fit_are_named(backbone: fp.FrozenViT, make: Callable[[], State], message: str) -> None:
    for b in (backbone, None):
        if b is None and "positions" in message:
            continue
        with pytest.raises(ValueError, match=message):
            fp.load_official(make(), b)


@pytest.mark.parametrize(
    ("make", "overrides", "message"),
    [
        (pgn_state, {"num_prompts": 3}, "num_prompts=3 contradicts the checkpoint, whose tensors say 2"),
        (pgn_state, {"trunk": "resnet18"}, "trunk='resnet18' contradicts"),
        (vpt_state, {"deep": False}, "deep=False contradicts"),
        (vapt_state, {"kernel": 3}, "kernel=3 contradicts"),
        (vapt_state, {"padding": 1}, "no padding gives|contradicts"),
        (vapt_state, {"share_projector": False}, "share_projector=False contradicts"),
        (vapt_state, {"hidden": 8}, "hidden=8 contradicts"),
        (vpt_state, {"kernel": 2}, "VPTConfig has no option 'kernel'"),
        (pgn_state, {"activation": "relu"}, "activation must be one of"),
        (vpt_state, {"grid": (3, 3)}, r"grid \(3, 3\)"),
        (vapt_state, {"grid": (3, 3)}, "grid"),
    ],
)
def test_contradictory_overrides_are_refused(
    backbone: fp.FrozenViT, make: Callable[[], State], overrides: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fp.load_official(make(), backbone, **overrides)


@pytest.mark.parametrize("make", [vpt_state, vapt_state])
def test_other_backbones_are_refused(make: Callable[[], State]) -> None:
    def vit(**options: Any) -> fp.FrozenViT:
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 3,
            "num_heads": 3,
            "num_classes": 0,
        }
        return fp.FrozenViT(VisionTransformer(**{**sizes, **options}))

    with pytest.raises(ValueError, match=r"source was trained for width 48, backbone has 24"):
        fp.load_official(make(), vit(embed_dim=24))
    with pytest.raises(ValueError, match=r"source was trained for depth 3, backbone has 2"):
        fp.load_official(make(), vit(depth=2))
    if make is vapt_state:
        with pytest.raises(ValueError, match=r"reads 9 positions, which no padding gives on a grid of \(8, 8\)"):
            fp.load_official(make(), vit(img_size=64))
    with pytest.raises(TypeError, match=r"backbone must be a FrozenViT or None, got VisionTransformer"):
        fp.load_official(make(), VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3))
    with pytest.raises(ValueError, match=r"head of shape \(4, 40\), backbone takes \(C, 48\)"):
        fp.load_official({**full_model(make()), "head.last_layer.weight": torch.ones(4, 40)}, vit())


def test_pgn_of_another_width_is_refused() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match=r"source was trained for width 48, backbone has 24"):
        fp.load_official(pgn_state(), fp.FrozenViT(vit))


def averaging_backbone() -> fp.FrozenViT:
    return fp.FrozenViT(
        VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=D,
            depth=L,
            num_heads=3,
            num_classes=0,
            global_pool="avg",
        )
    )


@pytest.mark.parametrize("make", [vpt_state, vapt_state])
def test_mae_models_average_patches_and_prompts_as_the_authors_do(
    tiny_images: Tensor, make: Callable[[], State]
) -> None:
    backbone, head = averaging_backbone(), torch.randn(4, D)
    state = {**{"enc." + k: v for k, v in make().items()}, "head.last_layer.weight": head}
    model = fp.load_official(state, backbone)
    assert (model.readout, model.num_classes) == ("patches+prompts", 4)
    torch.testing.assert_close(model(tiny_images), F.linear(model.forward_features(tiny_images), head))
    assert fp.load_official(state, backbone, readout="patches").readout == "patches"
    assert fp.load_official(pgn_state(), backbone).readout == "patches"


CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("make", "pixels"),
    [
        (pgn_state, CLIP),
        (lambda: {"pgn_vectors": torch.ones(2, D)}, CLIP),
        (vpt_state, IMAGENET),
        (vapt_state, IMAGENET),
    ],
)
def test_raw_pixels_are_normalised_as_the_authors_do(
    tiny_vit: VisionTransformer, tmp_path: Path, make: Callable[[], State], pixels: tuple[Any, Any]
) -> None:
    given = fp.FrozenViT(tiny_vit, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.warns(UserWarning, match="raw pixels are normalised as in the authors' code"):
        model, raw = fp.load_official(make(), given), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of the authors' own, or of what was asked for
        fp.load_official(make(), given.normalising_by(*pixels))
        fp.load_official(make(), given, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert ((model.backbone.mean, model.backbone.std), given.mean) == (pixels, (0.5, 0.5, 0.5))
    assert model.backbone.fingerprint == given.fingerprint
    assert model.backbone.patch_weight is given.patch_weight
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixels)
    torch.testing.assert_close(model(raw), model((raw / 255 - mean) / std), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backbone"]["mean"] == list(pixels[0])
    other = fp.load_official(make(), given, mean=(0.1, 0.2, 0.3))
    assert (other.backbone.mean, other.backbone.std) == ((0.1, 0.2, 0.3), pixels[1])


def classified(outputs: int = 7) -> fp.FrozenViT:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": L, "num_heads": 3}
    return fp.FrozenViT(VisionTransformer(**sizes, num_classes=outputs))


def test_label_map_is_the_pretrained_classifier_and_trains(tiny_images: Tensor, tmp_path: Path) -> None:
    backbone = classified()
    with pytest.warns(UserWarning, match="leaves out the classifier that the authors trained"):
        model = fp.load_official(pgn_state(), backbone, head="label_map")
    assert (model.num_classes, model.head.kind) == (7, "label_map")
    torch.testing.assert_close(model(tiny_images), backbone.head(model.forward_features(tiny_images)))
    trained = {name for name, _ in model.trainable_parameters() if name.startswith("head.")}
    assert trained == {"head.classifier_weight", "head.classifier_bias"}
    with torch.no_grad():
        model.head.classifier_bias += 1
    model.save_pretrained(tmp_path)
    loaded = fp.PromptedViT.from_pretrained(backbone.normalising_by(*CLIP), tmp_path)
    assert isinstance(loaded.head.classifier_weight, nn.Parameter)
    torch.testing.assert_close(loaded(tiny_images), model(tiny_images))


@pytest.mark.parametrize(("key", "head"), [("heads.head", "label_map"), ("heads.head", None), ("heads.0", None)])
def test_a_whole_pgn_model_brings_its_trained_classifier(
    tiny_images: Tensor, recwarn: pytest.WarningsRecorder, key: str, head: str | None
) -> None:
    """Lightning's file of the authors' ViTPGN."""
    weight, bias = torch.randn(7, D), torch.randn(7)
    state = {f"pgn_module.{name}": tensor for name, tensor in pgn_state().items()}
    state |= {f"vit_model.{key}.weight": weight, f"vit_model.{key}.bias": bias}
    model = fp.load_official({"state_dict": state}, classified(), head=head)
    assert [w for w in recwarn if "classifier" in str(w.message)] == []
    torch.testing.assert_close(model(tiny_images), F.linear(model.forward_features(tiny_images), weight, bias))


def dino_checkpoint(prototypes: int = 20) -> dict[str, Any]:
    head = {
        **{f"mlp.{i}.bias": torch.randn(n) for i, n in ((0, 9), (2, 9), (4, 5))},
        "mlp.0.weight": torch.randn(9, D),
        "mlp.2.weight": torch.randn(9, 9),
        "mlp.4.weight": torch.randn(5, 9),
        "last_layer.weight_g": torch.full((prototypes, 1), 2.0),
        "last_layer.weight_v": torch.randn(prototypes, 5),
    }
    return {
        "student": {f"module.head.{name}": tensor for name, tensor in head.items()},
        "teacher": {f"head.{name}": -tensor for name, tensor in head.items()},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 800,
    }


@pytest.mark.parametrize("rows", ["authors", "prototypes"])
def test_prototypes_of_a_dino_checkpoint(
    backbone: fp.FrozenViT, tiny_images: Tensor, tmp_path: Path, rows: str
) -> None:
    checkpoint = dino_checkpoint()
    torch.save(checkpoint, tmp_path / "full_checkpoint.pth")
    given = {"dino": tmp_path / "full_checkpoint.pth", "num_classes": 4, "seed": 3}
    model = fp.load_official(pgn_state(), backbone, head="prototypes", rows=rows, **given)
    student = checkpoint["student"]
    expected = fp.PrototypeHead.from_dino(student, 4, 3, rows=rows)
    assert torch.equal(model.head.prototypes, expected.prototypes)
    features = model.forward_features(tiny_images)
    torch.testing.assert_close(model(tiny_images), expected(features))
    model.save_pretrained(tmp_path / "adapter")
    loaded = fp.PromptedViT.from_pretrained(backbone.normalising_by(*CLIP), tmp_path / "adapter")
    assert torch.equal(loaded.head.prototypes, expected.prototypes)


def test_a_whole_dino_model_brings_its_head(backbone: fp.FrozenViT, tiny_images: Tensor) -> None:
    head = {k.removeprefix("module."): v for k, v in dino_checkpoint()["student"].items() if "last" not in k}
    rows = torch.randn(3, 5)
    state = {f"pgn_module.{name}": tensor for name, tensor in pgn_state().items()}
    state |= {f"dino_{name}": tensor for name, tensor in head.items()} | {"dino_head.last_layer.weight": rows}
    model = fp.load_official(state, backbone)
    mlp = nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 5))
    mlp.load_state_dict({name.removeprefix("head.mlp."): tensor for name, tensor in head.items()})
    expected = F.normalize(mlp(model.forward_features(tiny_images)), dim=-1) @ rows.T
    torch.testing.assert_close(model(tiny_images), expected)
    with pytest.raises(ValueError, match="num_classes must be the 3 of the file's head, got 4"):
        fp.load_official(state, backbone, num_classes=4)
    with pytest.raises(ValueError, match="head must be None or 'prototypes', as the file's is, got 'linear'"):
        fp.load_official(state, backbone, head="linear")


def test_the_text_head_of_pgn_on_clip(tiny_images: Tensor) -> None:
    texts = torch.randn(5, 7)
    model = fp.load_official(pgn_state(), classified(), head="text", class_embeddings=texts)
    expected = model.backbone.head(model.forward_features(tiny_images))
    torch.testing.assert_close(model(tiny_images), 100 * F.normalize(expected, dim=-1) @ F.normalize(texts, dim=-1).T)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "prototypes", "num_classes": 3}, "dino is needed for head 'prototypes'"),
        ({"head": "prototypes", "dino": dino_checkpoint()}, "num_classes must be given for head 'prototypes'"),
        (
            {"head": "prototypes", "dino": dino_checkpoint(), "num_classes": 3, "rows": "mine"},
            "rows must be 'prototypes' or 'authors', got 'mine'",
        ),
        ({"head": "text"}, "class_embeddings is needed for head 'text'"),
        ({"dino": {}}, "dino is only for head 'prototypes', head is None"),
        ({"class_embeddings": [[1.0]], "head": "linear"}, "class_embeddings is only for head 'text', head is 'linear'"),
        ({"head": "label_map"}, "needs a backbone with a pretrained classifier"),
        ({"head": "map", "num_classes": 3}, "head must be one of"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
    ],
)
def test_heads_that_cannot_be_built_are_named(backbone: fp.FrozenViT, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.load_official(
            pgn_state(), backbone, **{"num_classes": 3 if options.get("head") == "map" else None, **options}
        )


@pytest.mark.parametrize("options", [{"head": "linear"}, {"num_classes": 3}, {"mean": (0.5, 0.5, 0.5)}])
def test_a_generator_alone_has_neither_head_nor_pixels(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be None without a backbone"):
        fp.load_official(pgn_state(), **options)


def test_readout_needs_a_backbone_and_must_be_one(backbone: fp.FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"readout must be None without a backbone: .* got 'cls'"):
        fp.load_official(vpt_state(), readout="cls")
    with pytest.raises(ValueError, match=r"readout must be one of .* got 'mean'"):
        fp.load_official(vpt_state(), backbone, readout="mean")


def test_a_checkpoint_of_another_mae_backbone_warns(backbone: fp.FrozenViT) -> None:
    with pytest.warns(UserWarning, match=r"carries the weights of another backbone"):
        fp.load_official({**vpt_state(), "patch_embed.proj.weight": torch.randn(D, 3, 8, 8)}, backbone)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"last_layer.weight": torch.ones(4)}, r"head of shape \(4,\), backbone takes \(C, 48\)"),
        ({"last_layer.weight": torch.ones(4, 7)}, r"head of shape \(4, 7\)"),
        (
            {"last_layer.weight": torch.ones(4, D), "last_layer.bias": torch.ones(3)},
            r"with a bias of shape \(3,\)",
        ),
        (
            {"last_layer.weight": torch.ones(4, D), "projection.0.weight": torch.ones(D, D)},
            r"head of several layers \(head\.projection\.\*\)",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(backbone: fp.FrozenViT, tensors: State, message: str) -> None:
    state = {"enc.transformer." + k: v for k, v in vpt_state().items()}
    state |= {"head." + k: v for k, v in tensors.items()}
    with pytest.raises(ValueError, match=message):
        fp.load_official(state, backbone)


def test_batch_counters_may_be_missing() -> None:
    state = {k: v for k, v in pgn_state().items() if not k.endswith("num_batches_tracked")}
    assert torch.equal(fp.load_official(state).library, state["tl_vectors"])


@pytest.mark.parametrize("options", [{"grid": 4}, {"grid": (4, 0)}, {"padding": "1"}, {"patch_size": "8"}])
def test_sizes_that_are_none_are_named(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{next(iter(options))} must be"):
        fp.load_official(vapt_state(), **options)


def test_a_grid_may_be_a_list(backbone: fp.FrozenViT) -> None:
    assert fp.load_official(vapt_state(), backbone, grid=[4, 4]).generator.geometry.grid == (4, 4)


def swin_state(golden: Callable[[str], State]) -> State:
    data = golden("vpt_swin_deep")
    return {"enc." + k[len("prompt.") :]: v for k, v in data.items() if k.startswith("prompt.")}


def golden_swin(**options: Any) -> SwinTransformer:
    sizes = {"img_size": 128, "patch_size": 4, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    return SwinTransformer(**{**sizes, "window_size": 4, "num_classes": 0, **options})


def test_vpt_of_a_swin_transformer(golden: Callable[[str], State]) -> None:
    """The authors' features from their prompt tensors, under their names, on their backbone's tensors."""
    data, swin = golden("vpt_swin_deep"), golden_swin()
    theirs = {k[len("backbone.") :]: v for k, v in data.items() if k.startswith("backbone.")}
    swin.load_state_dict(
        {re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", k): v for k, v in theirs.items()}
    )
    head = {"head.last_layer.weight": torch.randn(7, 192), "head.last_layer.bias": torch.randn(7)}
    model = fp.load_official({**swin_state(golden), **head}, fp.FrozenViT(swin))
    assert (model.readout, model.generator.num_prompts, model.config.deep) == ("patches+prompts", 5, True)
    model = model.double()
    features = model.forward_features(data["images"].double())
    assert (features - data["features"]).norm() <= 1e-6 * data["features"].norm()
    expected = F.linear(data["features"], head["head.last_layer.weight"], head["head.last_layer.bias"])
    torch.testing.assert_close(model(data["images"].double()).float(), expected, rtol=1e-5, atol=1e-5)


def test_vpt_of_a_swin_transformer_without_backbone(golden: Callable[[str], State]) -> None:
    state = swin_state(golden)
    generator = fp.load_official(state, patch_size=4)
    assert generator.geometry.stages == ((24, 2), (48, 2), (96, 2), (192, 2))
    assert torch.equal(generator(layer=0), state["enc.prompt_embeddings"])
    assert torch.equal(generator(layer=1), state["enc.deep_prompt_embeddings_0"])
    assert torch.equal(generator(layer=7), state["enc.deep_prompt_embeddings_3"][1:])


def test_vpt_of_another_swin_transformer_is_refused(golden: Callable[[str], State], backbone: fp.FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"trained for stages \(\(24, 2\).*backbone has \(\(24, 2\), \(48, 1\)"):
        fp.load_official(swin_state(golden), fp.FrozenViT(golden_swin(depths=(2, 1, 2, 3))))
    with pytest.raises(ValueError, match="trained for width 24, backbone has 48"):
        fp.load_official(swin_state(golden), backbone)


def test_shallow_vpt_of_a_swin_transformer() -> None:
    swin = fp.FrozenViT(golden_swin(img_size=32))
    model = fp.load_official({"prompt_embeddings": torch.ones(1, 3, 24)}, swin)
    assert (model.config.deep, model.readout) == (False, "patches+prompts")
    assert torch.equal(model.generator(), torch.ones(1, 3, 24))
