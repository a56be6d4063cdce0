"""`RunSettings`, the settings of one run, stored in `run.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunSettings:
    """The settings of one run: method, backbone, data, head and changes to the method's default recipe.

    `options` are the method's configuration options (`fp.PGNConfig` and so on). `recipe` holds only the fields of
    `fastprompt.train.recipes.Recipe` that differ from `default_recipe`. An `image_size` of None is the backbone's own;
    `resize` says how image files are resized to it. With `train_backbone`, the backbone is trained along with the
    method's prompts. `mean` and `std` normalise pixels in place of the backbone's own.

    `more_data` are further data sets, which are then domains of one, with `labels` and `sampling` as in
    `fastprompt.load_data`.

    `data` may be a task of a protocol, as "vtab1k:dtd", below `data_root`. The protocol then fixes splits and resizing;
    `final` and `per_class` are as in `Protocol.load`. A final run keeps the last epoch, because its validation images
    may be trained on, and the L-BFGS probe takes `probe_C` instead of choosing it.
    """

    method: str
    data: str
    backbone: str = "clip-vit-b16"
    options: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    data_root: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    data_seed: int = 0
    augment: str = "none"
    resize: str = "crop"
    on_bad: str = "error"
    intensity_range: tuple[float, float] | None = None
    max_decoded_bytes: int | None = None
    head: str = "linear"
    class_embeddings: str | None = None
    readout: str | None = None
    train_backbone: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    final: bool = False
    per_class: int | None = None
    probe_C: float | None = None
    more_data: tuple[str, ...] = ()
    labels: str | None = None
    sampling: str | None = None

    def __post_init__(self) -> None:
        from fastprompt.generators import get_method

        get_method(self.method)
        for name in ("intensity_range", "mean", "std", "more_data"):
            if isinstance(value := getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(value))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """Create settings from a dictionary; raise `ValueError` for an unknown key or a missing method or data."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"run.json must have known keys, got {key!r}; known are {', '.join(sorted(known))}")
        for key in ("method", "data"):
            if key not in values:
                raise ValueError(f"run.json must have the key {key!r}")
        return cls(**values)
