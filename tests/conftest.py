"""Fixtures shared by the whole suite. Every test starts from the same seeds and runs on one thread."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "golden"

# PyTorch's MKL sums in one order wherever memory lies, on every CPU: without it the last bits, and how close PyTorch
# comes to float64, are those of the processor. Processes that tests start inherit it.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest --benchmark-only` collects no tests: it would import and then skip thousands."""
    return True if config.getoption("benchmark_only", default=False) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the suite take whole files, and of the kernels' gates, which are long, whole ops."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        op = callspec.params.get("op", "") if callspec and item.path.name == "test_triton.py" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.relative_to(ROOT)} {op}".strip()))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed Python, NumPy and torch before each test, so that no test depends on the ones before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and float buffer of `module` random values, in place.

    A fresh ViT has biases of 0 and norms of 1, which hide a forgotten bias or swapped norm from parity tests.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() < 2:
                norm_weight = name.endswith(("weight", "gamma"))
                value.copy_(1 + 0.2 * noise if norm_weight else 0.2 * noise)
            else:
                fan_in = value[0].numel()
                value.copy_(noise * fan_in**-0.5)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module


@pytest.fixture
def tiny_vit() -> VisionTransformer:
    """A random timm ViT in eval mode: 32 px, patch 8 (grid 4 x 4), width 48, 3 blocks, 3 heads, no head."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0)
    return randomise(vit).eval()


@pytest.fixture
def tiny_swin() -> Callable[..., nn.Module]:
    """`tiny_swin(version=1, seed=0, **options)`: a random timm Swin in eval mode.

    32 px, patch 4, window 4, widths 8, 16, 32, depths 2, 2, 1, no head.
    """

    def build(version: int = 1, seed: int = 0, **options: Any) -> nn.Module:
        sizes = {
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": (2, 2, 1),
            "num_heads": (1, 2, 4),
            "window_size": 4,
            "num_classes": 0,
        }
        cls = SwinTransformer if version == 1 else SwinTransformerV2
        return randomise(cls(**{**sizes, **options}), seed).eval()

    return build


@pytest.fixture
def tiny_images() -> Tensor:
    """Four normalised images (4, 3, 32, 32), float32."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Loader of `tests/golden/<name>.safetensors`, the outputs of the authors' published modules."""
    return lambda name: load_file(DATA / f"{name}.safetensors")


@pytest.fixture
def randomised() -> Callable[..., nn.Module]:
    """`randomised(module, seed=0)`: the module with random norms, biases and batch statistics."""
    return randomise


@pytest.fixture
def repository() -> Path:
    """The root of the working tree."""
    return ROOT
