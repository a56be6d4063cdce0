"""A minute of `make torture`, and that its checks find what is wrong."""

from __future__ import annotations

import json
import os
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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> torture.Place:
    torch.set_num_threads(1)
    return torture.Place(tmp_path_factory.mktemp("torture"))


def right(found: torture.Found) -> Counter[str]:
    assert found.wrong == []
    return found.outcomes


def test_runs_that_are_killed_end_in_the_same_bits(place: torture.Place) -> None:
    assert right(torture.random_kills(place, 3, seed=1))["kills"] >= 3
    found = torture.every_operation(place, 40)
    assert right(found)["the same bits in the end"] >= 4
    assert int(found.tried.split()[0]) > 100


def test_a_full_disk_is_an_error_and_loses_nothing(place: torture.Place) -> None:
    outcomes = right(torture.full_disk(place, 25))
    assert outcomes["an error that names the full disk"] >= 3
    assert outcomes["the same bits in the end"] == outcomes["an error that names the full disk"] + 1


def test_of_several_writers_one_writes(place: torture.Place) -> None:
    outcomes = right(torture.many_writers(place, 3, seed=0))
    assert outcomes["the same bits in the end"] == 3
    assert outcomes["refused: the directory is in use"] >= 2
    assert outcomes["killed"] >= 1


def test_flipped_bits_are_refused_by_name_or_change_nothing(place: torture.Place) -> None:
    for found in torture.flipped_bits(place, 60, seed=0):
        assert sum(right(found).values()) == 60
        assert found.outcomes["refused by name"] > 30


def test_hostile_clients_disturb_nobody(place: torture.Place) -> None:
    outcomes = right(torture.hostile_clients(place, hostile=20, idle=6, seconds=2.0))
    assert outcomes["right answers"] > 0
    assert sum(times for name, times in outcomes.items() if name.startswith("hostile")) >= 20


def test_what_differs_is_found(place: torture.Place) -> None:
    assert crashes.in_a_child(lambda: place.run("changed"), place.log) == 0
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
