"""Prompt generators, one file per kind, and the registry that maps a configuration to its generator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastprompt.generators.base import Geometry, PromptConfig, PromptGenerator
from fastprompt.generators.baselines import FullFineTuneConfig, LinearProbeConfig
from fastprompt.generators.free import FreePrompts, FreePromptsConfig
from fastprompt.generators.pgn import PGN, PGNConfig
from fastprompt.generators.pixel import PixelPrompt, PixelPromptConfig
from fastprompt.generators.rgb_pgn import RGBPGN, RGBPGNConfig
from fastprompt.generators.v2apt import V2APT, V2APTConfig
from fastprompt.generators.vapt import VAPT, VAPTConfig
from fastprompt.generators.vpt import VPT, VPTConfig

if TYPE_CHECKING:
    from fastprompt.vit import FrozenViT

__all__ = [
    "CONFIGS",
    "PGN",
    "RGBPGN",
    "V2APT",
    "VAPT",
    "VPT",
    "FreePrompts",
    "FreePromptsConfig",
    "FullFineTuneConfig",
    "Geometry",
    "LinearProbeConfig",
    "PGNConfig",
    "PixelPrompt",
    "PixelPromptConfig",
    "PromptConfig",
    "PromptGenerator",
    "RGBPGNConfig",
    "V2APTConfig",
    "VAPTConfig",
    "VPTConfig",
    "build_generator",
    "config_from_dict",
]

_GENERATORS: dict[type[PromptConfig], type[PromptGenerator] | None] = {
    PGNConfig: PGN,
    RGBPGNConfig: RGBPGN,
    V2APTConfig: V2APT,
    VAPTConfig: VAPT,
    VPTConfig: VPT,
    FreePromptsConfig: FreePrompts,
    PixelPromptConfig: PixelPrompt,
    LinearProbeConfig: None,
    FullFineTuneConfig: None,
}
CONFIGS: dict[str, type[PromptConfig]] = {config.kind: config for config in _GENERATORS}


def build_generator(config: PromptConfig, geometry: Geometry | FrozenViT) -> PromptGenerator | None:
    """The generator of `config` for a backbone or its geometry; None for the probes and full fine-tuning."""
    if type(config) not in _GENERATORS:
        raise TypeError(
            f"config must be one of {', '.join(c.__name__ for c in _GENERATORS)}, got {type(config).__name__}"
        )
    generator = _GENERATORS[type(config)]
    return None if generator is None else generator(config, geometry)


def config_from_dict(values: Mapping[str, Any]) -> PromptConfig:
    """The inverse of `PromptConfig.to_dict`.

    Raises:
        TypeError: `values` is no mapping.
        ValueError: `kind` is unknown or missing, or a key is not an option of that kind (the key is named).
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a mapping of options, got {type(values).__name__}")
    values = dict(values)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(f"kind must be one of {sorted(CONFIGS)}, got {kind!r}")
    return CONFIGS[kind].from_dict(values)
