"""What the double cannot show: a device records these forwards, and memory and streams hold."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import (
    eager,
    plain_step,
    run_threads,
    sgd,
)
from torch import Tensor

import fastprompt as fp
from fastprompt.engine.cuda_graph import WARM_UPS, GraphedForward, GraphedTrainStep

Build = Callable[..., fp.PromptedViT]


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")


@pytest.mark.parametrize(
    "method", ["pgn", "rgb-pgn", "v2apt", "v2apt-samples", "vapt", "vpt-deep", "vpt-project", "free", "pixel", "linear"]
)
def test_replay_equals_eager(build: Build, images: Tensor, method: str) -> None:
    model, x = build(method).float().cuda().eval(), images.float().cuda()
    graphed = GraphedForward(model, (1, 4))
    assert torch.equal(graphed(x[:4]), eager(model, x[:4]))
    change_on_device(model)
    assert torch.equal(graphed(x[:4]), eager(model, x[:4]))
    torch.testing.assert_close(graphed(x[:3]), eager(model, x[:3]), rtol=1e-4, atol=1e-4)
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
    assert torch.equal(graphed(raw), eager(model, raw))
    assert not graphed.eager
    graphed.release()


def test_noise_advances(build: Build, images: Tensor) -> None:
    graphed = GraphedForward(build("v2apt-samples").float().cuda().eval(), (4,), seed=3)
    x = images[:4].float().cuda()
    first = [graphed(x) for _ in range(3)]
    graphed.manual_seed(3)
    assert all(torch.equal(graphed(x), expected) for expected in first)
    assert not torch.equal(first[0], first[1])


def test_a_failed_capture_leaves_the_device_usable(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build("vpt-deep").float().cuda().eval(), images.float().cuda()
    plain, calls = fp.PromptedViT.predict, []

    def synchronizes(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
        output = plain(self, images, *arguments, **options)
        if len(images) == 4:
            calls.append(float(output[0].sum()))
        return output

    monkeypatch.setattr(fp.PromptedViT, "predict", synchronizes)
    stream = torch.cuda.current_stream()
    graphed = GraphedForward(model, (1, 2, 4))
    with pytest.warns(UserWarning, match="no CUDA graph for batch 4"):
        graphed(x[:4])
    assert torch.cuda.current_stream() == stream
    assert graphed.captures == 2
    for count in (1, 2, 4):
        torch.testing.assert_close(graphed(x[:count]), eager(model, x[:count]), rtol=1e-4, atol=1e-4)
    torch.randn(4, device="cuda")  # the generator is not left capturing
    graphed.release()


def test_memory_comes_back_and_threads_agree(build: Build, images: Tensor) -> None:
    model, x = build("vapt").float().cuda().eval(), images.float().cuda()
    expected = eager(model, x)
    sizes = []
    for _ in range(3):
        graphed = GraphedForward(model, (1, 2, 4))
        graphed.prepare(x)

        def hammer(me: int, graphed: GraphedForward = graphed) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                for turn in range(50):
                    start, count = (me + turn) % 6, (me * turn) % 6
                    found = graphed(x[start : start + count])
                    torch.testing.assert_close(found, expected[start : start + count], rtol=1e-4, atol=1e-4)

        run_threads(hammer, 8)
        graphed.release()
        del graphed
        gc.collect()
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[2] <= sizes[1]


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "v2apt", "vapt"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_train_step(build: Build, images: Tensor, labels: Tensor, method: str, name: str) -> None:
    model = build(method).float().cuda().train()
    plain = copy.deepcopy(model)
    make = {
        "sgd": lambda m: sgd(m, lr=0.01, momentum=0.9),
        "adamw": lambda m: torch.optim.AdamW([p for _, p in m.trainable_parameters()], lr=1e-3, capturable=True),
    }[name]
    optimizer, step = make(plain), GraphedTrainStep(model, make(model))
    x, y = images[:8].float().cuda(), labels[:8].cuda()
    losses: list[list[Tensor]] = []
    for run in (step, lambda a, b: plain_step(plain, optimizer, a, b)):
        torch.manual_seed(5)
        losses.append([run(x, y) for _ in range(WARM_UPS + 5)])
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-3)
    assert step.captures == 1


def change_on_device(model: fp.PromptedViT) -> None:
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.mul_(1.25)
