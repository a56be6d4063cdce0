"""The methods by name: configuration, fixed options, title, and what the name says about the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprompt.train.recipes import Recipe


# Method name -> configuration class and the options that the name itself fixes.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgn": ("PGNConfig", {}),
    "rgb-pgn": ("RGBPGNConfig", {}),
    "v2apt": ("V2APTConfig", {}),
    "vapt": ("VAPTConfig", {}),
    "vpt-deep": ("VPTConfig", {"deep": True}),
    "vpt-shallow": ("VPTConfig", {"deep": False}),
    "free": ("FreePromptsConfig", {}),
    "pixel": ("PixelPromptConfig", {}),
    "linear": ("LinearProbeConfig", {}),
    "linear-sgd": ("LinearProbeConfig", {}),
    "full": ("FullFineTuneConfig", {}),
}


# Augmented views of each training image that the L-BFGS probe is fitted to.
PROBE_VIEWS = 4


# What a method's name says about the recipe.
METHOD_RECIPES: dict[str, dict[str, Any]] = {"linear-sgd": {"optimizer": "sgd", "lr": 0.01}}


TITLES: dict[str, str] = {
    "pgn": "PGN",
    "rgb-pgn": "PGN in pixels",
    "v2apt": "V²APT",
    "vapt": "VAPT",
    "vpt-deep": "VPT-deep",
    "vpt-shallow": "VPT-shallow",
    "free": "Free prompts",
    "pixel": "Pixel prompt",
    "linear": "Linear probe (L-BFGS)",
    "linear-sgd": "Linear probe (SGD)",
    "full": "Full fine-tuning",
}


def build_config(method: str, options: Mapping[str, Any]) -> Any:
    """The configuration object of a method. An option that it does not have is a `ValueError` listing those
    it has.
    """
    import fastprompt as fp

    if method not in METHODS:
        raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
    class_name, fixed = METHODS[method]
    config_class = getattr(fp, class_name)
    known = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in fixed]
    for key in options:
        if key not in known:
            has = ", ".join(known) if known else "no options"
            raise ValueError(f"{key}: method {method!r} has no such option; it has {has}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return config_class(**{**values, **fixed})


def build_recipe(method: str, config: Any, overrides: Mapping[str, Any]) -> Recipe:
    """The method's default recipe with `overrides`; an unknown field is a `ValueError` listing the fields.

    Where the number of epochs is given and the warm-ups are not, they keep their share of the epochs.
    """
    from fastprompt.train.recipes import default_recipe

    recipe = default_recipe(config)
    changes = METHOD_RECIPES.get(method, {}) | dict(overrides)
    epochs = changes.get("epochs")
    if isinstance(epochs, int) and epochs > 0:
        for warmup in ("warmup_epochs", "kl_warmup_epochs"):
            changes.setdefault(warmup, getattr(recipe, warmup) * epochs / recipe.epochs)
    return recipe.replace(**changes)
