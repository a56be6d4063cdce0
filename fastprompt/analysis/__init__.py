"""Analysis of trained generators: the papers' figures as functions, public as `fastprompt.analysis`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprompt.analysis.corruptions import (
        Robustness as Robustness,
        corrupt as corrupt,
        robustness as robustness,
        robustness_difference as robustness_difference,
    )
    from fastprompt.analysis.domains import (
        Discovery as Discovery,
        discover_domains as discover_domains,
        nearest_domain as nearest_domain,
    )
    from fastprompt.analysis.features import collect as collect
    from fastprompt.analysis.kmeans import (
        Information as Information,
        information as information,
        mutual_information as mutual_information,
    )
    from fastprompt.analysis.latent import (
        LatentUse as LatentUse,
        latent_use as latent_use,
        most_telling_units as most_telling_units,
        traverse as traverse,
    )
    from fastprompt.analysis.library import library_usage as library_usage
    from fastprompt.analysis.rank import effective_rank as effective_rank
    from fastprompt.analysis.similarity import similarity_maps as similarity_maps

_MODULES = {
    "domains": ("Discovery", "discover_domains", "nearest_domain"),
    "features": ("collect",),
    "kmeans": ("Information", "information", "mutual_information"),
    "latent": ("LatentUse", "latent_use", "most_telling_units", "traverse"),
    "library": ("library_usage",),
    "rank": ("effective_rank",),
    "corruptions": ("Robustness", "corrupt", "robustness", "robustness_difference"),
    "similarity": ("similarity_maps",),
}
_WHERE = {name: f"fastprompt.analysis.{module}" for module, names in _MODULES.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
