"""What all generators share: configurations, geometry, dropout masks."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastprompt as fp
from fastprompt.generators import Geometry, PromptConfig, PromptGenerator, build_generator, get_method, method_of
from fastprompt.generators.base import GeometryOptions, dropout_mask

CHANGED = {
    "pgn": fp.PGNConfig(num_prompts=3, widths=(4, 8), activation="sigmoid", resolution=64),
    "v2apt": fp.V2APTConfig(num_prompts=4, num_instance=1, share="per_layer", beta=0.5),
    "vapt": fp.VAPTConfig(num_prompts=4, kernel=3, conv=False, project=12, static_layers=2),
    "vpt": fp.VPTConfig(num_prompts=4, deep=False, project=3),
    "cvpt": fp.CVPTConfig(num_prompts=2, first_block=1),
    "vqt": fp.VQTConfig(num_queries=4, normalise=False, group_lasso=0.5),
    "free": fp.FreePromptsConfig(num_prompts=2),
    "rgb-pgn": fp.RGBPGNConfig(num_prompts=4, placement="replace", bounded=False, offset=True),
    "pixel": fp.PixelPromptConfig(border=2),
    "linear": fp.LinearProbeConfig(),
    "full": fp.FullFineTuneConfig(),
}


def test_every_kind_is_known() -> None:
    assert {get_method(name).config_class.kind for name in fp.list_methods()} == set(CHANGED)
    assert all(config.kind == kind for kind, config in CHANGED.items())


@pytest.mark.parametrize("kind", CHANGED)
def test_configuration_round_trip_through_json(kind: str) -> None:
    config = CHANGED[kind]
    values = json.loads(json.dumps(config.to_dict()))
    assert values["kind"] == kind
    assert set(values) == {"kind", *(f.name for f in dataclasses.fields(config))}
    assert fp.config_from_dict(values) == config
    assert fp.config_from_dict({"kind": kind}) == type(config)()


@pytest.mark.parametrize("kind", CHANGED)
def test_unknown_keys_and_kinds_are_named(kind: str) -> None:
    with pytest.raises(ValueError, match=r"has no option 'num_promts'"):
        fp.config_from_dict({"kind": kind, "num_promts": 3})
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'pgm'"):
        fp.config_from_dict({"kind": "pgm"})
    with pytest.raises(ValueError, match=r"kind must be one of .* got None"):
        fp.config_from_dict({})


@pytest.mark.parametrize("config", CHANGED.values(), ids=CHANGED)
def test_configurations_are_frozen(config: PromptConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kind_of_thing = 1  # type: ignore[attr-defined]


def test_values_from_a_file_are_checked() -> None:
    with pytest.raises(ValueError, match=r"VPTConfig\.num_prompts must be at least 1"):
        fp.config_from_dict({"kind": "vpt", "num_prompts": 0})


@pytest.mark.parametrize("kind", ["pgn", "v2apt", "vapt", "vpt", "free", "pixel"])
def test_build_generator(kind: str) -> None:
    geometry = Geometry(width=48, depth=3, grid=(4, 4), patch_size=8, image_size=(32, 32))
    generator = build_generator(CHANGED[kind], geometry)
    assert generator is not None
    assert (generator.config, generator.geometry) == (CHANGED[kind], geometry)
    with pytest.raises(TypeError, match=rf"config must be {type(CHANGED[kind]).__name__}, got FullFineTuneConfig"):
        type(generator)(fp.FullFineTuneConfig())


def test_probes_have_no_generator() -> None:
    assert build_generator(fp.LinearProbeConfig(), Geometry()) is None
    assert build_generator(fp.FullFineTuneConfig(), Geometry()) is None
    with pytest.raises(TypeError, match=r"config must be one of .*PGNConfig, .* got dict"):
        build_generator({}, Geometry())  # type: ignore[arg-type]


def test_sizes_come_from_a_backbone_or_by_name(tiny_vit: VisionTransformer) -> None:
    expected = Geometry(width=48, depth=3, grid=(4, 4), patch_size=8, image_size=(32, 32))
    assert fp.VPT(geometry=fp.FrozenViT(tiny_vit)).geometry == expected
    assert fp.VPT(geometry=expected, width=12).geometry == dataclasses.replace(expected, width=12)
    assert fp.VPT().geometry == Geometry(768, 12, (14, 14), 16, (224, 224))


def test_options_by_name_override_the_configuration() -> None:
    vpt = fp.VPT(fp.VPTConfig(num_prompts=3, project=5), num_prompts=7)
    assert vpt.config == fp.VPTConfig(num_prompts=7, project=5)
    with pytest.raises(ValueError, match=r"VPT has no option 'prompts'; it takes"):
        fp.VPT(prompts=7)
    with pytest.raises(ValueError, match=r"num_prompts must be at least 1"):
        fp.VPT(num_prompts=0)
    with pytest.raises(TypeError, match=r"geometry must be a Geometry or a FrozenViT, got dict"):
        fp.VPT(geometry={"width": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pgn", "rgb-pgn", "v2apt", "vapt", "vpt-deep", "free", "pixel"])
def test_constructors_name_every_option_with_its_type(name: str) -> None:
    method = get_method(name)
    assert method.generator_class is not None
    parameters = dict(inspect.signature(method.generator_class).parameters)
    assert list(parameters)[:2] == ["config", "geometry"]
    sizes = parameters.pop("sizes")
    assert sizes.annotation == "Unpack[GeometryOptions]"
    options = {f.name: f.type for f in dataclasses.fields(method.config_class)}
    assert {key: p.annotation for key, p in list(parameters.items())[2:]} == options
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])
    assert GeometryOptions.__annotations__.keys() == Geometry.__dataclass_fields__.keys()


@pytest.mark.parametrize("kind", ["pgn", "v2apt", "vapt", "vpt", "free", "rgb-pgn", "pixel"])
def test_every_option_by_name_reaches_the_configuration(kind: str, tiny_vit: VisionTransformer) -> None:
    config, backbone = CHANGED[kind], fp.FrozenViT(tiny_vit)
    generator_class = method_of(config).generator_class
    assert generator_class is not None
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert generator_class(None, backbone, **options).config == config
    assert generator_class(config, backbone).config == config


def test_an_option_that_is_none_is_given() -> None:
    assert fp.VPT(fp.VPTConfig(project=5), project=None, width=24, depth=2).config.project is None


def test_a_subclass_may_have_more_options() -> None:
    @dataclasses.dataclass(frozen=True)
    class LouderConfig(fp.VPTConfig):
        gain: float = 2.0

    class Louder(fp.VPT):
        config_class = LouderConfig

        def __init__(self, config: LouderConfig | None = None, geometry: Geometry | None = None, **options: Any):
            super().__init__(config, geometry, **options)

    assert Louder(gain=3.0, num_prompts=2, width=24, depth=2).config == LouderConfig(num_prompts=2, gain=3.0)


def test_errors_name_the_argument_that_was_given() -> None:
    pgn, vapt = fp.PGN(width=8, depth=2, grid=(2, 2)), fp.VAPT(width=8, depth=2, grid=(2, 2))
    v2apt, pixel = fp.V2APT(width=8, depth=2, grid=(2, 2)), fp.PixelPrompt(border=2, image_size=(32, 32))
    flat = torch.zeros(3)
    for call, name in (
        (lambda: pgn(flat), "x"),
        (lambda: pgn.mixture(flat), "images"),
        (lambda: pixel(flat), "x"),
        (lambda: pixel.prompt_images(flat), "images"),
        (lambda: v2apt(flat), "x"),
        (lambda: v2apt.stats(flat), "embeddings"),
        (lambda: vapt(flat, 1), "x"),
        (lambda: vapt.prompts(1, tokens=flat), "tokens"),
        (lambda: vapt.prompts(1, tokens=torch.zeros(1, 3, 8)), "tokens"),
        (lambda: vapt(torch.zeros(1, 3, 8), 1), "x"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must (be|have) "):
            call()


def test_dropout_mask_keeps_the_mean() -> None:
    mask = dropout_mask((100, 100), 0.3, torch.zeros(1, dtype=torch.float64))
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs(mask.mean() - 1) < 0.03


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0),
        ("width", "384"),
        ("depth", 0),
        ("depth", True),
        ("patch_size", 16.0),
        ("grid", 14),
        ("grid", (14,)),
        ("grid", (0, 0)),
        ("image_size", 224),
    ],
)
def test_sizes_that_are_none_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*positive integer.*got"):
        fp.VPT(**{name: value})


def test_a_size_may_be_a_list() -> None:
    assert Geometry(grid=[3, 4]) == Geometry(grid=(3, 4))  # type: ignore[arg-type]


def test_a_model_that_is_not_frozen_is_no_geometry(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"geometry must be a Geometry or a FrozenViT, got VisionTransformer"):
        fp.VPT(geometry=tiny_vit)


@pytest.mark.parametrize("values", [None, ["vpt"], "vpt"])
def test_configurations_are_mappings(values: object) -> None:
    with pytest.raises(TypeError, match=r"values must be a mapping"):
        fp.config_from_dict(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind must be one of"):
        fp.config_from_dict({"kind": [values]})


@pytest.mark.parametrize("kind", [fp.PGN, fp.V2APT, fp.VAPT])
def test_input_on_another_device_is_named(kind: type[PromptGenerator]) -> None:
    generator = kind(width=8, depth=2, grid=(2, 2), num_prompts=6)
    shape = (1, 3, 32, 32) if kind is fp.PGN else (1, 4, 8)
    with pytest.raises(ValueError, match=r"x must be on cpu, where the generator is, got meta"):
        generator(torch.zeros(shape, device="meta"))


STAGES = ((24, 2), (48, 1), (96, 3))


def test_geometry_of_several_stages() -> None:
    geometry = Geometry(24, 6, (8, 8), 4, (32, 32), STAGES)
    assert geometry.widths == (24, 24, 48, 96, 96, 96)
    assert Geometry(24, 3).widths == (24, 24, 24)
    assert Geometry(24, 6, stages=[list(stage) for stage in STAGES]).stages == STAGES


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (((48, 2), (24, 4)), "stages must start with width 24 and have 6 blocks in all"),
        (((24, 2), (48, 2)), "stages must start with width 24 and have 6 blocks in all"),
        ((), r"stages must be \(width, blocks\)"),
        (((24, 2), (48, 0)), r"stages must be \(width, blocks\) for each stage or None"),
        ((24, 48), r"stages must be \(width, blocks\)"),
        (24, r"stages must be \(width, blocks\)"),
    ],
)
def test_bad_stages_are_named(stages: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(24, 6, stages=stages)


def test_geometry_of_a_swin_transformer(tiny_swin: Callable[..., nn.Module]) -> None:
    geometry = Geometry.of(fp.FrozenViT(tiny_swin()))
    assert geometry == Geometry(8, 5, (8, 8), 4, (32, 32), ((8, 2), (16, 2), (32, 1)))


@pytest.mark.parametrize("kind", ["pgn", "vapt"])
def test_methods_without_a_meaning_on_swin_say_what_works_there(tiny_swin: Callable[..., nn.Module], kind: str) -> None:
    message = rf"{type(CHANGED[kind]).__name__} is not defined on Swin transformers.*fp.list_methods"
    with pytest.raises(ValueError, match=message):
        fp.PromptedViT(fp.FrozenViT(tiny_swin()), CHANGED[kind])


LATE = {
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4,), first_block=2),
    "v2apt": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=3, hidden=5, first_block=1),
    "vapt": fp.VAPTConfig(num_prompts=3, hidden=4, first_block=1),
    "vpt": fp.VPTConfig(num_prompts=3, first_block=2),
    "vpt-shallow": fp.VPTConfig(num_prompts=3, deep=False, first_block=1),
}


@pytest.mark.parametrize("config", LATE.values(), ids=LATE)
def test_blocks_before_the_first_prompted_one_run_without_prompts(
    pre_norm_vit: VisionTransformer, randomised: Callable[..., nn.Module], config: PromptConfig
) -> None:
    """Block by block through timm's modules: values and gradients of both graphs."""
    vit, images = pre_norm_vit.double(), torch.randn(2, 3, 32, 32).double()
    model = fp.PromptedViT(fp.FrozenViT(vit), config, readout="cls").eval()
    generator = model.generator
    randomised(generator)
    own = 3 + 16  # class token, registers, patches
    with torch.no_grad():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    context = generator.context({"image": images, "embeddings": x[:, 3:]}.get(generator.known_at))
    for i, block in enumerate(vit.blocks):
        if i in generator.layers:
            prompts = generator.prompts(i, context, x[:, 3:own])
            x = torch.cat([x[:, :own], prompts.expand(2, -1, -1)], dim=1)
        assert x.shape[1] == own + 3 * (i >= config.first_block) + (config.kind == "v2apt" and i >= 1)
        x = block(x)
    expected, trained = vit.norm(x)[:, 0], list(generator.parameters())
    assert min(generator.layers) == config.first_block
    by_hand = torch.autograd.grad(expected.cos().sum(), trained)
    for forward in (model.forward, model.reference_forward):
        found = forward(images)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(found.cos().sum(), trained), by_hand, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("config", LATE.values(), ids=LATE)
def test_the_first_prompted_block_must_exist(config: PromptConfig, small: Geometry) -> None:
    label = rf"{type(config).__name__}\.first_block"
    with pytest.raises(ValueError, match=rf"{label} must be less than the 3 blocks, got 3"):
        build_generator(dataclasses.replace(config, first_block=3), small)
    with pytest.raises(ValueError, match=rf"{label} must be at least 0, got -1"):
        dataclasses.replace(config, first_block=-1)


def test_prompts_that_become_pixels_start_at_the_image() -> None:
    assert fp.RGBPGNConfig(placement="latent", first_block=1).first_block == 1
    with pytest.raises(ValueError, match=r"RGBPGNConfig\.first_block must be 0 unless placement is 'latent', got 1"):
        fp.RGBPGNConfig(placement="extend", first_block=1)


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("share", ["all", "per_layer", None])
def test_late_prompts_on_a_swin_transformer(
    tiny_swin: Callable[..., nn.Module], randomised: Callable[..., nn.Module], first: int, share: str | None
) -> None:
    backbone, images = fp.FrozenViT(tiny_swin()).double(), torch.randn(2, 3, 32, 32).double()
    config: PromptConfig = fp.VPTConfig(num_prompts=3, first_block=first)
    if share is not None:
        config = fp.V2APTConfig(3, 2, latent=3, hidden=5, share=share, first_block=first)
    model = fp.PromptedViT(backbone, config, num_classes=2).eval()
    randomised(model.generator)
    logits = model(images)
    torch.testing.assert_close(logits, model.reference_forward(images), rtol=1e-10, atol=1e-10)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.generator.parameters())
