"""What is kept of images for all epochs: same training, fewer forwards, files that are checked, limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.vit import folding, forward

CONFIGS: dict[str, PromptConfig] = {
    "vqt": fp.VQTConfig(num_queries=2, group_lasso=0.01),
    "vpt": fp.VPTConfig(num_prompts=3, first_block=2, prompt_dropout=0.2),
    "vapt": fp.VAPTConfig(num_prompts=3, hidden=4, first_block=1),
    "v2apt": fp.V2APTConfig(3, 2, latent=3, hidden=5, first_block=1),
    "pgn": fp.PGNConfig(3, 5, widths=(4,), first_block=1),
    "cvpt": fp.CVPTConfig(num_prompts=3, first_block=2),
}
Pair = tuple[Tensor, Tensor]
Train = Callable[..., tuple[fp.PromptedViT, fp.FitResult]]


@pytest.fixture
def data() -> Pair:
    """Nine raw images of three classes."""
    pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    return pixels, torch.arange(9) % 3


@pytest.fixture
def train(make_vit: Callable[..., VisionTransformer], data: Pair) -> Train:
    """`train(config, **fields)`: a model and the result of two epochs with the same seeds."""
    backbone = fp.FrozenViT(make_vit(pre_norm=True, reg_tokens=1))

    def fitted(config: PromptConfig, images: Any = None, **fields: Any) -> tuple[fp.PromptedViT, fp.FitResult]:
        torch.manual_seed(3)
        model = fp.PromptedViT(backbone, config, num_classes=3, readout="cls")
        options = {
            "epochs": 2,
            "batch_size": 4,
            "lr": 0.01,
            "optimizer": "sgd",
            "dtype": "float32",
            "progress": False,
            **fields,
        }
        return model, fp.fit(model, data if images is None else images, data, **options)

    return fitted


@pytest.fixture
def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each call of a block."""
    calls, run = [], forward.run_block
    monkeypatch.setattr(forward, "run_block", lambda block, x, *rest: calls.append(len(x.data)) or run(block, x, *rest))
    return calls


@pytest.mark.parametrize(("name", "keep"), [*((name, "inputs") for name in CONFIGS), ("vqt", "keys")])
def test_training_from_constants_is_training_from_images(
    train: Train, blocks_run: list[int], name: str, keep: str
) -> None:
    plain, of_plain = train(CONFIGS[name], cache="none")
    runs = sum(blocks_run)
    kept, of_kept = train(CONFIGS[name], cache=keep)
    assert sum(blocks_run) - runs < 0.9 * runs  # with a first pass, for two epochs of training and validation
    for event, expected in zip(of_kept.history, of_plain.history, strict=True):
        for key in ("train_loss", "val_loss", "grad_norm"):
            assert event[key] == pytest.approx(expected[key], rel=1e-3), key
    for (label, mine), (_, theirs) in zip(kept.trainable_parameters(), plain.trainable_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4, msg=label)


def test_queries_are_all_that_runs_after_the_first_pass(train: Train, blocks_run: list[int]) -> None:
    train(CONFIGS["vqt"], epochs=1)
    first = sum(blocks_run)
    train(CONFIGS["vqt"], epochs=5)
    assert sum(blocks_run) == 2 * first


def test_bfloat16_halves_what_is_kept(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = train(CONFIGS["vqt"], cache_dtype=dtype, progress=True)
        said = re.search(
            rf"kept for all epochs: inputs of 3 blocks, 18 images in {dtype}, ([\d,]+) bytes", capsys.readouterr().err
        )
        assert said is not None
        sizes[dtype] = int(said[1].replace(",", ""))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    own = 3 * 18 * 48  # numbers of 3 blocks
    assert sizes["float32"] - sizes["bfloat16"] == 2 * own
    assert 2 * own < sizes["bfloat16"] < 2 * own + 1024


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (fp.VQTConfig(), {"cache": "none"}),
        (fp.VQTConfig(), {"cache_gib": 1e-6}),
        (fp.VPTConfig(num_prompts=2), {}),
    ],
    ids=["switched off", "too large", "prompts enter the first block"],
)
def test_images_are_read_again_where_nothing_is_kept(
    train: Train, blocks_run: list[int], config: PromptConfig, fields: dict
) -> None:
    train(config, epochs=1, **fields)
    first = sum(blocks_run)
    train(config, epochs=3, **fields)
    assert sum(blocks_run) - first > 2 * first


def test_augmented_images_are_read_again(train: Train, blocks_run: list[int], data: Pair) -> None:
    class Flipped(torch.utils.data.Dataset):
        augment = "flip"

        def __len__(self) -> int:
            return 9

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return data[0][i].flip(-1), i % 3

    same = Flipped()
    train(CONFIGS["vqt"], same, epochs=2)
    augmented = sum(blocks_run)
    same.augment = "none"
    train(CONFIGS["vqt"], same, epochs=2)
    assert sum(blocks_run) - augmented < augmented


def test_files_are_shared_checked_and_bounded(
    train: Train, blocks_run: list[int], data: Pair, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    expected, _ = train(CONFIGS["vqt"])
    memory = sum(blocks_run)
    written, _ = train(CONFIGS["vqt"], cache_dir=tmp_path)
    files = sorted(tmp_path.glob("*.constants"))
    assert len(files) == 1  # training and validation images are the same here
    assert not list(tmp_path.glob("*.tmp"))
    assert sum(blocks_run) < 2 * memory
    before = sum(blocks_run)
    read, _ = train(CONFIGS["vqt"], cache_dir=tmp_path)
    again = sum(blocks_run) - before
    assert again < memory / 2  # the trial forward and the size of a record alone
    for mine, theirs, third in zip(
        *(dict(m.trainable_parameters()).values() for m in (written, read, expected)), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, third)
    train(fp.VQTConfig(num_queries=2, first_block=1), cache_dir=tmp_path)
    train(CONFIGS["vqt"], cache="keys", cache_dir=tmp_path)
    train(CONFIGS["vqt"], (data[0].flip(0), data[1]), cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.constants"))) == 4
    content = bytearray(files[0].read_bytes())
    content[5000] ^= 1
    files[0].write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and is computed again"):
        repaired, _ = train(CONFIGS["vqt"], cache_dir=tmp_path)
    for mine, theirs in zip(repaired.generator.parameters(), expected.generator.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    size = files[0].stat().st_size
    train(fp.VQTConfig(num_queries=2, first_block=2), cache_dir=tmp_path, cache_gib=2.1 * size / 2**30)
    left = list(tmp_path.glob("*.constants"))
    assert sum(file.stat().st_size for file in left) <= 2.1 * size
    assert files[0] in left  # it was used last but one


def test_keys_are_read_only_where_their_channels_lie_as_they_were_kept(
    make_vit: Callable[..., Any], data: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = {"kind": Eva, "use_rot_pos_emb": True, "rope_rotate_half": True}
    model = fp.PromptedViT(fp.FrozenViT(make_vit(depth=1, **rotary)), fp.VQTConfig(), num_classes=3)
    for files, dtypes in enumerate((folding.COMPLEX, (), ()), 1):
        monkeypatch.setattr(folding, "COMPLEX", dtypes)
        model.backbone.refold()
        fp.fit(model, data, data, epochs=1, dtype="float32", cache="keys", cache_dir=tmp_path, progress=False)
        assert len(list(tmp_path.glob("*.constants"))) == min(files, 2)


def test_images_of_two_sizes_are_refused(make_vit: Callable[..., VisionTransformer]) -> None:
    backbone = fp.FrozenViT(make_vit(dynamic_img_size=True))
    model = fp.PromptedViT(backbone, fp.VQTConfig(), num_classes=2)
    whole = model.constants(torch.randn(2, 3, 32, 32))
    assert whole["inputs.0"].shape == (2, 17, 48)
    with pytest.raises(ValueError, match="keep must be one of"):
        model.constants(torch.randn(2, 3, 32, 32), keep="values")
    with pytest.raises(ValueError, match="model must have something constant in training, but there are no prompts"):
        fp.PromptedViT(backbone, fp.LinearProbeConfig()).constants(torch.randn(1, 3, 32, 32))
    late = fp.PromptedViT(backbone, fp.VPTConfig(2, first_block=1), num_classes=2).eval()
    images = torch.randn(2, 3, 48, 40)
    torch.testing.assert_close(late.from_constants(late.constants(images)), late(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "disk"}, "cache must be one of 'auto', 'inputs', 'keys', 'none', got 'disk'"),
        ({"cache_dtype": "int8"}, "cache_dtype must be one of"),
        ({"cache_gib": -1}, "cache_gib must be in"),
    ],
)
def test_bad_options_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.Recipe(**fields)
