"""Adapters on disk: one unit whatever is killed, read beside a writer, damaged or made to do harm."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import in_a_child, killed_at
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.adapters import CONFIG_FILE, WEIGHTS_FILE, Preprocessing, check_sizes, read_adapter, write_adapter

SAVED = Path(__file__).parent / "golden" / "saved"
"""Adapters that commit 5c9eef2 saved on the timm module whose state is in `backbone.safetensors`: three classes, every
tensor random. `logits.safetensors` has two normalised images and what that commit's models made of them."""
KEYS = {"format", "fastprompt_version", "method", "num_classes", "head", "readout", "class_names", "backbone"}


def adapter(value: float, size: int = 6) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter whose class name is the value of its tensors."""
    config = {
        "method": {"kind": "linear"},
        "num_classes": 1,
        "head": {"kind": "linear"},
        "readout": "cls",
        "class_names": [str(value)],
        "backbone": {"name": "vit", "fingerprint": "0", "image_size": [32, 32]},
    }
    state = {"a": torch.full((2, size), value), "b": torch.full((size, 2), value), "n": torch.tensor(int(value))}
    return config, state


def value_of(directory: Path) -> float:
    """The value of the adapter there, all of whose parts have it."""
    config, state = read_adapter(directory)
    [value] = {tensor.double().unique().item() for tensor in state.values()}
    assert config["class_names"] == [str(value)]
    return value


@pytest.fixture
def saved_backbone() -> fp.FrozenViT:
    """The backbone of `SAVED`."""
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    vit.load_state_dict(load_file(SAVED / "backbone.safetensors"))
    return fp.FrozenViT(vit)


@pytest.mark.parametrize("method", ["pgn", "vpt-deep", "v2apt"])
def test_an_adapter_of_an_earlier_version_still_loads(
    method: str, saved_backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    expected = load_file(SAVED / "logits.safetensors")
    model = fp.PromptedViT.from_pretrained(saved_backbone, SAVED / method)
    assert model.class_names == ["cat", "chien", "🦆"]
    torch.testing.assert_close(model(expected["images"]), expected[method])
    model.save_pretrained(tmp_path)
    again = fp.PromptedViT.from_pretrained(saved_backbone, tmp_path)
    assert torch.equal(again(expected["images"]), model(expected["images"]))


posix = pytest.mark.skipif(os.name != "posix", reason="forks a process and kills it")
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@posix
@forks
@pytest.mark.parametrize("before", [None, "this version", "an earlier version"])
def test_whenever_a_save_is_killed_the_old_or_the_new_adapter_is_there(before: str | None, tmp_path: Path) -> None:
    number, seen = 0, []
    while True:
        number += 1
        directory = tmp_path / f"killed at {number}"
        if before is not None:
            write_adapter(directory, *adapter(1.0))
        if before == "an earlier version":
            make_earlier(directory)
        ended = killed_at(number, directory, lambda to=directory: write_adapter(to, *adapter(2.0)))
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            break
        try:
            found = value_of(directory)
        except FileNotFoundError:
            found = None
        assert found in (2.0, None if before is None else 1.0)
        seen.append(found)
        write_adapter(directory, *adapter(3.0))
        assert value_of(directory) == 3.0
        assert json.loads((directory / CONFIG_FILE).read_text())["class_names"] == ["3.0"]
    assert len(seen) >= 8
    assert len(set(seen)) == 2  # killed early and late


@posix
@forks
def test_a_save_that_is_killed_in_the_middle_of_a_write_changes_nothing(tmp_path: Path) -> None:
    import resource

    def short_of_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_adapter(tmp_path, *adapter(2.0, size=500))

    write_adapter(tmp_path, *adapter(1.0))
    assert in_a_child(short_of_space) == -signal.SIGXFSZ
    assert value_of(tmp_path) == 1.0


@posix
@forks
@pytest.mark.parametrize("writers", [1, 2])
def test_reads_beside_writers_see_one_save_each(writers: int, tmp_path: Path) -> None:
    write_adapter(tmp_path, *adapter(1.0))
    children = []
    try:
        for writer in range(writers):
            child = os.fork()
            if child == 0:
                while True:
                    for value in (1.0, 2.0):
                        write_adapter(tmp_path, *adapter(value + 2 * writer))
            children.append(child)
        values = [value_of(tmp_path) for _ in range(400)]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert len(set(values)) >= 2  # they wrote meanwhile
    assert value_of(tmp_path) in {1.0, 2.0, 3.0, 4.0}


def test_what_happens_to_the_files_after_a_read_changes_nothing(tmp_path: Path) -> None:
    write_adapter(tmp_path, *adapter(1.0))
    _, state = read_adapter(tmp_path)
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    with open(tmp_path / WEIGHTS_FILE, "r+b") as file:
        file.write(b"\0" * size)
    assert all((tensor == 1).all() for tensor in state.values())
    os.truncate(tmp_path / WEIGHTS_FILE, 0)  # of a memory map, the next look is a SIGBUS
    assert all((tensor == 1).all() for tensor in state.values())


def flips(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`content` with one bit flipped: the bits of the first 40 bytes, then random ones."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(8 * len(content), generator=random)[:count].tolist()
    for place in [*range(0, 320, 5), *chosen]:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_flipped_bit_is_an_error_that_names_the_file_or_changes_nothing(
    name: str, saved_backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    fp.PromptedViT.from_pretrained(saved_backbone, SAVED / "vpt-deep").save_pretrained(tmp_path)
    config, state = read_adapter(tmp_path)
    content = (tmp_path / name).read_bytes()
    refused = unchanged = tried = 0
    for flipped in flips(content, 300, seed=len(name)):
        (tmp_path / name).write_bytes(flipped)
        tried += 1
        try:
            found, tensors = read_adapter(tmp_path)
        except ValueError as error:
            refused += str(tmp_path / name) in str(error)
            continue
        unchanged += 1
        assert found == config
        assert list(tensors) == list(state)
        assert all(torch.equal(tensors[key], state[key]) for key in state)
        assert all(tensors[key].dtype == state[key].dtype for key in state)
    assert refused + unchanged == tried
    assert refused > 5 * unchanged  # of a bit in white space, a carriage return comes


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The weights file with another header."""
    content = (directory / WEIGHTS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def swap(header: dict[str, Any]) -> None:
    header["a"], header["b"] = header["b"], header["a"]


def make_earlier(directory: Path) -> None:
    """The adapter there as an earlier version would have written it."""
    config, state = read_adapter(directory)
    del config["backbone"]["optional"]
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    save_file(state, directory / WEIGHTS_FILE, {"format": "pt"})


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "names swapped": swap,
    "a dtype": lambda h: h["a"].update(dtype="I32"),
    "a shape": lambda h: h["a"].update(shape=[6, 2]),
    "no metadata": lambda h: h.pop("__metadata__"),
    "no digest": lambda h: h["__metadata__"].pop("digest"),
    "no configuration": lambda h: h["__metadata__"].pop("config"),
    "an earlier version's metadata": lambda h: h.update(__metadata__={"format": "pt"}),
    "another configuration": lambda h: h["__metadata__"].update(
        config=h["__metadata__"]["config"].replace("1.0", "9.0")
    ),
    "an unknown dtype": lambda h: h["a"].update(dtype="F8_E4M3"),
    "a shape of gigabytes": lambda h: h["a"].update(shape=[1 << 40]),
    "offsets of gigabytes": lambda h: h["a"].update(data_offsets=[0, 1 << 40], shape=[1 << 38]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_the_header_is_under_the_digest(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    write_adapter(tmp_path, *adapter(1.0))
    rewrite_header(tmp_path, change)
    with pytest.raises(ValueError, match=WEIGHTS_FILE):
        read_adapter(tmp_path)


WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "a huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header that is too long": (1000).to_bytes(8, "little") + b"{}",
    "a deep header": (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
    "a name twice": (lambda t: len(t).to_bytes(8, "little") + t + bytes(4))(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    ),
    "a small float": (lambda t: len(t).to_bytes(8, "little") + t + bytes(4))(
        b'{"a":{"dtype":"F8_E5M2","shape":[4],"data_offsets":[0,4]}}'
    ),
    "a dtype nobody knows": (lambda t: len(t).to_bytes(8, "little") + t + bytes(4))(
        b'{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    ),
    "a header that is no object": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_none(content: bytes, tmp_path: Path) -> None:
    write_adapter(tmp_path, *adapter(1.0))
    make_earlier(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=WEIGHTS_FILE):
        read_adapter(tmp_path)


CONFIGS: dict[str, Callable[[str], str]] = {
    "deep": lambda text: "[" * 200_000,
    "deep in a value": lambda text: text.replace('"linear"', "[" * 200_000, 1),
    "a key twice": lambda text: text.replace('"num_classes"', '"num_classes": 1, "num_classes"', 1),
    "NaN": lambda text: text.replace('"num_classes": 1', '"num_classes": NaN', 1),
    "an infinite number": lambda text: text.replace('"num_classes": 1', '"num_classes": 1e999', 1),
    "a huge integer": lambda text: text.replace('"num_classes": 1', '"num_classes": 1' + "0" * 5000, 1),
    "too long": lambda text: text + " " * (16 << 20),
    "names that are numbers": lambda text: text.replace('"1.0"', "1.0", 1),
    "edited": lambda text: text.replace('"1.0"', '"2.0"', 1),
}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_none(change: Callable[[str], str], earlier: bool, tmp_path: Path) -> None:
    write_adapter(tmp_path, *adapter(1.0))
    if earlier:
        make_earlier(tmp_path)
    text = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(change(text))
    assert change(text) != text
    if earlier and change is CONFIGS["edited"]:  # nothing tells
        assert read_adapter(tmp_path)[0]["class_names"] == ["2.0"]
        return
    with pytest.raises(ValueError, match=CONFIG_FILE):
        read_adapter(tmp_path)


def test_what_is_optional_is_ignored_and_what_is_not_is_refused_by_name(tmp_path: Path) -> None:
    config, state = adapter(1.0)
    write_adapter(tmp_path, {**config, "backbone": {**config["backbone"], "optional": {"of the future": [1]}}}, state)
    found, _ = read_adapter(tmp_path)
    assert found["backbone"]["optional"]["of the future"] == [1]
    assert set(found) == KEYS  # earlier versions refuse others
    write_adapter(tmp_path, {**config, "of the future": 1}, state)
    with pytest.raises(ValueError, match=r"unknown keys \['of the future'\]"):
        read_adapter(tmp_path)


def test_a_configuration_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    config, state = adapter(1.0)
    write_adapter(tmp_path, config, state)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_adapter(tmp_path, {**config, "head": {"scale": float("nan")}}, state)
    with pytest.raises(ValueError, match="must have at most"):
        write_adapter(tmp_path, {**config, "class_names": ["x" * (17 << 20)]}, state)
    assert value_of(tmp_path) == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fp.PGNConfig(num_prompts=2, library_size=10**9), r"has shape \(.*\), the configuration says \(.*"),
        (fp.PGNConfig(num_prompts=2, library_size=3, widths=(10**9, 4)), "no tensor can have"),
        (fp.PGNConfig(num_prompts=10**18, library_size=10**18), "no tensor can have the sizes"),
        (fp.VPTConfig(num_prompts=10**10), "has shape|missing"),
        (fp.V2APTConfig(num_prompts=3, num_instance=1, latent=2, hidden=10**9), "has shape|missing"),
        (fp.VAPTConfig(num_prompts=10**9, hidden=3), "has shape|missing"),
        (fp.PGNConfig(widths=(1,) * 10**6), "widths has 1,000,000 entries, but there are only"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_configuration_cannot_ask_for_memory(
    config: Any, message: str, saved_backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    kind = {"pgn": "pgn", "v2apt": "v2apt"}.get(config.kind, "vpt-deep")
    stored, state = read_adapter(SAVED / kind)
    write_adapter(tmp_path, {**stored, "method": config.to_dict()}, state)
    with pytest.raises(ValueError, match=message) as caught:
        fp.PromptedViT.from_pretrained(saved_backbone, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("num_classes", [10**12, -1, True, "3", [3], 1.5])
def test_a_number_of_classes_that_is_none(num_classes: Any, saved_backbone: fp.FrozenViT, tmp_path: Path) -> None:
    stored, state = read_adapter(SAVED / "vpt-deep")
    write_adapter(tmp_path, {**stored, "num_classes": num_classes, "class_names": None}, state)
    with pytest.raises(ValueError, match=str(tmp_path)):
        fp.PromptedViT.from_pretrained(saved_backbone, tmp_path)


@pytest.mark.parametrize("name", ["generator.static.embeddings", "head.weight"])
def test_tensors_of_another_kind_are_refused(name: str, saved_backbone: fp.FrozenViT, tmp_path: Path) -> None:
    stored, state = read_adapter(SAVED / "vpt-deep")
    write_adapter(tmp_path, stored, {**state, name: state[name].long()})
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.int64, this model has torch\.float32"):
        fp.PromptedViT.from_pretrained(saved_backbone, tmp_path)
    wide = state[name].double()
    wide.view(-1)[-1] = 1e300
    write_adapter(tmp_path, stored, {**state, name: wide})
    with pytest.raises(ValueError, match=rf"{name} contains NaN or infinite values in torch\.float32") as caught:
        fp.PromptedViT.from_pretrained(saved_backbone, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert torch.isfinite(fp.PromptedViT.from_pretrained(saved_backbone.double(), tmp_path).head.weight).all()


@pytest.mark.parametrize("method", ["pgn", "vpt-deep", "v2apt"])
def test_check_sizes_takes_what_fits(method: str, saved_backbone: fp.FrozenViT) -> None:
    stored, state = read_adapter(SAVED / method)
    before = torch.get_rng_state()
    check_sizes(fp.config_from_dict(stored["method"]), 3, saved_backbone, state)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"head\.weight has shape \(3, 16\), the configuration says \(4, 16\)"):
        check_sizes(fp.config_from_dict(stored["method"]), 4, saved_backbone, state)


def test_the_tensors_of_every_method_are_of_a_dtype_that_is_read(
    saved_backbone: fp.FrozenViT, randomised: Callable[..., nn.Module], tmp_path: Path
) -> None:
    for number, config in enumerate(
        (
            fp.PGNConfig(num_prompts=2, library_size=3, trunk="resnet18"),
            fp.RGBPGNConfig(num_prompts=2, library_size=3, widths=(2,)),
            fp.V2APTConfig(num_prompts=3, num_instance=1, latent=2, hidden=3, share="per_layer"),
            fp.VAPTConfig(num_prompts=2, hidden=3),
            fp.PixelPromptConfig(border=2),
            fp.FullFineTuneConfig(),
        )
    ):
        model = fp.PromptedViT(saved_backbone, config, 3).eval()
        model.save_pretrained(tmp_path / str(number))
        again = fp.PromptedViT.from_pretrained(saved_backbone, tmp_path / str(number)).adapter_state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.adapter_state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": "stretch"}, "resize must be one of"),
        ({"intensity_range": [1, 0]}, "intensity_range must be two finite numbers"),
        ({"intensity_range": [0, float("nan")]}, "intensity_range must be two finite numbers"),
        ({"intensity_range": [0]}, r"intensity_range must be \(low, high\)"),
        ({"intensity_range": 4095}, r"intensity_range must be \(low, high\)"),
        ({"grey": True}, "no option 'grey'"),
        ([1], "must be a mapping"),
    ],
    ids=str,
)
def test_preprocessing_that_is_none(values: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Preprocessing.from_dict(values)
