"""Training through a backbone in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastprompt as fp
from fastprompt.int8.linear import Int8Linear, is_int8
from fastprompt.int8.training import running_in_int8
from fastprompt.int8.weights import cached, find_weights, relative_error
from fastprompt.train.through_int8 import backbone_of_run, prepare_int8

Colours = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache of its own."""
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


RECIPE = fp.Recipe(epochs=3, batch_size=8, lr=1e-2, warmup_epochs=0, backbone="int8", num_workers=0)


def gradients(model: fp.PromptedViT, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for _, p in model.trainable_parameters() if p.grad is not None])


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("variant", ["vpt-deep", "vapt", "pgn", "v2apt", "cvpt", "late vpt"])
def test_gradients_are_those_of_the_int8_backbone(
    make_model: Callable[..., Any], colours: Colours, variant: str, bits: int
) -> None:
    """As autograd computes them on a backbone with the weights that the int8 ones stand for."""
    config: Any = {
        "vpt-deep": fp.VPTConfig(3),
        "vapt": fp.VAPTConfig(3),
        "pgn": fp.PGNConfig(3, library_size=8),
        "v2apt": fp.V2APTConfig(4, 2),
        "cvpt": fp.CVPTConfig(3),
        "late vpt": fp.VPTConfig(3, first_block=1),
    }[variant]
    model, (images, labels) = make_model(config).eval(), colours(16)
    weights = fp.Int8Weights.calibrate(model.backbone, images, activation_bits=bits)
    exact = gradients(model, images, labels)
    with running_in_int8(model.backbone, weights):
        folded = model.backbone.folded()
        assert folded is not None
        assert all(is_int8(block) for block in folded.blocks)
        found = gradients(model, images, labels)
        model.set_activation_bits(0)
        again = gradients(model, images, labels)
        model.set_activation_bits(None)
        model.set_grad_checkpointing()
        recomputed = gradients(model, images, labels)
        model.set_grad_checkpointing(False)
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < 0.15
    assert float((again - found).norm() / found.norm()) < 1e-2
    assert float((recomputed - found).norm() / found.norm()) < 1e-2
    torch.testing.assert_close(gradients(model, images, labels), exact)


def test_the_weights_take_a_quarter_and_are_back_at_the_end(make_model: Callable[..., Any], colours: Colours) -> None:
    model, (images, _) = make_model(), colours(16)
    backbone = model.backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    fingerprint, folded = backbone.fingerprint, backbone.folded()
    weights = fp.Int8Weights.calibrate(backbone, images)

    def fail() -> None:
        with running_in_int8(backbone, weights):
            blocks = backbone.folded().blocks
            linears = [module for block in blocks for module in block.modules() if isinstance(module, Int8Linear)]
            assert len(linears) == 8
            assert all(linear.kept is None for linear in linears)
            plain = sum(4 * linear.sizes[0] * linear.sizes[1] for linear in linears)
            assert sum(linear.packed.nbytes for linear in linears) == plain / 4
            assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(is_int8(block) for block in backbone.folded().blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert backbone.fingerprint == fingerprint
    assert not backbone.private
    torch.testing.assert_close(backbone.folded().blocks[0].qkv.weight, folded.blocks[0].qkv.weight, rtol=0, atol=0)


def test_fit_trains_through_what_an_engine_serves(
    make_model: Callable[..., Any], colours: Colours, cache: Path
) -> None:
    train, val = colours(32), colours(24, seed=1)
    model = make_model()
    result = fp.fit(model, train, val, RECIPE, progress=False)
    assert cached(model.backbone.fingerprint).is_file()  # calibrated on training images
    assert result.best_val_accuracy > 0.9
    float_model = make_model()
    in_float = fp.fit(float_model, train, val, RECIPE.replace(backbone="float", dtype="float32"), progress=False)
    losses = [[event["train_loss"] for event in each.history] for each in (result, in_float)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    engine = fp.Engine(model, dtype="int8")
    with torch.no_grad():
        assert relative_error(engine(val[0]), model.eval()(val[0])) < 0.05
        assert (engine(val[0]).argmax(1) == val[1]).float().mean() > 0.9


def test_a_killed_run_resumes_only_on_the_same_int8_weights(
    make_model: Callable[..., Any], colours: Colours, tmp_path: Path
) -> None:
    train, val = colours(32), colours(24, seed=1)
    whole = fp.fit(make_model(), train, val, RECIPE, progress=False)
    model = make_model()
    fp.fit(model, train, val, RECIPE, out_dir=tmp_path / "run", progress=False)
    again = fp.fit(make_model(), train, val, RECIPE, out_dir=tmp_path / "run", progress=False)
    assert again.history[-1]["train_loss"] == whole.history[-1]["train_loss"]
    other = fp.Int8Weights.calibrate(model.backbone, val[0], activation_bits=12)
    assert other.digest != find_weights(model.backbone, None).digest
    other.save()
    with pytest.raises(ValueError, match="int8"):
        fp.fit(make_model(), train, val, RECIPE, out_dir=tmp_path / "run", progress=False)


def test_what_int8_does_not_go_with(make_model: Callable[..., Any], colours: Colours, tmp_path: Path) -> None:
    train = colours(16)
    with pytest.raises(ValueError, match="compile must be False with backbone='int8'"):
        RECIPE.replace(compile=True)
    with pytest.raises(ValueError, match="backbone must be one of 'float', 'int8', got 'int4'"):
        RECIPE.replace(backbone="int4")
    with pytest.raises(ValueError, match="backbone must be 'float' in a grid"):
        fp.fit_grid(make_model, train, train, RECIPE, {"seed": [0, 1]}, out_dir=tmp_path)
    with pytest.raises(ValueError, match="backbone must be frozen"):
        fp.fit(make_model(fp.FullFineTuneConfig()), train, train, RECIPE, progress=False)
    with pytest.raises(ValueError, match="int8 needs at least 8 images to calibrate, got 6"):
        fp.fit(make_model(), colours(6), train, RECIPE, progress=False)
    assert RECIPE.computes_in == "float32"
    assert RECIPE.replace(dtype="bfloat16").computes_in == "bfloat16"


def test_bfloat16_around_int8(make_model: Callable[..., Any], colours: Colours) -> None:
    model, (images, labels) = make_model(), colours(16)
    recipe = RECIPE.replace(dtype="bfloat16")
    prepare_int8(model, (images, labels), recipe)
    exact = gradients(model.eval(), images, labels)
    with backbone_of_run(model, recipe):
        assert model.backbone_dtype == torch.bfloat16
        found = gradients(model, images, labels)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.2
    assert model.backbone_dtype == torch.float32
    torch.testing.assert_close(gradients(model, images, labels), exact)


def test_learning_rates_are_found_through_int8(make_model: Callable[..., Any], colours: Colours) -> None:
    model, train = make_model(), colours(32)
    rates = fp.find_lr(model, train, RECIPE, steps=12, low=1e-4, high=1.0)
    assert (
        rates.losses
        != fp.find_lr(
            make_model(), train, RECIPE.replace(backbone="float", dtype="float32"), steps=12, low=1e-4, high=1.0
        ).losses
    )
    assert rates.recipe.backbone == "int8"


def test_constants_of_int8_have_files_of_their_own(
    make_model: Callable[..., Any], colours: Colours, tmp_path: Path
) -> None:
    """Runs in float32 and in int8 share a folder and no records."""
    train, val, files = colours(32), colours(24, seed=1), set()
    for backbone in ("float", "int8"):
        recipe = RECIPE.replace(backbone=backbone, dtype="float32")
        fp.fit(make_model(fp.VPTConfig(2, first_block=1)), train, val, recipe, cache_dir=tmp_path / "c", progress=False)
        found = {path.name for path in (tmp_path / "c").rglob("*.constants")}
        assert len(found - files) == 2
        files = found


def test_a_run_says_that_it_trains_through_int8(
    make_model: Callable[..., Any], colours: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    fp.fit(make_model(), colours(16), colours(8), RECIPE.replace(epochs=1))
    assert "training vpt on cpu in int8 and float32: 16 training" in capsys.readouterr().err
