"""Models and images of the tests of graphs, in float64."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig


@pytest.fixture(autouse=True)
def pytorchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded are PyTorch's own products; oneDNN's differ in their last bits."""
    for name in ("onednn_is_faster", "onednn_has_bfloat16"):
        monkeypatch.setattr(f"fastprompt.vit.linear.{name}", lambda: False)


@pytest.fixture
def build(
    tiny_vit: VisionTransformer, randomised: Callable[..., nn.Module], configs: dict[str, PromptConfig]
) -> Callable[..., fp.PromptedViT]:
    """`build(method, seed=0, **options)`: a model in float64 with random parameters, in eval mode, on one backbone.

    method: a name in `configs`, or a configuration.
    """
    backbone = fp.FrozenViT(tiny_vit).double()

    def make(method: str | PromptConfig, seed: int = 0, **options: Any) -> fp.PromptedViT:
        config = configs[method] if isinstance(method, str) else method
        model = fp.PromptedViT(backbone, config, **{"num_classes": 3, **options})
        for i, part in enumerate((model.generator, model.head)):
            if part is not None:
                randomised(part, 2 * seed + i)
        return model.eval()

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture
def capturable_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the capturable step from CPUs; it runs there all the same."""
    for module in ("torch.optim.adam", "torch.optim.adamw"):
        monkeypatch.setattr(
            importlib.import_module(module),
            "_get_capturable_supported_devices",
            lambda *args, **kwargs: ["cpu", "cuda"],
            raising=False,
        )
