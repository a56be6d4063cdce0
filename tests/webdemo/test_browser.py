"""The page in a real Chromium, wide and narrow: `make browser` sets what it needs, elsewhere this test is skipped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import fastprompt as fp

MODULES = os.environ.get("FASTPROMPT_NODE_MODULES")
pytestmark = pytest.mark.skipif(not MODULES, reason="needs a browser: make browser")


def test_pictures_are_dropped_and_classified(
    models: dict[str, fp.PromptedViT], pictures: list[Path], tmp_path: Path
) -> None:
    from fastprompt.webdemo.page import launch

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "no chromium: apt-get install chromium, or set CHROMIUM"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    page, address = launch(models, port=port)
    job = {
        "page": address,
        "files": [str(path) for path in pictures],
        "modules": str(Path(str(MODULES)).resolve()),
        "chromium": chromium,
        "profile": str(tmp_path / "profile"),
        "widths": [1280, 390],
        "maps": 2,
        "patience": 120_000,  # milliseconds
        "screenshot": os.environ.get("FASTPROMPT_SCREENSHOT"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    try:
        ran = subprocess.run(
            ["node", str(Path(__file__).with_name("browser.mjs")), str(tmp_path / "job.json")],
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        page.close(verbose=False)
    assert ran.returncode == 0, ran.stderr
    for shown in map(json.loads, ran.stdout.splitlines()):
        assert shown["adapters"] == 2 * list(models)
        assert shown["bars"] == 2 * (3 + 8 + 2 + 2)
        assert shown["maps"] >= 2
        assert shown["overflow"] == 0
        assert shown["errors"] == []
        assert shown["outside"] == []
