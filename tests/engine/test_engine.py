"""`fp.Engine`: answers, batches, adapters, changes of the model, errors, and eight threads at once."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine import engine as module
from fastprompt.engine.backends import BACKENDS, Backend
from fastprompt.engine.engine import Measured, cover

Build = Callable[..., fp.PromptedViT]
HAMMER_TURNS = int(os.environ.get("FASTPROMPT_HAMMER_TURNS", "16"))  # of each thread


def eager(model: Any, **options: Any) -> fp.Engine:
    return fp.Engine(model, **{"backend": "eager", "dtype": torch.float64, **options})


def test_answers_are_those_of_the_model(build: Build, images: Tensor, variant: str) -> None:
    model = build(variant).double()
    engine = eager(model, batch_sizes=(1, 4))
    for batch in (11, 4, 3, 1, 0):
        with torch.no_grad():
            expected = model(images[:batch].double())
        found = engine(images[:batch])
        assert found.shape == (batch, 5)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        named = engine(images[:batch], adapter_names=["default"] * batch)
        assert isinstance(named, list)
        assert len(named) == batch
        for ours, theirs in zip(named, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_raw_pixels_and_autocast_and_inference_mode(build: Build, images: Tensor) -> None:
    model = build("pgn").double()
    engine, raw = eager(model), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(raw)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(engine(raw), expected, rtol=1e-10, atol=1e-10)
    engine(images[:2].bfloat16())


def test_the_model_itself_is_left_alone(build: Build, images: Tensor) -> None:
    model = build("vpt-deep").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = eager(model, dtype=torch.bfloat16)
    engine.add_adapter("again", model)
    engine(images)
    assert model.training
    assert all(p.requires_grad for p in model.generator.parameters())
    assert model.backbone.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dtype_is_what_the_hardware_multiplies(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(module, "bfloat16_is_fast", lambda device, fast=fast: fast)
        engine = fp.Engine(build("vpt-deep"), backend="eager")
        assert engine.dtype == engine.model.backbone.dtype == dtype


def test_a_bare_backbone_gives_features(backbone: fp.FrozenViT, build: Build, images: Tensor) -> None:
    engine = eager(backbone)
    expected = backbone.double().forward_features(images.double())
    torch.testing.assert_close(engine(images), expected, rtol=1e-10, atol=1e-10)
    engine.add_adapter("default", build("vpt-deep"))  # a name like any other here
    found = engine(images[:2], adapter_names=["__base__", "default"])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    assert found[1].shape == (5,)


@pytest.mark.parametrize(
    ("batch", "sizes", "expected"),
    [
        (8, (1, 8, 32), [8]),
        (9, (1, 8, 32), [8, 1]),
        (7, (1, 8, 32), [8]),
        (20, (1, 8, 32), [8, 8, 8]),
        (31, (1, 8, 32), [32]),
        (64, (1, 8, 32), [32, 32]),
        (3, (4,), [4]),
        (9, (4,), [4, 4, 4]),
    ],
)
def test_batches_are_covered_with_little_padding(batch: int, sizes: tuple[int, ...], expected: list[int]) -> None:
    assert cover(batch, sizes) == expected


class Recorder:
    """A backend that runs the model and records the batches; it can be slow, wrong or broken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "recorded", bakes: bool = True) -> None:
        self.batches: list[int] = []
        self.built = 0
        self.alter: Callable[[Tensor], Tensor] = lambda output: output
        monkeypatch.setitem(BACKENDS, name, Backend(self.build, bakes=bakes))

    def build(self, model: fp.PromptedViT, images: Tensor) -> Callable[[Tensor], Tensor]:
        self.built += 1
        size = len(images)

        def run(images: Tensor) -> Tensor:
            assert len(images) == size
            assert not torch.is_grad_enabled()
            self.batches.append(len(images))
            return self.alter(model(images))

        return run


def test_batches_are_padded_and_split(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, model = Recorder(monkeypatch), build("vapt").double()
    engine = eager(model, backend="recorded", batch_sizes=(4, 1, 4))
    assert engine.batch_sizes == (1, 4)
    for batch, sizes in ((11, [4, 4, 4]), (5, [4, 1]), (3, [4]), (1, [1]), (0, [])):
        recorder.batches.clear()
        found = engine(images[:batch])
        assert recorder.batches == sizes
        torch.testing.assert_close(found, model(images[:batch].double()).detach(), rtol=1e-10, atol=1e-10)
    assert recorder.built == 2


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt", "v2apt"])
@pytest.mark.parametrize("bakes", [True, False])
def test_changes_of_the_model_are_seen(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch, method: str, bakes: bool
) -> None:
    recorder, model = Recorder(monkeypatch, bakes=bakes), build(method).double()
    engine = eager(model, backend="recorded", batch_sizes=(2,))
    x = images[:2]

    def expect(changed: bool = True) -> None:
        before = engine_says.pop() if engine_says else None
        found = engine(x)
        engine_says.append(found)
        torch.testing.assert_close(found, model(x.double()).detach(), rtol=1e-10, atol=1e-10)
        assert before is None or changed == bool((found - before).abs().max() > 1e-6)

    engine_says: list[Tensor] = []
    expect()
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.5)
    model(x.double()).square().sum().backward()
    optimizer.step()
    expect()
    model.load_adapter_state_dict(
        {
            name: 1.1 * value if value.is_floating_point() else value
            for name, value in model.adapter_state_dict().items()
        }
    )
    expect()
    expect(changed=False)
    assert recorder.built == (3 if bakes else 1)
    model.head.weight.data = 2 * model.head.weight.data  # other memory, the same version
    expect()
    model.head.bias.data.add_(1)  # the same memory and version
    expect()
    for scale in (2, 3, 4):  # what was freed is used again: neither address nor version tells
        model.head.weight = nn.Parameter(scale * torch.ones_like(model.head.weight))
        expect()
    for scale in (2, 3, 4):
        state = {name: scale * torch.ones_like(value) for name, value in model.head.state_dict().items()}
        model.head.load_state_dict(state, assign=True)
        expect()
    engine.refresh()
    expect(changed=False)
    model.readout = "patches"
    expect()
    model.head = fp.LinearHead(48, 7).double()
    expect_shape = engine(x).shape
    assert expect_shape == (2, 7)
    torch.testing.assert_close(engine(x), model(x.double()).detach(), rtol=1e-10, atol=1e-10)


class Halting(Tensor):
    """A tensor that is copied only when it is let: whoever loads it stops half way."""

    reached, released = threading.Event(), threading.Event()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            cls.reached.set()
            assert cls.released.wait(60)
        return super().__torch_function__(func, types, args, kwargs or {})


def with_a_halt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, with a stop before the last of its tensors is written."""
    Halting.reached.clear()
    Halting.released.clear()
    last = list(state)[-1]
    return {**state, last: state[last].as_subclass(Halting)}


@contextlib.contextmanager
def in_a_thread(act: Callable[[], Any]) -> Iterator[None]:
    """`act` runs beside the block, to its end; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        try:
            yield
        finally:
            Halting.released.set()
        acting.result(60)


LOADERS: dict[str, Callable[[fp.PromptedViT, dict[str, Tensor]], Any]] = {
    "adapter": lambda model, state: model.load_adapter_state_dict(state),
    "model": lambda model, state: model.load_state_dict(state, strict=False),
    "head": lambda model, state: model.head.load_state_dict(part_of(state, "head.")),
    "generator": lambda model, state: model.generator.load_state_dict(part_of(state, "generator.")),
}


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    part = {name.removeprefix(prefix): tensor.as_subclass(Tensor) for name, tensor in state.items() if prefix in name}
    return {**part, list(part)[-1]: list(part.values())[-1].as_subclass(Halting)}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bakes", [True, False])
def test_a_state_that_is_being_loaded_is_seen_whole_or_not_at_all(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch, loader: str, bakes: bool
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    Recorder(monkeypatch, bakes=bakes)
    model, other, x = build("vapt").double(), build("vapt", seed=1).double(), images.double()
    engine = eager(model, backend="recorded")
    before = engine(x)
    state = with_a_halt(other.adapter_state_dict())
    with in_a_thread(lambda: LOADERS[loader](model, state)):
        assert Halting.reached.wait(60)
        torch.testing.assert_close(engine(x), before, rtol=0, atol=0)
        torch.testing.assert_close(torch.stack(engine(x, adapter_names=["default"] * 11)), before)
    after = engine(x)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, model(x).detach(), rtol=1e-10, atol=1e-10)
    if loader in ("adapter", "model"):
        torch.testing.assert_close(after, other(x).detach(), rtol=1e-10, atol=1e-10)


def test_an_adapter_is_added_in_one_state(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Added while another thread loads a state into it, it is what it will be then."""
    copied, copy_adapter = threading.Event(), module._copy_adapter

    def copying(*given: Any) -> fp.PromptedViT:
        adapter = copy_adapter(*given)
        copied.set()
        return adapter

    model, other, x = build("vapt").double(), build("vapt", seed=1).double(), images[:2].double()
    engine = eager(build("linear"))
    state = with_a_halt(other.adapter_state_dict())
    with in_a_thread(lambda: model.load_adapter_state_dict(state)):
        assert Halting.reached.wait(60)
        monkeypatch.setattr(module, "_copy_adapter", copying)
        with in_a_thread(lambda: engine.add_adapter("a", model)):
            assert not copied.wait(0.3)
    found = engine(x, adapter_names=["a", "a"])
    torch.testing.assert_close(torch.stack(found), other(x).detach(), rtol=1e-10, atol=1e-10)


class HalfwayOptimizer(torch.optim.Optimizer):
    """Subtracts the gradients, and stops before the last: for `halfway`, which can raise."""

    def __init__(self, parameters: Any, halfway: Callable[[], None]) -> None:
        super().__init__(parameters, {})
        self.halfway = halfway

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        for parameter in parameters[:-1]:
            parameter.sub_(parameter.grad)
        self.halfway()
        parameters[-1].sub_(parameters[-1].grad)


def test_an_optimizer_s_step_is_seen_whole_or_not_at_all(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    model, x = build("vapt").double(), images[:2].double()
    engine, answers = eager(model), []
    optimizer = HalfwayOptimizer([p for _, p in model.trainable_parameters()], lambda: None)
    before = engine(x)
    model(x).square().sum().backward()

    def halfway() -> None:
        with in_a_thread(lambda: answers.append(engine(x))):
            pass
        answers.append(engine(x))  # of the thread that is in the step itself

    optimizer.halfway = halfway
    optimizer.step()
    for answer in answers:
        torch.testing.assert_close(answer, before, rtol=0, atol=0)
    after = engine(x)
    torch.testing.assert_close(after, model(x).detach(), rtol=1e-10, atol=1e-10)
    assert (after - before).abs().max() > 1e-6


def test_a_step_that_failed_does_not_hide_what_comes_after_it(build: Build, images: Tensor) -> None:
    """The thread of the step lives on; nobody waits for it, and the next state is seen."""
    model, other, x = build("vapt").double(), build("vapt", seed=1).double(), images[:2].double()
    engine = eager(model)

    def fail() -> None:
        raise ZeroDivisionError

    optimizer = HalfwayOptimizer([p for _, p in model.trainable_parameters()], fail)
    model(x).square().sum().backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    with in_a_thread(lambda: model.load_adapter_state_dict(other.adapter_state_dict())):
        pass
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(engine, x).result(60)
    torch.testing.assert_close(found, other(x).detach(), rtol=1e-10, atol=1e-10)


def test_changes_of_one_s_own_code_are_one(build: Build, images: Tensor) -> None:
    model, x = build("vpt-deep").double(), images[:2].double()
    engine = eager(model)
    before = engine(x)
    with model.changing():
        with torch.no_grad():
            model.head.weight.mul_(2)
        torch.testing.assert_close(engine(x), before, rtol=0, atol=0)
        for act in (lambda: engine.add_adapter("a", model), engine.refresh):
            with pytest.raises(RuntimeError, match="model is being changed by this thread"):
                act()
        model.head = fp.LinearHead(48, 7).double()
        assert engine(x).shape == before.shape
    torch.testing.assert_close(engine(x), model(x).detach(), rtol=1e-10, atol=1e-10)
    engine.add_adapter("a", model)


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt"])
def test_hammered_while_states_swap(build: Build, images: Tensor, method: str) -> None:
    """No answer is of neither state, and both are seen, while one thread swaps them without a pause."""
    interval = sys.getswitchinterval()
    model, other = build(method).double(), build(method, seed=1).double()
    x, engine = images[:2].double(), eager(model, batch_sizes=(1, 2))
    states = [{name: t.clone() for name, t in m.adapter_state_dict().items()} for m in (model, other)]
    with torch.no_grad():
        expected = [model(x), other(x)]
    engine.add_adapter("added", model)
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=1.0)
    for (_, parameter), (_, aim) in zip(model.trainable_parameters(), other.trainable_parameters(), strict=True):
        parameter.grad = (parameter - aim).detach()
    served, seen, problems = threading.Event(), [0, 0], []

    def swap() -> None:
        while not served.is_set():
            model.load_adapter_state_dict(states[1])
            model.load_adapter_state_dict(states[0])
            optimizer.step()  # to the other state
            engine.add_adapter("added", model)
            model.load_state_dict(states[0], strict=False)

    def serve(named: bool) -> None:
        turns, until = 0, time.monotonic() + 60
        while turns < 2 * HAMMER_TURNS or (not all(seen) and time.monotonic() < until):
            turns += 1
            name = "added" if named else "default"
            found = torch.stack(engine(x, adapter_names=[name] * 2)) if named else engine(x)
            right = [bool(torch.allclose(found, one, rtol=1e-8, atol=1e-8)) for one in expected]
            if not any(right):
                problems.append(found)
            for i, is_right in enumerate(right):
                seen[i] += is_right

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            swapping = pool.submit(swap)
            try:
                for future in [pool.submit(serve, i == 2) for i in range(3)]:
                    future.result()
            finally:
                served.set()
            swapping.result()
    finally:
        sys.setswitchinterval(interval)
    assert not problems, f"{len(problems)} of {sum(seen)} answers are of neither state"
    assert min(seen) > 0


def test_a_fully_fine_tuned_model_is_served_and_followed(backbone: fp.FrozenViT, build: Build, images: Tensor) -> None:
    model = fp.PromptedViT(backbone.double(), fp.FullFineTuneConfig(), 5, readout="cls").eval()
    engine, x = eager(model), images.double()
    torch.testing.assert_close(engine(images), model(x).detach(), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        model.backbone.blocks[0].qkv.weight.mul_(1.5)
    torch.testing.assert_close(engine(images), model(x).detach(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="serves a fully fine-tuned model, whose backbone no adapter shares"):
        engine.add_adapter("a", build("vpt-deep"))
    with pytest.raises(ValueError, match="model was fully fine-tuned and has a backbone of its own"):
        eager(backbone).add_adapter("full", model)


def test_adapters_are_added_replaced_and_deleted(
    backbone: fp.FrozenViT, build: Build, images: Tensor, tmp_path: Path
) -> None:
    models = {"a": build("vpt-deep", 1, 3), "b": build("pgn", 2, 4), "c": build("vapt", 3, None)}
    engine = eager(build("linear"))
    for name, model in models.items():
        if name == "b":
            model.save_pretrained(tmp_path)
        engine.add_adapter(name, tmp_path if name == "b" else model)
    assert engine.adapter_names == ["__base__", "default", "a", "b", "c"]
    names = ["a", "b", "c", "a", "__base__"]
    found = engine(images[:5], adapter_names=names)
    assert [tuple(output.shape) for output in found] == [(3,), (4,), (48,), (3,), (48,)]
    backbone.double()
    for i, name in enumerate(names[:4]):
        expected = models[name].double()(images[i : i + 1].double()).detach()[0]
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        next(models["a"].generator.parameters()).normal_()
    torch.testing.assert_close(engine(images[:1], adapter_names=["a"])[0], found[0])
    engine.add_adapter("a", models["a"])
    expected = models["a"](images[:1].double()).detach()[0]
    again = engine(images[:1], adapter_names=["a"])[0]
    torch.testing.assert_close(again.double(), expected, rtol=1e-6, atol=1e-6)
    assert (again - found[0]).abs().max() > 1e-3
    engine.delete_adapter("a")
    with pytest.raises(ValueError, match=r"adapter_names\[1\] is 'a', which is no adapter of this engine; it has"):
        engine(images[:2], adapter_names=["b", "a"])
    with pytest.raises(ValueError, match="name is 'a', which is no adapter"):
        engine.delete_adapter("a")


def test_a_mixed_batch_above_the_largest_size_is_split(build: Build, images: Tensor) -> None:
    engine = eager(build("vpt-deep").double(), batch_sizes=(1, 4))
    engine.add_adapter("b", build("vpt-5", 1, 3).double())
    names = [("default", "b")[i % 2] for i in range(11)]
    for i, output in enumerate(engine(images, adapter_names=names)):
        torch.testing.assert_close(
            output, engine(images[i : i + 1], adapter_names=[names[i]])[0], rtol=1e-10, atol=1e-10
        )
    assert engine(images[:0], adapter_names=[]) == []


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt"])
def test_other_adapters_change_no_bit(build: Build, images: Tensor, method: str) -> None:
    engine = fp.Engine(build(method), (8,), torch.bfloat16, "eager")
    for seed in range(6):
        engine.add_adapter(str(seed), build(method, seed, 3 + seed))
    first = engine(images[:3], adapter_names=["0", "1", "2"])
    second = engine(images[:3], adapter_names=["5", "1", "4"])
    assert torch.equal(first[1], second[1])


def test_an_adapter_of_another_backbone_is_refused(
    build: Build, make_vit: Callable[..., VisionTransformer], tmp_path: Path
) -> None:
    stranger = fp.PromptedViT(fp.FrozenViT(make_vit(5)), fp.VPTConfig(num_prompts=3), 5)
    stranger.save_pretrained(tmp_path)
    engine = eager(build("vpt-deep"))
    for model in (stranger, tmp_path):
        with pytest.raises(ValueError, match="on another backbone"):
            engine.add_adapter("x", model)
    assert "x" not in engine.adapter_names


def test_raw_pixels_are_normalised_as_each_adapter_was_trained(
    backbone: fp.FrozenViT, build: Build, tmp_path: Path
) -> None:
    other = backbone.normalising_by((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    models = {"a": build("vpt-deep"), "b": build("vpt-deep", backbone=other), "c": build("pgn", backbone=other)}
    engine = eager(backbone, dtype=torch.float32)
    models["b"].save_pretrained(tmp_path)
    for name, model in models.items():
        engine.add_adapter(name, tmp_path if name == "b" else model)
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = engine(raw, adapter_names=["a", "b", "c", "b"])
    for i, name in enumerate("abcb"):
        with torch.no_grad():
            right = models[name](raw[i : i + 1])[0]
        torch.testing.assert_close(found[i], right, rtol=1e-4, atol=1e-4)
    engine.add_adapter("b", models["a"])
    torch.testing.assert_close(engine(raw[:1], adapter_names=["b"]), found[:1], rtol=1e-4, atol=1e-4)


def test_a_cast_backbone_is_still_the_same(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    engine = eager(model.backbone, dtype=torch.bfloat16)
    model.set_backbone_dtype(torch.float16)
    engine.add_adapter("half", model)
    assert engine(images[:1], adapter_names=["half"])[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_sizes": ()}, ValueError, r"batch_sizes must be positive integers, got \(\)"),
        ({"batch_sizes": (0, 1)}, ValueError, "batch_sizes must be positive integers"),
        ({"batch_sizes": 8}, ValueError, "batch_sizes must be positive integers, got 8"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"backend": "tensorrt"}, ValueError, "backend must be 'auto' or one of .*'cuda_graph'.* got 'tensorrt'"),
    ],
)
def test_bad_arguments_are_named(backbone: fp.FrozenViT, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.Engine(backbone, **options)


def test_bad_calls_are_named(build: Build, images: Tensor) -> None:
    with pytest.raises(TypeError, match="model must be a PromptedViT or a FrozenViT, got Linear"):
        fp.Engine(nn.Linear(2, 2))
    engine = eager(build("vpt-deep"))
    with pytest.raises(ValueError, match="images must be 32 x 32 pixels"):
        engine(images[:, :, :16])
    with pytest.raises(ValueError, match="images contain NaN"):
        engine(images * float("nan"))
    with pytest.raises(ValueError, match="adapter_names must be a list of 11 names, one per image, got 'default'"):
        engine(images, adapter_names="default")
    with pytest.raises(ValueError, match="adapter_names must be a list of 11 names"):
        engine(images, adapter_names=["default"])
    for name in ("__base__", "default", 3):
        with pytest.raises(ValueError, match="name must be a text other than"):
            engine.add_adapter(name, build("vpt-deep"))
        with pytest.raises(ValueError, match="name must be a text other than"):
            engine.delete_adapter(name)
    with pytest.raises(TypeError, match="model must be a PromptedViT or a directory, got int"):
        engine.add_adapter("x", 3)
    with pytest.raises(FileNotFoundError, match="is no adapter"):
        engine.add_adapter("x", "/nowhere")
    with pytest.raises(ValueError, match="image_dtype must be"):
        engine.warm_up(torch.int32)


def test_released_engines_say_so_and_hold_nothing(build: Build, images: Tensor) -> None:
    with eager(build("vpt-deep")) as engine:
        engine(images)
        kept = weakref.ref(engine.model.backbone)
    gc.collect()
    assert kept() is None
    engine.release()
    for call in (
        lambda: engine(images),
        lambda: engine.add_adapter("a", build("vpt-deep")),
        engine.warm_up,
        engine.refresh,
        lambda: engine.delete_adapter("a"),
        lambda: fp.explain(engine),
    ):
        with pytest.raises(RuntimeError, match="this engine was released; make a new one"):
            call()


def test_auto_takes_the_fastest_and_measures_once(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda_graph", "compiled_cuda_graph", "compile", "openvino"):
        monkeypatch.delitem(BACKENDS, name)
    recorder, durations = Recorder(monkeypatch), {"recorded": 1.0, "eager": 2.0}
    monkeypatch.setattr(
        module,
        "_seconds",
        lambda run, device: (
            run() is None
            or durations["eager" if getattr(run.func, "__class__", None) is fp.PromptedViT else "recorded"]
        ),
    )
    engine = eager(build("vpt-deep"), backend="auto", batch_sizes=(1, 2))
    engine(images[:2])
    signature = (2, (32, 32), torch.float64)
    assert engine.measured == {signature: Measured("recorded", {"eager": 2.0, "recorded": 1.0}, {})}
    recorder.batches.clear()
    engine(images[:2])
    assert recorder.batches == [2]
    durations["recorded"] = 3.0
    engine(images[:1])
    assert engine.measured[1, (32, 32), torch.float64].chosen == "eager"
    assert recorder.built == 2


def test_batches_of_one_adapter_run_on_a_backend_once_it_is_ready(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of exactly the sizes that were made ready; mixed batches, other sizes and adapters, and replaced ones do not."""
    recorder, names = Recorder(monkeypatch), ["a", "b", "__base__"]
    engine = eager(build("linear").backbone, backend="recorded", batch_sizes=(1, 4))
    models = {name: build(method).double() for name, method in (("a", "vpt-deep"), ("b", "pgn"), ("c", "vapt"))}
    for name, model in models.items():
        engine.add_adapter(name, model)
    engine(images[:4], adapter_names=["a"] * 4)
    assert recorder.batches == []
    engine.warm_up(images.dtype, names)
    assert set(engine.measured_of("a")) == {(1, (32, 32), torch.float64), (4, (32, 32), torch.float64)}
    assert engine.measured_of("c") == {}

    def runs(*batch: str) -> list[int]:
        recorder.batches.clear()
        found = engine(images[: len(batch)], adapter_names=batch)
        for i, name in enumerate(batch):
            model = engine.model if name == "__base__" else models[name]
            with torch.no_grad():
                right = model(images[i : i + 1].double())[0]
            torch.testing.assert_close(found[i], right, rtol=1e-10, atol=1e-10)
        return list(recorder.batches)

    for name in names:
        assert runs(name) == [1]
        assert runs(*[name] * 4) == [4]
        assert runs(*[name] * 9) == [4, 4, 1]
        assert runs(*[name] * 3) == []
    assert runs("a", "a", "a", "b") == runs("c") == runs(*"cccc") == []
    assert runs(*"aaaabbbb") == [4, 4]
    engine.add_adapter("a", models["a"])
    assert runs("a") == []
    engine.warm_up(images.dtype, ["a"])
    assert runs("a") == runs("b") == [1]
    engine.delete_adapter("b")
    engine.add_adapter("b", models["b"])
    assert runs("b") == []
    with pytest.raises(ValueError, match="adapter_names has 'none', which is no adapter"):
        engine.warm_up(images.dtype, ["none"])
    monkeypatch.setattr(module, "KEPT", 5)
    with pytest.raises(ValueError, match="adapter_names must be at most 1 names: an engine keeps 5 functions"):
        engine.warm_up(images.dtype, ["a", "b"])


def test_added_adapters_try_the_backend_that_was_the_fastest_for_the_engine_s_own_model(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = Recorder(monkeypatch, "fast"), Recorder(monkeypatch, "slow")
    times = iter([3.0, 1.0, 2.0] * module.ROUNDS + [3.0, 1.0] * module.ROUNDS)
    monkeypatch.setattr(module, "_seconds", lambda run, device: next(times))
    monkeypatch.setitem(BACKENDS, "left out", Backend(lambda model, images: pytest.fail("it is not among backends")))
    engine = eager(build("vpt-deep").backbone, backend="auto", batch_sizes=(2,), backends=["fast", "slow"])
    engine.add_adapter("a", build("vpt-deep"))
    engine.warm_up(images.dtype, ["a"])
    [own], [added] = engine.measured.values(), engine.measured_of("a").values()
    assert (own.chosen, set(own.seconds)) == ("fast", {"eager", "fast", "slow"})
    assert (added.chosen, set(added.seconds)) == ("fast", {"eager", "fast"})
    assert (fast.built, slow.built) == (2, 1)
    for wrong in ("fast", ["none"]):
        with pytest.raises(ValueError, match="backends must be a list of some of"):
            eager(build("vpt-deep"), backends=wrong)


def test_auto_leaves_out_what_is_wrong_broken_or_missing(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda_graph", "compiled_cuda_graph", "compile", "openvino"):
        monkeypatch.delitem(BACKENDS, name)
    Recorder(monkeypatch, "wrong").alter = lambda output: output + 1

    def broken(model: fp.PromptedViT, images: Tensor) -> Any:
        raise OSError("no such device\nand more")

    monkeypatch.setitem(BACKENDS, "broken", Backend(broken))
    monkeypatch.setitem(BACKENDS, "missing", Backend(broken, package="no_such_package"))
    engine = eager(build("vpt-deep"), backend="auto", batch_sizes=(2,))
    engine(images[:2])
    measured = engine.measured[2, (32, 32), torch.float64]
    assert measured.chosen == "eager"
    assert measured.reasons["broken"] == "it failed: OSError: no such device"
    assert measured.reasons["missing"] == "no_such_package is not installed: pip install 'fastprompt[no_such_package]'"
    assert "its output is off by" in measured.reasons["wrong"]
    for name, error in (("missing", ImportError), ("broken", RuntimeError)):
        with pytest.raises(error, match=f"backend '{name}'"):
            eager(build("vpt-deep"), backend=name)(images)


def test_a_failure_in_a_call_falls_back_once_or_is_reported(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda_graph", "compiled_cuda_graph", "compile", "openvino"):
        monkeypatch.delitem(BACKENDS, name)
    recorder, model = Recorder(monkeypatch), build("vpt-deep").double()
    monkeypatch.setattr(
        module,
        "_seconds",
        lambda run, device: run() is None or float(getattr(run.func, "__class__", None) is fp.PromptedViT),
    )
    automatic, asked = (eager(model, backend=name, batch_sizes=(2,)) for name in ("auto", "recorded"))
    for engine in (automatic, asked):
        engine(images[:2])

    def fail(output: Tensor) -> Tensor:
        raise RuntimeError("device lost")

    recorder.alter = fail
    with pytest.warns(UserWarning, match="recorded failed on a batch of 2, eager runs from now on: .*device lost"):
        found = automatic(images[:2])
    torch.testing.assert_close(found, model(images[:2].double()).detach(), rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        automatic(images[:2])
    assert "device lost" in str(fp.explain(automatic))
    with pytest.raises(RuntimeError, match="backend 'recorded' failed: device lost"):
        asked(images[:2])


def test_adapters_of_static_prompts_take_the_bytes_of_keys_values_and_prompts(
    build: Build, backbone: fp.FrozenViT
) -> None:
    """The formula that a ViT-B/16 with 200 adapters of 50 prompts is held to, here on a small backbone."""
    engine, storages = fp.Engine(backbone, dtype=torch.bfloat16, backend="eager"), {}
    for i in range(20):
        engine.add_adapter(str(i), build("vpt-5", i))
    for name in map(str, range(20)):
        adapter = engine._adapters[name]
        tensors = [*adapter.generator.parameters(), *adapter.head.parameters()]
        with torch.no_grad():
            tensors += [t for prefix in adapter.kept_prefixes().values() for t in prefix]
        for tensor in tensors:
            assert tensor.dtype == torch.bfloat16 or tensor.shape[0] == 5
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(storages.values()) == 20 * adapter_bytes(depth=3, width=48, num_prompts=5, num_classes=5)
    assert 200 * adapter_bytes(depth=12, width=768, num_prompts=50, num_classes=100) < 2**30


def adapter_bytes(depth: int, width: int, num_prompts: int, num_classes: int) -> int:
    """Prompts of every block, keys and values of all but the last, 2 bytes each; a float32 head."""
    return 2 * num_prompts * width * (depth + 2 * (depth - 1)) + 4 * num_classes * (width + 1)


def test_hammered_by_eight_threads(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only right answers or clear errors while adapters come and go and backends fail; memory does not grow."""
    recorder, failing = Recorder(monkeypatch), threading.Event()

    def sometimes(output: Tensor) -> Tensor:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("injected")
        return output

    recorder.alter = sometimes
    model, steady = build("pgn").double(), build("vpt-deep", 1, 4).double()
    versions = [build("vapt", seed, 3).double() for seed in range(2)]
    images = images.double()
    with torch.no_grad():
        expected = {"default": model(images), "steady": steady(images)}
        swapped = [m(images) for m in versions]
    engine = eager(model, backend="recorded", batch_sizes=(1, 4))
    engine.add_adapter("steady", steady)
    problems, answers, errors = [], [0], [0]

    def close(ours: Tensor, theirs: Tensor) -> bool:
        return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9))

    def serve(seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=random))

        for _ in range(HAMMER_TURNS):
            if problems:
                return
            batch, kind = draw(0, 7), draw(0, 8)
            try:
                if kind == 0:
                    engine.add_adapter("swapped", versions[draw(0, 2)])
                elif kind == 1:
                    engine.delete_adapter("swapped")
                elif kind == 2:
                    failing.set()
                elif kind < 5:
                    start = draw(0, 4)
                    if not close(engine(images[start : start + batch]), expected["default"][start : start + batch]):
                        problems.append("a wrong answer")
                else:
                    names = [("default", "steady", "swapped")[draw(0, 3)] for _ in range(batch)]
                    for i, output in enumerate(engine(images[:batch], adapter_names=names)):
                        right = [e[i] for e in (swapped if names[i] == "swapped" else [expected[names[i]]])]
                        if not any(close(output, one) for one in right):
                            problems.append(f"a wrong answer of {names[i]}")
                answers[0] += 1
            except (RuntimeError, ValueError) as error:
                errors[0] += 1
                if "injected" not in str(error) and "'swapped'" not in str(error):
                    problems.append(repr(error))
            except Exception as error:
                problems.append(repr(error))

    def live() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    engine(images)
    engine.add_adapter("swapped", versions[0])
    before = live()
    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert answers[0] > 20
    assert errors[0] > 0
    recorder.alter = lambda output: output
    engine.add_adapter("swapped", versions[0])
    torch.testing.assert_close(engine(images), expected["default"], rtol=1e-10, atol=1e-10)
    assert live() <= before + 8


@pytest.mark.parametrize("adapter_names", [None, ["default"] * 3, ["__base__"] * 3], ids=["one", "mixed", "base"])
def test_images_that_overflow_are_an_error(
    backbone: fp.FrozenViT, tiny_images: Tensor, adapter_names: list[str] | None
) -> None:
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3)
    engine = fp.Engine(model, dtype=torch.float32, backend="eager")
    images = tiny_images[:3].float().clone()
    engine(images, adapter_names)
    images[1] = 1e38 * images[1].sign()
    with pytest.raises(ValueError, match=r"images must give finite outputs, got .* whose values reach 1e\+38"):
        engine(images, adapter_names)
    with torch.no_grad():
        model.head.weight[1, 5] = torch.nan
    if adapter_names is None:
        with pytest.raises(
            ValueError, match=r"model must have finite parameters, got NaN or infinite values in head\.weight"
        ):
            engine(tiny_images[:3].float())
