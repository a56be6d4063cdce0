from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import table
from table import Job, Plan

from fastprompt.locks import directory_lock
from fastprompt.runs.settings import RunSettings
from fastprompt.train.recipes import Recipe

LABELS = [0, 1] * 50


def make_plan(
    out: Path, *methods: str, seeds: tuple[int, ...] = (0, 1), lrs: tuple[float, ...] | None = (0.1, 0.2)
) -> Plan:
    base = RunSettings(method=methods[0], data="images", image_size=112)
    return Plan(base, methods, seeds, lrs, out)


def finish(
    plan: Plan, job: Job, wrong: int = 0, *, accuracy: float = 0.5, loss: float = 1.0, test: bool = True
) -> None:
    """Write a run's results: the first `wrong` test images are misclassified."""
    directory = job.directory(plan.out)
    directory.mkdir(parents=True, exist_ok=True)
    predictions = [1 - y if i < wrong else y for i, y in enumerate(LABELS)]
    results: dict[str, Any] = {
        "method": job.method, "config": {"kind": job.method}, "backbone": "tiny", "backbone_fingerprint": "f",
        "image_size": 112, "data": {"name": "images", "train": 8, "val": 4, "test": 100}, "machine": "m",
        "torch_version": "0", "recipe": Recipe(epochs=3, batch_size=4).to_dict(),
        "trained_parameters": {"total": 1010, "generator": 1000, "head": 10, "backbone": 0},
        "paper_parameter_count": None, "images_per_second": 3.0,  # held up in its last epoch
        "history": [{"epoch": i, "images_per_second": s + job.seed} for i, s in enumerate((10.0, 10.5, 0.5))],
        "peak_memory_mib": 100.0 + job.seed,
        "seconds": 1.0, "validation": {"accuracy": accuracy, "loss": loss},
        "test": {"accuracy": 1 - wrong / 100, "labels": LABELS, "predictions": predictions} if test else None,
    }  # fmt: skip
    table.write_json(directory / "results.json", results)


def row_of(found: dict[str, Any], method: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["method"] == method)


def test_grid_with_every_seed_then_test_records_then_nothing(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "pgn")
    grid = [Job("pgn", lr, seed, False) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert table.next_jobs(plan, [], []) == grid
    assert table.next_jobs(plan, grid[:1], []) == grid[1:]
    for job in grid[:-1]:
        finish(plan, job, accuracy=0.6, test=False)
    assert table.next_jobs(plan, [], []) == grid[-1:]
    finish(plan, grid[-1], accuracy=0.7, test=False)
    final = [Job("pgn", 0.2, 0, True), Job("pgn", 0.2, 1, True)]
    assert table.next_jobs(plan, [], []) == final
    finish(plan, final[0], accuracy=0.7)
    assert table.next_jobs(plan, [], []) == final[1:]
    assert table.next_jobs(plan, [], final[1:]) == []
    finish(plan, final[1], accuracy=0.7)
    assert table.next_jobs(plan, [], []) == []


def test_learning_rate_by_validation_over_the_seeds_then_loss_and_never_a_diverged_one(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "pgn", lrs=(0.1, 0.2, 0.3, 0.4))
    for lr, accuracies, loss in ((0.1, (0.7, 0.7), 0.9), (0.2, (0.65, 0.75), 0.8), (0.3, (0.9, 0.4), 0.1)):
        for seed, accuracy in enumerate(accuracies):
            finish(plan, Job("pgn", lr, seed, False), accuracy=accuracy, loss=loss)
    finish(plan, Job("pgn", 0.4, 0, False), accuracy=0.99, loss=0.1)
    diverged = Job("pgn", 0.4, 1, False).directory(tmp_path)
    diverged.mkdir(parents=True)
    (diverged / "diverged.json").write_text(json.dumps({"diverged": True}))
    assert table.choose_lr(plan, "pgn") == (0.2,)
    Job("pgn", 0.1, 1, False).directory(tmp_path).joinpath("results.json").unlink()
    assert table.choose_lr(plan, "pgn") is None


def test_settings_of_a_job() -> None:
    base = RunSettings(method="pgn", data="images", image_size=112, recipe={"epochs": 7})
    settings = Job("pixel", 0.1, 2, False).settings(base)
    assert settings.recipe == {"epochs": 7, "seed": 2, "lr": 0.1}
    assert settings.data_seed == 2
    assert settings.options == {"border": 15}
    assert Job("linear", None, 2, False).settings(base).recipe == {"epochs": table.CACHED_EPOCHS, "seed": 2}


def test_the_flags_reach_every_method_and_the_shared_recipe_only_those_that_train_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(table, "run_all", lambda plan, *_: plans.append(plan) or [])
    where = ["--workers", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert table.main([*where, "--augment", "crop", "--epochs", "9", "--recipe", "dtype=float32"]) == 0
    base = plans[0].base
    vapt = Job("vapt", 0.1, 2, False).settings(base)
    assert vapt.recipe == {**table.RECIPE, "epochs": 9, "dtype": "float32", "seed": 2, "lr": 0.1}
    assert vapt.augment == "crop"
    probe = Job("linear", None, 2, False).settings(base)
    assert probe.recipe == {"epochs": table.CACHED_EPOCHS, "dtype": "float32", "seed": 2}
    assert probe.augment == "crop"
    by_sgd = Job("linear-sgd", 0.1, 2, False).settings(base)
    assert by_sgd.recipe == {**probe.recipe, "lr": 0.1}
    assert by_sgd.augment == "none"  # it trains on features that are encoded once
    assert Job("vqt", 0.1, 2, False).settings(base).augment == "none"  # its frozen features are constants
    assert base.augment == Job("cvpt", 0.1, 2, False).settings(base).augment
    assert table.main([*where, "--recipe", "head_lr=0.5"]) == 0
    assert Job("pgn", 0.1, 0, False).settings(plans[1].base).recipe["head_lr"] == 0.5


def test_rows_and_paired_differences(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "linear", "linear-sgd", "vpt-deep", "pgn")
    for seed in (0, 1):
        finish(plan, Job("linear", None, seed, True), wrong=20, accuracy=0.8)
        finish(plan, Job("linear-sgd", 0.1, seed, True), wrong=30, accuracy=0.7)
        finish(plan, Job("vpt-deep", 0.2, seed, True), wrong=10 + seed, accuracy=0.9)
        finish(plan, Job("linear-sgd", 0.2, seed, True), wrong=30, accuracy=0.6)
        finish(plan, Job("vpt-deep", 0.1, seed, False), accuracy=0.5, test=False)
    finish(plan, Job("pgn", 0.1, 0, False), test=False)  # its grid is not finished
    found = table.aggregate(plan)
    assert found["best_probe"] == "linear"
    assert [row["method"] for row in found["rows"]] == ["linear", "linear-sgd", "vpt-deep"]
    deep = row_of(found, "vpt-deep")
    assert deep["lr"] == 0.2
    assert deep["at_edge_of_grid"] is True
    assert deep["grid"] == {"0.1": 0.5, "0.2": 0.9}
    assert deep["test_accuracy_by_seed"] == [0.9, 0.89]
    assert deep["test_accuracy"] == pytest.approx(0.895)
    # t(0.975, 1 degree) = 12.706; standard error of (0.90, 0.89) = 0.005
    assert deep["test_interval_over_seeds"] == pytest.approx(12.706 * 0.005, rel=1e-3)
    assert deep["images_per_second"] == pytest.approx(10.5)
    assert deep["peak_memory_mib"] == 101.0
    difference = deep["difference_to_probe"]
    assert difference["mean"] == pytest.approx(0.095)
    per_image = np.array([0.0] * 10 + [0.5] + [1.0] * 9 + [0.0] * 80)
    half = 1.984 * per_image.std(ddof=1) / 10
    assert difference["image_interval"] == pytest.approx([0.095 - half, 0.095 + half], abs=1e-4)
    assert row_of(found, "linear-sgd")["images_per_second"] == 3.0
    assert row_of(found, "linear")["difference_to_probe"] is None
    assert row_of(found, "linear-sgd")["difference_to_probe"]["mean"] == pytest.approx(-0.1)


def test_other_test_images_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "linear", "pgn", lrs=(0.1,))
    for job in (Job("linear", None, 0, True), Job("pgn", 0.1, 0, True)):
        finish(plan, job)
    path = Job("pgn", 0.1, 0, True).directory(tmp_path) / "results.json"
    results = json.loads(path.read_text())
    results["test"]["labels"] = results["test"]["labels"][::-1]
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="different images"):
        table.aggregate(plan)


def test_markdown_says_what_was_done(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "linear", "pgn")
    for seed in (0, 1):
        finish(plan, Job("linear", None, seed, True), wrong=20)
        finish(plan, Job("pgn", 0.2, seed, True), wrong=10, accuracy=0.9)
        finish(plan, Job("pgn", 0.1, seed, False), accuracy=0.4, test=False)
    text = table.markdown(table.aggregate(plan))
    lines = text.splitlines()
    pgn = next(line for line in lines if line.startswith("| PGN"))
    assert "0.2 (edge)" in pgn
    assert "+0.1000 [+0.0" in pgn
    assert lines.index(pgn) < next(i for i, line in enumerate(lines) if line.startswith("| Linear"))
    assert "* PGN (adamw, 3 epochs, batch 4): 0.1: 0.4000, 0.2: 0.9000" in lines
    assert "8 train, 4 val, 100 test" in text
    header = next(line for line in lines if line.startswith("| Method"))
    assert {line.count("|") for line in lines if line.startswith("|")} == {header.count("|")}


def test_the_recipe_in_words() -> None:
    recipe = Recipe(epochs=6, batch_size=16, optimizer="sgd", head_init="probe", head_lr=1e-3, label_smoothing=0.1)
    assert table.recipe_words(recipe.to_dict()) == (
        "sgd, 6 epochs, batch 16, the head starts as the probe, head 0.001, label smoothing 0.1"
    )


def test_other_methods_on_disk_stay_in_the_table(tmp_path: Path) -> None:
    both = make_plan(tmp_path, "linear", "pgn", lrs=(0.7,), seeds=(0,))
    finish(both, Job("linear", None, 0, True), wrong=20)
    finish(both, Job("pgn", 0.7, 0, True), wrong=10)
    only_vpt = make_plan(tmp_path, "vpt-deep", lrs=None, seeds=(0,))
    found = table.write_table(only_vpt, tmp_path / "results")
    assert [row["method"] for row in found["rows"]] == ["linear", "pgn"]
    assert json.loads((tmp_path / "results" / "table.json").read_text()) == found
    assert (tmp_path / "results" / "table.md").read_text() == table.markdown(found)


def test_a_table_with_a_name_leaves_the_default_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(table, "RECORDS", tmp_path / "records")
    plan = make_plan(tmp_path / "runs", "linear", lrs=None, seeds=(0,))
    finish(replace(plan, out=tmp_path / "runs" / "small-vit"), Job("linear", None, 0, True), wrong=20)
    shared = ["--methods", "linear", "--seeds", "0", "--results", str(tmp_path / "results"), "--aggregate-only"]
    assert table.main(["--name", "small vit", *shared]) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"table-small-vit.json", "table-small-vit.md"}
    assert {path.name for path in (tmp_path / "records").iterdir()} == {"small-vit.jsonl", "small-vit.npz"}


@pytest.fixture
def small(tiny_run: list[str], tmp_path: Path) -> list[str]:
    """The flags of a table on a tiny backbone and tiny images."""
    flags = list(tiny_run)
    flags += [
        "--num-train",
        "8",
        "--num-val",
        "6",
        "--num-test",
        "6",
        "--epochs",
        "1",
        "--recipe",
        "dtype=float32",
    ]
    return [*flags, "--seeds", "0", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]


@pytest.mark.long
def test_from_nothing_to_the_table(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs, one of which cannot start: it is reported, the others make the table, once."""
    blocked = tmp_path / "runs" / "free" / "lr0.01-seed0"
    blocked.mkdir(parents=True)
    (blocked / "run.json").write_text("{}")  # a run with other settings
    command = ["--methods", "free", "linear", "vpt-shallow", "--lrs", "0.01", "--workers", "1", *small]
    assert table.main(command) == 1
    found = json.loads((tmp_path / "results" / "table.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["linear", "vpt-shallow"]
    assert row_of(found, "vpt-shallow")["difference_to_probe"]["num_images"] == 6
    shown = capsys.readouterr().out
    assert "VPT-shallow" in shown
    assert f"failed (1)  {blocked}" in shown
    assert "different settings" in (blocked / "output.txt").read_text()
    monkeypatch.setattr(table, "start", lambda *_: pytest.fail("a finished run was started again"))
    plan = make_plan(tmp_path / "runs", "linear", "vpt-shallow", lrs=(0.01,), seeds=(0,))
    assert table.run_all(plan, 2, 1) == []


def test_one_directory_is_not_run_twice_at_once(small: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with directory_lock(directory):
        assert table.run_single(RunSettings(method="linear", data="x"), directory, False, 1) == 3
    assert not directory.exists()


def test_a_run_can_be_interrupted_where_a_background_shell_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a shell starts its children with SIGINT ignored."""

    def execute(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(table, "execute", execute)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            table.run_single(RunSettings(method="linear", data="x"), tmp_path / "run", False, 1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_parents_end_interrupts_a_run(tmp_path: Path) -> None:
    """A process that starts a watched one and dies must not leave it running."""
    watched = (
        f"import sys; sys.path.insert(0, {str(Path(table.__file__).parent)!r}); "
        "import pathlib, signal, threading; from table import stop_with; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background shell's children ignore it
        "pathlib.Path(sys.argv[2]).touch(); stop_with(int(sys.argv[1])); threading.Event().wait()"
    )
    parent = (
        "import os, subprocess, sys; null = subprocess.DEVNULL; "
        f"command = [sys.executable, '-c', {watched!r}, str(os.getpid()), {str(tmp_path / 'began')!r}]; "
        "print(subprocess.Popen(command, stdout=null, stderr=null, pass_fds=[int(sys.argv[1])]).pid)"
    )
    ended, held = os.pipe()  # the watched process holds the writing end as long as it runs
    command = [sys.executable, "-c", parent, str(held)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, pass_fds=[held])
    os.close(held)
    try:
        assert select.select([ended], [], [], 60)[0], "still running"
        assert os.read(ended, 1) == b""
        assert (tmp_path / "began").exists()
    finally:
        os.close(ended)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(shown.stdout), signal.SIGKILL)


def test_what_cannot_be_fetched_ends_the_table_without_a_traceback(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert table.main([*small, "--methods", "linear", "--workers", "2", "--data", str(tmp_path / "nowhere")]) == 1
    shown = capfd.readouterr().err
    assert shown.startswith("table: error: data must be a folder that exists")
    assert "Traceback" not in shown
    assert not (tmp_path / "runs").exists()
