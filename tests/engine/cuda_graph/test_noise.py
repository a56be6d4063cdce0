"""Latent noise in a graph: every replay draws anew, by seed and offset."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from recorded_graphs import (
    close,
    eager,
    graphed_of,
)
from torch import Tensor

import fastprompt as fp

Build = Callable[..., fp.PromptedViT]


def test_every_replay_draws_anew_and_a_seed_repeats_it(build: Build, images: Tensor) -> None:
    graphed, _ = graphed_of(build("v2apt-samples"), seed=3)
    first = [graphed(images[:2]) for _ in range(4)]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(first, 2))
    graphed.manual_seed(3)
    assert all(torch.equal(graphed(images[:2]), expected) for expected in first)
    graphed.manual_seed(4)
    assert not torch.allclose(graphed(images[:2]), first[0])
    other, _ = graphed_of(build("v2apt-samples"), seed=3)
    assert torch.equal(other(images[:2]), first[0])


def test_it_is_the_stream_of_seed_and_offset(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model, seed=11)
    for call in range(3):
        samples = [eager(model, images[:3], {"noise": torch.tensor([11, 2 * call + k])}).softmax(-1) for k in range(2)]
        close(graphed(images[:3]), torch.stack(samples).mean(0).log())


def test_neither_padding_nor_capturing_disturbs_it(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model, (4,), seed=3)
    exact, _ = graphed_of(model, (2,), seed=3)
    graphed(images[:2])
    exact(images[:2])
    close(graphed(images[:2]), exact(images[:2]))
    graphed(images[:2].float())  # another kind of images is captured
    exact(images[:2])
    model.head.weight.data = model.head.weight.data.clone()
    close(graphed(images[:2]), exact(images[:2]))


def test_eager_calls_draw_from_it_too(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model, (2,), seed=3)
    fallen, _ = graphed_of(model, (2,), seed=3, failures={0: RuntimeError("no")})
    with pytest.warns(UserWarning, match="no CUDA graph"):
        fallen(images[:2])
    graphed(images[:2])
    close(fallen(images[:2]), graphed(images[:2]))


def test_without_a_seed_a_call_repeats_the_model(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model)
    assert torch.equal(graphed(images[:2]), graphed(images[:2]))
    close(graphed(images[:2]), eager(model, images[:2]))


def test_a_seed_needs_a_method_that_draws(build: Build) -> None:
    for method in ("vpt-deep", "v2apt"):
        with pytest.raises(ValueError, match="seed is for a V2APT with inference_samples"):
            graphed_of(build(method), seed=1)
    graphed, _ = graphed_of(build("v2apt-samples"))
    with pytest.raises(ValueError, match="seed must be given when"):
        graphed.manual_seed(1)
    with pytest.raises(ValueError, match="seed must be an integer"):
        graphed.manual_seed(1.5)
    with pytest.raises(ValueError, match="seed must be an integer"):
        graphed_of(build("v2apt-samples"), seed=-1)
