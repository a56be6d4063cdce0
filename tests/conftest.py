"""Fixtures shared by the whole suite. Every test starts from the same seeds and runs on one thread."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import setuptools  # noqa: F401 (torch.compile imports it, and it fails if another thread imports distutils meanwhile)
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "golden"

METHODS: dict[str, PromptConfig] = {
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8)),
    "rgb-pgn": fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8)),
    "v2apt": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=3, hidden=5),
    "vapt": fp.VAPTConfig(num_prompts=3, hidden=4, prompt_dropout=0.1),
    "vpt-deep": fp.VPTConfig(num_prompts=3),
    "vpt-shallow": fp.VPTConfig(num_prompts=3, deep=False),
    "vqt": fp.VQTConfig(num_queries=2),
    "cvpt": fp.CVPTConfig(num_prompts=3),
    "free": fp.FreePromptsConfig(num_prompts=3),
    "pixel": fp.PixelPromptConfig(border=4),
    "linear": fp.LinearProbeConfig(),
    "full": fp.FullFineTuneConfig(),
}
VARIANTS: dict[str, PromptConfig] = {
    "pgn-sigmoid": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4,), activation="sigmoid", resolution=16),
    "pgn-late": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4,), first_block=1),
    "rgb-latent": fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8), placement="latent"),
    "rgb-replace": fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8), placement="replace"),
    "v2apt-late": fp.V2APTConfig(num_prompts=3, num_instance=2, latent=3, hidden=5, share="per_layer", first_block=2),
    "v2apt-per-layer": fp.V2APTConfig(num_prompts=3, num_instance=3, latent=3, hidden=5, share="per_layer"),
    "v2apt-samples": fp.V2APTConfig(num_prompts=3, num_instance=1, latent=3, hidden=5, inference_samples=2),
    "vapt-ablated": fp.VAPTConfig(
        num_prompts=3, channelwise=False, share_projector=False, learnable_scale=True, static_layers=2, project=6
    ),
    "vapt-late": fp.VAPTConfig(num_prompts=3, hidden=4, prompt_dropout=0.1, first_block=1),
    "vapt-attention": fp.VAPTConfig(num_prompts=3, hidden=4, activation="attention"),
    "vpt-partial": fp.VPTConfig(num_prompts=3, deep_layers=2, prompt_dropout=0.2, dropout_per="batch"),
    "vpt-late": fp.VPTConfig(num_prompts=3, first_block=1, prompt_dropout=0.2, dropout_per="batch"),
    "vpt-5": fp.VPTConfig(num_prompts=5),
    "vpt-dropout": fp.VPTConfig(num_prompts=3, prompt_dropout=0.2),
    "vpt-project": fp.VPTConfig(num_prompts=3, project=5),
    "cvpt-late": fp.CVPTConfig(num_prompts=25, first_block=1),
    "vqt-late": fp.VQTConfig(num_queries=3, first_block=1, normalise=False),
    "vpt-shallow-project": fp.VPTConfig(num_prompts=3, deep=False, project=6, prompt_dropout=0.2),
}

# PyTorch's MKL sums in one order wherever memory lies, on every CPU: without it the last bits, and how close PyTorch
# comes to float64, are those of the processor. Processes that tests start inherit it.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest --benchmark-only` collects no tests: it would import and then skip thousands."""
    return True if config.getoption("benchmark_only", default=False) else None


def pytest_collection_finish() -> None:
    """Leave what imports made out of garbage collections: it stays, and looking through it takes half a second."""
    gc.collect()
    gc.freeze()


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
                fan_in = max(1, value.shape[1:].numel())  # a tensor may be empty
                value.copy_(noise * fan_in**-0.5)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return module


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """The name of a method: a test that takes it runs for each, or for those that it parametrises `method` with."""
    return request.param


@pytest.fixture(params=METHODS | VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """The name of a method or of another of its forms."""
    return request.param


@pytest.fixture(scope="session")
def configs() -> dict[str, PromptConfig]:
    """A tiny configuration for each name that `method` and `variant` have."""
    return METHODS | VARIANTS


@pytest.fixture
def make_vit() -> Callable[..., Any]:
    """`make_vit(seed=0, kind=VisionTransformer, **options)`: a random timm ViT of this class in eval mode.

    32 px, patch 8 (grid 4 x 4), width 48, 3 blocks, 3 heads, no head.
    """

    def build(seed: int = 0, kind: Any = VisionTransformer, **options: Any) -> Any:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
        return randomise(kind(**{**sizes, **options}), seed).eval()

    return build


@pytest.fixture
def tiny_vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """The ViT of `make_vit` as it is."""
    return make_vit()


@pytest.fixture
def pre_norm_vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """The ViT of `make_vit` with two registers and, as in CLIP, a norm before the first block."""
    return make_vit(pre_norm=True, reg_tokens=2)


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


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return ROOT
