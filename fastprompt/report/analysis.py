"""Sections of the report that need the trained adapter: what a run's generator does on its validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators.v2apt import V2APT
from fastprompt.report import plots
from fastprompt.report.html import figure, table

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

ANALYSES = ("information", "latent", "similarity", "domains")
TRAVERSED = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
SHOWN_IMAGES, SHOWN_PROMPTS, SHOWN_UNITS = 4, 5, 6


def analyse(run: Path, names: Sequence[str], max_images: int = 500) -> list[dict[str, Any]]:
    """Analyse a run on its validation images, and return the sections of its part of the page.

    Args:
        run: directory of a finished run.
        names: any of `ANALYSES`. "information": mutual information with the labels; "latent": KL and traversals of
            V²APT's units; "similarity": maps of prompts and patches; "domains": whether the generator tells the data
            sets of a run of several apart. Those that a run does not have are left out.
        max_images: number of validation images to use at most, the first ones.

    Raises:
        ValueError: a name is unknown. FileNotFoundError: the directory holds no run with its adapter.
    """
    from torch.utils.data import Subset

    from fastprompt.model import PromptedViT
    from fastprompt.runs.directory import adapter_dir, read_settings
    from fastprompt.runs.execute import backbone_at, load_run_data, square_size

    for name in names:
        if name not in ANALYSES:
            raise ArgumentError("analysis", f"must be of {', '.join(ANALYSES)}, got {name!r}")
    if max_images < 1:
        raise ArgumentError("max_images", f"must be at least 1, got {max_images}")
    if not isinstance(run, Path):
        raise ArgumentTypeError("runs", "must be directories, of which the adapters are loaded, to be analysed")
    settings = read_settings(run)
    directory = adapter_dir(run)
    if settings is None:
        raise ArgumentError("runs", f"must be directories of runs to be analysed; {run} has no run.json")
    backbone = backbone_at(settings.backbone, settings.image_size)
    model = PromptedViT.from_pretrained(backbone, directory)
    data: Any = load_run_data(dataclasses.replace(settings, augment="none"), square_size(backbone)).val
    if "domains" in names and model.domains is not None:
        domains = {name: data.of(name) for name in model.domains.names}
    else:
        domains = {}
    data = Subset(data, range(min(max_images, len(data))))
    made: dict[str, Callable[[PromptedViT, Any], dict[str, Any] | None]]
    made = {"information": _information, "latent": _latent, "similarity": _similarity}
    made["domains"] = lambda model, data: _domains(model, domains, max_images) if domains else None
    return [section for name in names if (section := made[name](model, data)) is not None]


def _information(model: PromptedViT, data: Any) -> dict[str, Any]:
    from fastprompt.analysis import information

    found = information(model, data)
    rows = [
        [source, f"{each.corrected:.3f} ± {each.std:.3f}", f"{each.raw:.3f}", f"{each.bias:.3f}"]
        for source, each in found.items()
    ]
    one = next(iter(found.values()))
    said = (
        f"Mutual information of k-means clusters ({one.clusters} of {len(data)} validation images) with the labels, in "
        f"nats; the labels' entropy is {one.entropy:.3f}. The bias is the mean under permuted labels, ± their standard "
        "deviation. Compare the rows with each other: a clustering keeps only part of the information."
    )
    return {
        "title": "Mutual information with the labels",
        "figures": [],
        "table": table(said, ["Features", "Corrected", "Raw", "Bias"], rows),
    }


def _latent(model: PromptedViT, data: Any) -> dict[str, Any] | None:
    import torch

    from fastprompt.analysis import latent_use, traverse

    if not isinstance(model.generator, V2APT):
        return None
    use = latent_use(model, data)
    order = use.kl.argsort(descending=True).tolist()
    images = torch.stack([data[i][0] for i in range(min(16, len(data)))])
    figures = [
        figure(
            plots.latent_kl([float(use.kl[i]) for i in order], order),
            "Bar chart of the KL of each latent unit",
            f"KL of each latent unit to its prior over {len(data)} validation images, {use.total:.2f} nats in all; "
            f"{use.active} of {len(order)} units are active (above 0.01 nats).",
        )
    ]
    if model.head is not None:
        curves = {}
        for unit in order[:SHOWN_UNITS]:
            probabilities = traverse(model, images, unit, TRAVERSED)  # (values, images, classes)
            at_zero = probabilities[TRAVERSED.index(0.0)].argmax(-1)
            of_class = probabilities[:, torch.arange(len(images)), at_zero]
            curves[f"unit {unit}"] = of_class.mean(1).tolist()
        figures.append(
            figure(
                plots.traversals(TRAVERSED, curves),
                "Line plot of class probability along the units with the highest KL",
                f"Probability of the class that is predicted with the unit at 0, while one unit moves and the others "
                f"keep their mean; average of {len(images)} images.",
            )
        )
    return {"title": "Latent units", "figures": figures, "table": None}


def _similarity(model: PromptedViT, data: Any) -> dict[str, Any] | None:
    import torch

    from fastprompt.analysis import similarity_maps

    generator = model.generator
    if generator is None or generator.num_prompts == 0 or model.backbone.staged:
        return None
    images = torch.stack([data[i][0] for i in range(min(SHOWN_IMAGES, len(data)))])
    maps = similarity_maps(model, images)
    block = max(maps)
    said = (
        f"Cosine similarity of the first prompts with the patches that enter block {block}, for {len(images)} "
        "validation images."
    )
    drawn = plots.maps_beside_images(images, maps[block][:, :SHOWN_PROMPTS])
    return {
        "title": "Prompts and patches",
        "figures": [figure(drawn, "Images beside maps of their patches' similarity with prompts", said)],
        "table": None,
    }


def _domains(model: PromptedViT, data: dict[str, Any], max_images: int) -> dict[str, Any] | None:
    from fastprompt.analysis import discover_domains

    generator = model.generator
    if generator is None or generator.num_prompts == 0 or generator.known_at == "static":
        return None
    found = discover_domains(model, data, max_images=max_images)
    rows = [
        [source, f"{100 * each.nearest:.1f}%", f"{100 * each.linear:.1f}%"] for source, each in found.read_out.items()
    ]
    used = ", ".join(f"{name} {count}" for name, count in found.tokens_used.items())
    chance = next(iter(found.read_out.values())).chance
    said = (
        f"How well vectors name the domain of {len(found.labels)} validation images; chance is {100 * chance:.1f}%."
        + (f" Tokens that carry nine tenths of a domain's weight: {used}." if used else "")
    )
    drawn = plots.scatter(found.embedding, found.labels, found.domains)
    caption = "t-SNE of the generator's outputs, coloured by domain; nobody named the domains to the generator."
    return {
        "title": "Domains",
        "figures": [figure(drawn, f"Scatter plot of the generator's outputs for {', '.join(found.domains)}", caption)],
        "table": table(said, ["Vectors", "Nearest other image", "Linear read-out"], rows),
    }
