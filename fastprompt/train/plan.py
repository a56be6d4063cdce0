"""What of a run is computed once: what is constant for this method, recipe and data, where it is kept, how large it is.

`fit` follows the same plan (`RunData`): what is described here is what happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, TensorDataset

from fastprompt.train.batches import is_tensor_pair, num_images
from fastprompt.train.constants import Constants, reason_against, size_of
from fastprompt.train.recipes import Recipe

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

MEMORY = "memory"


@dataclass(frozen=True)
class PlanEntry:
    """One thing that a run may compute once.

    Attributes:
        what: what it is, such as "inputs of 12 blocks". of: whose, such as "train, 800 images".
        place: "memory", the folder whose files hold it, or "" if it is not kept.
        bytes: its size, kept or not; 0 if it is not known.
        why: why it is not kept, or where it comes from.
    """

    what: str
    of: str
    place: str
    bytes: int
    why: str = ""

    def __str__(self) -> str:
        size = size_of(self.bytes) if self.bytes else ""
        kept = f"kept in {self.place}" if self.place else "not kept"
        return f"{self.what} ({self.of}): {', '.join(part for part in (kept, size) if part)}" + (
            f"; {self.why}" if self.why else ""
        )


@dataclass(frozen=True)
class Plan:
    """What a run of `fit` computes once.

    Attributes:
        reads: what a step of an epoch after the first reads: "images", "features" of a probe, or "constants" of the
            frozen backbone (`PromptedViT.constants`).
        entries: everything that could be kept, in the order of the computation.
        said: the line that `fit` prints; "" if nothing is worth one.
    """

    reads: str
    entries: tuple[PlanEntry, ...]
    said: str = ""
    constants: Constants | None = field(default=None, repr=False, compare=False)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that are kept, by place."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.place:
                found[entry.place] = found.get(entry.place, 0) + entry.bytes
        return found

    def __str__(self) -> str:
        total = ", ".join(f"{size_of(size)} in {place}" for place, size in self.bytes.items()) or "nothing"
        lines = [f"Epochs after the first read {self.reads}; kept for all of them: {total}."]
        return "\n".join([*lines, *(f"* {entry}" for entry in self.entries)])


def make_plan(
    model: PromptedViT,
    data: Mapping[str, Any],
    recipe: Recipe,
    cached: bool,
    fixed: bool,
    directory: Path | None,
    facts: Mapping[str, Any] | None,
    kind: str,
) -> Plan:
    """Make the plan of a run.

    Args:
        data: "train" and "val".
        cached: whether the head reads features that are computed once.
        fixed: whether all images are the same in every epoch.
        directory: where constants are kept; None: in memory.
        facts: what the images depend on (`data_identities`); needed with a directory.
        kind: of the labels.
    """
    counts = {name: num_images(each, name) for name, each in data.items()}
    of_all = f"train and val, {sum(counts.values()):,} images"
    entries: list[PlanEntry] = []
    reads, said, constants = "images", "", None
    if model.generator is None and not model.full:
        reason = "" if cached else "the images may change from epoch to epoch"
        size = sum(counts.values()) * model.feature_width * 4
        entries.append(PlanEntry("features", of_all, "" if reason else MEMORY, size, reason))
        reads = "images" if reason else "features"
    elif reason := reason_against(model, recipe, fixed):
        entries.append(PlanEntry("results of the frozen blocks", of_all, "", 0, reason))
    else:
        constants = Constants(model, recipe, directory, {} if facts is None else facts, kind)
        what, too_large = "results of the frozen blocks", constants.prepare(data)
        size = sum(counts.values()) * constants.bytes
        if too_large:
            said, constants = f"nothing is kept for all epochs: {too_large}", None
            entries.append(PlanEntry(what, of_all, "", size, too_large))
        else:
            reads, said = "constants", constants.describe(sum(counts.values()))
            for name, count in counts.items():
                entries.append(
                    PlanEntry(
                        constants.what(), f"{name}, {count:,} images", constants.place(name), count * constants.bytes
                    )
                )
    entries += _images(model, data, counts, reads, fixed)
    if model.head is not None and model.head.kind in ("text", "prototypes"):
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.head.buffers())
        entries.append(PlanEntry("class embeddings", "the head", MEMORY, size, "they are part of the adapter"))
    return Plan(reads, tuple(entries), said, constants)


def _images(
    model: PromptedViT, data: Mapping[str, Any], counts: Mapping[str, int], reads: str, fixed: bool
) -> list[PlanEntry]:
    """The entries on patch embeddings and decoded images."""
    vit, entries = model.backbone, []
    rows, columns = vit.spec.grid
    width = vit.width[0] if isinstance(vit.width, tuple) else vit.width
    size = sum(counts.values()) * rows * columns * width * vit.dtype.itemsize
    of_all = f"train and val, {sum(counts.values()):,} images"
    if reads != "images":
        entries.append(PlanEntry("patch embeddings", of_all, "", size, "no step reads them again"))
    elif fixed:
        why = "one product of the step, several times the bytes of the pixels"
        entries.append(PlanEntry("patch embeddings", of_all, "", size, why))
    for name, each in data.items():
        of = f"{name}, {counts[name]:,} images"
        given = each.tensors if isinstance(each, TensorDataset) else each
        if is_tensor_pair(given):
            pixels = given[0]
            entries.append(PlanEntry("decoded images", of, MEMORY, pixels.nbytes, "they were given as tensors"))
        elif isinstance(each, DataLoader):
            entries.append(PlanEntry("decoded images", of, "", 0, "the DataLoader reads them"))
        else:
            entries.append(_of_dataset(each, of, reads))
    return entries


def _of_dataset(data: Any, of: str, reads: str) -> PlanEntry:
    """The entry on the decoded images of a Dataset."""
    kept, size = getattr(data, "kept_bytes", 0), getattr(data, "decoded_bytes", 0)
    if kept:
        workers = "before augmentation, in each process that reads them"
        return PlanEntry("decoded images", of, MEMORY, kept, workers)
    if reads != "images":
        return PlanEntry("decoded images", of, "", size, "they are read once")
    return PlanEntry("decoded images", of, "", size, "the data set reads them in every epoch")
