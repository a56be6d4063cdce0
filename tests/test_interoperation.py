"""The rewritten forward inside PyTorch's own tools: compiler, exporters, autocast, checkpointing, DDP, torch.func."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastprompt as fp
from fastprompt.generators import PromptConfig

Make = Callable[..., fp.PromptedViT]
METHODS = ["vpt-dropout", "vpt-shallow", "vapt", "v2apt", "pgn", "free"]
SLOW = [name if name in ("vapt", "pgn") else pytest.param(name, marks=pytest.mark.long) for name in METHODS]
ALL = pytest.mark.parametrize("method", METHODS)
COMPILED = pytest.mark.parametrize("method", SLOW)


@pytest.fixture
def make(make_vit: Callable[..., VisionTransformer], configs: dict[str, PromptConfig]) -> Make:
    """`make(method, dtype=torch.float64)`: the same random model each time."""

    def build(method: str, dtype: torch.dtype = torch.float64) -> fp.PromptedViT:
        torch.manual_seed(0)
        model = fp.PromptedViT(fp.FrozenViT(make_vit(depth=2)).to(dtype), configs[method], num_classes=5)
        with torch.no_grad():
            for p in model.generator.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return model

    return build


def raw_images(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)


def step(model: fp.PromptedViT, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one backward pass."""
    model.zero_grad()
    out = run()
    (out * torch.linspace(-1, 1, 5, dtype=out.dtype)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-13, name


@COMPILED
def test_compiled_without_graph_breaks(make: Make, tiny_images: Tensor, method: str) -> None:
    torch._dynamo.reset()
    model, images = make(method).train(), tiny_images.double()
    compiled, draws = torch.compile(model, fullgraph=True, backend="aot_eager"), model.draw(4)
    expected = step(model, lambda: model(images, draws=draws))
    for _ in range(2):
        assert_same(step(model, lambda: compiled(images, draws=draws)), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model, lambda: compiled(images, draws=draws)), expected)
    torch.manual_seed(3)
    expected = step(model, lambda: model(images))
    torch.manual_seed(3)
    assert_same(step(model, lambda: compiled(images)), expected)
    model.eval()
    with torch.no_grad():
        for x in (images, raw_images(4)):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)
    assert not any("_folded" in name for name in model.state_dict())


@ALL
def test_autocast(make: Make, tiny_images: Tensor, method: str) -> None:
    exact, model = make(method).train(), make(method, torch.float32).train()
    draws = exact.draw(4)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in draws.items()}
    truth = step(exact, lambda: exact.reference_forward(tiny_images.double(), draws=draws))[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, gradients = step(model, lambda: model(tiny_images, draws=narrow))
        theirs = step(model, lambda: model.reference_forward(tiny_images, draws=narrow))[0]
    bound = 2 * (theirs.double() - truth).abs().max() + torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= bound
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients.values())


@COMPILED
def test_exported_with_a_dynamic_batch(make: Make, tiny_images: Tensor, tmp_path: Path, method: str) -> None:
    model = make(method, torch.float32).eval()
    check_export(model, tiny_images)
    if method == "pgn":  # the one that also reads the image itself
        check_export(model, raw_images(4))
    if method in ("pgn", "vapt"):
        check_onnx(model, tiny_images, tmp_path)


def check_export(model: fp.PromptedViT, images: Tensor) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program, file = torch.export.export(model, (images,), dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = [program.module(), torch.export.load(file).module()]
    for x in (images, images[:3], images[:1]):
        with torch.no_grad():
            expected = model(x)
            for run in exported:
                torch.testing.assert_close(run(x), expected)


def check_onnx(model: fp.PromptedViT, images: Tensor, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    torch.onnx.export(model, (images,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for x in (images, images[:3], images[:1]):
        with torch.no_grad():
            expected = model(x)
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert (out - expected).norm() <= 1e-4 * expected.norm()


@ALL
def test_gradient_checkpointing(make: Make, tiny_images: Tensor, method: str) -> None:
    model, images, saved = make(method).train(), tiny_images.double(), [0, 0]
    draws = model.draw(4)

    def counted(i: int) -> Tensor:
        def pack(t: Tensor) -> Tensor:
            saved[i] += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return model(images, draws=draws)

    expected = step(model, lambda: counted(0))
    assert_same(step(model, lambda: checkpoint(model, images, False, draws, use_reentrant=False)), expected)
    model.set_grad_checkpointing()
    assert_same(step(model, lambda: counted(1)), expected)
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@ALL
def test_small_batches(make: Make, tiny_images: Tensor, method: str, training: bool) -> None:
    model = make(method).train(training)
    for batch in (0, 1):
        for images in (tiny_images[:batch].double(), raw_images(batch)):
            draws = model.draw(batch)
            out = model(images, draws=draws)
            out.sum().backward()
            assert out.shape == (batch, 5)
            torch.testing.assert_close(out, model.reference_forward(images, draws=draws), rtol=1e-10, atol=1e-10)
    assert all(t.isfinite().all() for t in model.generator.state_dict().values())


@ALL
def test_memory_layout_of_images_does_not_matter(make: Make, method: str) -> None:
    model, pixels = make(method).eval(), torch.randn(8, 64, 64, 3).double().permute(0, 3, 1, 2)
    layouts = [
        pixels[::2, :, ::2, 1::2],
        pixels[:4, :, :32, :32].contiguous(memory_format=torch.channels_last),
        pixels[:1, :, :32, :32].expand(3, -1, -1, -1),
        raw_images(8).to(memory_format=torch.channels_last)[::2],
    ]
    with torch.no_grad():
        for images in layouts:
            torch.testing.assert_close(model(images), model(images.contiguous()), rtol=1e-10, atol=1e-12)


@ALL
def test_gradients_reach_the_images(make: Make, tiny_images: Tensor, method: str) -> None:
    model, gradients = make(method).train(), []
    draws = model.draw(4)
    for run in (model, model.reference_forward):
        images = tiny_images.double().requires_grad_()
        run(images, draws=draws).square().sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@ALL
def test_functional_calls_and_copies(make: Make, tiny_images: Tensor, method: str) -> None:
    model, images = make(method).eval(), tiny_images.double()
    with torch.no_grad():
        before = model(images)
        clone, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        swapped = {f"generator.{n}": 2 * p + 0.1 for n, p in model.generator.named_parameters()}
        out = torch.func.functional_call(model, swapped, (images,))
        for name, p in clone.generator.named_parameters():
            p.copy_(swapped[f"generator.{name}"])
        expected = clone.reference_forward(images)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(clone(images), expected, rtol=1e-10, atol=1e-12)
        for run in (model, again):
            torch.testing.assert_close(run(images), before, rtol=1e-10, atol=1e-12)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images,)).square().sum())(swapped)
    clone.reference_forward(images).square().sum().backward()
    for name, p in clone.generator.named_parameters():
        ours = gradients[f"generator.{name}"]
        assert (ours - p.grad).norm() <= 1e-10 * p.grad.norm() + 1e-13, name


@ALL
def test_half_precision(make: Make, tiny_images: Tensor, method: str) -> None:
    model = make(method, torch.float32).train()
    model.set_backbone_dtype(torch.float16)
    out, gradients = step(model, lambda: model(tiny_images))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients.values())


@ALL
def test_a_compiled_model_sees_loaded_weights(make: Make, tiny_images: Tensor, method: str) -> None:
    torch._dynamo.reset()
    model, images = make(method).eval(), tiny_images.double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled(images)
        model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        after = compiled(images)
        assert (after - before).abs().max() > 1e-6
        torch.testing.assert_close(after, model.reference_forward(images), rtol=1e-10, atol=1e-10)
