"""fastprompt: instance-conditioned visual prompts on frozen vision transformers.

Public names are resolved on first use, so importing one op does not import timm.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "FrozenViT": "fastprompt.vit",
    "PromptedViT": "fastprompt.model",
    "load_official": "fastprompt.official",
    "load_backbone": "fastprompt.vit.assets",
    "PromptGenerator": "fastprompt.generators",
    "PGN": "fastprompt.generators",
    "PGNConfig": "fastprompt.generators",
    "V2APT": "fastprompt.generators",
    "V2APTConfig": "fastprompt.generators",
    "VAPT": "fastprompt.generators",
    "VAPTConfig": "fastprompt.generators",
    "VPT": "fastprompt.generators",
    "VPTConfig": "fastprompt.generators",
    "FreePrompts": "fastprompt.generators",
    "FreePromptsConfig": "fastprompt.generators",
    "PixelPrompt": "fastprompt.generators",
    "PixelPromptConfig": "fastprompt.generators",
    "LinearProbeConfig": "fastprompt.generators",
    "FullFineTuneConfig": "fastprompt.generators",
    "config_from_dict": "fastprompt.generators",
    "LinearHead": "fastprompt.heads",
    "TextHead": "fastprompt.heads",
    "LabelMapHead": "fastprompt.heads",
    "PrototypeHead": "fastprompt.heads",
    "encode_class_texts": "fastprompt.heads",
    "fit": "fastprompt.train.fit",
    "FitResult": "fastprompt.train.fit",
    "Recipe": "fastprompt.train.recipes",
    "default_recipe": "fastprompt.train.recipes",
    "evaluate": "fastprompt.train.evaluate",
    "fit_linear_probe": "fastprompt.train.probe",
    "load_data": "fastprompt.data",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
