"""Training, evaluation, prediction and serving of timm backbones need none of the optional packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastprompt.extras import needed

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("matplotlib", "mpl_toolkits", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "open_clip", "openvino")
OPTIONAL += ("accelerate", "gradio", "gradio_client", "scipy", "sklearn", "tensorboard", "transformers")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an interpreter whose packages are those of this one without the optional ones."""
    site = tmp_path_factory.mktemp("site")
    for folder in dict.fromkeys(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")):
        for path in Path(folder).iterdir():
            name = path.name.split("-")[0].lower()
            blocked = name in OPTIONAL or name in ("scikit_learn", "open_clip_torch") or path.suffix == ".pth"
            if not blocked and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-S", *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and a tiny timm ViT saved as timm does."""
    import timm
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("place")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    (root / "vit").mkdir()
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    save_file(model.state_dict(), root / "vit" / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (root / "vit" / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(low, low + 127, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return root


def adapt(place: Path, out: str, *more: str) -> list[str]:
    data = ["--data", str(place / "images"), "--backbone", f"local-dir:{place / 'vit'}", "--out", str(place / out)]
    sizes = ["--num-train", "8", "--num-val", "4", "--num-test", "4", "--batch-size", "4", "--epochs", "1"]
    return ["adapt", *data, *sizes, "--dtype", "float32", "--no-progress", *more]


def test_the_packages_are_not_there(without: dict[str, str]) -> None:
    code = (
        f"import importlib.util as u; print([n for n in {OPTIONAL} if u.find_spec(n)], u.find_spec('timm') is not None)"
    )
    assert run(without, "-c", code).stdout.strip() == "[] True"


def commands(*lines: list[str]) -> str:
    """A program that runs commands one after the other and prints their exit codes."""
    return f"from fastprompt.cli import main\nfor line in {lines!r}: print('exit', main(line), flush=True)\n"


def test_adapt_eval_predict_and_serve_need_none_of_them(without: dict[str, str], place: Path) -> None:
    code = commands(
        adapt(place, "run", "--method", "vpt-deep", "--num-prompts", "2"),
        ["eval", str(place / "run")],
        ["predict", str(place / "run"), str(place / "images" / "dark")],
    )
    code += "import fastprompt.serve.host, fastprompt as fp; fp.Engine, fp.RGBPrompts, fp.fit, fp.load_official\n"
    ran = run(without, "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("exit 0") == 3, ran.stderr
    assert json.loads((place / "run" / "results.json").read_text())["validation"]["num_images"] == 4


def test_what_needs_them_names_the_extra_before_any_work(without: dict[str, str], place: Path) -> None:
    (place / "bare").mkdir()
    code = commands(
        adapt(place, "probe", "--method", "linear"),
        ["report", str(place / "bare"), "--out", str(place / "report.html")],
    )
    ran = run(without, "-c", code + "import fastprompt.pixels.graph")
    assert ran.stdout.split() == ["exit", "1", "exit", "1"], ran.stderr
    probe, report, *_, export = ran.stderr.strip().splitlines()
    needs = "needs the package {}: pip install 'fastprompt[{}]'"
    assert probe == f"fastprompt adapt: error: the L-BFGS probe {needs.format('sklearn', 'report')}"
    assert report == f"fastprompt report: error: the report {needs.format('matplotlib', 'report')}"
    assert export == f"ImportError: the folder of a client {needs.format('onnx', 'weights')}"
    assert not (place / "probe").exists()
    assert not (place / "report.html").exists()


def test_the_package_that_is_missing_is_named() -> None:
    with (
        pytest.raises(
            ImportError, match=r"^the thing needs the package no_such_package: pip install 'fastprompt\[x\]'$"
        ),
        needed("x", "the thing"),
    ):
        import no_such_package.part  # type: ignore[import-not-found]  # noqa: F401
