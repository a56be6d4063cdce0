"""A short job in the environment that this runs in: adapt, evaluate, predict and export with the installed package.

python smoke.py FOLDER: FOLDER is empty and becomes the working directory. The C++ kernels must be there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def make_backbone(folder: Path) -> str:
    """Write a small random ViT in timm's folder format; returns the name that loads it."""
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def make_pictures(folder: Path) -> None:
    """Write dark and bright pictures, a folder of each."""
    random = np.random.default_rng(0)
    for name, least in (("dark", 0), ("bright", 128)):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(least, least + 127, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def fastprompt(*words: str) -> str:
    """Run a command of the installed package and return what it prints."""
    ran = subprocess.run([sys.executable, "-m", "fastprompt", *words], capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"fastprompt {' '.join(words)} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def main() -> None:
    """Run the job; exit with what went wrong."""
    os.chdir(sys.argv[1])
    import fastprompt as package

    place = Path(str(package.__file__)).resolve()
    if Path(sys.prefix).resolve() not in place.parents:
        sys.exit(f"fastprompt was imported from {place}, which is not of this environment")
    kernels = json.loads(fastprompt("info", "--json"))["software"]["C++ kernels"]
    if not kernels.startswith("in use"):
        sys.exit(f"the C++ kernels of the wheel are not in use: {kernels}")
    make_pictures(Path("pictures"))
    backbone = make_backbone(Path("vit"))
    flags = ["--data", "pictures", "--backbone", backbone, "--image-size", "32", "--dtype", "float32", "--no-progress"]
    fastprompt("adapt", *flags, "--method", "vpt-deep", "--epochs", "4", "--batch-size", "4", "--out", "run")
    fastprompt("eval", "run")
    fastprompt("predict", "run", "pictures", "--out", "found.json")
    found = json.loads(Path("found.json").read_text())["images"]
    right = sum(Path(image["file"]).parent.name == image["class"] for image in found)
    if right < 20:
        sys.exit(f"{right} of {len(found)} pictures were right, at least 20 should be")
    fastprompt("export", "run", "--format", "pt2", "--out", "model.pt2")
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"Python {version}, torch {torch.__version__}, C++ kernels {kernels}: {right} of {len(found)} right")


if __name__ == "__main__":
    main()
