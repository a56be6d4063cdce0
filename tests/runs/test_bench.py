from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_backbones import write_backbone
from made_protocols import make_task, small, write_protocol

import fastprompt.runs.bench as bench_module
from fastprompt.cli import main
from fastprompt.locks import directory_lock
from fastprompt.protocols import load_protocol
from fastprompt.runs.bench import BenchPlan, Cell, Entry, Finished, Job, cells_of, plan_from, run_bench, search, wider

TASKS = ("dtd", "kitti")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of two of VTAB-1k's tasks, and a tiny backbone in timm's own folder format."""
    root = tmp_path_factory.mktemp("bench")
    protocol = small("vtab1k", TASKS)
    protocol = dataclasses.replace(protocol, name="mini", seeds=(0, 1), base_lrs=(20.0, 10.0), weight_decays=(0.001,))
    write_protocol(protocol, root / "mini.toml")
    for task in protocol.tasks:
        make_task(task, root / "data")
    write_backbone(root / "vit", embed_dim=24, depth=1)
    return root


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    words = ["bench", str(place / "mini.toml"), "--data-root", str(place / "data"), "--out", str(out)]
    words += ["--backbone", f"local-dir:{place / 'vit'}", "--epochs", "1", "--device", "cpu"]
    return [*words, *more]


def test_a_bench_from_search_to_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = arguments(place, out, "--methods", "linear", "vpt-deep", "--widenings", "0", "--final", "--tasks", "dtd")
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "VPT-deep" in printed.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["split"] == "test"
    rows = {row["name"]: row for row in summary["rows"]}
    assert set(rows) == {"linear", "vpt-deep"}
    vpt = rows["vpt-deep"]
    assert len(vpt["tasks"]["dtd"]["by_seed"]) == 2
    assert vpt["tasks"]["dtd"]["points"] >= 2
    assert 0 < vpt["trained_share"] < 1
    records = [json.loads(text) for text in (out / "records.jsonl").read_text().splitlines()]
    finals = [r for r in records if r["stage"] == "final" and r["name"] == "vpt-deep"]
    assert len(finals) == 2
    for record in finals:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["correct"]), np.uint8))[: record["num_images"]]
        assert bits.mean() == pytest.approx(record["test_accuracy"])
    assert {r["test_accuracy"] for r in records if r["stage"] == "search"} == {None}
    # the final runs train on both splits, take the chosen point, and keep the last epoch
    chosen = next(r for r in finals if r["task"] == "dtd")
    assert (chosen["lr"], chosen["weight_decay"]) == (vpt["tasks"]["dtd"]["lr"], vpt["tasks"]["dtd"]["weight_decay"])
    folder = next((out / "dtd" / "vpt-deep" / "final").glob("lr*-seed0"))
    results = json.loads((folder / "results.json").read_text())
    assert results["data"]["train"] == 12
    assert results["recipe"]["select_by"] == "last"
    assert results["recipe"]["optimizer"] == "sgd"
    searched = json.loads((next((out / "dtd" / "linear" / "validation").glob("*")) / "results.json").read_text())
    tested = json.loads((next((out / "dtd" / "linear" / "final").glob("*seed1")) / "results.json").read_text())
    assert tested["probe"]["grid"][0]["C"] == searched["probe"]["C"]
    assert len(tested["probe"]["grid"]) == 1
    # differences are those of the accuracies
    difference = vpt["differences"]["linear"]["mean"]
    assert difference["mean"] == pytest.approx(vpt["mean"]["mean"] - rows["linear"]["mean"]["mean"])
    assert difference["low"] < difference["mean"] < difference["high"] or difference["p"] in (0, 1)
    assert 0 <= difference["p"] <= difference["p_holm"] <= 1
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 2
    assert "VPT-deep" in page
    assert re.search(r"^\| VPT-deep \|", (out / "table.md").read_text(), re.MULTILINE)
    # a finished bench runs nothing
    monkeypatch.setattr(bench_module, "execute", lambda *_, **__: pytest.fail("ran again"))
    assert main(line) == 0
    assert json.loads((out / "summary.json").read_text()) == summary


def test_workers_share_the_runs(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process leaves one of the tasks to the other one, as if that had been faster."""
    words = ["--methods", "linear", "vpt-deep", "--widenings", "0"]
    assert main(arguments(place, tmp_path / "alone", *words)) == 0
    capfd.readouterr()
    run = bench_module._run
    monkeypatch.setattr(bench_module, "_run", lambda job, *rest: job.cell.task.name == "dtd" and run(job, *rest))
    assert main(arguments(place, tmp_path / "shared", *words, "--workers", "2", "--threads", "1")) == 0
    said = capfd.readouterr().err
    assert re.search(r"^worker 1 \[1\]", said, re.MULTILINE)
    runs = [len([*(tmp_path / out).rglob("results.json")]) for out in ("alone", "shared")]
    assert runs[0] == runs[1]
    rows = [json.loads((tmp_path / out / "summary.json").read_text())["rows"] for out in ("alone", "shared")]
    assert [row["mean"]["mean"] for row in rows[0]] == pytest.approx([row["mean"]["mean"] for row in rows[1]])


def test_a_worker_that_fails_is_said(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It cannot import what the others have: a plugin that is gone."""
    plan = plan_from(
        {"methods": ["linear"], "tasks": ["dtd"], "seeds": [0], "backbone": f"local-dir:{place / 'vit'}"},
        protocol=str(place / "mini.toml"),
        data_root=str(place / "data"),
        final=False,
    )
    with pytest.raises(RuntimeError, match="worker 1 failed"):
        run_bench(plan, tmp_path / "out", device="cpu", workers=2, plugins=[str(tmp_path / "gone.py")])
    assert "gone.py" in capfd.readouterr().err
    for workers in (0, True):
        with pytest.raises(ValueError, match="workers"):
            run_bench(plan, tmp_path / "out", device="cpu", workers=workers)


def test_without_final_the_test_split_stays_locked(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--methods", "linear", "--tasks", "dtd", "--seeds", "0", "--low-data", "1,3"]
    assert main(arguments(place, out, *words)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["split"] == "validation"
    assert [row["per_class"] for row in summary["rows"]] == [1, 3]
    for few, folder in ((1, "linear-1-per-class"), (3, "linear-3-per-class")):
        results = json.loads(next((out / "dtd" / folder).rglob("results.json")).read_text())
        assert results["data"]["train"] == 2 * few
        assert results["test"] is None
    assert not list(out.rglob("final"))


def test_a_file_of_settings_makes_rows(place: Path, tmp_path: Path) -> None:
    methods = {
        "linear": None,
        "vpt-2": {"method": "vpt-deep", "options": {"num_prompts": 2}, "lrs": [1, 2], "weight_decays": [0]},
    }
    settings = {"methods": methods, "tasks": ["kitti"], "seeds": [3], "widenings": 0, "recipe": "default"}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    assert main(arguments(place, out, "--config", str(tmp_path / "bench.yaml"))) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["title"] for row in summary["rows"]] == ["Linear probe (L-BFGS)", "VPT-deep (vpt-2)"]
    assert summary["rows"][1]["tasks"]["kitti"]["points"] == 2
    run = json.loads(next((out / "kitti" / "vpt-2").rglob("run.json")).read_text())
    assert run["options"] == {"num_prompts": 2}
    assert run["recipe"]["weight_decay"] == 0
    assert run["mean"] == list(load_protocol("vtab1k").mean)
    assert main(arguments(place, out, "--config", str(tmp_path / "bench.yaml"), "--recipe", "paper")) == 2


@pytest.fixture
def cell(place: Path, tmp_path: Path) -> Callable[..., Cell]:
    def make(**fields: Any) -> Cell:
        entry = fields.pop("entry", Entry("vpt-deep", "vpt-deep"))
        plan = BenchPlan(str(place / "mini.toml"), str(place / "data"), "x", (entry,), ("dtd",), **fields)
        return cells_of(plan, tmp_path)[0]

    return make


class Scored(Finished):
    """Pretends that every run is finished, with a validation accuracy by learning rate and weight decay."""

    def __init__(self, accuracy: Callable[[float, float], float]) -> None:
        super().__init__()
        self.accuracy, self.asked = accuracy, set[Any]()

    def of(self, job: Job) -> dict[str, Any] | None:
        self.asked.add(job.point)
        accuracy = self.accuracy(*map(float, job.point))  # type: ignore[arg-type]
        if math.isnan(accuracy):
            return {"diverged": True}
        return {"validation": {"accuracy": accuracy, "loss": 1.0}}


def test_the_grid_widens_until_the_best_lies_inside(cell: Callable[..., Cell]) -> None:
    peak = Scored(lambda lr, wd: -abs(math.log(lr / 70)))
    found = search(cell(), peak)
    assert sorted({lr for lr, _ in found.tried if lr}) == [10, 20, 40, 80, 160]
    assert found.best == (80, 0.001)
    assert not found.at_edge
    low = search(cell(), Scored(lambda lr, wd: -abs(math.log(lr / 3))))
    assert found.jobs == low.jobs == []
    assert low.best == (2.5, 0.001)


def test_widening_ends_and_says_so(cell: Callable[..., Cell]) -> None:
    found = search(cell(widenings=2), Scored(lambda lr, wd: lr))
    assert found.best == (80, 0.001)
    assert found.at_edge


def test_weight_decay_widens_too_but_not_below_zero(cell: Callable[..., Cell]) -> None:
    entry = Entry("vpt-deep", "vpt-deep", lrs=(1.0, 2.0, 4.0), weight_decays=(0.0, 0.001, 0.01))
    up = search(cell(entry=entry), Scored(lambda lr, wd: -abs(lr - 2) - abs(wd - 0.1)))
    assert up.best == (2, 0.1)
    assert not up.at_edge
    down = search(cell(entry=entry), Scored(lambda lr, wd: -abs(lr - 2) - wd))
    assert down.best == (2, 0)
    assert not down.at_edge


def test_a_point_that_diverges_is_worst(cell: Callable[..., Cell]) -> None:
    found = search(cell(), Scored(lambda lr, wd: math.nan if lr > 15 else 0.1))
    assert found.best == (10, 0.001)
    assert found.tried[(20.0, 0.001)][0] == -1


def test_what_lies_beyond() -> None:
    assert wider([1, 2, 4], 4) == 8
    assert wider([1, 2, 4], 1) == 0.5
    assert wider([1, 2, 4], 2) is None
    assert wider([1], 1) is None
    assert wider([0, 0.01], 0) is None
    assert wider([0, 0.01], 0.01) == 0.1


def test_the_grids_are_the_papers_or_the_methods(cell: Callable[..., Cell]) -> None:
    assert cell().axes() == ((10.0, 20.0), (0.001,))  # the protocol's search
    assert cell(entry=Entry("pgn", "pgn")).axes() == (pytest.approx((0.1 / 3, 0.1, 0.3)), (0.0,))
    rates, decays = cell(entry=Entry("pgn", "pgn"), recipe="default").axes()  # type: ignore[misc]
    assert rates == (0.003, 0.01)
    assert len(decays) == 1
    assert cell(entry=Entry("linear", "linear")).axes() is None
    made = cell().settings(Job(cell(), "search", (10.0, 0.001), 7))
    assert made.recipe["lr"] == pytest.approx(10 * 64 / 256)
    assert (made.recipe["seed"], made.data_seed, made.resize) == (7, 0, "squash")


def test_a_run_that_another_process_holds_is_left_to_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_from(
        {"methods": ["linear"], "tasks": ["dtd"], "seeds": [0, 1]},
        protocol=str(place / "mini.toml"),
        data_root=str(place / "data"),
        backbone=f"local-dir:{place / 'vit'}",
    )
    run_bench(plan, tmp_path / "done")
    [held] = (tmp_path / "done" / "dtd" / "linear" / "validation").glob("*seed0")
    finished = tmp_path / "finished"
    shutil.move(held, finished)
    lines: list[str] = []
    with directory_lock(held) as writable:
        assert writable

        def finish(seconds: float) -> None:  # instead of sleeping: the other process finishes
            for path in finished.iterdir():
                if path.is_file():
                    shutil.copy(path, held)

        monkeypatch.setattr(bench_module.time, "sleep", finish)
        run_bench(plan, tmp_path / "done", announce=lines.append)
    assert any("another process works on it" in line for line in lines)


def test_divergence_is_recorded_and_counts_as_no_image_right(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = bench_module.execute

    def diverge(settings: Any, directory: Path, **options: Any) -> Any:
        if settings.recipe["seed"] == 1:
            raise FloatingPointError("loss is nan")
        return execute(settings, directory, **options)

    monkeypatch.setattr(bench_module, "execute", diverge)
    plan = plan_from(
        {"methods": ["linear"], "tasks": ["dtd"], "seeds": [0, 1]},
        protocol=str(place / "mini.toml"),
        data_root=str(place / "data"),
        backbone=f"local-dir:{place / 'vit'}",
    )
    [row] = run_bench(plan, tmp_path)["rows"]
    assert row["tasks"]["dtd"]["diverged"] == 1
    assert row["tasks"]["dtd"]["by_seed"][1] == 0
    assert [json.loads(line)["diverged"] for line in (tmp_path / "records.jsonl").read_text().splitlines()] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "dtt"], "task must be one of mini's dtd, kitti, got 'dtt'; did you mean dtd?"),
        (["--methods", "lora"], "must be one of"),
        (["--low-data", "few"], "--low-data must be numbers of images"),
        (["--widenings", "-1"], "--widenings must be at least 0"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_wrong_input_is_refused_before_any_run(
    words: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_data_are_named_at_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "vtab1k", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(line) == 2
    text = capsys.readouterr().err
    assert "--data-root must hold the tasks of vtab1k" in text
    assert "caltech101, camelyon" in text
    assert "huggingface.co" in text
    assert not (tmp_path / "out").exists()
