"""The page of `client/web` in a real Chromium: `make browser` sets what it needs, elsewhere these tests are skipped."""

from __future__ import annotations

import json
import mimetypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastprompt as fp
from fastprompt.pixels.export import export_client
from fastprompt_client import Client

PAGE, MODULES = os.environ.get("FASTPROMPT_PAGE"), os.environ.get("FASTPROMPT_NODE_MODULES")
pytestmark = pytest.mark.skipif(not PAGE or not MODULES, reason="needs a browser: make browser")


@pytest.fixture
def serve(host: Any) -> Callable[[Path], None]:
    """`serve(folder)`: the host has the page and, under /model, the folder."""

    def put(folder: Path) -> None:
        for root, prefix in ((Path(str(PAGE)), "/"), (folder, "/model/")):
            for path in root.rglob("*"):
                if path.is_file() and "model" not in path.relative_to(root).parts:
                    kind = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}.get(
                        path.suffix, mimetypes.guess_type(path.name)[0] or "application/octet-stream"
                    )
                    host.files[prefix + path.relative_to(root).as_posix()] = (kind, path.read_bytes())

    return put


@pytest.fixture
def browse(host: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`browse(files)`: what the page shows for each."""

    def run(files: list[Path], query: str = "") -> list[dict[str, Any]]:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
        assert chromium, "no chromium: apt-get install chromium, or set CHROMIUM"
        job = {
            "page": host.url + "/index.html" + query,
            "files": [str(file) for file in files],
            "modules": str(Path(str(MODULES)).resolve()),
            "chromium": chromium,
            "profile": str(tmp_path / "profile"),
            "patience": 120_000,  # milliseconds
            "screenshot": os.environ.get("FASTPROMPT_SCREENSHOT"),
        }
        (tmp_path / "job.json").write_text(json.dumps(job))
        ran = subprocess.run(
            ["node", str(Path(__file__).with_name("browser.mjs")), str(tmp_path / "job.json")],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr
        assert not ran.stderr.strip(), ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return run


def pixels(shown: dict[str, Any]) -> np.ndarray:
    rgba = np.array(shown["rgba"], dtype=np.uint8).reshape(shown["height"], shown["width"], 4)
    assert (rgba[..., 3] == 255).all()
    return rgba[..., :3]


def images(folder: Path) -> list[Path]:
    """PNG files of several sizes: enlarged, shrunk, of the right size."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("right", (32, 32)), ("large", (233, 310)), ("tall", (150, 61)), ("small", (13, 20))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


def test_the_page_is_the_python_client(
    model: fp.PromptedViT, host: Any, tmp_path: Path, serve: Any, browse: Any
) -> None:
    export_client(model, tmp_path / "model")
    serve(tmp_path / "model")
    client, files = Client(tmp_path / "model"), images(tmp_path / "images")
    different, total = 0, 0
    for file, shown in zip(files, browse(files), strict=True):
        assert shown["state"] == "Done.", shown["state"]
        assert "is right" in shown["verification"]
        opened = client.picture(file).astype(int)
        found = pixels(shown["picture"]).astype(int)
        assert found.shape == opened.shape
        rows = len(found) - client.folder.rows * 8
        assert np.array_equal(found[:rows], opened[:rows])  # resizing, shrinking, border: the same bytes
        assert np.abs(found - opened).max() <= 1
        different, total = different + int((found != opened).sum()), total + found.size
        prediction = client.predict(host.url, file)
        assert shown["class"] == prediction.name
        assert {name: float(p) for name, p in shown["rows"]} == pytest.approx(
            dict(zip("abc", prediction.probabilities, strict=True)), abs=5e-3
        )
    assert different <= 1e-3 * total
    print(f"{different} of {total} levels differ")


@pytest.mark.parametrize("kind", ["text", "prototypes", "inverted"])
def test_the_page_has_every_head_and_placement(
    backbone: fp.FrozenViT, make: Any, host: Any, tmp_path: Path, serve: Any, browse: Any, kind: str
) -> None:
    config = fp.RGBPGNConfig(num_prompts=4, library_size=6, widths=(4, 8))
    if kind == "inverted":
        pgn = make(backbone, fp.PGNConfig(num_prompts=4, library_size=6, widths=(4, 8)))
        model = fp.RGBPrompts.invert(pgn, "extend", picture=True)
    elif kind == "text":
        texts = torch.randn(3, 48)
        model = fp.PromptedViT(backbone, config, 3, "text", class_embeddings=texts, class_names=list("abc"))
    else:
        layers = [(torch.randn(20, 48), torch.randn(20)), (torch.randn(10, 20), None)]
        model = fp.PromptedViT(
            backbone, config, head=fp.PrototypeHead(torch.randn(3, 10), layers), class_names=list("abc")
        )
    export_client(model, tmp_path / "model")
    serve(tmp_path / "model")
    [file, *_] = images(tmp_path / "images")
    [shown] = browse([file])
    assert shown["state"] == "Done.", shown["state"]
    prediction = Client(tmp_path / "model").predict(host.url, file)
    assert {name: float(p) for name, p in shown["rows"]} == pytest.approx(
        dict(zip("abc", prediction.probabilities, strict=True)), abs=5e-3
    )


def test_a_broken_host_gets_no_picture(folder: Path, host: Any, tmp_path: Path, serve: Any, browse: Any) -> None:
    serve(folder)
    host.change = lambda picture: picture.resize((32, 32), Image.Resampling.BICUBIC)
    [shown] = browse(images(tmp_path / "images")[:1])
    assert "refused" in shown["state"]
    assert "Likely: resizing" in shown["verification"]
    assert shown["class"] == "–"
    sent = [body for path, _, body in host.requests if path == "/v1/embeddings"]
    assert len(sent) == 1  # the golden picture


def test_a_damaged_file_stops_the_page(folder: Path, host: Any, tmp_path: Path, serve: Any, browse: Any) -> None:
    serve(folder)
    kind, content = host.files["/model/library.npy"]
    host.files["/model/library.npy"] = (kind, content[:-1] + bytes([content[-1] ^ 1]))
    [shown] = browse(images(tmp_path / "images")[:1])
    assert "library.npy is damaged" in shown["state"]
