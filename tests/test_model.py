"""PromptedViT: every method, readout and head; what trains; adapters on disk; bad arguments."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt import files
from fastprompt.adapters import Preprocessing, read_adapter, write_adapter
from fastprompt.generators import PromptConfig
from fastprompt.vit import assets
from fastprompt.vit.source import BackboneSource

Build = Callable[..., fp.PromptedViT]
NO_TOKENS = ("pixel", "linear", "full", "rgb-pgn", "rgb-replace", "vqt", "vqt-late", "cvpt", "cvpt-late")
READOUTS = ["cls", "patches", "patches+prompts", "prompts", "map"]
HEADS: dict[str, dict[str, Any]] = {
    "none": {"num_classes": None},
    "linear": {"num_classes": 5},
    "text": {
        "num_classes": 5,
        "head": "text",
        "class_embeddings": torch.arange(35.0).view(5, 7).cos(),
        "logit_scale": 14.3,
    },
    "label_map": {"num_classes": 5, "head": "label_map"},
    "prototypes": {
        "num_classes": 5,
        "head": "prototypes",
        "prototypes": torch.arange(240.0).view(5, 48).sin(),
    },
}


@pytest.fixture
def backbone(make_vit: Callable[..., VisionTransformer]) -> fp.FrozenViT:
    """Class token, one register, attention pooling, a 7-way classifier."""
    return fp.FrozenViT(make_vit(num_classes=7, reg_tokens=1, global_pool="map"))


@pytest.fixture
def build(configs: dict[str, PromptConfig]) -> Build:
    """`build(backbone, method, **options)`: a model whose every trained tensor is random, as after some training."""

    def model_of(backbone: fp.FrozenViT, method: str, **options: Any) -> fp.PromptedViT:
        model = fp.PromptedViT(backbone, configs[method], **options)
        with torch.no_grad():
            for _, p in model.trainable_parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    return model_of


def fits(method: str, readout: str) -> bool:
    return "prompts" not in readout or method not in NO_TOKENS


def assert_comes_back_from_disk(model: fp.PromptedViT, images: Tensor, directory: Path) -> None:
    model.train()
    model(images)  # moves PGN's batch statistics
    model.eval().save_pretrained(directory / "deep" / "adapter")
    assert sorted(p.name for p in (directory / "deep" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = fp.PromptedViT.from_pretrained(model.backbone, directory / "deep" / "adapter")
    assert not loaded.training
    assert (loaded.config, loaded.readout, loaded.class_names) == (
        model.config,
        model.readout,
        model.class_names,
    )
    assert loaded.num_classes == model.num_classes
    state, other = model.adapter_state_dict(), loaded.adapter_state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert torch.equal(loaded(images), model(images))
    trains = [name for name, _ in model.trainable_parameters()]
    assert [name for name, _ in loaded.trainable_parameters()] == trains


@pytest.mark.parametrize("readout", READOUTS)
def test_forward_equals_the_reference(
    backbone: fp.FrozenViT, build: Build, tiny_images: Tensor, variant: str, readout: str
) -> None:
    if not fits(variant, readout):
        with pytest.raises(ValueError, match=rf"readout '{readout.replace('+', '.')}' needs prompt tokens"):
            build(backbone, variant, readout=readout)
        return
    model, images = build(backbone.double(), variant, num_classes=5, readout=readout), tiny_images.double()
    for mode in (False, True):
        draws = model.train(mode).draw(4) or None
        logits = model(images, draws=draws)
        assert (logits.shape, logits.dtype) == ((4, 5), torch.float64)
        torch.testing.assert_close(model.reference_forward(images, draws=draws), logits, rtol=1e-10, atol=1e-10)
    if model.config.to_dict().get("inference_samples", 0) == 0:
        expected = model.eval()(images)
        torch.testing.assert_close(model.head(model.forward_features(images)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_only_what_should_train_gets_gradients(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str, head: str
) -> None:
    if method == "vqt" and head in ("text", "label_map", "prototypes"):
        with pytest.raises(ValueError, match=r"head .* reads features of width 48, those of the method have 336"):
            build(backbone, method, readout="cls", **HEADS[head])
        return
    model = build(backbone, method, readout="cls", **HEADS[head]).train()
    names = {name for name, _ in model.trainable_parameters()}
    parts = {name.partition(".")[0] for name in names}
    expected = ({"head"} if head == "linear" else set()) | (
        {"backbone"} if method == "full" else set() if method == "linear" else {"generator"}
    )
    assert parts == expected
    if not expected:
        return
    logits, aux = model(tiny_images, return_aux=True)
    # cosine heads on top of a plain sum have a gradient too
    ((logits * torch.randn_like(logits)).sum() + sum(v.sum() for v in aux.values())).backward()
    unused = ("backbone.map_pool", "backbone.head")
    for name, p in model.named_parameters():
        if name in names and not name.startswith(unused):
            assert p.grad is not None, name
        elif name not in names:
            assert p.grad is None, name
            assert not p.requires_grad, name
    assert all(p.grad is None for p in backbone.parameters())


def test_default_readout_is_that_of_the_backbone_s_own_head(
    backbone: fp.FrozenViT, tiny_images: Tensor, tiny_vit: VisionTransformer
) -> None:
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig())
    assert model.readout == "map"
    torch.testing.assert_close(model(tiny_images), backbone.forward_features(tiny_images))
    assert fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig()).readout == "cls"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (fp.VPTConfig(num_prompts=2), "patches+prompts"),
        (fp.VPTConfig(num_prompts=2, deep=False), "patches+prompts"),
        (fp.VAPTConfig(num_prompts=2), "patches+prompts"),
        (fp.PGNConfig(num_prompts=2, library_size=3, widths=(4,)), "patches"),
        (fp.FreePromptsConfig(num_prompts=2), "patches"),
        (fp.LinearProbeConfig(), "patches"),
    ],
)
def test_default_readout_where_the_backbone_averages_patches(
    make_vit: Callable[..., VisionTransformer], tmp_path: Path, config: PromptConfig, expected: str
) -> None:
    backbone = fp.FrozenViT(make_vit(global_pool="avg"))
    assert fp.PromptedViT(backbone, config).readout == expected
    fp.PromptedViT(backbone, config, readout="patches").save_pretrained(tmp_path)  # the default of earlier versions
    assert fp.PromptedViT.from_pretrained(backbone, tmp_path).readout == "patches"


@pytest.mark.parametrize("readout", ["cls", "patches", "map"])
def test_linear_probe_reads_the_backbone_s_tokens(
    make_vit: Callable[..., VisionTransformer], tiny_images: Tensor, readout: str
) -> None:
    vit = make_vit(depth=2, reg_tokens=1, global_pool="map").double()
    model = fp.PromptedViT(fp.FrozenViT(vit), fp.LinearProbeConfig(), readout=readout)
    tokens = vit.forward_features(tiny_images.double())
    expected = {"cls": tokens[:, 0], "patches": tokens[:, 2:].mean(1), "map": vit.attn_pool(tokens[:, 2:])}[readout]
    torch.testing.assert_close(model(tiny_images.double()), expected, rtol=1e-10, atol=1e-10)


def test_train_mode_reaches_generator_and_head_but_not_the_backbone(build: Build, backbone: fp.FrozenViT) -> None:
    model = build(backbone, "pgn", num_classes=5)
    assert model.train() is model
    assert model.generator.training
    assert model.head.training
    assert not any(m.training for m in model.backbone.modules())
    model.eval()
    assert not model.generator.training


def test_backbone_is_shared_between_adapters_but_copied_for_full_fine_tuning(
    backbone: fp.FrozenViT, tiny_images: Tensor
) -> None:
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3)).backbone is backbone
    full = fp.PromptedViT(backbone, fp.FullFineTuneConfig(), num_classes=5).train()
    assert full.backbone is not backbone
    optimizer = torch.optim.SGD([p for _, p in full.trainable_parameters()], lr=0.1)
    full(tiny_images).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert not torch.equal(full.backbone.blocks[0].qkv.weight, before["blocks.0.qkv.weight"])
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_bit_for_bit(
    backbone: fp.FrozenViT, build: Build, tiny_images: Tensor, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    names = [f"class {i}" for i in range(5)]
    model = build(backbone.to(dtype), variant, num_classes=5, readout="cls", class_names=names)
    assert_comes_back_from_disk(model, tiny_images.to(dtype), tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_saved_and_loaded_bit_for_bit(
    backbone: fp.FrozenViT, build: Build, tiny_images: Tensor, tmp_path: Path, head: str
) -> None:
    names = [f"class {i}" for i in range(5)] if head != "none" else None
    model = build(backbone, "vpt-deep", readout="cls", class_names=names, **HEADS[head])
    assert_comes_back_from_disk(model, tiny_images, tmp_path)


def test_a_head_object_is_saved_as_what_it_is(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, tmp_path: Path
) -> None:
    head = fp.PrototypeHead(torch.randn(4, 6), [(torch.randn(9, 48), None), (torch.randn(6, 9), torch.randn(6))])
    model = build(backbone, "free", head=head).eval()
    assert model.num_classes == 4
    model.save_pretrained(tmp_path)
    assert torch.equal(fp.PromptedViT.from_pretrained(backbone, tmp_path)(tiny_images), model(tiny_images))


def test_adapter_files_hold_no_backbone_and_say_what_they_are(
    build: Build, backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    model = build(backbone, "vpt-deep", num_classes=5, class_names="abcde")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {"generator.static.embeddings", "head.weight", "head.bias"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["backbone"]["fingerprint"] == backbone.fingerprint
    assert config["method"] == model.config.to_dict()
    assert (config["class_names"], config["fastprompt_version"]) == (list("abcde"), fp.__version__)


def test_adapter_loads_onto_a_cast_backbone(
    build: Build, backbone: fp.FrozenViT, tiny_vit: VisionTransformer, tmp_path: Path
) -> None:
    build(backbone, "vapt", num_classes=5).save_pretrained(tmp_path)
    loaded = fp.PromptedViT.from_pretrained(backbone.bfloat16(), tmp_path)
    assert {p.dtype for _, p in loaded.trainable_parameters()} == {torch.float32}


def test_another_backbone_is_refused(
    build: Build, backbone: fp.FrozenViT, tiny_vit: VisionTransformer, tmp_path: Path
) -> None:
    build(backbone, "vpt-deep", num_classes=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"trained on another backbone: .*{backbone.fingerprint[:12]}.*32x32 px"):
        fp.PromptedViT.from_pretrained(fp.FrozenViT(tiny_vit), tmp_path)


def test_raw_pixels_are_normalised_as_the_adapter_was_trained(tiny_vit: VisionTransformer, tmp_path: Path) -> None:
    trained = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=3), 5).eval()
    trained.save_pretrained(tmp_path)
    other = fp.FrozenViT(tiny_vit, mean=(0.5, 0.5, 0.5))
    loaded = fp.PromptedViT.from_pretrained(other, tmp_path)
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.forward_features(raw)  # which keeps what it folded
        torch.testing.assert_close(loaded(raw), trained(raw))
        assert (other.forward_features(raw) - loaded.backbone.forward_features(raw)).abs().max() > 1e-3
    assert loaded.backbone.patch_weight is other.patch_weight
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["backbone"]["mean"] == list(loaded.backbone.mean)
    stored, state = read_adapter(tmp_path)
    write_adapter(tmp_path, {**stored, "backbone": {**stored["backbone"], "std": [1, 0, 1]}}, state)
    with pytest.raises(ValueError, match=r"corrupted: backbone\.std must be three positive numbers") as caught:
        fp.PromptedViT.from_pretrained(other, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_adapter_loads_its_backbone(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: Tensor
) -> None:
    made = fp.FrozenViT.from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    made.source, calls = BackboneSource("load_backbone", "clip-vit-b16", image_size=(32, 32)), []

    def load(name: str, image_size: Any) -> fp.FrozenViT:
        calls.append((name, image_size))
        return made

    monkeypatch.setattr(assets, "load_backbone", load)
    model = build(made, "vpt-deep", num_classes=5).eval()
    model.preprocessing = Preprocessing("squash", (0, 4095))
    model.save_pretrained(tmp_path)
    again = fp.PromptedViT.from_pretrained(tmp_path)
    assert calls == [("clip-vit-b16", (32, 32))]
    assert torch.equal(again(tiny_images), model(tiny_images))
    assert again.preprocessing == model.preprocessing
    again = fp.PromptedViT.from_pretrained(made, tmp_path)
    assert again.preprocessing == model.preprocessing


def test_an_adapter_that_does_not_name_its_backbone_says_so(
    build: Build, backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    build(backbone, "vpt-deep", num_classes=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not record how its backbone, .*, was loaded: .* give it") as caught:
        fp.PromptedViT.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    resave(tmp_path, lambda c, t: c["backbone"]["optional"].update(source={"loader": "of the future", "name": "x"}))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot load its backbone: .*loader must be one of"):
        fp.PromptedViT.from_pretrained(str(tmp_path))
    assert fp.PromptedViT.from_pretrained(backbone, tmp_path).num_classes == 5
    resave(tmp_path, lambda c, t: c["backbone"]["optional"].update(preprocessing={"resize": "crop", "grey": True}))
    with pytest.raises(ValueError, match="preprocessing has no option 'grey'"):
        fp.PromptedViT.from_pretrained(backbone, tmp_path)


@pytest.mark.parametrize("arguments", [(None, "x"), ("x", "x"), (3,), (None,)])
def test_from_pretrained_names_what_it_takes(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"from_pretrained\(backbone, directory\) or from_pretrained\(directory\)"):
        fp.PromptedViT.from_pretrained(*arguments)


def test_from_pretrained_needs_a_directory(backbone: fp.FrozenViT) -> None:
    with pytest.raises(TypeError, match="directory must be that of an adapter, got None"):
        fp.PromptedViT.from_pretrained(backbone)


class Data(list):
    """A data set with attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update(attributes)


def test_class_names_and_preprocessing_come_from_the_data(build: Build, backbone: fp.FrozenViT) -> None:
    squash = Preprocessing("squash")
    for data in (
        Data(class_names=list("abcde"), preprocessing=squash),
        Data(classes=list("abcde"), preprocessing=squash),  # as torchvision's
        Data(dataset=Data(dataset=Data(class_names=list("abcde"), preprocessing=squash))),  # a loader of a subset
    ):
        model = build(backbone, "vpt-deep", num_classes=5)
        model.describe_data(data)
        assert (model.class_names, model.preprocessing) == (list("abcde"), squash)


def test_class_names_that_the_model_has_stay(build: Build, backbone: fp.FrozenViT) -> None:
    model = build(backbone, "vpt-deep", num_classes=5, class_names="vwxyz")
    model.describe_data(Data(class_names=list("abcde")))
    assert (model.class_names, model.preprocessing) == (list("vwxyz"), None)
    with pytest.raises(ValueError, match="class_names must be in the order of the data's labels"):
        model.describe_data(Data(class_names=list("zyxwv")))


@pytest.mark.parametrize("names", [list("abcd"), "abcde", [1, 2, 3, 4, 5], 3, None])
def test_names_that_do_not_fit_are_left_alone(build: Build, backbone: fp.FrozenViT, names: Any) -> None:
    model = build(backbone, "vpt-deep", num_classes=5)
    model.describe_data(Data(class_names=names))
    model.describe_data((torch.zeros(1), torch.zeros(1)))
    assert model.class_names is None


def edit_config(directory: Path, change: Callable[[dict], Any]) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def resave(directory: Path, change: Callable[[dict, dict], Any]) -> None:
    """An adapter whose digests are right and whose configuration or tensors are not."""
    config, tensors = read_adapter(directory)
    change(config, tensors)
    write_adapter(directory, config, tensors)


def damage(directory: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (directory / name).write_bytes(change((directory / name).read_bytes()))


CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated tensors": (
        lambda d: damage(d, "adapter_model.safetensors", lambda b: b[:-10]),
        r"adapter_model\.safetensors is corrupted",
    ),
    "empty tensors": (lambda d: damage(d, "adapter_model.safetensors", lambda b: b""), "is corrupted"),
    "flipped header": (
        lambda d: damage(d, "adapter_model.safetensors", lambda b: bytes([b[0] ^ 255]) + b[1:]),
        "is corrupted",
    ),
    "flipped bit": (
        lambda d: damage(d, "adapter_model.safetensors", lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
        r"adapter_model\.safetensors is corrupted: .*sha256",
    ),
    "truncated config": (
        lambda d: damage(d, "adapter_config.json", lambda b: b[:40]),
        r"config\.json is corrupted",
    ),
    "config no text": (
        lambda d: damage(d, "adapter_config.json", lambda b: b"\xff" + b),
        r"config\.json is corrupted",
    ),
    "config no object": (
        lambda d: damage(d, "adapter_config.json", lambda b: b"[1]"),
        "not an adapter configuration",
    ),
    "other format": (lambda d: edit_config(d, lambda c: c.update(format=2)), "configuration of format 1"),
    "missing key": (lambda d: edit_config(d, lambda c: c.pop("readout")), r"missing keys \['readout'\]"),
    "unknown key": (lambda d: edit_config(d, lambda c: c.update(extra=1)), r"unknown keys \['extra'\]"),
    "unknown option": (
        lambda d: resave(d, lambda c, t: c["method"].update(promts=1)),
        "no option 'promts'",
    ),
    "unknown method": (
        lambda d: resave(d, lambda c, t: c["method"].update(kind="x")),
        "kind must be one of",
    ),
    "bad option": (
        lambda d: resave(d, lambda c, t: c["method"].update(num_prompts=0)),
        "num_prompts must be",
    ),
    "bad readout": (lambda d: resave(d, lambda c, t: c.update(readout="mean")), "readout must be one of"),
    "bad head": (lambda d: resave(d, lambda c, t: c["head"].update(kind="mlp")), "head must be one of"),
    "head no object": (lambda d: resave(d, lambda c, t: c.update(head=3)), "cannot be read"),
    "backbone no object": (lambda d: edit_config(d, lambda c: c.update(backbone=None)), "backbone"),
    "backbone without fingerprint": (
        lambda d: edit_config(d, lambda c: c["backbone"].pop("fingerprint")),
        "fingerprint",
    ),
    "method no object": (lambda d: resave(d, lambda c, t: c.update(method=[1])), "cannot be read"),
    "number of classes": (
        lambda d: resave(d, lambda c, t: c.update(num_classes=4, class_names=None)),
        r"head\.\w+ has shape \(5",
    ),
    "class names": (
        lambda d: resave(d, lambda c, t: c.update(class_names=["a"])),
        "class_names has 1 names, num_classes is 5",
    ),
    "missing tensor": (lambda d: resave(d, lambda c, t: t.pop("head.bias")), r"missing \['head\.bias'\]"),
    "unknown tensor": (lambda d: resave(d, lambda c, t: t.update(x=torch.ones(1))), r"unknown \['x'\]"),
    "misshapen tensor": (
        lambda d: resave(d, lambda c, t: t.update({"head.bias": torch.ones(6)})),
        r"head\.bias has shape \(6,\), this model has \(5,\)",
    ),
    "NaN tensor": (
        lambda d: resave(d, lambda c, t: t["head.bias"].fill_(float("nan"))),
        r"head\.bias .*NaN",
    ),
}


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_adapters_are_refused(
    build: Build, backbone: fp.FrozenViT, tmp_path: Path, corrupt: Callable[[Path], Any], message: str
) -> None:
    build(backbone, "vpt-deep", num_classes=5, class_names="abcde").save_pretrained(tmp_path)
    corrupt(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        fp.PromptedViT.from_pretrained(backbone, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(build: Build, backbone: fp.FrozenViT, tmp_path: Path, name: str) -> None:
    build(backbone, "vpt-deep", num_classes=5).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"is no adapter: {name} is missing"):
        fp.PromptedViT.from_pretrained(backbone, tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("fsync", OSError(28, "No space left on device")),
        ("fsync", KeyboardInterrupt()),
        ("replace", KeyboardInterrupt()),
    ],
)
def test_a_full_disk_or_ctrl_c_while_saving_changes_nothing(
    build: Build,
    backbone: fp.FrozenViT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
    call: int,
    exists: bool,
) -> None:
    directory = tmp_path / "adapter"
    if exists:
        build(backbone, "vpt-deep", num_classes=5).save_pretrained(directory)
        before = contents(directory)
    model, original, calls = build(backbone, "pgn", num_classes=5), getattr(os, function), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(files.os, function, failing)
    with pytest.raises(type(error)):
        model.save_pretrained(directory)
    monkeypatch.undo()
    assert len(calls) >= call
    if exists:
        assert contents(directory) == before
        fp.PromptedViT.from_pretrained(backbone, directory)
    else:
        assert not directory.exists() or contents(directory) == {}


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_write_that_the_system_refuses_is_an_error_that_names_the_file(
    build: Build, backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    import resource

    model = build(backbone, "pgn", num_classes=5)
    model.save_pretrained(tmp_path)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


def test_load_adapter_state_dict_is_strict_and_changes_nothing_on_error(build: Build, backbone: fp.FrozenViT) -> None:
    model = build(backbone, "vpt-deep", num_classes=5)
    before = {k: v.clone() for k, v in model.adapter_state_dict().items()}
    good = {k: torch.zeros_like(v) for k, v in before.items()}
    for bad, message in (
        ({k: v for k, v in good.items() if k != "head.bias"}, r"missing \['head\.bias'\]"),
        ({**good, "other": torch.ones(1)}, r"unknown \['other'\]"),
        ({**good, "head.weight": torch.ones(5, 1)}, r"head\.weight has shape \(5, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter_state_dict(bad)
        assert all(torch.equal(v, before[k]) for k, v in model.adapter_state_dict().items())
    for bad in (None, {k: v.tolist() for k, v in good.items()}):
        with pytest.raises(TypeError, match=r"state must be a mapping of tensors"):
            model.load_adapter_state_dict(bad)
    model.load_adapter_state_dict(good)
    assert all((v == 0).all() for v in model.adapter_state_dict().values())


def test_bfloat16_backbone_keeps_trained_tensors_and_logits_in_float32(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str
) -> None:
    model = build(backbone, method, num_classes=5, readout="cls").eval()
    expected = model(tiny_images)
    model.set_backbone_dtype(torch.bfloat16)
    assert model.backbone_dtype == torch.bfloat16
    logits = model(tiny_images)
    assert logits.dtype == torch.float32
    assert {p.dtype for _, p in model.trainable_parameters()} == {torch.float32}
    assert not torch.equal(logits, expected)
    assert (logits - expected).norm() < 0.1 * expected.norm()
    model.train()(tiny_images).square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.trainable_parameters() if p.grad is not None)
    model.set_backbone_dtype(torch.float32)
    assert model.backbone_dtype == torch.float32
    assert model(tiny_images).dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype, got torch.int8"):
        model.set_backbone_dtype(torch.int8)


@pytest.mark.parametrize("head", HEADS)
def test_double_moves_everything(build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, head: str) -> None:
    model = build(backbone, "vapt", readout="cls", **HEADS[head]).eval()
    single = model(tiny_images)
    double = model.double()(tiny_images)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)
    assert model.to(torch.bfloat16)(tiny_images).dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str, batch: int) -> None:
    for readout in ("cls", "map", *(["patches+prompts"] if fits(method, "prompts") else [])):
        model = build(backbone.double(), method, num_classes=5, readout=readout).eval()
        expected = model(tiny_images.double())[:batch]
        for run in (model, model.reference_forward):
            torch.testing.assert_close(run(tiny_images[:batch].double()), expected, rtol=1e-9, atol=1e-9)


def test_a_batch_of_0_without_gradients(build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str) -> None:
    model = build(backbone, method, num_classes=5).eval()
    with torch.no_grad():
        assert model(tiny_images[:0]).shape == (0, 5)


def test_memory_layout_of_the_images_does_not_matter(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str
) -> None:
    model, images = build(backbone.double(), method, num_classes=5).eval(), tiny_images.double()
    expected = model(images)
    strided = torch.stack([images, images], dim=-1).flatten(3)[..., ::2]
    assert not strided.is_contiguous()
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        strided,
        images.expand(4, -1, -1, -1),
    ):
        torch.testing.assert_close(model(other), expected, rtol=1e-9, atol=1e-9)


def test_raw_pixels_are_the_normalised_image(build: Build, backbone: fp.FrozenViT, method: str) -> None:
    model = build(backbone.double(), method, num_classes=5).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(pixels), model(backbone.normalise(pixels)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "part"), [("vpt-deep", "generator"), ("pgn", "generator"), ("linear", "head")])
def test_a_shared_backbone_that_was_moved_is_named(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str, part: str
) -> None:
    first, second = build(backbone, method, num_classes=5), build(backbone, "vpt-deep", num_classes=5)
    second.to("meta")
    with pytest.raises(ValueError, match=rf"the {part} is on cpu, the backbone is on meta.*model\.to\('meta'\)"):
        first(tiny_images.to("meta"))
    assert first.to("meta")(tiny_images.to("meta")).shape == (4, 5)


def test_aux_is_empty_where_a_loss_needs_nothing_more(
    build: Build, backbone: fp.FrozenViT, tiny_images: Tensor
) -> None:
    logits, aux = build(backbone, "vpt-deep", num_classes=5)(tiny_images, return_aux=True)
    assert aux == {}
    assert logits.shape == (4, 5)


def test_counts(backbone: fp.FrozenViT, capsys: pytest.CaptureFixture[str]) -> None:
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=3), num_classes=5)
    assert model.num_trainable() == {
        "total": 3 * 3 * 48 + 5 * 49,
        "generator": 432,
        "head": 245,
        "backbone": 0,
    }
    assert model.paper_parameter_count() == 432
    total = sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: 677 || all params: {total:,} || trainable%: {100 * 677 / total:.4f}\n"
    )
    assert fp.PromptedViT(backbone, fp.LinearProbeConfig(), 5).paper_parameter_count() is None
    full = fp.PromptedViT(backbone, fp.FullFineTuneConfig(), 5).num_trainable()
    assert full["backbone"] == sum(p.numel() for n, p in backbone.named_parameters() if not n.startswith("head."))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be a positive integer or None, got 0"),
        ({"num_classes": 2.0}, ValueError, r"num_classes must be a positive integer or None, got 2\.0"),
        ({"num_classes": True}, ValueError, "num_classes must be a positive integer"),
        ({"num_classes": 5, "head": "mlp"}, ValueError, "head must be one of .* got 'mlp'"),
        ({"num_classes": 5, "head": "text"}, ValueError, "head 'text' needs class_embeddings"),
        (
            {"num_classes": 5, "head": "text", "class_embeddings": torch.ones(4, 7)},
            ValueError,
            "class_embeddings must have one row for each of 5 classes, got 4 rows",
        ),
        (
            {"num_classes": 5, "head": "text", "class_embeddings": torch.ones(5, 6)},
            ValueError,
            r"class_embeddings must have shape \(C, 7\).*got \(5, 6\)",
        ),
        ({"num_classes": 5, "head": "prototypes"}, ValueError, "head 'prototypes' needs prototypes"),
        ({"num_classes": 8, "head": "label_map"}, ValueError, "num_classes must be at most the 7 outputs"),
        ({"head": "text", "class_embeddings": torch.ones(5, 7)}, ValueError, "head 'text' needs num_classes"),
        ({"head": "label_map"}, ValueError, "head 'label_map' needs num_classes"),
        (
            {"num_classes": 5, "class_embeddings": torch.ones(5, 7)},
            ValueError,
            "class_embeddings is for head 'text', head is 'linear'",
        ),
        (
            {"num_classes": 5, "head": "text", "prototypes": torch.ones(5, 7)},
            ValueError,
            "prototypes is for head 'prototypes', head is 'text'",
        ),
        (
            {"num_classes": 5, "class_names": 5},
            TypeError,
            "class_names must be a sequence of names, got int",
        ),
        ({"num_classes": 5, "readout": "mean"}, ValueError, "readout must be one of .* got 'mean'"),
        ({"num_classes": 5, "class_names": ["a"]}, ValueError, "class_names has 1 names, num_classes is 5"),
        ({"config": {"kind": "vpt"}}, TypeError, "config must be one of .*PGNConfig.* got dict"),
        ({"config": "vpt"}, TypeError, "config must be .* got str"),
        ({"backbone": "clip-vit-b16"}, TypeError, "backbone must be a FrozenViT, got str"),
        (
            {"backbone": nn.Linear(2, 2)},
            TypeError,
            "backbone must be a FrozenViT, got Linear; wrap a timm model",
        ),
    ],
)
def test_bad_arguments_are_named(
    backbone: fp.FrozenViT, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fp.PromptedViT(**{"backbone": backbone, "config": fp.VPTConfig(), **options})


def test_bad_readouts_for_a_backbone_are_named(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(ValueError, match=r"readout 'map' needs an attention-pooling head"):
        fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(), readout="map")
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, class_token=False, global_pool="avg"
    )
    with pytest.raises(ValueError, match=r"readout 'cls' needs a class token"):
        fp.PromptedViT(fp.FrozenViT(vit), fp.VPTConfig(), readout="cls")


def test_given_head_must_agree_with_num_classes(backbone: fp.FrozenViT) -> None:
    with pytest.raises(ValueError, match=r"num_classes is 3, the given head has 5"):
        fp.PromptedViT(backbone, fp.VPTConfig(), 3, head=fp.LinearHead(48, 5))


def test_bad_images_are_named(build: Build, backbone: fp.FrozenViT, tiny_images: Tensor, method: str) -> None:
    model = build(backbone, method, num_classes=5)
    for images, error, message in (
        (tiny_images.long(), TypeError, "images must be floating point"),
        (tiny_images[0], ValueError, "images must have shape"),
        (tiny_images[..., :16], ValueError, "images must be 32 x 32 pixels"),
        (tiny_images / 0, ValueError, "NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            model(images)


def test_other_image_sizes_on_a_backbone_that_takes_them(
    make_vit: Callable[..., VisionTransformer], build: Build, method: str
) -> None:
    vit = make_vit(depth=2, dynamic_img_size=True)
    model = build(fp.FrozenViT(vit).double(), method, num_classes=5).eval()
    images = torch.randn(2, 3, 40, 24).double()
    if method.startswith(("vapt", "pixel", "rgb")):  # their tensors are made for one grid, or one frame
        with pytest.raises(ValueError, match=r"4 x 4 patch tokens.* got 15|images must have \(32, 32\) pixels"):
            model(images)
        return
    torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("method", "readout"),
    [
        ("vpt-dropout", "patches+prompts"),
        ("vpt-shallow-project", "patches+prompts"),
        ("v2apt", "patches+prompts"),
        ("v2apt-per-layer", "patches+prompts"),
        ("free", "patches+prompts"),
        ("pixel", "patches"),
        ("linear", "patches"),
        ("full", "patches"),
    ],
)
def test_methods_on_swin_train_and_come_back_from_disk(
    tiny_swin: Callable[..., nn.Module],
    tiny_images: Tensor,
    configs: dict[str, PromptConfig],
    method: str,
    readout: str,
    version: int,
    tmp_path: Path,
) -> None:
    config = configs[method]
    backbone = fp.FrozenViT(tiny_swin(version))
    model = fp.PromptedViT(backbone, config, num_classes=5)
    assert model.readout == readout
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    for _ in range(2):  # behind the first step no initial zero is left
        logits, aux = model.train()(tiny_images, return_aux=True)
        optimizer.zero_grad()
        (logits.square().sum() + sum(value.sum() for name, value in aux.items() if name == "kl")).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trainable_parameters() if p.numel())
    model.eval().save_pretrained(tmp_path)
    again = fp.PromptedViT.from_pretrained(backbone, tmp_path)
    assert torch.equal(again(tiny_images), model(tiny_images))
    assert not torch.allclose(fp.PromptedViT(backbone, config, num_classes=5).eval()(tiny_images), model(tiny_images))
    with pytest.raises(ValueError, match="was trained on another backbone"):
        fp.PromptedViT.from_pretrained(fp.FrozenViT(tiny_swin(version, seed=1)), tmp_path)


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        ("cls", "readout 'cls' needs a class token; this backbone has none"),
        ("map", "readout 'map' needs an attention-pooling head; this backbone has none"),
        ("pixels", "readout must be one of"),
    ],
)
def test_readouts_that_swin_has_not_are_refused(
    tiny_swin: Callable[..., nn.Module], readout: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VPTConfig(num_prompts=3), readout=readout)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "prototypes"])
def test_heads_on_swin_read_the_last_stage(tiny_swin: Callable[..., nn.Module], tiny_images: Tensor, head: str) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_swin(num_classes=7)), fp.VPTConfig(num_prompts=3), **HEADS[head])
    assert model.forward_features(tiny_images).shape == (4, 32)
    assert model(tiny_images).shape == (4, 32 if head == "none" else 5)


def test_parameters_of_a_prompted_swin_are_counted(
    tiny_swin: Callable[..., nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VPTConfig(num_prompts=3), num_classes=5)
    prompts = 3 * (2 * 8 + 2 * 16 + 32)
    assert model.num_trainable() == {"total": prompts + 165, "generator": prompts, "head": 165, "backbone": 0}
    assert model.paper_parameter_count() == prompts
    model.print_trainable_parameters()
    assert f"trainable params: {prompts + 165:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["pgn", "vpt-deep", "vapt", "v2apt", "free", "pixel", "rgb-pgn"])
def test_prompts_and_backbone_train_together(
    method: str, configs: dict[str, PromptConfig], tiny_vit: VisionTransformer, tiny_images: Tensor, tmp_path: Path
) -> None:
    """Exact as with a frozen backbone, and every tensor that is read has the gradient of the papers' graph."""
    shared = fp.FrozenViT(tiny_vit).double()
    before = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    model = fp.PromptedViT(shared, configs[method], 5, train_backbone=True).train()
    images = tiny_images.double()
    gradients = []
    draws = model.draw(4)
    for run in (model, model.reference_forward):
        model.zero_grad()
        run(images, draws=draws).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.trainable_parameters() if p.grad is not None})
    assert {"head", "generator", "backbone"} == {name.partition(".")[0] for name in gradients[0]}
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10, msg=name)
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=1e-4)
    optimizer.step()
    assert model.num_trainable()["backbone"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.state_dict().items())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)
        first = model(images)
        for _, parameter in model.backbone.named_parameters():
            parameter.mul_(1.01)
        assert not torch.equal(model(images), first)
        torch.testing.assert_close(model(images), model.reference_forward(images), rtol=1e-10, atol=1e-10)
        model.save_pretrained(tmp_path)
        loaded = fp.PromptedViT.from_pretrained(shared, tmp_path)
        assert loaded.full
        assert torch.equal(loaded(images), model(images))
    with pytest.raises(ValueError, match="fully fine-tuned"):
        fp.Engine(shared, (4,), torch.float64, "eager").add_adapter("mine", model)


def test_train_backbone_is_yes_or_no(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(TypeError, match="train_backbone must be True or False, got 'yes'"):
        fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.PGNConfig(), 5, train_backbone="yes")  # type: ignore[arg-type]
