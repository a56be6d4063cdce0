"""What cannot be captured runs eagerly, with one warning; wrong arguments are errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import (
    RecordingCapturer,
    close,
    eager,
    graphed_of,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.engine.cuda_graph import GraphedForward

Build = Callable[..., fp.PromptedViT]


def test_one_signature_runs_eagerly_with_one_warning(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, capturer = graphed_of(model, failures={1: RuntimeError("operation not permitted")})
    with pytest.warns(UserWarning, match="no CUDA graph") as caught:
        found = [graphed(images[:count]) for count in (2, 4, 1, 2)]
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "batch 2 of 32 x 32 images in torch.float64, backbone in torch.float64" in message
    assert "VPTConfig(num_prompts=3" in message
    assert "RuntimeError: operation not permitted" in message
    for output, count in zip(found, (2, 4, 1, 2), strict=True):
        close(output, eager(model, images[:count]))
    assert [graph.replays for graph in capturer.graphs] == [1, 1]
    ((signature, reason),) = graphed.eager.items()
    assert signature.batch == 2
    assert reason == "RuntimeError: operation not permitted"


def test_a_pool_that_a_failure_may_have_spoilt_is_left(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vpt-deep"), failures={1: RuntimeError("no")})
    with pytest.warns(UserWarning, match="no CUDA graph"):
        graphed(images[:2])
    assert [len(pool) for pool in capturer.pools] == [1, 1]


def test_it_is_remembered_when_the_others_are_captured_again(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, capturer = graphed_of(model, failures={0: RuntimeError("no")})
    with pytest.warns(UserWarning, match="no CUDA graph"):
        graphed(images[:4])
    model.head.weight.data = 2 * model.head.weight.data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (4, 2):
            close(graphed(images[:count]), eager(model, images[:count]))
    assert capturer.attempts == 5


def test_a_model_that_reads_the_host(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("linear")
    head = type(model.head)
    plain = head.forward

    def peeks(self: Any, features: Tensor) -> Tensor:
        return plain(self, features) if float(features.sum()) else features

    monkeypatch.setattr(head, "forward", peeks)
    graphed, _ = graphed_of(model, (2,))
    with pytest.warns(UserWarning, match="_local_scalar_dense.* is not permitted while a stream is capturing"):
        close(graphed(images[:2]), eager(model, images[:2]))


def test_a_warm_up_without_memory(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("vpt-deep")
    plain = fp.PromptedViT.predict

    def runs_out(self: Any, images: Tensor, *arguments: Any, **options: Any) -> Any:
        if len(images) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, images, *arguments, **options)

    monkeypatch.setattr(fp.PromptedViT, "predict", runs_out)
    graphed, _ = graphed_of(model)
    with pytest.warns(UserWarning, match="batch 4 .*OutOfMemoryError: CUDA out of memory"):
        close(graphed(images[:3]), eager(model, images[:3]))
    assert graphed.captures == 2


def test_wrong_images_are_an_error_and_no_fallback(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vpt-deep"))
    with pytest.raises(ValueError, match="images must have shape"):
        graphed(images[0])
    with pytest.raises(ValueError, match="images must be 32 x 32"):
        graphed(images[:, :, :16])
    with pytest.raises(TypeError, match="images must be"):
        graphed(None)
    assert capturer.warm_ups == 0
    assert not graphed.eager


def test_training_mode_is_an_error(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode.*model\.eval"):
        graphed(images[:2])


def test_wrong_arguments(build: Build, tiny_vit: VisionTransformer) -> None:
    model = build("vpt-deep")
    with pytest.raises(TypeError, match="model must be a PromptedViT"):
        GraphedForward(tiny_vit, capturer=RecordingCapturer())
    for sizes in ((), (0,), (1, -2), (True,), (1.5,)):
        with pytest.raises(ValueError, match="batch_sizes must be positive integers"):
            graphed_of(model, sizes)
    with pytest.raises(TypeError, match="batch_sizes must be positive integers"):
        graphed_of(model, 8)
    with pytest.raises(ValueError, match="model must be on a CUDA or ROCm device to be captured, it is on cpu"):
        GraphedForward(model)
