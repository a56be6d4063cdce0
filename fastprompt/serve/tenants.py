"""One engine for all clients: build it from an operator's settings, and run it on many clients' pictures at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastprompt.adapters import Preprocessing, read_adapter, source_of
from fastprompt.arguments import ArgumentError, NotFiniteError
from fastprompt.domains import Domains
from fastprompt.engine.backends import BACKENDS
from fastprompt.engine.engine import KEPT, Engine
from fastprompt.generators import load_plugin
from fastprompt.model import PromptedViT
from fastprompt.runs.directory import adapter_dir, read_settings
from fastprompt.runs.execute import backbone_at
from fastprompt.serve.protocol import BASE, Catalogue, Refused, Work
from fastprompt.vit.source import split_local
from fastprompt.vit.weights import is_finite

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "clip-vit-b16"
MOST_FAST = KEPT // 2 - 1
"""Maximum of `HostSettings.fast_adapters`: an engine keeps `KEPT` functions, two for each adapter and the backbone."""
DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": "int8"}


@dataclass(frozen=True)
class HostSettings:
    """What to serve, and how.

    Attributes:
        backbone: a name that `fp.load_backbone` knows; None: that of the first adapter's run, else "clip-vit-b16".
            Clients see a "local-dir:" or "checkpoint:" backbone under the bare name of its folder or file.
        image_size: side in pixels; None: that of the first adapter, else the backbone's own.
        any_size: compute pictures of any whole number of patches at their own size, with resampled position
            embeddings. Clients whose prompts are rows below the image (placement "extend") need it.
        adapters: directories written by `save_pretrained` or `fastprompt adapt`, or repositories of the Hub as
            "owner/name", keyed by the name to serve them under.
        dtype: "auto" (bfloat16 if the hardware multiplies it), "bfloat16", "float32" or "int8".
        batch_size: maximum number of images that the engine computes at once.
        threads: CPU threads; None: torch's choice.
        device: "cpu" or "cuda".
        plugins: modules that register the adapters' methods: their names, or paths of `.py` files.
        backend: runs batches of one image or of `batch_size` images that belong entirely to one adapter or to the
            backbone. "auto": the fastest here, except "compile", which is slow to build.
        fast_adapters: number of adapters that use that backend, the first ones given. Each takes two functions, which
            are built before the host is ready; those of "compile" and "openvino" each hold a copy of the weights. All
            other batches run in "eager".
        int8: file of the weights for dtype "int8"; None: those in the user cache.
    """

    backbone: str | None = None
    image_size: int | None = None
    any_size: bool = False
    adapters: Mapping[str, Path] = field(default_factory=dict)
    dtype: str = "auto"
    batch_size: int = 8
    threads: int | None = None
    device: str = "cpu"
    plugins: Sequence[str] = ()
    backend: str = "auto"
    fast_adapters: int = 1
    int8: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ArgumentError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.int8 is not None and self.dtype != "int8":
            raise ArgumentError("int8", f"must be given with dtype 'int8' only, got dtype {self.dtype!r}")
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(name, f"must be a number from 1, got {value}")
        if not 0 <= self.fast_adapters <= MOST_FAST:
            raise ArgumentError("fast_adapters", f"must be a number from 0 to {MOST_FAST}, got {self.fast_adapters}")


def load(settings: HostSettings) -> tuple[Engine, Catalogue]:
    """Load the engine with all its adapters; return it and the catalogue of what it serves.

    Raises:
        ValueError, FileNotFoundError: the backbone is unknown, or an adapter is damaged, belongs to another backbone,
            has no head, or has a name that is taken. The error names the adapter.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    for module in settings.plugins:
        load_plugin(module)
    directories = {name: adapter_dir(path) for name, path in settings.adapters.items()}
    backbone_name, image_size = settings.backbone, settings.image_size
    if directories:
        first = next(iter(directories.values()))
        run, (stored, _) = read_settings(first), read_adapter(first)
        backbone_name = backbone_name or (None if run is None else run.backbone)
        if backbone_name is None and (source := source_of(stored)) is not None:
            backbone_name = source.backbone_name
        image_size = image_size or int(stored["backbone"]["image_size"][0])
    backbone_name = backbone_name or DEFAULT_BACKBONE
    backbone = backbone_at(backbone_name, image_size)
    if backbone.channels != 3:
        raise ArgumentError(
            "backbone", f"must read RGB images to be served, this one reads {backbone.channels} channels"
        )
    if settings.any_size:
        backbone = backbone.any_size()
    backbone.to(settings.device)
    if (local := split_local(backbone_name)) is not None:  # do not reveal its location
        backbone_name = Path(local[1]).absolute().name or "backbone"
    quick = [name for name in BACKENDS if name != "compile"]
    engine = Engine(
        backbone, (1, settings.batch_size), DTYPES[settings.dtype], settings.backend, quick, int8=settings.int8
    )
    class_names: dict[str, Sequence[str]] = {}
    preprocessing: dict[str, Preprocessing] = {}
    in_pixels = []
    domains: dict[str, Domains] = {}
    for name, directory in directories.items():
        if name == backbone_name:
            raise ValueError(f"adapter {name!r}: is the name of the backbone")
        try:
            model = PromptedViT.from_pretrained(backbone, directory)
            if model.head is None:
                raise ValueError(f"the adapter in {directory} has no head, so it has no classes to answer with")
            engine.add_adapter(name, model)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        class_names[name] = list(model.class_names or map(str, range(int(model.num_classes or 0))))
        preprocessing[name] = model.preprocessing or Preprocessing()
        if model.domains is not None:
            domains[name] = model.domains
        if model.generator is not None and model.generator.changes_images:
            in_pixels.append(name)
    fixed = [name for name in directories if backbone.spec.dynamic_size and not _takes_other_sizes(engine, name)]
    return engine, Catalogue(
        backbone_name,
        backbone.fingerprint,
        backbone.feature_width,
        engine.precision,
        backbone.spec,
        class_names,
        fixed,
        int(time.time()),
        preprocessing,
        in_pixels,
        domains,
    )


def warm_up(engine: Engine, settings: HostSettings, catalogue: Catalogue) -> list[str]:
    """Prepare backends, and run every adapter once.

    Returns:
        One line for the backbone and one per fast adapter: the backend for batches that belong entirely to it.
    """
    fast = list(catalogue.adapters)[: settings.fast_adapters]
    engine.warm_up(torch.uint8, (BASE, *fast))
    picture = np.zeros((3, *catalogue.spec.image_size), np.uint8)
    for name in (BASE, *catalogue.adapters):
        answers(engine, [Work([picture], name)])
    return [
        f"{catalogue.name if name == BASE else name}: "
        + ", ".join(f"{known.chosen} for batches of {size}" for (size, *_), known in engine.measured_of(name).items())
        for name in (BASE, *fast)
    ]


def _takes_other_sizes(engine: Engine, name: str) -> bool:
    """Whether an adapter accepts an image one patch row taller than the backbone's; some are built for one grid."""
    backbone = engine.model.backbone
    height, width = backbone.image_size
    try:
        engine(
            torch.zeros(1, 3, height + backbone.spec.patch_size, width, dtype=torch.uint8, device=backbone.device),
            adapter_names=[name],
        )
    except ValueError:
        return False
    return True


def answers(engine: Engine, works: Sequence[Work]) -> list[list[np.ndarray] | Refused]:
    """Answer each request: float32 (C,) or (D,) for each of its pictures, or why it was refused.

    Pictures of the same size share one engine call across requests. If that call fails, its requests are computed one
    by one, so that one request cannot make another fail.
    """
    alike: dict[Any, list[tuple[int, int]]] = {}
    for i, work in enumerate(works):
        for j, picture in enumerate(work.pictures):
            alike.setdefault(picture.shape, []).append((i, j))
    found: dict[tuple[int, int], np.ndarray | Refused] = {}
    for places in alike.values():
        found |= _outputs(engine, works, places)
    given: list[list[np.ndarray] | Refused] = []
    for i, work in enumerate(works):
        outputs: list[np.ndarray] = []
        refused = None
        for j in range(len(work.pictures)):
            output = found[i, j]
            if isinstance(output, Refused):
                refused = output
            else:
                outputs.append(output)
        given.append(refused or outputs)
    return given


def _outputs(
    engine: Engine, works: Sequence[Work], places: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], np.ndarray | Refused]:
    """Compute pictures of the same kind, keyed by request and picture. Exception texts are only for the operator."""
    try:
        pictures = np.stack([works[i].pictures[j] for i, j in places])  # (B, 3, H, W)
        images = torch.from_numpy(pictures).to(engine.model.backbone.device)
        outputs = engine(images, adapter_names=[works[i].adapter for i, _ in places])
        on_host = [output.float().cpu() for output in outputs]
        if not all(map(is_finite, on_host)):  # a call on a GPU does not check its outputs
            raise NotFiniteError("pictures", "must give finite outputs, got NaN or infinite ones")
        return dict(zip(places, (output.numpy() for output in on_host), strict=True))
    except Exception as error:
        requests = sorted({i for i, _ in places})
        if len(requests) > 1:
            found: dict[tuple[int, int], np.ndarray | Refused] = {}
            for i in requests:
                found |= _outputs(engine, works, [place for place in places if place[0] == i])
            return found
        logger.exception("a request failed")
        refused = Refused(500, "internal_error", "the host failed to compute this request")
        if isinstance(error, ValueError) and not isinstance(error, NotFiniteError):
            i, j = places[0]
            height, width = works[i].pictures[j].shape[1:]
            refused = Refused(422, "refused_by_model", f"the model takes no picture of {height} x {width} pixels")
        return dict.fromkeys(places, refused)
