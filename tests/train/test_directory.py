from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastprompt.files import atomic_write
from fastprompt.locks import DirectoryInUse
from fastprompt.train.directory import open_run


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name != ".lock")


def test_state_and_log_come_back(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        assert run.read_state() is None
        assert run.read_log() == []
        run.commit({"x": torch.ones(2)}, {"epoch": 1})
        run.write_log([{"event": "start"}, {"event": "epoch"}])
        assert run.read_state() is not None
        (run.path / "log.jsonl").write_text('{"event": "start"}\n{"event": "ep')
        assert run.read_log() == [{"event": "start"}]


def test_a_run_is_held_by_one_and_a_file_is_no_directory(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"), pytest.raises(DirectoryInUse, match=f"process {os.getpid()}"):
        open_run(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out_dir must be a directory"):
        open_run(tmp_path / "file").__enter__()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    for path in (tmp_path / ".last.safetensors.1-ab.tmp", tmp_path / "best" / ".adapter_model.safetensors.1-ab.tmp"):
        atomic_write(path, b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    with open_run(tmp_path):
        assert names(tmp_path) == [".owner.json", "best", "notes.tmp"]


def test_a_new_run_takes_the_old_one_away_result_first_and_settings_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["results.json", "result.json", "last.safetensors", "choices.json", "log.jsonl", "recipe.json", "run.json"]
    for name in (*files, "best/adapter_model.safetensors", "notes.txt"):
        atomic_write(tmp_path / name, b"old")
    gone: list[str] = []
    unlink = Path.unlink

    def record(self: Path, missing_ok: bool = False) -> None:
        gone.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", record)
    with open_run(tmp_path) as run:
        run.begin({"run.json": "new"})
        assert [name for name in gone if name in files] == files
        assert names(tmp_path) == [".owner.json", "notes.txt", "run.json"]
        assert (tmp_path / "run.json").read_text() == "new"


def test_choices_are_those_of_a_run_and_every_flipped_bit_of_them_is_found(tmp_path: Path) -> None:
    choices = {"('op', torch.Size([2, 3]))": "native", "float32 products": "oneDNN"}
    with open_run(tmp_path) as run:
        assert run.read_choices("a") == {}
        run.write_choices("a", choices)
        assert run.read_choices("a") == choices
        with pytest.raises(ValueError, match=r"choices\.json cannot be used.*belongs to another run"):
            run.read_choices("b")
        path = tmp_path / "choices.json"
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                assert run.read_choices("a") == choices  # white space is the only thing that may differ
                assert json.loads(bytes(damaged)) == json.loads(whole)
            except ValueError as error:
                assert "choices.json cannot be used" in str(error)  # noqa: PT017
