"""What cost formulas are given: sizes of backbones that have a formula, and sums."""

from __future__ import annotations

from typing import Any

import pytest
import timm

import fastprompt as fp
from fastprompt.generators.accounting import PromptCost, Sizes, Tally


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"qk_norm": True}, "q- and k-norm"),
        ({"init_values": None, "dynamic_img_pad": True, "dynamic_img_size": True}, "zero-padded"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "res-post-norm"),
        ({"mlp_layer": timm.layers.SwiGLU}, "gated MLP"),
        ({"act_layer": "mish"}, "mish"),
    ],
)
def test_a_backbone_without_formula_is_refused(sizes: dict[str, Any], named: str) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1, **sizes)
    with pytest.raises(ValueError, match=named):
        Sizes.of(fp.FrozenViT(vit))


def test_a_swin_transformer_is_refused(tiny_swin: Any) -> None:
    with pytest.raises(ValueError, match="Swin"):
        Sizes.of(fp.FrozenViT(tiny_swin()))


def test_a_product_counts_its_gradients() -> None:
    tally = Tally()
    tally.product(100, gradients=2)
    tally.product(10, gradients=0, calls=3)
    tally.call(1, 2, saved=8)
    assert tally == Tally(forward=110, backward=200, saved=8, calls=5, backward_calls=4)
    tally.add(Tally(forward=1, backward_calls=1))
    assert tally == Tally(forward=111, backward=200, saved=8, calls=5, backward_calls=5)


def test_sizes_in_bytes() -> None:
    sizes = Sizes(48, 3, 3, 192, 16, 1, 8, (32, 32), (4, 4), element=2)
    assert sizes.tokens(5) == 5 * 48 * 2
    assert sizes.tokens(5, 10) == 5 * 10 * 2
    assert (sizes.own, sizes.head_dim, sizes.cast) == (17, 16, True)


def test_shared_prompts_are_one_set_for_all_images() -> None:
    cost = PromptCost(4, range(3), shared=2)
    assert [cost.images(i, 8) for i in range(3)] == [1, 1, 8]
    tally = Tally()
    cost.make(tally, 0)
    assert tally == Tally()
