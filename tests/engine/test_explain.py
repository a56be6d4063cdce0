from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine import backends
from fastprompt.kernels import dispatch


def model_of(vit: VisionTransformer, config: fp.PromptConfig) -> fp.PromptedViT:
    return fp.PromptedViT(fp.FrozenViT(vit), config, num_classes=3)


def test_names_every_op_that_runs_and_why_no_faster_one(tiny_vit: VisionTransformer) -> None:
    found = fp.explain(model_of(tiny_vit, fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8))))
    assert found.ops["library_prompts"].backend == "reference"
    assert "CUDA or ROCm" in found.ops["library_prompts"].reason
    assert "library_prompts" in str(found)
    assert "reference: " in str(found)
    other = fp.explain(model_of(tiny_vit, fp.V2APTConfig(num_prompts=3, num_instance=1, latent=4, hidden=4)))
    assert "vae_prompts" in other.ops
    assert "library_prompts" not in other.ops


def test_respects_use_backend(tiny_vit: VisionTransformer) -> None:
    model = model_of(tiny_vit, fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8)))
    with fp.use_backend("reference"):
        assert fp.explain(model).ops["library_prompts"].reason == "asked for by use_backend"


def test_leaves_the_model_and_the_record_alone(
    tiny_vit: VisionTransformer, tiny_images: Tensor, randomised: Callable[..., nn.Module]
) -> None:
    model = model_of(tiny_vit, fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8))).train()
    randomised(model.generator)
    model.generator.trunk.pool.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    dispatch.choices["some_op"] = dispatch.Choice("triton", "")
    fp.explain(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dispatch.choices.pop("some_op").backend == "triton"


def test_refuses_what_is_no_prompted_vit(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(TypeError, match="model must be a PromptedViT or an Engine, got VisionTransformer"):
        fp.explain(tiny_vit)


def test_tells_what_an_engine_runs(
    tiny_vit: VisionTransformer, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name, *rest: None)
    engine = fp.Engine(
        model_of(tiny_vit, fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 8))), (1, 4), torch.float32
    )
    engine.add_adapter("a", model_of(tiny_vit, fp.VPTConfig(num_prompts=2)))
    assert "batch of" not in str(fp.explain(engine))
    engine(tiny_images)
    text = str(fp.explain(engine))
    assert "auto engine in float32 on cpu with 1 threads, batches of 1, 4, 1 added adapters" in text
    assert "batch of 4, 32 x 32 px, float32: eager\n" in text
    assert "not openvino: openvino is not installed: pip install 'fastprompt[openvino]'" in text
    assert "not cuda_graph: CUDA graphs need a CUDA or ROCm device, the engine is on cpu" in text
    assert "not compile: torch.compile needs a C++ compiler" in text
    assert "library_prompts   reference" in text


def test_tells_the_times_that_an_engine_measured(
    tiny_vit: VisionTransformer, tiny_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda_graph", "compiled_cuda_graph", "compile", "openvino"):
        monkeypatch.delitem(backends.BACKENDS, name)
    monkeypatch.setitem(backends.BACKENDS, "other", backends.Backend(lambda model, images: model))
    engine = fp.Engine(model_of(tiny_vit, fp.VPTConfig(num_prompts=2)), (4,), torch.float32)
    engine(tiny_images)
    found = fp.explain(engine)
    (measured,) = found.batches.values()
    assert set(measured.seconds) == {"eager", "other"}
    assert f"{measured.chosen} (" in str(found)
    assert str(found).count(" ms") == 2
