from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from made_protocols import small, write_protocol

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.protocols import named_task


def test_the_protocols_have_the_papers_tasks() -> None:
    assert fp.list_protocols() == ["fgvc", "hta", "pgn12", "vtab1k"]
    counts = {name: len(fp.load_protocol(name).tasks) for name in fp.list_protocols()}
    assert counts == {"fgvc": 5, "hta": 10, "pgn12": 12, "vtab1k": 19}
    vtab = fp.load_protocol("vtab1k")
    assert {(task.train, task.val) for task in vtab.tasks} == {(800, 200)}
    groups = [task.group for task in vtab.tasks]
    assert [groups.count(name) for name in ("natural", "specialised", "structured")] == [7, 4, 8]
    assert [vtab.task(name).classes for name in ("sun397", "clevr-distance", "kitti")] == [397, 6, 4]
    assert vtab.seeds == (42, 44, 82, 100, 800)
    assert len(vtab.base_lrs) == 10
    assert fp.load_protocol("fgvc").base_lrs == tuple(lr for lr in vtab.base_lrs if lr != 0.05)
    sizes = fp.load_protocol("pgn12").task("resisc45")
    assert (sizes.train, sizes.val, sizes.test, sizes.unconfirmed) == (18900, 6300, 6300, ())


def test_a_file_of_ones_own_is_a_protocol(tmp_path: Path) -> None:
    mine = dataclasses.replace(small("vtab1k", ["dtd", "kitti"]), name="mine")
    path = write_protocol(mine, tmp_path / "mine.toml")
    assert fp.load_protocol(path) == mine
    found = named_task(f"{path}:kitti")
    assert found is not None
    assert (found[0].name, found[1].name) == ("mine", "kitti")
    assert named_task("torchvision:DTD") is None
    assert named_task("birds") is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'resize = "squash"',
            'resize = "stretch"',
            r"resize must be one of 'crop', 'squash', got 'stretch' \(in",
        ),
        ("seeds = [42, 44, 82, 100, 800]", "", r"seeds is missing in the protocol"),
        ("seeds = [42, 44, 82, 100, 800]", "seeds = 42", r"seeds must be a list"),
        ('layout = "lists"', 'layout = "listed"', r"layout must be one of"),
        ('layout = "lists"', 'layout = "coop"', r"file must be given for the layouts coop, clevr"),
        ("train = 8", "train = 0", r"train must be a positive integer, got 0"),
        ("train = 8", "train = 8\ncolour = 1", r"colour is no key of task 'dtd'"),
        ("size = 32", "size = 32\nside = 1", r"side is no key of the protocol"),
        ('name = "dtd"', 'name = "kitti"', r"tasks must be tasks of different names"),
        ("[images]", "[images", r"name must be a TOML file"),
    ],
)
def test_a_damaged_protocol_is_refused_by_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_protocol(small("vtab1k", ["dtd", "kitti"]), tmp_path / "mine.toml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        fp.load_protocol(path)


def test_wrong_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name must be one of fgvc, .*got 'vtab-1k'; did you mean vtab1k"):
        fp.load_protocol("vtab-1k")
    with pytest.raises(ValueError, match=r"task must be one of fgvc's cub, .*got 'car'; did you mean cars"):
        named_task("fgvc:car")
    with pytest.raises(FileNotFoundError, match="name must be a file that exists"):
        fp.load_protocol(tmp_path / "none.toml")
    with pytest.raises(TypeError, match="name must be"):
        fp.load_protocol(1)  # type: ignore[arg-type]


def test_the_command_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dtd").mkdir()
    assert main(["protocols", "vtab1k", "--data-root", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^dtd +47 +800 +200 +1,880\? +{tmp_path}/dtd$", text, re.MULTILINE)
    assert re.search(r"^kitti +4 +800 +200 +711 +–$", text, re.MULTILINE)
    assert "learning rate 50 25 10" in text
    assert "huggingface.co/datasets/XiN0919/VTAB-1k" in text
    assert main(["protocols"]) == 0
    text = capsys.readouterr().out
    assert all(f"{name}: " in text for name in fp.list_protocols())
    assert main(["protocols", "vtab"]) == 2
