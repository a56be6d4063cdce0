"""A grid in one batch ends as its runs do one by one, whatever happens to it on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from crashes import in_a_child, killed_at
from fresh_process import passed_in_a_fresh_process
from torch.utils.data import DataLoader, Dataset

import fastprompt as fp
from fastprompt.arguments import ArgumentError
from fastprompt.train.checkpoint import load_state
from fastprompt.train.fit import fit
from fastprompt.train.grid import fit_grid, grid_recipes
from fastprompt.train.recipes import Recipe
from fastprompt.train.termination import Terminated, sigterm_handled
from fastprompt.train.together import Together

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=1, optimizer="sgd", dtype="float32").replace()
GRID = {"lr": [1e-2, 3e-2], "seed": [0, 1]}
V2APT = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16)
PGN = fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8))
TIMES = {"seconds", "images_per_second", "environment", "peak_memory_mib"}

Make = Callable[..., Callable[[int], Any]]


@pytest.fixture
def maker() -> Make:
    """maker(config): a function seed -> model, all on one tiny ViT, whose position embedding timm has resampled."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = fp.FrozenViT(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes))
    assert vit.identity.resampled

    def of(config: Any) -> Callable[[int], Any]:
        def make(seed: int) -> Any:
            torch.manual_seed(seed)
            return fp.PromptedViT(vit, config, num_classes=4)

        return make

    return of


class Flipped(Dataset[Any]):
    """Draws from the global generators."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return (image.flip(-2) if np.random.rand() < 0.5 else image), int(self.labels[index])


def rows(directory: Path, without: tuple[str, ...] = ("resume",)) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found if row["event"] not in without]


def assert_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Both directories hold the same run: files, identity, log, state."""
    files = [{path.name for path in place.iterdir()} - {"result.json", "choices.json"} for place in (a, b)]
    assert files[0] == files[1]
    (one, values), (other, others) = (load_state(path / "last.safetensors") for path in (a, b))
    assert one.keys() == other.keys()
    for key in one:
        same = torch.equal(one[key], other[key])
        assert same or (tolerance and torch.allclose(one[key], other[key], rtol=tolerance, atol=tolerance)), key
    assert values["identity"] == others["identity"]
    assert values["progress"]["best_epoch"] == others["progress"]["best_epoch"]
    for mine, theirs in zip(rows(a), rows(b), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value == (pytest.approx(theirs[key], rel=1e-4) if isinstance(value, float) else theirs[key]), key
    assert (a / "recipe.json").read_text() == (b / "recipe.json").read_text()


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "vpt": (fp.VPTConfig(num_prompts=2, prompt_dropout=0.2), {"clip_grad": 0.5, "optimizer": "adamw"}, None),
    "pgn": (PGN, {"mixup": 0.8, "random_erasing": 0.5}, None),
    "v2apt": (V2APT, {"kl_warmup_epochs": 1.0, "accumulate": 2}, Flipped),
    "vapt": (fp.VAPTConfig(num_prompts=2, hidden=4), {"sampling": "balanced"}, None),
    "vqt-kept": (fp.VQTConfig(num_queries=2), {}, None),
    "late-kept": (fp.VPTConfig(num_prompts=2, first_block=1), {"head_init": "vpt"}, None),
    "late": (fp.VPTConfig(num_prompts=2, first_block=1), {}, Flipped),
    "linear": (fp.LinearProbeConfig(), {}, None),
}


@pytest.mark.filterwarnings("ignore:train yields different images")
@pytest.mark.parametrize("case", CASES)
def test_every_adapter_ends_as_alone(case: str, maker: Make, colours: Callable[..., Any], tmp_path: Path) -> None:
    config, fields, dataset = CASES[case]
    recipe, make = RECIPE.replace(**fields), maker(config)
    train, val = colours(20), colours(12, seed=1)
    train = train if dataset is None else dataset(*train)
    found = fit_grid(make, train, val, recipe, GRID, tmp_path / "grid", progress=False)
    assert [run.name for run in found] == ["lr-0.01_seed-0", "lr-0.01_seed-1", "lr-0.03_seed-0", "lr-0.03_seed-1"]
    assert not (tmp_path / "grid" / "grid.safetensors").exists()
    assert len({run.best_val_loss for run in found}) == 4
    run = found[2 + (case in ("vpt", "v2apt"))]
    own = recipe.replace(lr=run.lr, seed=run.seed)
    alone = fit(make(run.seed), train, val, own, tmp_path / run.name, progress=False)
    assert_same_run(run.directory, tmp_path / run.name, 1e-4)
    assert run.best_val_loss == pytest.approx(alone.best_val_loss, rel=1e-4)
    assert fit(make(run.seed), train, val, own, run.directory, progress=False).best_val_loss == run.best_val_loss
    saved = fp.PromptedViT.from_pretrained(make(0).backbone, run.adapter)
    assert fp.evaluate(saved, val).loss == pytest.approx(run.best_val_loss, rel=1e-4)


def test_a_diverged_adapter_is_dropped_and_the_others_go_on(
    maker: Make, colours: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val, make = colours(20), colours(12, seed=1), maker(V2APT)
    found = fit_grid(make, train, val, RECIPE, {"lr": [1e-2, 1e30]}, tmp_path / "grid")
    assert [run.diverged for run in found] == [False, True]
    said = capsys.readouterr().err
    assert "dropped lr-1e+30: the " in said
    assert "epoch 2/2: 1 adapters, 1 diverged; best lr-0.01: validation loss" in said
    fit(make(0), train, val, RECIPE, tmp_path / "alone", progress=False)
    assert_same_run(found[0].directory, tmp_path / "alone", 1e-4)
    assert rows(found[1].directory)[-1]["event"] == "diverged"
    tensors, _ = load_state(found[1].directory / "last.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    everything = fit_grid(make, train, val, RECIPE, {"lr": [1e30]}, tmp_path / "none", progress=False)
    assert [run.diverged for run in everything] == [True]


def test_an_adapter_that_stops_early_leaves_the_batch(maker: Make, colours: Callable[..., Any], tmp_path: Path) -> None:
    train, val, make = colours(20), colours(12, seed=1), maker(fp.VPTConfig(num_prompts=2))
    recipe = RECIPE.replace(epochs=4, warmup_epochs=0)
    found = fit_grid(make, train, val, recipe, {"lr": [1e-12, 1e-2], "patience": [1, None]}, tmp_path, progress=False)
    assert [len(rows(run.directory)) for run in found] == [1 + 2 + 1, 1 + 4 + 1, 1 + 4 + 1, 1 + 4 + 1]


def test_a_grid_may_grow_and_is_bounded(maker: Make, colours: Callable[..., Any], tmp_path: Path) -> None:
    train, val, make = colours(20), colours(12, seed=1), maker(fp.VPTConfig(num_prompts=2))
    sizes: list[int] = []
    begin = Together.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Together, "train", lambda self, saved: (sizes.append(len(self.runs)), begin(self, saved))[1])
        first = fit_grid(make, train, val, RECIPE, {"lr": [1e-2]}, tmp_path, progress=False)
        found = fit_grid(
            make, train, val, RECIPE, {"lr": [1e-3, 1e-2, 2e-2, 3e-2]}, tmp_path, together=2, progress=False
        )
        assert sizes == [1, 2, 1]
        assert found[1] == first[0]
        assert fit_grid(make, train, val, RECIPE, {"lr": [3e-2]}, tmp_path, progress=False) == [found[3]]
        assert sizes == [1, 2, 1]
        fit_grid(make, train, val, RECIPE, {"lr": [3e-2]}, tmp_path, progress=False, resume=False)
        assert sizes == [1, 2, 1, 1]
    with pytest.raises(ValueError, match=r"holds another run \(train\.images changed"):
        fit_grid(make, colours(20, seed=3), val, RECIPE, {"lr": [1e-2, 5e-2]}, tmp_path, progress=False)


@pytest.mark.parametrize("config", [V2APT, PGN])
def test_a_killed_grid_ends_with_the_same_bits(
    config: Any, maker: Make, colours: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed at file operations, and diverging once: within epochs, between them, and while runs are written."""
    if passed_in_a_fresh_process(request):
        return
    train, val, make = colours(20), colours(12, seed=1), maker(config)
    recipe = RECIPE.replace(checkpoint_every="2 steps", deterministic=True)
    grid = {"lr": [1e-2, 1e30], "seed": [0, 1]}

    def work(place: Path) -> Callable[[], Any]:
        return lambda: fit_grid(make, train, val, recipe, grid, place, progress=False)

    whole = work(tmp_path / "whole")()
    killed = 0
    for number in (12, 40, 90):
        killed += killed_at(number, tmp_path / "run", work(tmp_path / "run")) == -signal.SIGKILL
    assert killed == 3
    assert in_a_child(work(tmp_path / "run")) == 0
    for run in whole:
        assert_same_run(tmp_path / "run" / run.name, run.directory)
    left = [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"]
    assert sorted(left) == sorted(run.name for run in whole)
    assert any(row["event"] == "resume" for row in rows(tmp_path / "run" / whole[0].name, ()))


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_sigterm_writes_a_checkpoint_of_all(
    moment: str, maker: Make, colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, make = colours(20), colours(12, seed=1), maker(V2APT)
    whole = fit_grid(make, train, val, RECIPE, GRID, tmp_path / "whole", progress=False)
    name = "_step" if moment == "step" else "_validate"
    act, calls = getattr(Together, name), []

    def terminated(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return act(self, *arguments)

    monkeypatch.setattr(Together, name, terminated)
    with sigterm_handled(), pytest.raises(Terminated) as ended:
        fit_grid(make, train, val, RECIPE, GRID, tmp_path / "run", progress=False)
    assert ended.value.saved
    states = load_state(tmp_path / "run" / "grid.safetensors")[1]["runs"]
    assert {values["epoch"]["steps"] for values in states.values()} == {2 if moment == "step" else 3}
    monkeypatch.undo()
    with pytest.raises(ArgumentError, match=r"grid must have the runs that .* has begun to train, lr-0.03_seed-0"):
        fit_grid(make, train, val, RECIPE, {"lr": [1e-2], "seed": [0, 1]}, tmp_path / "run", progress=False)
    fit_grid(make, train, val, RECIPE, GRID, tmp_path / "run", progress=False)
    for run in whole:
        assert_same_run(tmp_path / "run" / run.name, run.directory)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "must name at least one field"),
        ({"epochs": [1, 2]}, "must name fields among lr, .*, got 'epochs'"),
        ({"lr": 1e-3}, "must have a sequence of values for 'lr', got 0.001"),
        ({"lr": []}, "must have a sequence of values for 'lr'"),
        ({"seed": [0, 1, 0]}, "must have different values for 'seed', got 0, 1, 0"),
        ({"lr": [1e-3, -1.0]}, r"must have valid values: lr must be in \(0, inf\), got -1.0"),
    ],
)
def test_bad_grids_are_refused(grid: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"grid {message}"):
        grid_recipes(RECIPE, grid)


def test_names_of_runs_are_short_and_different() -> None:
    found = grid_recipes(RECIPE, {"lr": [0.001, 0.0010000001], "head_lr": [None, 1e-2], "optimizer": ["adamw"]})
    assert [*found] == [
        "lr-0.001_head_lr-None_optimizer-adamw",
        "lr-0.001_head_lr-0.01_optimizer-adamw",
        "lr-0.0010000001_head_lr-None_optimizer-adamw",
        "lr-0.0010000001_head_lr-0.01_optimizer-adamw",
    ]


def test_what_cannot_keep_in_step_is_refused(maker: Make, colours: Callable[..., Any], tmp_path: Path) -> None:
    def attempt(train: Any = None, recipe: Recipe = RECIPE, config: Any = V2APT, **options: Any) -> None:
        fit_grid(maker(config), train or colours(8), colours(8), recipe, GRID, tmp_path / "new", **options)

    with pytest.raises(ArgumentError, match="rollbacks must be 0 in a grid"):
        attempt(recipe=RECIPE.replace(rollbacks=1))
    with pytest.raises(ArgumentError, match="together must be a positive integer or None, got 0"):
        attempt(together=0)
    with pytest.raises(ArgumentError, match="make_model must leave the backbone frozen, of which 'full'"):
        attempt(config=fp.FullFineTuneConfig())
    with pytest.raises(ArgumentError, match="train must be a Dataset or a pair of tensors for several seeds"):
        attempt(train=DataLoader(Flipped(*colours(8)), 4))
    assert not (tmp_path / "new").exists()
