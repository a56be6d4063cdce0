"""Measure the cost of reading a folder of images: checking and decoding each file, and the memory of one image.

    python bench/data_table.py [number of files]

The jobs take turns; each line is the median of seven rounds. Memory is the growth of the peak resident size
of a fresh process that reads the largest square image that `MAX_DECODED_BYTES` allows in each mode.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ROUNDS, SIDE = 7, 224
PEAK = """
import resource, sys
from fastprompt.data.files import read_images
read_images(sys.argv[1], 224)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_images(sys.argv[2], 224)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def write_images(folder: Path, number: int, suffix: str) -> list[str]:
    """Write `number` files of 500 x 375 pixels: smooth colours with some noise, which compress like photographs."""
    paths = []
    for seed in range(number):
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (20, 26, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.clip(np.asarray(coarse) + random.integers(-8, 9, (375, 500, 3)), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{seed}.{suffix}"))
        Image.fromarray(noisy).save(paths[-1], **({"quality": 90} if suffix == "jpg" else {}))
    return paths


def seconds(job: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def jobs(paths: list[str], folder: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    from fastprompt.data.checks import REMEMBERED_FROM, check_image, check_images
    from fastprompt.data.images import open_image, to_tensor

    check_images(paths, root=folder)  # fills the cache
    remembered = {"checked, remembered": lambda: check_images(paths, root=folder)}
    return {
        "decoded and resized, one thread": lambda: [
            to_tensor(open_image(path, strict=False), (SIDE, SIDE)) for path in paths
        ],
        "checked, one thread": lambda: [check_image(path) for path in paths],
        f"checked, {min(8, os.cpu_count() or 1)} threads": lambda: check_images(paths),
    } | (remembered if len(paths) >= REMEMBERED_FROM else {})


def main() -> None:
    """Print both tables."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as name:
        os.environ["FASTPROMPT_CACHE"] = str(Path(name) / "cache")
        for suffix in ("jpg", "png"):
            folder = Path(name) / suffix
            folder.mkdir()
            todo = jobs(write_images(folder, number, suffix), folder)
            times: dict[str, list[float]] = {job: [] for job in todo}
            for _ in range(ROUNDS):
                for job, run in todo.items():
                    times[job].append(seconds(run))
            first = statistics.median(times["decoded and resized, one thread"])
            for job, found in times.items():
                median = statistics.median(found)
                print(f"{number} .{suffix} {job:34s} {median / number * 1e3:7.2f} ms/image  x {median / first:.2f}")
        Image.new("RGB", (300, 300)).save(Path(name) / "small.png")
        for mode, bytes_per_pixel in {"RGB": 4, "L": 5, "RGBA": 8, "I;16": 6}.items():
            side = int((2**29 / bytes_per_pixel) ** 0.5)
            large = Path(name) / "large.png"
            Image.new(mode, (side, side)).save(large, compress_level=1)
            command = [sys.executable, "-W", "ignore", "-c", PEAK, str(Path(name) / "small.png"), str(large)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{mode:5s} {side} x {side} pixels, {large.stat().st_size / 1e3:.0f} kB: {float(ran.stdout):.0f} MiB")


if __name__ == "__main__":
    main()
