"""A minute of `make torture`, and that its checks find what is wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import crashes
import pytest
import torch
import torture
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes and kills them"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


SMALL = (
    "--kills 2 --within 3 --workers 1 --ranks 2 --every 60 --writers 3 --flips 40 --hostile 20 --idle 6 --turns 0 "
    "--seed 1"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict[str, int]]:
    """What a minute of `make torture` saw, by part. It forks, so it needs a process in which nothing else ran."""
    out = tmp_path_factory.mktemp("torture") / "torture.md"
    command = [sys.executable, str(repository / "bench" / "torture.py"), *SMALL.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = re.findall(r"^([^|:\n]+(?:: \w[^:\n]*)?): (.*): (\{.*\}), 0 wrong$", ran.stdout, re.MULTILINE)
    assert out.read_text().count("| 0 |\n") == len(lines) == 12, ran.stdout
    return {
        part: {"tried": int(re.findall(r"\d+", tried)[0]), **ast.literal_eval(found)} for part, tried, found in lines
    }


def test_a_minute_of_torture_loses_nothing(outcomes: dict[str, dict[str, int]]) -> None:
    assert outcomes["Runs killed at random"]["kills"] >= 2
    within = outcomes["Runs killed within an epoch"]
    assert (within["kills"], within["the same bits in the end"]) == (3, 3)
    for part in ("with two loading processes", "on shards"):
        of_part = outcomes[f"Runs {part} killed"]
        assert min(of_part["kills"], of_part["the same bits in the end"]) >= 1
    of_ranks = outcomes["Processes of a run in two processes killed"]
    assert of_ranks["kills"] >= 2
    assert of_ranks["the same bits in the end"] >= 1
    assert outcomes["Every operation on files killed"]["tried"] > 100
    assert outcomes["Every operation on files killed"]["the same bits in the end"] >= 4
    full = outcomes["Full disk"]
    assert full["an error that names the full disk"] >= 3
    assert full["the same bits in the end"] == full["an error that names the full disk"] + 1
    writers = outcomes["Several writers in one directory"]
    assert writers["the same bits in the end"] == 3
    assert writers["refused: the directory is in use"] >= 2
    for part in ("weights", "configuration", "state of a run"):
        flipped = outcomes[f"Flipped bits: {part}"]
        assert flipped["refused by name"] > 20
        assert flipped["refused by name"] + flipped.get("read as it was", 0) == 40
    clients = outcomes["Hostile clients of a host"]
    assert clients["right answers"] > 0
    assert sum(times for name, times in clients.items() if name.startswith("hostile")) >= 20


def test_what_differs_is_found(tmp_path: Path) -> None:
    place = torture.Place(tmp_path)
    place.run("changed")
    directory = place.root / "changed"
    assert torture.differences(torture.contents(directory), place.expected) == []
    log = directory / "log.jsonl"
    rows = log.read_text().splitlines()
    log.write_text("\n".join([rows[0], rows[1], *rows[1:]]) + "\n")
    (directory / ".log.jsonl.1-ab.tmp").write_text("half")
    results = json.loads((directory / "results.json").read_text())
    results["test"]["predictions"][0] += 1
    (directory / "results.json").write_text(json.dumps(results))
    assert torture.differences(torture.contents(directory), place.expected) == [
        "log differs",
        "results.json differs",
        "temporary files differs",
    ]
    weights = directory / "weights.safetensors"
    save_file(place.expected["best/"], weights)
    changed = load_file(weights)
    name = next(iter(changed))
    changed[name].view(-1)[0] = torch.nextafter(changed[name].view(-1)[0], torch.tensor(9.0))
    assert not torture.same(changed, place.expected["best/"])


def test_a_process_is_killed_where_it_should_be(tmp_path: Path) -> None:
    def work() -> None:
        for name in "abc":
            (tmp_path / name).write_text(name)

    assert crashes.killed_at(3, tmp_path, work) == -9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert crashes.in_a_child(lambda: os._exit(crashes.at_operation(-1, tmp_path, work, print))) == 3
    assert crashes.full_from(2, tmp_path, work, tmp_path.with_suffix(".log")) == 1
    assert "No space left on device" in tmp_path.with_suffix(".log").read_text()
    assert crashes.full_from(4, tmp_path, work) == 0
    assert crashes.killed_after(60.0, work) == 0


def test_the_report_says_what_was_tried_and_what_went_wrong() -> None:
    found = torture.Found("Part", "7 kills", Counter({"the same bits in the end": 6}), ["run 7: log differs"])
    text = torture.report([found], torture.Flags())
    assert "| Part | 7 kills | the same bits in the end: 6 | 1 |" in text
    assert "* Part: run 7: log differs" in text
    assert torch.__version__ in text
