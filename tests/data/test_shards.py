"""WebDataset shards and Hugging Face data sets: the same images as in a folder, any order, shared by processes."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_server import FileServer, running
from hub_stub import in_its_place
from PIL import Image

import fastprompt as fp
from fastprompt.cli.options import data_name
from fastprompt.data import remote
from fastprompt.fetch import FetchError
from fastprompt.train.batches import Batches
from fastprompt.train.ranks import Ranks

SIDE = 8


def picture(i: int) -> bytes:
    """A PNG whose colour says which one it is."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), 5 * i, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(numbers: range) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i in numbers:
        found[f"{i:03}.png"], found[f"{i:03}.mask.png"] = picture(i), picture(51)
        label = (
            (f"{i:03}.cls", str(i % 2).encode()) if i % 3 else (f"{i:03}.json", json.dumps({"label": i % 2}).encode())
        )
        found[label[0]] = label[1]
    return found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Sixteen images to train on in two shards, six for validation, four to test."""
    folder = tmp_path / "shards"
    for name, numbers in (("train-0", range(8)), ("train-1", range(8, 16)), ("val-0", range(16, 22))):
        write_shard(folder / f"{name}.tar", samples(numbers))
    write_shard(folder / "test" / "0.tar", samples(range(22, 26)))
    (folder / "classes.txt").write_text("even\nodd\n")
    return folder


def numbers(data: Any) -> list[int]:
    """Which pictures these are, checked against their labels."""
    found = []
    for image, label in data:
        assert image.unique().numel() == 1
        found.append(int(image[0, 0, 0]) // 5)
        assert label == found[-1] % 2
    return found


def test_shards_are_read_where_images_lie(shards: Path) -> None:
    data = fp.load_data(f"wds:{shards}", image_size=SIDE)
    assert data.class_names == ["even", "odd"]
    assert sorted(numbers(data.train)) == [*range(16)]
    assert sorted(numbers(data.val)) == [*range(16, 22)]
    assert sorted(numbers(data.test)) == [*range(22, 26)]
    data = fp.load_data(f"wds:{shards}", image_size=SIDE, num_train=4, num_val=2)
    assert len(numbers(data.train)) == 4


def test_shards_without_splits_are_split_here(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", samples(range(20)))
    data = fp.load_data(f"wds:{tmp_path}", image_size=SIDE)
    parts = [numbers(part) for part in (data.train, data.val, data.test)]
    assert sorted(i for part in parts for i in part) == [*range(20)]
    assert data.class_names == ["0", "1"]


def test_two_processes_share_an_epoch_without_duplicates(shards: Path) -> None:
    check_shared(fp.load_data(f"wds:{shards}", image_size=SIDE))


def check_shared(data: Any) -> None:
    for part, count in ((data.train, 16), (data.val, 6)):
        found = []
        for rank in range(2):
            batches = Batches(part, 4, name="data", num_classes=2, seed=0, ranks=FakeRanks(rank, 2))
            found += [int(image[0, 0, 0]) // 5 for images, _ in batches.epoch(3) for image in images]
        assert sorted(found) == sorted(numbers(part))
        assert len(found) == count


class FakeRanks(Ranks):
    """One of several processes that say nothing to each other."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def huggingface(folder: Path, label: Callable[[int], Any], feature: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": feature(datasets)})

    def rows(numbers: range) -> Any:
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": picture(i), "path": None} for i in numbers], "label": [label(i) for i in numbers]},
            features=features,
        )

    parts = datasets.DatasetDict({"train": rows(range(12)), "validation": rows(range(12, 16)), "extra": rows(range(2))})
    parts.save_to_disk(str(folder))
    return datasets


@pytest.mark.parametrize(
    ("label", "feature", "names"),
    [
        (lambda i: i % 2, lambda datasets: datasets.ClassLabel(names=["even", "odd"]), ["even", "odd"]),
        (lambda i: ("even", "odd")[i % 2], lambda datasets: datasets.Value("string"), ["even", "odd"]),
        (lambda i: i % 2, lambda datasets: datasets.Value("int64"), ["0", "1"]),
    ],
)
def test_a_data_set_of_hugging_face(tmp_path: Path, label: Any, feature: Any, names: list[str]) -> None:
    huggingface(tmp_path / "set", label, feature)
    with pytest.warns(UserWarning, match="the split 'extra' is left out, its name says neither training"):
        data = fp.load_data(f"hfds:{tmp_path / 'set'}", image_size=SIDE)
    assert data.class_names == names
    left = sorted([*numbers(data.train), *numbers(data.test)])
    assert left == [*range(12)]  # there is no test split
    assert sorted(numbers(data.val)) == [*range(12, 16)]


def test_a_run_on_shards_resumes_exactly(make_vit: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    class Stop(fp.Callback):
        def on_step(self, step: Any) -> None:
            if (step.epoch, step.step) == (1, 2):
                raise KeyboardInterrupt

    def run(out: Path | None, *callbacks: fp.Callback) -> torch.Tensor:
        data = fp.load_data(f"wds:{shards}", image_size=32)
        torch.manual_seed(0)
        model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(2), num_classes=2)
        options = {"epochs": 2, "batch_size": 4, "dtype": "float32", "checkpoint_every": "1 steps"}
        fp.fit(model, data.train, data.val, out_dir=out, progress=False, callbacks=callbacks, **options)
        return torch.cat([p.detach().flatten() for _, p in model.trainable_parameters()])

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Stop())
    assert torch.equal(run(tmp_path / "run"), run(None))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"0.tar": {"a.png": picture(0)}}, r"must label a\.png in .* with a class index, got None"),
        ({"0.tar": {"a.png": picture(0), "a.cls": b"cat"}}, "got 'cat'"),
        ({"0.tar": {"a.png": picture(0), "a.cls": b"1000000000000"}}, "with a class index, got '1000000000000'"),
        ({"0.tar": {"a.npy": b"", "a.cls": b"0"}}, r"must have an image that Pillow reads in each sample, got a in"),
        ({"0.tar": {"a.png": picture(0), "a.jpg": picture(0), "a.cls": b"0"}}, "must have one image a sample"),
        ({"train.tar": samples(range(4)), "0.tar": samples(range(4))}, "must name the split of every shard or of none"),
        ({}, "must be a folder with .tar shards"),
        ({"val.tar": samples(range(4))}, "must have images to train on"),
    ],
)
def test_wrong_shards_are_named(tmp_path: Path, files: dict[str, dict[str, bytes]], problem: str) -> None:
    for name, content in files.items():
        write_shard(tmp_path / name, content)
    with pytest.raises(ValueError, match=problem):
        fp.load_data(f"wds:{tmp_path}", image_size=SIDE)


def test_other_errors(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must be a folder of \.tar shards, or .*, behind 'wds:', got 'nowhere'"):
        fp.load_data("wds:nowhere", image_size=SIDE)
    with pytest.raises(ValueError, match="on_bad must be 'error'"):
        fp.load_data(f"wds:{shards}", image_size=SIDE, on_bad="skip")
    (shards / "classes.txt").write_text("even\n")
    with pytest.raises(ValueError, match="must have 2 different class names"):
        fp.load_data(f"wds:{shards}", image_size=SIDE)
    (shards / "classes.txt").unlink()
    content = bytearray((shards / "train-0.tar").read_bytes())
    start = content.index(b"IDAT") + 6
    content[start : start + 8] = bytes(8)
    (shards / "train-0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image 000.png in .*train-0.tar"):
        numbers(fp.load_data(f"wds:{shards}", image_size=SIDE).train)
    (shards / "train-0.tar").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="must have readable, uncompressed shards"):
        fp.load_data(f"wds:{shards}", image_size=SIDE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"the data set hfds:any needs the package datasets: pip install 'fastprompt\[dat"
    ):
        fp.load_data("hfds:any", image_size=SIDE)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    datasets = huggingface(tmp_path / "set", lambda i: i % 2, lambda datasets: datasets.Value("int64"))
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    loaded["train"].rename_column("label", "kind").save_to_disk(str(tmp_path / "renamed"))
    with pytest.raises(ValueError, match=r"must have one column of images and one of labels, got .*kind"):
        fp.load_data(f"hfds:{tmp_path / 'renamed'}", image_size=SIDE)


def test_wrong_splits_and_labels_are_named(tmp_path: Path) -> None:
    datasets = huggingface(tmp_path / "set", lambda i: i % 2, lambda datasets: datasets.Value("int64"))
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    twice = datasets.DatasetDict({**loaded, "valid": loaded["validation"]})
    twice.save_to_disk(str(tmp_path / "twice"))
    with pytest.raises(ValueError, match="must have one val split, got"), pytest.warns(UserWarning, match="'extra'"):
        fp.load_data(f"hfds:{tmp_path / 'twice'}", image_size=SIDE)
    for wrong in (None, 2**40):
        datasets = huggingface(
            tmp_path / str(wrong), lambda i, wrong=wrong: i or wrong, lambda datasets: datasets.Value("int64")
        )
        with pytest.raises(ValueError, match=r"must label every image of .* with a class, train does not"):
            fp.load_data(f"hfds:{tmp_path / str(wrong)}", image_size=SIDE)


def test_the_command_line_records_an_absolute_place(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    assert data_name("wds:shards") == f"wds:{shards}"
    assert data_name("hfds:ylecun/mnist") == "hfds:ylecun/mnist"


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    """The shards behind addresses, an empty cache, and no pauses between attempts."""
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    with running() as found:
        for path in shards.rglob("*.*"):
            found.files[f"/set/{path.relative_to(shards).as_posix()}"] = path.read_bytes()
        yield found


def behind(server: FileServer) -> str:
    return f"wds:{server.address}/set/{{train-{{0..1}},val-0}}.tar::{server.address}/set/test/0.tar?signed=1"


def test_shards_on_a_server_are_those_of_a_folder(server: FileServer, shards: Path) -> None:
    data, local = (fp.load_data(name, image_size=SIDE) for name in (behind(server), f"wds:{shards}"))
    assert data.class_names == ["even", "odd"]
    for one, other in ((data.train, local.train), (data.val, local.val), (data.test, local.test)):
        assert numbers(one) == numbers(other)
        assert one.identity() == other.identity()
    check_shared(data)
    size = len(picture(0))
    assert max(end - start for _, start, end in server.requests[-16:]) < 2 * size  # an image alone
    before = len(server.requests)
    stale = fp.load_data(behind(server), image_size=SIDE)
    shard = len(server.files["/set/train-0.tar"])
    assert not [1 for _, start, end in server.requests[before:] if end - start == shard]  # headers are cached
    server.files["/set/train-0.tar"] = server.files["/set/train-1.tar"]
    changed = fp.load_data(behind(server), image_size=SIDE)
    assert sorted(numbers(changed.train)) == sorted([*range(8, 16)] * 2)
    with pytest.raises(FetchError, match=r"train-0\.tar has (changed while it was read|\d+ bytes)"):
        numbers(stale.train)


def test_a_server_that_fails_midway_is_asked_again(server: FileServer) -> None:
    server.cut["/set/train-0.tar"], server.busy["/set/val-0.tar"] = 3, 2
    data = fp.load_data(behind(server), image_size=SIDE)
    server.cut["/set/train-1.tar"] = 4
    assert sorted(numbers(data.train)) == [*range(16)]


def test_a_server_that_fails_for_good_is_an_error_that_names_the_shard(server: FileServer) -> None:
    data = fp.load_data(behind(server), image_size=SIDE)
    server.busy["/set/train-1.tar"] = 1000
    with pytest.raises(FetchError, match=r"cannot read http.*/set/train-1\.tar after 5 attempts: .*503"):
        numbers(data.train)
    assert server.busy["/set/train-1.tar"] == 1000 - remote.ATTEMPTS
    server.busy.clear()
    with pytest.raises(FetchError, match=r"/set/train-2\.tar: HTTP Error 404"):
        fp.load_data(f"wds:{server.address}/set/train-{{0..2}}.tar", image_size=SIDE)
    server.whole = True
    with pytest.raises(FetchError, match="does not send parts of a file"):
        fp.load_data(behind(server), image_size=SIDE)
    for wrong in ("http://host/a.txt", "http://host/a.tar::pipe:cat b.tar", "http://host/a.tar::http://host/a.tar"):
        with pytest.raises(ValueError, match=r"name must have (addresses of|each address)"):
            fp.load_data(f"wds:{wrong}", image_size=SIDE)
    with pytest.raises(ValueError, match="must be a folder of"):
        fp.load_data("wds:pipe:cat a.tar", image_size=SIDE)


def test_a_set_of_the_hub_is_read_without_a_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})

    def parquet(numbers: range) -> bytes:
        rows = {"image": [{"bytes": picture(i), "path": None} for i in numbers], "label": [i % 2 for i in numbers]}
        file = io.BytesIO()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file, batch_size=2)
        return file.getvalue()

    with in_its_place(monkeypatch, tmp_path) as hub:
        parts = {"train-00000-of-00002": range(8), "train-00001-of-00002": range(8, 16), "validation": range(16, 22)}
        files = {f"data/{name}.parquet": parquet(numbers) for name, numbers in parts.items()}
        hub.repositories["datasets/owner/set"] = dict(files)
        data = fp.load_data("hfids:owner/set", image_size=SIDE, num_train=12, num_test=2)
        assert data.class_names == ["even", "odd"]
        data.train._kept = None
        batches = Batches(data.train, 4, name="data", num_classes=2, seed=0)
        once, again = ([image for images, _ in batches.epoch(3) for image in images] for _ in range(2))
        assert torch.equal(torch.stack(once), torch.stack(again))
        skipped = [image for images, _ in batches.epoch(3, skip=2) for image in images]
        assert torch.equal(torch.stack(once[8:]), torch.stack(skipped))
        whole = fp.load_data("hfids:owner/set/data", image_size=SIDE)
        assert sorted([*numbers(whole.train), *numbers(whole.test)]) == [*range(16)]
        assert sorted(numbers(whole.val)) == [*range(16, 22)]
        hub.repositories["datasets/owner/set"] = {"other/train-0.parquet": b"", **files}
        with pytest.raises(ValueError, match=r"with configurations \['data', 'other'\]: name one, owner/set/FOLDER"):
            fp.load_data("hfids:owner/set", image_size=SIDE)
        hub.repositories["datasets/owner/set"] = {"a.csv": b""}
        with pytest.raises(ValueError, match="must be a data set of the Hub in Parquet files"):
            fp.load_data("hfids:owner/set", image_size=SIDE)
