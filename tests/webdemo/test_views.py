"""What is computed for the page: the model's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastprompt as fp
from fastprompt.data.images import to_tensor
from fastprompt.domains import Domains
from fastprompt.webdemo.views import HEAT, heat, likeliest, view


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8))


def pixels_of(model: fp.PromptedViT, picture: Image.Image) -> Tensor:
    return to_tensor(picture, model.backbone.image_size)[None]


def test_classes_and_tokens_are_the_models(models: dict[str, fp.PromptedViT], picture: Image.Image) -> None:
    model = models["birds"]
    shown = view(model, picture)
    pixels = pixels_of(model, picture)
    with torch.inference_mode():
        expected = model(pixels)[0].double().softmax(-1)
        shares = model.generator.mixture(model.backbone.normalise(pixels))[0].mean(0)
    found = dict(shown.classes[""])
    assert [found[name] for name in model.class_names] == pytest.approx(expected.tolist(), abs=1e-6)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert shown.tokens[0][0] == int(shares.argmax())
    assert shown.tokens[0][1] == pytest.approx(float(shares.max()), abs=1e-6)
    assert len(shown.tokens) == 8


def test_maps_colour_the_patches_that_read_prompts(models: dict[str, fp.PromptedViT], picture: Image.Image) -> None:
    model = models["birds"]
    shown = view(model, picture)
    captions = [caption for caption, _ in shown.maps]
    assert captions[0] == "block 0: patches that read the prompts"
    assert captions[-1] == "block 2: what the class token reads"
    [first, *_] = model.attention_maps(pixels_of(model, picture))
    read = first.between("patches", "prompts")[0].sum(-1).mean(0).reshape(model.backbone.grid)
    row, column = divmod(int(read.argmax()), read.shape[1])
    drawn = np.asarray(shown.maps[0][1]).astype(int)
    side = drawn.shape[0] // read.shape[0]
    orange = np.abs(drawn - np.array(HEAT)).sum(-1)
    patches = orange.reshape(read.shape[0], side, read.shape[1], side).mean((1, 3))
    assert divmod(int(patches.argmin()), read.shape[1]) == (row, column)


def test_a_map_is_grey_where_nothing_is_and_full_at_the_largest() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    drawn = np.asarray(heat(picture, torch.tensor([[0.0, 2.0], [1.0, 0.0]])))
    assert drawn.shape == (224, 224, 3)
    assert (drawn[:100, :100] == 0).all()
    strong, weak = drawn[50, 170].astype(float), drawn[170, 50].astype(float)
    assert strong[0] == pytest.approx(HEAT[0] * 217 / 255, abs=2)
    assert weak[0] == pytest.approx(strong[0] / 2, abs=2)
    assert (np.asarray(heat(picture, torch.zeros(2, 2))) == 0).all()


def test_a_pixel_prompt_shows_what_the_model_sees(models: dict[str, fp.PromptedViT], picture: Image.Image) -> None:
    model = models["border"]
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.add_(1.0)
    [(caption, changed)] = view(model, picture).maps
    before = pixels_of(model, picture)[0].permute(1, 2, 0).numpy()
    after = np.asarray(changed)
    assert caption == "what the frozen model sees"
    assert np.abs(after[4:-4, 4:-4].astype(int) - before[4:-4, 4:-4]).max() <= 1
    assert np.abs(after[:4].astype(int) - before[:4]).max() > 20


def test_prompts_outside_the_sequence_have_no_maps(models: dict[str, fp.PromptedViT], picture: Image.Image) -> None:
    shown = view(models["vqt"], picture)
    assert shown.maps == []
    assert shown.tokens == []


def test_a_head_for_each_domain_answers_alone(models: dict[str, fp.PromptedViT]) -> None:
    model = models["birds"]
    model.domains = Domains(("air", "sea"), ((0, 1), (2,)), "per-domain")
    found = likeliest(model, torch.tensor([[1.0, 2.0, 9.0]]))
    assert [name for name, _ in found["air"]] == ["robin", "<b>owl</b>"]
    assert found["sea"] == [("wren", 1.0)]
