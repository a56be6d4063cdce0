"""Prompt generators: one file per method, each with a configuration, a generator and its registration."""

from __future__ import annotations

from fastprompt.generators.accounting import CostFormula, PromptCost, Sizes, Tally
from fastprompt.generators.base import Geometry, PromptConfig, PromptGenerator
from fastprompt.generators.baselines import FullFineTuneConfig, LinearProbeConfig
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
)
from fastprompt.generators.rgb_pgn import RGBPGN, RGBPGNConfig
from fastprompt.generators.v2apt import V2APT, V2APTConfig
from fastprompt.generators.vapt import VAPT, VAPTConfig
from fastprompt.generators.vpt import VPT, VPTConfig

__all__ = [
    "PGN",
    "RGBPGN",
    "V2APT",
    "VAPT",
    "VPT",
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
