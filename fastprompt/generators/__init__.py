"""Prompt generators: one file per method, each with a configuration, a generator and its registration.

Files in this folder are discovered: their registered configurations and generators become names of this package and of
`fastprompt`. The imports below are for editors and type checkers.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastprompt.generators.accounting import CostFormula, PromptCost, Sizes, Tally
from fastprompt.generators.base import Geometry, PromptConfig, PromptGenerator
from fastprompt.generators.baselines import FullFineTuneConfig, LinearProbeConfig
from fastprompt.generators.cvpt import CVPT, CVPTConfig
from fastprompt.generators.free import FreePrompts, FreePromptsConfig
from fastprompt.generators.pgn import PGN, PGNConfig
from fastprompt.generators.pixel import PixelPrompt, PixelPromptConfig
from fastprompt.generators.registry import (
    Method,
    Published,
    Variant,
    build_generator,
    config_from_dict,
    get_method,
    list_methods,
    load_plugin,
    method_of,
    published_recipes,
    register_method,
    registered_classes,
)
from fastprompt.generators.rgb_pgn import RGBPGN, RGBPGNConfig
from fastprompt.generators.v2apt import V2APT, V2APTConfig
from fastprompt.generators.vapt import VAPT, VAPTConfig
from fastprompt.generators.vpt import VPT, VPTConfig
from fastprompt.generators.vqt import VQT, VQTConfig

__all__ = [
    "CVPT",
    "PGN",
    "RGBPGN",
    "V2APT",
    "VAPT",
    "VPT",
    "VQT",
    "CVPTConfig",
    "CostFormula",
    "FreePrompts",
    "FreePromptsConfig",
    "FullFineTuneConfig",
    "Geometry",
    "LinearProbeConfig",
    "Method",
    "PGNConfig",
    "PixelPrompt",
    "PixelPromptConfig",
    "PromptConfig",
    "PromptCost",
    "PromptGenerator",
    "Published",
    "RGBPGNConfig",
    "Sizes",
    "Tally",
    "V2APTConfig",
    "VAPTConfig",
    "VPTConfig",
    "VQTConfig",
    "Variant",
    "build_generator",
    "config_from_dict",
    "get_method",
    "list_methods",
    "load_plugin",
    "method_of",
    "published_recipes",
    "register_method",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
globals().update(registered_classes(__name__))
