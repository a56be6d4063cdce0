"""`Recipe.compile`: training on what `torch.compile` makes of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprompt as fp

CONFIGS = [
    fp.VPTConfig(num_prompts=2),
    fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8)),
    fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16, beta=0.1),
    fp.VQTConfig(num_queries=2),
    *(
        pytest.param(config, marks=pytest.mark.long)
        for config in (fp.VAPTConfig(num_prompts=2), fp.PixelPromptConfig(border=4), fp.FullFineTuneConfig())
    ),
]


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """20 images, of which the last batch of 8 has 4."""
    return torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 4


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each `torch.compile`, which makes the graphs that Inductor gets, and runs them without it."""
    calls: list[dict[str, Any]] = []
    compiled = torch.compile

    def recorded(function: Callable[..., Any], **keywords: Any) -> Any:
        calls.append(keywords)
        return compiled(function, backend="aot_eager", dynamic=keywords["dynamic"])

    monkeypatch.setattr(torch, "compile", recorded)
    return calls


def run(make_model: Callable[..., Any], config: Any, images: Any, out: Any = None, **fields: Any) -> fp.FitResult:
    recipe = fp.Recipe(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0, dtype="float32").replace(**fields)
    return fp.fit(make_model(config), images, images, recipe, out_dir=out, progress=False)


def test_with_activations_that_are_computed_again(
    make_model: Callable[..., Any], images: Any, compiler: list[dict[str, Any]]
) -> None:
    plain = run(make_model, CONFIGS[0], images)
    found = run(make_model, CONFIGS[0], images, compile=True, activation_bits=0)
    assert compiler
    for ours, theirs in zip(found.history, plain.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_it_trains_as_without(
    make_model: Callable[..., Any], images: Any, compiler: list[dict[str, Any]], config: Any
) -> None:
    plain = run(make_model, config, images)
    assert not compiler
    compiled = run(make_model, config, images, compile=True)
    assert compiler == [{"mode": None, "dynamic": False}]
    for ours, theirs in zip(compiled.history, plain.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


@pytest.mark.long
def test_inductor_trains_as_eager_does(make_model: Callable[..., Any], images: Any) -> None:
    plain, compiled = (run(make_model, fp.VPTConfig(2), images, compile=how) for how in (False, True))
    for ours, theirs in zip(compiled.history, plain.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_training_alone_is_compiled(
    make_model: Callable[..., Any], images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def recorded(function: Callable[[Tensor], Any], **keywords: Any) -> Any:
        return lambda given: (seen.append(len(given)), function(given))[1]

    monkeypatch.setattr(torch, "compile", recorded)
    run(make_model, fp.VPTConfig(2), images, compile=True)  # validates after each epoch
    assert sorted(seen) == sorted(2 * [8, 8, 4])


def test_cached_features_leave_nothing_to_compile(
    make_model: Callable[..., Any], images: Any, compiler: list[dict[str, Any]]
) -> None:
    run(make_model, fp.LinearProbeConfig(), images, compile=True)
    assert not compiler


class Interrupt(fp.Callback):
    """Ends a run at a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step(self, step: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_run_ends_in_the_same_bits(
    make_model: Callable[..., Any], images: Any, compiler: list[dict[str, Any]], tmp_path: Any
) -> None:
    def trained(folder: str, *callbacks: fp.Callback) -> fp.FitResult:
        recipe = fp.Recipe(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0, dtype="float32", compile=True)
        model = make_model(fp.VPTConfig(2, prompt_dropout=0.2))
        return fp.fit(model, images, images, recipe, out_dir=tmp_path / folder, progress=False, callbacks=callbacks)

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", Interrupt(4))
    assert [e["train_loss"] for e in trained("cut").history] == [e["train_loss"] for e in whole.history]


def test_a_grid_says_that_its_steps_are_shared(make_model: Callable[..., Any], images: Any, tmp_path: Any) -> None:
    recipe = fp.Recipe(epochs=1, batch_size=8, warmup_epochs=0, compile=True)
    with pytest.raises(ValueError, match="compile must be False in a grid"):
        fp.fit_grid(lambda seed: make_model(), images, images, recipe, {"lr": [1e-3, 1e-2]}, tmp_path)


def test_it_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        fp.Recipe(compile="yes")
