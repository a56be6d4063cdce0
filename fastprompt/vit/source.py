"""Record how a backbone was loaded, so that whoever receives an adapter for it can load it again."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprompt.arguments import ArgumentError, ArgumentTypeError

_MEAN_STD = {"mean", "std"}
_TIMM = _MEAN_STD | {"num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"}
_OPTIONS = {
    "load_backbone": _MEAN_STD,
    "timm": _TIMM,
    "checkpoint": _TIMM | {"arch", "checkpoint_key"},
    "torchvision": _MEAN_STD,
    "open_clip": _MEAN_STD | {"force_quick_gelu"},
    "transformers": _MEAN_STD | {"revision"},
}
"""The options recorded for each loader: those that change the backbone. Adapters may come from untrusted sources, so no
recorded option may run code or choose where files are written."""

LARGEST_SIDE = 1 << 13
"""In pixels. It keeps a recorded call from requesting a position embedding of gigabytes."""


_LOCAL = re.compile(r"(local-dir:|checkpoint:[^:]*:)(.+)", re.DOTALL)


def split_local(name: str) -> tuple[str, str] | None:
    """Split a backbone name into ("local-dir:" or "checkpoint:ARCH:", path); None if it contains no path."""
    found = _LOCAL.fullmatch(name)
    return None if found is None else (found[1], found[2])


@dataclasses.dataclass(frozen=True)
class BackboneSource:
    """A call that loads a backbone with its published weights; `load_source` makes the call.

    Attributes:
        loader: "load_backbone", or the suffix of a `FrozenViT.from_...` method: "timm", "torchvision", "open_clip",
            "transformers" or "checkpoint".
        name: the model's name, or the path of a checkpoint.
        pretrained: which weights to load; True: the default ones; None: those implied by the name.
        image_size: pixels or (height, width), as given; None: the model's own.
        options: the remaining arguments of the call.

    Raises:
        TypeError, ValueError: a value is invalid, or an option may not be recorded.
    """

    loader: str
    name: str
    pretrained: bool | str | None = True
    image_size: int | tuple[int, int] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loader not in _OPTIONS:
            raise ArgumentError("loader", f"must be one of {tuple(_OPTIONS)}, got {self.loader!r}")
        if not isinstance(self.name, str) or not isinstance(self.pretrained, (bool, str, type(None))):
            raise TypeError(f"name and pretrained must be texts, got {self.name!r} and {self.pretrained!r}")
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if not _is_size(self.image_size):
            raise ArgumentError(
                "image_size", f"must be 1 to {LARGEST_SIDE} pixels a side, or None, got {self.image_size!r}"
            )
        if not isinstance(self.options, Mapping):
            raise ArgumentTypeError("options", f"must be a mapping, got {self.options!r}")
        unknown = sorted(set(self.options) - _OPTIONS[self.loader])
        if unknown:
            raise ValueError(f"options of {self.loader} must be of {sorted(_OPTIONS[self.loader])}, got {unknown}")

    @classmethod
    def of_call(
        cls,
        loader: str,
        name: Any,
        pretrained: bool | str | None,
        image_size: int | tuple[int, int] | None,
        options: Mapping[str, Any],
    ) -> BackboneSource | None:
        """Return the source of a call; None if it cannot be repeated: random weights, a module, other options.

        The path of a folder or file becomes absolute.
        """
        given = {key: value for key, value in options.items() if value is not None}
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str) or not _is_size(image_size) or not set(given) <= _OPTIONS[loader]:
            return None
        if not pretrained and not (loader == "open_clip" and name.startswith(("hf-hub:", "local-dir:"))):
            return None
        if loader == "checkpoint":
            name = str(Path(name).absolute())
        if isinstance(pretrained, str) and os.path.isfile(pretrained):
            pretrained = str(Path(pretrained).absolute())
        prefix, path = ("local-dir:", name[10:]) if name.startswith("local-dir:") else ("", name)
        if os.path.isdir(path) and (prefix or loader == "transformers"):
            name = f"{prefix}{Path(path).absolute()}"
        given = {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in given.items()}
        return cls(loader, name, pretrained, image_size, given)

    @property
    def is_local(self) -> bool:
        """Whether the call reads a file or folder of this machine."""
        name = self.name.removeprefix("local-dir:")
        weights = isinstance(self.pretrained, str) and os.path.isabs(self.pretrained)
        return self.loader == "checkpoint" or name != self.name or os.path.isabs(name) or weights

    @property
    def backbone_name(self) -> str | None:
        """The name under which `load_backbone` and the command line know its tensors; None if there is none."""
        if self.loader == "checkpoint" and set(self.options) <= _MEAN_STD | {"arch"}:
            return f"checkpoint:{self.options['arch']}:{self.name}"
        known = self.loader in ("load_backbone", "timm") and set(self.options) <= _MEAN_STD
        return self.name if known else None


def _is_size(image_size: Any) -> bool:
    sides = image_size if isinstance(image_size, (tuple, list)) and len(image_size) == 2 else (image_size,)
    return image_size is None or all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides)
