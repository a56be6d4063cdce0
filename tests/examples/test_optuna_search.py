"""Optuna chooses sizes and learning rate, and ends trials that fall behind."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from documented import offline, prepare

optuna = pytest.importorskip("optuna")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "optuna_search.py"


def test_it_finds_a_good_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    offline(monkeypatch, tiny=True)
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: asked.append(trial.number) or trial.number == 1)
    example = runpy.run_path(str(EXAMPLE))
    study = example["search"](Path("birds"), "vit_base_patch16_224", 32, trials=3, epochs=2)
    assert asked == [0, 0, 1, 2, 2]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert set(study.best_params) == {"num_prompts", "first_block", "lr"}
    example["main"](["birds", "--image-size", "32", "--trials", "1", "--epochs", "1"])
    assert "validation accuracy" in capsys.readouterr().out
