from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastprompt_client import Client
from fastprompt_client.cli import KEY, main


@pytest.fixture
def image(photo: np.ndarray, tmp_path: Path) -> Path:
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_images_are_classified(folder: Path, host: Any, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), str(image), str(image), "--url", host.url]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    expected = Client(folder).predict(host.url, image)
    assert (
        first == second == {"file": str(image), "class": expected.name, "probability": round(expected.probability, 6)}
    )


def test_without_an_image_the_host_is_verified(folder: Path, host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--url", host.url]) == 0
    assert "is right" in capsys.readouterr().out
    host.finish = lambda vector: -vector
    assert main([str(folder), "--url", host.url]) == 1
    assert "refused" in capsys.readouterr().err


def test_the_picture_is_written_without_a_host(folder: Path, image: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(image), "--png", str(tmp_path / "out.png")]) == 0
    written = Image.open(io.BytesIO((tmp_path / "out.png").read_bytes()))
    assert np.array_equal(np.asarray(written), Client(folder).picture(image))


def test_the_key_comes_from_the_environment(folder: Path, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host.key = "secret"
    assert main([str(folder), "--url", host.url]) == 1
    monkeypatch.setenv(KEY, "secret")
    assert main([str(folder), "--url", host.url]) == 0


def test_an_empty_key_is_none(folder: Path, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "")
    assert main([str(folder), "--url", host.url]) == 0
    assert not any("Authorization" in headers for _, headers, _ in host.requests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FOLDER"], "--url or --png must be given"),
        (["FOLDER", "--png", "x.png"], "--png must be given with one image, got 0"),
        (["FOLDER", "none.jpg", "--png", "x.png"], "image none.jpg is not a file"),
        (["FOLDER", "--url", "localhost"], "url must be http://HOST"),
        (["FOLDER", "--url", "http://localhost:99999"], "url must have a port from 1 to 65535"),
        (["FOLDER", "--url", "http://localhost", "--timeout", "0"], "timeout must be above 0"),
        (["/no/such", "--url", "http://localhost"], "must be a folder"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder) if a == "FOLDER" else a for a in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


HOSTILE = "a\x1b[31m\x9b2J\u202eb\x07\udcff"


def test_no_foreign_text_reaches_the_terminal_raw(
    folder: Path, host: Any, photo: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile, image = Path(shutil.copytree(folder, tmp_path / "copy")), tmp_path / "a\x1b]0;b\x9b\u202e.png"
    Image.fromarray(photo).save(image)
    manifest = json.loads((hostile / "manifest.json").read_text())
    manifest["class_names"] = [HOSTILE + str(i) for i in range(3)]
    manifest["backbone"]["name"] = HOSTILE
    (hostile / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(hostile), str(image), "--url", host.url]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert json.loads(line)["class"].startswith(HOSTILE)
    assert json.loads(line)["file"] == str(image)
    assert main([str(hostile), "--url", host.url]) == 0
    host.finish = lambda vector: -vector
    host.models = [{"id": "x", "fingerprint": HOSTILE}]
    assert main([str(hostile), "--url", host.url]) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err):
        [line] = text.splitlines()
        assert line.isprintable()
