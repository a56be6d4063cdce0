from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from documented import prepare
from timm.models import save_for_hf

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_write_one_run(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    prepare(tmp_path)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes), tmp_path / "vit")
    flags = ["--backbone", "local-dir:vit", "--image-size", "32", "--epochs", "2", "--batch-size", "4"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import os, pathlib\npathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ.get('RANK', 'none')).touch()\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [ROOT / "examples" / "torchrun_adapt.sh", "birds", "run", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert {f.name for f in tmp_path.glob("rank-*")} >= {"rank-0", "rank-1"}
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["history"]) == 2
    assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()
