"""Time a client from image to prompted picture at 224 px, on one thread, with an image that has the right size.

Decoding, resizing, encoding and the host are excluded. The goal for `RGBPGNConfig()` is 5 ms on one core.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastprompt as fp
from fastprompt.pixels.export import export_client
from fastprompt_client import Client
from fastprompt_client.pictures import png

CONFIGS = {
    "extend": fp.RGBPGNConfig(),
    "replace": fp.RGBPGNConfig(placement="replace"),
    "extend, 32 px patches": fp.RGBPGNConfig(),
    "border": fp.PixelPromptConfig(),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    torch.manual_seed(0)
    name = "vit_base_patch32_224" if "32" in request.param else "vit_base_patch16_224"
    backbone = fp.FrozenViT(timm.create_model(name, num_classes=0, depth=1))  # the client runs none of its blocks
    folder: Path = tmp_path_factory.mktemp("client")
    export_client(fp.PromptedViT(backbone, CONFIGS[request.param], num_classes=10), folder)
    return Client(folder, threads=1)


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)


def test_picture(client: Client, benchmark: BenchmarkFixture) -> None:
    before = threading.active_count()
    made = benchmark(client.prompt, image())
    assert made.shape == (*client.folder.picture_size, 3)
    assert threading.active_count() == before


def test_png(client: Client, benchmark: BenchmarkFixture) -> None:
    """Time encoding, which the goal excludes."""
    benchmark(png, client.prompt(image()))
