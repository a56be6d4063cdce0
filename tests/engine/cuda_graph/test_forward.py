"""A replayed forward equals the eager one, for every method, batch size and kind of image."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from recorded_graphs import (
    RecordedGraph,
    change,
    close,
    eager,
    graphed_of,
    tensors_of,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine.cuda_graph import MAX_FORMS, WARM_UPS
from fastprompt.generators import PromptConfig

Build = Callable[..., fp.PromptedViT]


def test_equals_eager_at_every_batch_size(build: Build, images: Tensor, method: str) -> None:
    model = build(method)
    graphed, capturer = graphed_of(model)
    for count in (3, 4, 1, 2, 0, 5, 11, 4):
        close(graphed(images[:count]), eager(model, images[:count]))
    assert not graphed.eager
    assert len(capturer.graphs) == graphed.captures == 3


def test_a_batch_size_that_was_captured_gives_the_same_bits(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    assert torch.equal(graphed(images[:4]), eager(model, images[:4]))


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "v2apt"])
def test_raw_pixels(build: Build, method: str) -> None:
    model = build(method)
    raw = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    graphed, _ = graphed_of(model)
    close(graphed(raw), eager(model, raw))
    assert not graphed.eager


@pytest.mark.parametrize("method", ["vpt-deep", "v2apt"])
def test_swin(
    configs: dict[str, PromptConfig],
    tiny_swin: Callable[..., nn.Module],
    images: Tensor,
    randomised: Callable[..., nn.Module],
    method: str,
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), configs[method], num_classes=3).double().eval()
    randomised(model.generator)
    graphed, _ = graphed_of(model)
    close(graphed(images[:3]), eager(model, images[:3]))
    change(model)
    close(graphed(images[:3]), eager(model, images[:3]))
    assert not graphed.eager
    assert graphed.captures == 3


def test_without_head_and_with_a_readout_of_prompts(build: Build, images: Tensor) -> None:
    for options in ({"num_classes": None}, {"readout": "patches+prompts"}):
        model = build("vpt-deep", **options)
        graphed, _ = graphed_of(model)
        close(graphed(images[:3]), eager(model, images[:3]))


def test_largest_first_into_one_pool(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vapt"), (2, 8, 1, 2))
    graphed(images[:1])
    assert graphed.batch_sizes == (8, 2, 1)
    assert len(capturer.pools) == 1
    assert [len(graph.calls) > 0 for graph in capturer.pools[0]] == [True] * 3
    assert [largest_batch(graph) for graph in capturer.graphs] == [8, 2, 1]
    assert capturer.warm_ups == 3 * WARM_UPS


def test_the_smallest_graph_that_fits_runs(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vpt-deep"))
    for count in (3, 2, 11):
        graphed(images[:count])
    assert [graph.replays for graph in capturer.graphs] == [1 + 3, 1, 0]  # 11 = 4 + 4 + 3


def test_rows_behind_the_batch_do_not_matter(build: Build, images: Tensor) -> None:
    model = build("pgn")
    graphed, _ = graphed_of(model, (4,))
    expected = graphed(images[:2])
    graphed(1e6 * images[4:8])
    assert torch.equal(graphed(images[:2]), expected)


def test_an_output_is_a_copy_unless_it_is_borrowed(build: Build, images: Tensor) -> None:
    graphed, _ = graphed_of(build("vpt-deep"))
    own = graphed(images[:2])
    kept = own.clone()
    borrowed = graphed(images[:2], borrow=True)
    again = graphed(images[2:4], borrow=True)
    assert torch.equal(own, kept)
    assert borrowed.data_ptr() == again.data_ptr() != own.data_ptr()
    assert torch.equal(borrowed, again)
    assert not torch.equal(borrowed, kept)
    close(graphed(images[:6], borrow=True), graphed(images[:6]))


def test_inputs_are_left_alone_and_may_be_strided(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    strided = images[:4].to(memory_format=torch.channels_last)[::2]
    before = strided.clone()
    close(graphed(strided), eager(model, strided))
    assert torch.equal(strided, before)


def test_modes_of_torch_around_a_call(build: Build, images: Tensor) -> None:
    model, x = build("vpt-deep").float(), images[:2].float()
    graphed, _ = graphed_of(model)
    expected = eager(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        first = graphed(x)
    with torch.inference_mode():
        second = graphed(x.clone())
    for output in (first, second, graphed(x.clone().requires_grad_())):
        assert torch.equal(output, expected)
        assert not output.requires_grad
        assert not output.is_inference()


def test_kinds_of_images_and_kernel_backends_have_graphs_of_their_own(build: Build, images: Tensor) -> None:
    model = build("pgn")
    graphed, capturer = graphed_of(model, (2,))
    graphed(images[:2])
    close(graphed(images[:2].float()), eager(model, images[:2].float()))
    assert graphed.captures == 2
    with fp.use_backend("reference"):
        graphed(images[:2])
    graphed(images[:2])
    assert graphed.captures == 3
    assert len(capturer.pools) == 1


def test_only_so_many_kinds_of_images(
    configs: dict[str, PromptConfig], images: Tensor, make_vit: Callable[..., VisionTransformer]
) -> None:
    vit = make_vit(depth=2, dynamic_img_size=True)
    model = fp.PromptedViT(fp.FrozenViT(vit).double(), configs["vpt-deep"], num_classes=3).eval()
    graphed, _ = graphed_of(model, (2,))
    for i in range(MAX_FORMS):
        graphed(images[:2, :, : 8 * (i + 1)])
    last = images[:2, :, :, :8]
    with pytest.warns(UserWarning, match="batch 2 of 32 x 8 images in torch.float64.*4 kinds of images"):
        close(graphed(last), eager(model, last))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(graphed(last), eager(model, last))
        graphed(images[:2])
    assert graphed.captures == MAX_FORMS


def test_prepare_captures_ahead(build: Build, images: Tensor) -> None:
    graphed, _ = graphed_of(build("vpt-deep"))
    graphed.prepare(images)
    assert graphed.captures == 3
    graphed(images)
    assert graphed.captures == 3
    with pytest.raises(ValueError, match="images must hold at least one image"):
        graphed.prepare(images[:0])


def largest_batch(graph: RecordedGraph) -> int:
    return max(
        tensor.shape[0]
        for _, _, _, outputs in graph.calls
        for tensor in tensors_of(outputs)
        if tensor.ndim == 4 and tensor.shape[1] == 3
    )
