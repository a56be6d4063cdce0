from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import pytest

import fastprompt.data
from fastprompt.fetch import FetchError


def test_from_nothing_to_the_report(tiny_run: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = list(tiny_run)
    flags += [
        "--num-train",
        "8",
        "--num-val",
        "4",
        "--num-test",
        "6",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--first-block",
        "1",
    ]
    flags += ["--methods", "linear", "pgn", "--out", str(tmp_path / "demo")]
    assert demo.main(flags) == 0
    shown = capfd.readouterr().out
    for method in ("linear", "pgn"):
        results = json.loads((tmp_path / "demo" / method / "results.json").read_text())
        assert results["test"]["num_images"] == 6
        assert f"{results['trained_parameters']['total']:,}" in shown
        assert f"{results['peak_memory_mib']:,.0f}" in shown
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "Most-used library tokens" in report
    assert str(tmp_path / "demo" / "report.html") in shown
    assert "pgn: " in shown
    assert "points over the probe [" in shown


def test_gains_are_paired_over_images() -> None:
    labels = [0] * 20
    runs = [
        {"method": method, "test": {"labels": labels, "predictions": [0] * right + [1] * (20 - right)}}
        for method, right in (("linear", 12), ("vpt-deep", 17), ("pgn", 12))
    ]
    deep, pgn, caveat = demo.gains(runs)
    assert deep.startswith("vpt-deep: +25.0 points over the probe [+4.2, +45.8], McNemar p = 0.06")
    assert pgn.startswith("pgn: +0.0 points over the probe [+0.0, +0.0]")
    assert "One seed" in caveat
    assert demo.gains(runs[1:]) == []


@pytest.mark.long
def test_a_failing_method_ends_the_demo_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", lambda *_: None)
    flags = ["--data", "no/such/folder", "--methods", "linear", "--out", str(tmp_path / "demo")]
    assert demo.main(flags) == 2
    assert not (tmp_path / "demo" / "report.html").exists()


@pytest.mark.parametrize(("error", "text"), [(FetchError, "no network"), (ValueError, "name must be a folder")])
def test_what_cannot_be_fetched_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: type[Exception],
    text: str,
) -> None:
    def load_data(*_: Any, **__: Any) -> None:
        raise error(text)

    monkeypatch.setattr(fastprompt.data, "load_data", load_data)
    assert demo.main(["--data", "x", "--out", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err == f"demo: error: {text}\n"
    assert not (tmp_path / "demo").exists()
