from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pixels
import pytest
import records
import table

from fastprompt.runs.directory import write_json

RESULTS: dict[str, Any] = {
    "title": "V²APT",
    "best_epoch": None,
    "seconds": 1.0,
    "history": [{"epoch": 1, "lr": 1e-3}, {"epoch": 2, "lr": 0.1 + 0.2}],
    "validation": {"labels": [0, 1] * 40, "predictions": list(range(80))},
    "test": {"labels": [0, 1] * 40, "predictions": [1000 * i - 7 for i in range(80)]},
    "library": {"mean_weight": [1 / (i + 1) for i in range(50)], "perplexity": math.inf},
    "mixed": [1, 1.0] * 40,
    "flags": [True, False] * 40,
    "huge": [2**70] * 40,
    "empty": [],
}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs, one that diverged, one under way; adapters and logs beside the JSON."""
    for name, files in {
        "pgn/lr0.01-seed0": {
            "run.json": {"method": "pgn"},
            "results.json": RESULTS,
            "pictures.json": {"png": [3] * 40},
        },
        "pgn/lr0.01-seed1": {"run.json": {"method": "pgn"}, "results.json": RESULTS | {"seconds": 2.5}},
        "pgn/lr1-seed0": {"run.json": {"method": "pgn"}, "diverged.json": {"diverged": True}},
        "pgn/lr1-seed1": {"run.json": {"method": "pgn"}},
    }.items():
        (tmp_path / "runs" / name / "best").mkdir(parents=True)
        (tmp_path / "runs" / name / "best" / "adapter.bin").write_bytes(b"\0")
        for file, value in files.items():
            write_json(tmp_path / "runs" / name / file, value)
    return tmp_path / "runs"


def test_the_json_of_finished_runs_comes_back_byte_for_byte(runs: Path, tmp_path: Path) -> None:
    names = ["pgn/lr0.01-seed0", "pgn/lr0.01-seed1", "pgn/lr1-seed0"]
    assert records.pack(runs, tmp_path / "kept") == names
    assert records.unpack(tmp_path / "kept", tmp_path / "again") == names
    expected = {
        name: text
        for name, text in contents(runs).items()
        if name.endswith(".json") and not name.startswith("pgn/lr1-seed1")
    }
    assert contents(tmp_path / "again") == expected
    before = contents(tmp_path)
    records.pack(tmp_path / "again", tmp_path / "kept")
    assert contents(tmp_path) == before


def test_numbers_of_every_image_are_kept_once_and_not_as_text(runs: Path, tmp_path: Path) -> None:
    records.pack(runs, tmp_path / "kept")
    first, second, _ = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    labels = [
        run["files"]["results.json"][split]["labels"] for run in (first, second) for split in ("test", "validation")
    ]
    assert labels[0].keys() == {"vector"}
    assert labels == labels[:1] * 4
    assert first["files"]["results.json"]["history"] == RESULTS["history"]


def test_a_run_directory_that_is_there_is_left_alone(runs: Path, tmp_path: Path) -> None:
    records.pack(runs, tmp_path / "kept")
    (runs / "pgn/lr0.01-seed0/results.json").unlink()  # it runs again
    before = contents(runs)
    assert records.unpack(tmp_path / "kept", runs) == []
    assert contents(runs) == before


@pytest.mark.parametrize("text", ['{"a":1}', '{\n "a": 1.00\n}\n', '{\n "vector": "0"\n}\n'])
def test_what_would_not_come_back_as_it_is_is_refused(runs: Path, tmp_path: Path, text: str) -> None:
    (runs / "pgn/lr0.01-seed1/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json could not be restored|the vector '0'"):
        records.pack(runs, tmp_path / "kept")
    assert not list(tmp_path.glob("kept*"))


def test_records_and_vectors_of_two_packings_are_noticed(runs: Path, tmp_path: Path) -> None:
    records.pack(runs, tmp_path / "kept")
    write_json(runs / "pgn/lr0.01-seed0/pictures.json", {"png": [4] * 40})
    records.pack(runs, tmp_path / "other")
    (tmp_path / "other.npz").replace(tmp_path / "kept.npz")
    with pytest.raises(ValueError, match="records must hold the vector"):
        records.unpack(tmp_path / "kept", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_command_packs_and_unpacks(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert records.main(["pack", str(runs), str(tmp_path / "kept")]) == 0
    assert records.main(["unpack", str(tmp_path / "kept"), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == "3 runs packed\n3 runs unpacked\n"
    assert records.main(["unpack", str(tmp_path / "none"), str(tmp_path / "again")]) == 1
    assert "records: error:" in capsys.readouterr().err


def test_the_kept_records_make_the_tables_and_leave_nothing_to_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in table.RECORDS.glob("*.jsonl"):
        records.unpack(name.with_suffix(""), tmp_path / name.stem)
    monkeypatch.setattr(table, "RUNS", tmp_path)
    kept = [name for name in table.default_rows() if (tmp_path / "fashion-mnist" / name).is_dir()]
    assert {*table.default_rows()} - {*kept} == {"cvpt"}  # not measured yet
    assert table.main(["--dry-run", "--methods", *kept]) == pixels.main(["--dry-run"]) == 0
    assert capsys.readouterr().out == "nothing is left to run\n" * 2
    out = ["--results", str(tmp_path / "results")]
    assert table.main(["--aggregate-only", "--out", str(tmp_path / "fashion-mnist"), *out]) == 0
    assert pixels.main(["--tables-only", "--out", str(tmp_path), *out]) == 0
    named = "vit-s14-mnist5k"
    assert table.main(["--aggregate-only", "--name", named, "--out", str(tmp_path / named), *out]) == 0
    for name in ("table.json", "table.md", f"table-{named}.json", f"table-{named}.md", "pixels.json", "pixels.md"):
        assert (tmp_path / "results" / name).read_bytes() == (repository / "results" / name).read_bytes()


@pytest.mark.parametrize(
    ("data", "name"), [("fashion-mnist", "fashion-mnist"), ("/home/me/my pictures", "home-me-my-pictures")]
)
def test_runs_on_a_folder_of_images_do_not_lie_in_it(data: str, name: str) -> None:
    assert table.name_of(data) == name


def test_a_missing_record_is_what_a_dry_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "RUNS", tmp_path)
    table.restore("mnist5k")
    lost = tmp_path / "mnist5k" / "pixel" / "lr0.01-seed1"
    (lost / "pictures.json").unlink()
    assert pixels.main(["--dry-run", "--data", "mnist5k"]) == 0
    assert capsys.readouterr().out == f"would run again   {lost}\n"
    (lost / "best").mkdir()
    assert pixels.main(["--dry-run", "--data", "mnist5k"]) == 0
    assert capsys.readouterr().out == f"would classify    {lost}\n"
    (lost / "results.json").unlink()
    assert pixels.main(["--dry-run", "--data", "mnist5k"]) == 0
    assert capsys.readouterr().out == f"would run         {lost}\n"
