"""The code of `client/web` in Node, where there is one; in a real browser it runs by `make browser`."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastprompt_client import Client

NODE, WEB = shutil.which("node"), Path(__file__).parents[2] / "client" / "web"
PAGE = Path(__file__).with_name("page.mjs")
CASES = re.findall(r"^  async \"?([a-z ]+)\"?\(\) {$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
ORT = """
export const env = { wasm: {} };
export class Tensor {}
export const InferenceSession = { create: async () => ({ run: async () => ({ weights: globalThis.weights }) }) };
"""

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")


def raw(content: bytes) -> dict[str, Any]:
    """A PNG file's pixels as the job has them."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return {"width": image.width, "height": image.height, "rgba": base64.b64encode(image.tobytes()).decode()}


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Path:
    """JOB.json for `page.mjs`, and the page's files beside a stand-in for onnxruntime-web."""
    web = tmp_path / "web"
    (web / "ort").mkdir(parents=True)
    for file in WEB.glob("*.js"):
        shutil.copy(file, web)
    (web / "package.json").write_text('{"type": "module"}')
    (web / "ort" / "ort.wasm.min.mjs").write_text(ORT)
    client = Client(folder)
    files = [client.folder.golden_image, client.folder.golden_picture]
    image = np.asarray(Image.open(io.BytesIO(files[0])))
    [weights] = client._session.run(None, {"image": image[None]})
    head = client.folder.head
    assert head is not None
    (tmp_path / "job.json").write_text(
        json.dumps(
            {
                "web": web.as_uri(),
                "folder": str(folder),
                "golden": client.folder.golden_embedding.tolist(),
                "rows": (head.rows * 10).tolist(),
                "images": {base64.b64encode(file).decode(): raw(file) for file in files},
                "weights": {"dims": list(weights.shape), "data": weights.ravel().tolist()},
            }
        )
    )
    return tmp_path / "job.json"


def test_every_case_is_run(job: Path) -> None:
    ran = subprocess.run(
        [str(NODE), str(PAGE), "list", str(job)], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(ran.stdout) == CASES


@pytest.mark.parametrize("case", CASES)
def test_the_page(case: str, job: Path) -> None:
    ran = subprocess.run([str(NODE), str(PAGE), case, str(job)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
