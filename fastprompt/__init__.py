"""fastprompt: instance-conditioned visual prompts on frozen vision transformers.

Public names are resolved on first use, so importing one op does not import timm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` below finds at run time
    import fastprompt.analysis as analysis  # noqa: F401
    from fastprompt.data import load_data as load_data
    from fastprompt.engine.engine import Engine as Engine
    from fastprompt.engine.explain import explain as explain
    from fastprompt.export import export_model as export_model
    from fastprompt.generators import (
        CVPT as CVPT,
        PGN as PGN,
        RGBPGN as RGBPGN,
        V2APT as V2APT,
        VAPT as VAPT,
        VPT as VPT,
        VQT as VQT,
        CVPTConfig as CVPTConfig,
        FreePrompts as FreePrompts,
        FreePromptsConfig as FreePromptsConfig,
        FullFineTuneConfig as FullFineTuneConfig,
        Geometry as Geometry,
        LinearProbeConfig as LinearProbeConfig,
        PGNConfig as PGNConfig,
        PixelPrompt as PixelPrompt,
        PixelPromptConfig as PixelPromptConfig,
        PromptConfig as PromptConfig,
        PromptCost as PromptCost,
        PromptGenerator as PromptGenerator,
        Published as Published,
        RGBPGNConfig as RGBPGNConfig,
        V2APTConfig as V2APTConfig,
        VAPTConfig as VAPTConfig,
        Variant as Variant,
        VPTConfig as VPTConfig,
        VQTConfig as VQTConfig,
        config_from_dict as config_from_dict,
        list_methods as list_methods,
        register_method as register_method,
    )
    from fastprompt.heads import (
        LabelMapHead as LabelMapHead,
        LinearHead as LinearHead,
        PrototypeHead as PrototypeHead,
        TextHead as TextHead,
        encode_class_texts as encode_class_texts,
    )
    from fastprompt.huggingface import get_prompted_model as get_prompted_model
    from fastprompt.int8.weights import Int8Weights as Int8Weights
    from fastprompt.kernels.dispatch import use_backend as use_backend
    from fastprompt.locks import DirectoryInUse as DirectoryInUse
    from fastprompt.model import PromptedViT as PromptedViT
    from fastprompt.official import load_official as load_official
    from fastprompt.pixels.export import export_client as export_client
    from fastprompt.pixels.prompts import RGBPrompts as RGBPrompts
    from fastprompt.protocols import (
        list_protocols as list_protocols,
        load_protocol as load_protocol,
    )
    from fastprompt.train.callbacks import Callback as Callback
    from fastprompt.train.evaluate import evaluate as evaluate
    from fastprompt.train.find_lr import find_lr as find_lr
    from fastprompt.train.fit import (
        FitResult as FitResult,
        fit as fit,
        plan as plan,
    )
    from fastprompt.train.grid import (
        fit_grid as fit_grid,
        summarise_seeds as summarise_seeds,
    )
    from fastprompt.train.plan import Plan as Plan
    from fastprompt.train.probe import fit_linear_probe as fit_linear_probe
    from fastprompt.train.recipes import (
        Recipe as Recipe,
        default_recipe as default_recipe,
        paper_recipe as paper_recipe,
    )
    from fastprompt.vit import FrozenViT as FrozenViT
    from fastprompt.vit.assets import (
        list_backbones as list_backbones,
        load_backbone as load_backbone,
    )

__version__ = "0.1.0"

_PUBLIC = {
    "FrozenViT": "fastprompt.vit",
    "PromptedViT": "fastprompt.model",
    "get_prompted_model": "fastprompt.huggingface",
    "load_official": "fastprompt.official",
    "load_backbone": "fastprompt.vit.assets",
    "list_backbones": "fastprompt.vit.assets",
    "Geometry": "fastprompt.generators",
    "PromptConfig": "fastprompt.generators",
    "PromptGenerator": "fastprompt.generators",
    "PGN": "fastprompt.generators",
    "PGNConfig": "fastprompt.generators",
    "RGBPGN": "fastprompt.generators",
    "RGBPGNConfig": "fastprompt.generators",
    "RGBPrompts": "fastprompt.pixels.prompts",
    "export_client": "fastprompt.pixels.export",
    "export_model": "fastprompt.export",
    "V2APT": "fastprompt.generators",
    "V2APTConfig": "fastprompt.generators",
    "VAPT": "fastprompt.generators",
    "VAPTConfig": "fastprompt.generators",
    "VPT": "fastprompt.generators",
    "VPTConfig": "fastprompt.generators",
    "CVPT": "fastprompt.generators",
    "CVPTConfig": "fastprompt.generators",
    "VQT": "fastprompt.generators",
    "VQTConfig": "fastprompt.generators",
    "FreePrompts": "fastprompt.generators",
    "FreePromptsConfig": "fastprompt.generators",
    "PixelPrompt": "fastprompt.generators",
    "PixelPromptConfig": "fastprompt.generators",
    "LinearProbeConfig": "fastprompt.generators",
    "FullFineTuneConfig": "fastprompt.generators",
    "config_from_dict": "fastprompt.generators",
    "register_method": "fastprompt.generators",
    "list_methods": "fastprompt.generators",
    "Variant": "fastprompt.generators",
    "Published": "fastprompt.generators",
    "PromptCost": "fastprompt.generators",
    "LinearHead": "fastprompt.heads",
    "TextHead": "fastprompt.heads",
    "LabelMapHead": "fastprompt.heads",
    "PrototypeHead": "fastprompt.heads",
    "encode_class_texts": "fastprompt.heads",
    "fit": "fastprompt.train.fit",
    "Callback": "fastprompt.train.callbacks",
    "find_lr": "fastprompt.train.find_lr",
    "plan": "fastprompt.train.fit",
    "Plan": "fastprompt.train.plan",
    "fit_grid": "fastprompt.train.grid",
    "summarise_seeds": "fastprompt.train.grid",
    "FitResult": "fastprompt.train.fit",
    "Recipe": "fastprompt.train.recipes",
    "default_recipe": "fastprompt.train.recipes",
    "paper_recipe": "fastprompt.train.recipes",
    "evaluate": "fastprompt.train.evaluate",
    "fit_linear_probe": "fastprompt.train.probe",
    "load_data": "fastprompt.data",
    "list_protocols": "fastprompt.protocols",
    "load_protocol": "fastprompt.protocols",
    "Int8Weights": "fastprompt.int8.weights",
    "Engine": "fastprompt.engine.engine",
    "explain": "fastprompt.engine.explain",
    "use_backend": "fastprompt.kernels.dispatch",
    "DirectoryInUse": "fastprompt.locks",
}

_PACKAGES = ("analysis",)
"""Packages whose functions are public under the package's name, as `fastprompt.analysis.collect`."""

__all__ = ["__version__", *sorted([*_PUBLIC, *_PACKAGES])]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _PACKAGES:
        value = importlib.import_module(f"fastprompt.{name}")
    elif name[0].isupper() and name in (methods := importlib.import_module("fastprompt.generators")).__dict__:
        value = getattr(methods, name)  # a method's classes
    else:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
