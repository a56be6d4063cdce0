"""Images of many adapters in one pass: the same answers as alone, and the backbone runs once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine import mixed
from fastprompt.generators import PromptConfig
from fastprompt.vit import forward, swin_forward

Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def exact(backbone: fp.FrozenViT) -> fp.FrozenViT:
    return backbone.double()


@pytest.mark.parametrize("raw", [False, True], ids=["float", "uint8"])
def test_every_method_head_and_readout_in_one_batch(
    exact: fp.FrozenViT, build: Build, configs: dict[str, PromptConfig], images: Tensor, raw: bool
) -> None:
    readouts = ["cls", "patches", "map", "patches+prompts", "prompts"]
    models = []
    for i, method in enumerate(name for name in configs if name != "full"):
        readout = readouts[i % (5 if method not in ("pixel", "linear", "rgb-pgn", "rgb-replace") else 3)]
        models.append(build(method, i, None if i == 3 else 4 + i, readout))
    models += [build("vpt-deep", 20, 9), models[0], build("vapt", 21, 2), models[5]]
    order = torch.randperm(len(models))
    models = [models[i] for i in order]
    images = images[torch.arange(len(models)) % len(images)].double()
    if raw:
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    with torch.no_grad():
        found = mixed.outputs(images, models)
        assert len(found) == len(models)
        for i, model in enumerate(models):
            expected = model(images[i : i + 1])[0]
            assert found[i].shape == expected.shape
            torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["vpt-deep", "vpt-shallow-project", "free", "vapt", "v2apt", "pgn"])
def test_other_adapters_in_the_batch_change_no_bit(
    backbone: fp.FrozenViT, build: Build, images: Tensor, method: str, dtype: torch.dtype
) -> None:
    """Same batch size, row and path of keys and values; generators see the same number of images."""
    models = [build(method, seed) for seed in range(4)]
    backbone.to(dtype)
    with torch.no_grad():
        together = mixed.outputs(images[:4], models)
        for i, model in enumerate(models):
            others = [build(method, 10 + seed) for seed in range(4)]
            others[i] = model
            assert torch.equal(mixed.outputs(images[:4], others)[i], together[i])


def test_products_with_frozen_weights_run_once_for_all(
    exact: fp.FrozenViT, build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, original = [], forward.reference.mlp
    monkeypatch.setattr(
        forward.reference, "mlp", lambda module, x, bits: rows.append(x[..., 0].numel()) or original(module, x, bits)
    )
    models = [build("vpt-deep"), build("vpt-5"), build("pgn"), build("vpt-deep", 1), build("linear", readout="patches")]
    with torch.no_grad():
        mixed.outputs(images[:5].double(), models)
    own, patches = 18, 16
    assert rows == [5 * own + 3, 5 * own + 3, 4 + patches]


def test_adapters_that_prompt_alike_share_their_attention(
    exact: fp.FrozenViT, build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, original = [], forward.prefix_attention
    monkeypatch.setattr(
        forward, "prefix_attention", lambda q, *rest, **options: batches.append(len(q)) or original(q, *rest, **options)
    )
    models = [build("vpt-deep", seed) for seed in range(4)] + [build("vpt-5"), build("vpt-5", 1)]
    with torch.no_grad():
        mixed.outputs(images[:6].double(), models)
    assert batches == [4, 2, 4, 2]  # the last block has one query and no keys


def test_keys_and_values_of_static_prompts_are_not_computed_in_a_call(
    exact: fp.FrozenViT, build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [build("vpt-deep", seed, readout="patches") for seed in range(3)]
    with torch.no_grad():
        expected = mixed.outputs(images[:3].double(), models)
        monkeypatch.setattr(forward, "prompt_keys", lambda block, prompts: pytest.fail("computed again"))
        for i, found in enumerate(mixed.outputs(images[:3].double(), models)):
            assert torch.equal(found, expected[i])


def test_adapters_on_a_swin_transformer_share_its_products_where_they_prompt_alike(
    tiny_swin: Callable[..., nn.Module], images: Tensor, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    swin = fp.FrozenViT(tiny_swin()).double()
    models = [build("vpt-deep", seed, 3 + seed, "patches", backbone=swin) for seed in range(2)]
    models += [build("v2apt-samples", 3, readout="patches+prompts", backbone=swin)]
    models += [
        build("pixel", 4, readout="patches", backbone=swin),
        build("linear", 5, readout="patches", backbone=swin),
    ]
    batch = [models[i] for i in (0, 1, 0, 2, 3, 4)]
    sizes, original = [], swin_forward.group_features
    monkeypatch.setattr(
        swin_forward, "group_features", lambda v, x, *rest: sizes.append(len(x.tokens)) or original(v, x, *rest)
    )
    with torch.no_grad():
        together = mixed.outputs(images[:6].double(), batch)
        assert sizes == [3, 2, 2]  # both VPTs; V²APT's two samples; the two without prompt tokens
        for i, found in enumerate(together):
            torch.testing.assert_close(found, batch[i](images[i : i + 1].double())[0], rtol=1e-10, atol=1e-10)
