"""Prompts as pixels: a trained PGN becomes pictures, which a host embeds that knows nothing of prompts.

python examples/pixels_client.py
python examples/pixels_client.py --data birds --backbone vit-s14 --image-size 98

It trains a PGN, inverts its token library into pixels, exports a client's folder, starts a host of the bare frozen ViT
on this machine, and classifies pictures with both. Without flags it takes a tiny random ViT and random pictures. Needs
`pip install 'fastprompt[serve,weights]' ./client`.
"""

from __future__ import annotations

import argparse
import contextlib
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
from timm.models import save_for_hf
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.pixels.export import export_client
from fastprompt_client import Client


def tiny_backbone(folder: Path) -> str:
    """Save a small random ViT in timm's folder format; returns the name that loads it."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64), folder)
    return f"local-dir:{folder}"


def tiny_pictures(count: int) -> TensorDataset:
    """uint8 pictures (count, 3, 64, 64), dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
    return TensorDataset(images + 127 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels)


@contextlib.contextmanager
def host_of(backbone: str, image_size: int) -> Iterator[str]:
    """A host of the frozen ViT until the end of the block. Pictures with prompts are taller: --any-size."""
    words = ["--backbone", backbone, "--image-size", str(image_size), "--any-size", "--dtype", "float32"]
    command = [sys.executable, "-u", "-m", "fastprompt", "serve", "--port", "0", "--backend", "eager", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = None
            while found is None:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"the host ended with {process.wait()}; it said why")
                found = re.search(r"on (http://\S+);", line)
            while not is_healthy(found[1]):
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()


def is_healthy(url: str) -> bool:
    """Whether the engine answers; before that, the host says 503 or does not listen."""
    with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        return bool(answer.status == 200)
    return False


def compare(client: Client, url: str, model: fp.PromptedViT, pictures: Any) -> tuple[int, int]:
    """Classify pictures by client and host; returns how many are right, and how many as the trained model says."""
    print(client.verify(url).message)
    right = same = 0
    for image, label in pictures:
        found = client.predict(url, image.permute(1, 2, 0).numpy())
        with torch.inference_mode():
            expected = int(model(image[None]).argmax())
        right += int(found.probabilities.argmax()) == int(label)
        same += int(found.probabilities.argmax()) == expected
    return right, same


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, invert, export, serve and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="pictures, a folder for each class, or the name of a data set")
    parser.add_argument("--backbone", help="one whose patches have clearly more numbers than a token, such as vit-s14")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        name = args.backbone or tiny_backbone(Path(folder) / "vit")
        backbone = fp.load_backbone(name, image_size=args.image_size)
        if args.data is None:
            train, val, num_classes = tiny_pictures(48), tiny_pictures(16), 2
        else:
            data = fp.load_data(args.data, image_size=args.image_size)
            train, val, num_classes = data.train, data.val, data.num_classes
        per_row = args.image_size // backbone.patch_size  # whole rows of patches
        config = fp.PGNConfig(num_prompts=per_row, library_size=16, widths=(8, 16))
        model = fp.PromptedViT(backbone, config, num_classes=num_classes)
        fp.fit(model, train, val, epochs=args.epochs, batch_size=16, lr=5e-3, head_lr=1e-2, progress=False)

        inverted = fp.RGBPrompts.invert(model, "extend", picture=True)
        export_client(inverted, Path(folder) / "client")
        client = Client(Path(folder) / "client")
        with host_of(name, args.image_size) as url:
            count = min(len(val), 32)
            right, same = compare(client, url, model, [val[i] for i in range(count)])
    print(f"{right} of {count} right, {same} as the model that was trained says")


if __name__ == "__main__":
    main()
