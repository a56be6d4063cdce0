"""Every generator in a transformer of another library: the numbers of `PromptedViT`, alone and compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIBRARIES = ["timm", "transformers"]
METHODS = ["pgn", "rgb-replace", "rgb-latent", "v2apt", "vapt", "vpt-deep", "vpt-shallow", "free", "pixel"]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    if request.param == "transformers":
        pytest.importorskip("transformers", minversion="5.23")
    return request.param


@pytest.fixture
def example(library: str) -> ModuleType:
    path = EXAMPLES / f"drop_in_{library}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vit(library: str, tiny_vit: VisionTransformer, randomised: Callable[..., nn.Module]) -> nn.Module:
    if library == "timm":
        return tiny_vit.double()
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}
    module = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes), add_pooling_layer=False)
    return randomised(module).double().eval()


def gradients(out: Tensor, generator: nn.Module) -> list[Tensor | None]:
    weights = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), list(generator.parameters()), allow_unused=True))


def assert_same(ours: Tensor, theirs: Tensor, generator: nn.Module) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for x, y in zip(gradients(ours, generator), gradients(theirs, generator), strict=True):
        if x is None or y is None:
            assert all(g is None or g.abs().max() == 0 for g in (x, y))
        else:
            assert (x - y).norm() <= 1e-9 * y.norm() + 1e-12


def prompted(example: ModuleType, vit: nn.Module, config: PromptConfig) -> tuple[Any, fp.PromptedViT]:
    """The example's module, and ours with the same generator."""
    model = fp.PromptedViT(fp.FrozenViT(vit).double(), config).eval()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return example.Prompted(vit, model.generator), model


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_a_prompted_vit(
    example: ModuleType,
    vit: nn.Module,
    configs: dict[str, PromptConfig],
    tiny_images: Tensor,
    method: str,
) -> None:
    foreign, model = prompted(example, vit, configs[method])
    images = tiny_images[:2].double()
    assert_same(foreign(images), model(images), model.generator)


@pytest.mark.parametrize("method", ["pgn", "vapt", "pixel"])
def test_compiled(
    example: ModuleType, vit: nn.Module, configs: dict[str, PromptConfig], tiny_images: Tensor, method: str
) -> None:
    foreign, model = prompted(example, vit, configs[method])
    images = tiny_images[:2].double()
    torch._dynamo.reset()
    compiled = torch.compile(foreign, fullgraph=True, backend="aot_eager")
    assert_same(compiled(images), model(images), model.generator)


@pytest.mark.parametrize("method", ["pgn", "rgb-latent"])
def test_the_fused_sequence_is_the_unfused_one(
    example: ModuleType, vit: nn.Module, configs: dict[str, PromptConfig], tiny_images: Tensor, method: str
) -> None:
    foreign, model = prompted(example, vit, configs[method])
    fused, images = example.PromptedByPGN(vit, model.generator), tiny_images[:2].double()
    assert_same(fused(images), foreign(images), model.generator)
    if method == "pgn":
        torch._dynamo.reset()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert_same(compiled(images), foreign(images), model.generator)


def test_the_program_runs(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [c.__name__ for c in example.GENERATORS]
    assert all(int(line.split()[-2].replace(",", "")) > 0 for line in lines)
