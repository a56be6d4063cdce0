"""Serve two adapters from one frozen backbone over HTTP, and ask for classes and embeddings.

python examples/serve_and_query.py
python examples/serve_and_query.py --backbone clip-vit-b16 --image-size 112 --data birds --picture owl.png

It trains two adapters, starts `fastprompt serve` with both and queries it with the standard library alone. Without
flags it takes a tiny random ViT and random pictures. Needs `pip install 'fastprompt[serve]'`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import fastprompt as fp

METHODS = {"vpt": fp.VPTConfig(num_prompts=4), "pgn": fp.PGNConfig(num_prompts=4, widths=(8, 16))}


def tiny_backbone(folder: Path) -> str:
    """Save a small random ViT in timm's folder format; returns the name that loads it."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64), folder)
    return f"local-dir:{folder}"


def tiny_pictures(folder: Path) -> Path:
    """Write 40 pictures, dark and bright ones in a folder each."""
    for name, least in (("dark", 0), ("bright", 127)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            noise = torch.randint(least, least + 128, (64, 64, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / name / f"{i}.png")
    return folder


@contextlib.contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """`fastprompt serve` until the end of the block; gives its address once it is ready."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "fastprompt",
        "serve",
        "--port",
        "0",
        "--backend",
        "eager",
        *words,
    ]  # auto is faster, and measures first
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = None
            while found is None:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"the host ended with {process.wait()}; it said why")
                found = re.search(r"on (http://\S+);", line)  # the host names its address once
            while not is_healthy(found[1]):
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()  # it answers what has reached it, and ends


def is_healthy(url: str) -> bool:
    """Whether the engine answers; before that, the host says 503 or does not listen."""
    with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        return bool(answer.status == 200)
    return False


def ask(address: str, body: Any = None) -> Any:
    """Send JSON and return the JSON of the answer."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def query(url: str, image: Image.Image) -> list[str]:
    """Ask each adapter for the picture's class, and the backbone for its embedding; returns the classes."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    found = []
    for name in METHODS:
        answer = ask(f"{url}/v1/classify", {"model": name, "input": picture})["data"][0]
        print(f"{name}: {answer['class']} {answer['probabilities'][0]['probability']:.2f}")
        found.append(answer["class"])
    embedding = ask(f"{url}/v1/embeddings", {"input": picture})["data"][0]["embedding"]
    served = [model["id"] for model in ask(f"{url}/v1/models")["data"]]
    print(f"embedding of {len(embedding)} numbers; models: {', '.join(served)}")
    return found


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """Train, serve, ask; returns what each adapter says of the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="pictures, a folder for each class")
    parser.add_argument("--picture", type=Path, help="picture to classify; a bright one if not given")
    parser.add_argument("--backbone", help="clip-vit-b16, vit-s14 or a timm name")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        name = args.backbone or tiny_backbone(here / "vit")
        folder = args.data or tiny_pictures(here / "pictures")
        image = Image.open(args.picture) if args.picture else Image.new("RGB", (64, 64), (200, 190, 180))
        backbone = fp.load_backbone(name, image_size=args.image_size)
        words = ["--backbone", name, "--image-size", str(args.image_size)]
        for method, config in METHODS.items():
            data = fp.load_data(folder, image_size=args.image_size)
            model = fp.PromptedViT(backbone, config, num_classes=data.num_classes)
            fp.fit(model, data.train, data.val, epochs=args.epochs, batch_size=8, lr=5e-3, head_lr=1e-2, progress=False)
            model.save_pretrained(here / method)
            words += ["--adapter", f"{method}={here / method}"]
        with serving(words) as url:
            return query(url, image.convert("RGB"))


if __name__ == "__main__":
    main()
