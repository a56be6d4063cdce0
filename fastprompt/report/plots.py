"""Figures of the report, returned as the bytes of PNG files with a white background; they need no display."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fastprompt.arguments import ArgumentError
from fastprompt.extras import needed
from fastprompt.report.ranks import Ranking

with needed("report", "the report"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's palette without yellow; distinguishable with the common colour-vision deficiencies.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of `width` x `height` inches."""
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def literal(text: str) -> str:
    """Escape `text` so that Matplotlib draws it literally and does not parse text between dollar signs as a formula."""
    drawn = "".join(letter if letter.isprintable() else "\ufffd" for letter in text).replace("$", r"\$")
    return f" {drawn}" if drawn.startswith("_") else drawn  # legends omit labels that begin with an underscore


def to_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The page's tables also hold the names that the font cannot draw.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(axes: Axes) -> None:
    """Draw a light grid and remove the frame at the top and right."""
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Plot loss and accuracy by epoch, with one colour per run and one line style each for training and validation.

    `histories`: run title -> epoch records with `epoch` and any of `train_loss`, `val_loss`, `train_accuracy`,
    `val_accuracy`.
    """
    figure = new_figure(10, 3.9)
    loss, accuracy = figure.subplots(1, 2)
    for number, (title, history) in enumerate(histories.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        epochs = [entry["epoch"] for entry in history]
        for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
            for split, style, shown in (("train", "--", None), ("val", "-", literal(title))):
                values = [entry.get(f"{split}_{name}") for entry in history]
                if not any(value is not None for value in values):
                    continue
                pairs = [(e, v) for e, v in zip(epochs, values, strict=True) if v is not None]
                axes.plot(
                    *zip(*pairs, strict=True),
                    style,
                    color=colour,
                    marker=marker if split == "val" else None,
                    markersize=4,
                    linewidth=1.6 if split == "val" else 1.1,
                    label=shown,
                )
    for axes, name in ((loss, "Cross-entropy"), (accuracy, "Accuracy")):
        plain(axes)
        axes.set_xlabel("Epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss.set_ylim(bottom=0)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    loss.plot([], [], "-", color="#555555", label="validation")
    loss.plot([], [], "--", color="#555555", linewidth=1.1, label="training")
    loss.legend(fontsize=8, frameon=False)
    return to_png(figure)


def confusion_matrix(confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str = "") -> bytes:
    """Plot counts by true class (rows) and predicted class (columns), coloured by their share of the row.

    Class names are shown for up to 40 classes, counts for up to 20.

    Raises:
        ValueError: `confusion` is not square with a row for each class.
    """
    with needed("report", "the report"):
        from sklearn.metrics import ConfusionMatrixDisplay

    counts = np.asarray(confusion, dtype=object)
    size = len(class_names)
    if counts.shape != (size, size):
        raise ArgumentError("confusion", f"must have shape {(size, size)} for {size} classes, got {counts.shape}")
    counts = counts.astype(np.int64)
    side = min(12.0, 2.4 + 0.38 * size)
    figure = new_figure(side + 0.9, side)
    axes = figure.subplots()
    names = [literal(name if len(name) <= 16 else name[:15] + "…") for name in class_names]
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(
        include_values=size <= 20,
        cmap="Blues",
        xticks_rotation="vertical",
        ax=axes,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        text_kw={"fontsize": 7},
    )
    if display.text_ is not None:
        for text, count, share in zip(display.text_.flat, counts.flat, shares.flat, strict=True):
            text.set(text=str(count) if count else "", color="white" if share > 0.55 else "black")
    if size > 40:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(display.im_, ax=axes, shrink=0.8, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("Share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    axes.set_xlabel("Predicted class", fontsize=9)
    axes.set_ylabel("True class", fontsize=9)
    axes.set_title(literal(title), fontsize=10)
    axes.tick_params(length=0, labelsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return to_png(figure)


def library_tokens(usage: Mapping[str, Any], title: str = "", top: int = 24) -> bytes:
    """Plot the most-used tokens of a PGN's library and the distribution of use over the whole library.

    `usage` is the result of `fastprompt.analysis.library.library_usage`: `mean_weight` (M,), `effective_tokens`,
    `effective_library`.
    """
    weights = list(usage["mean_weight"])
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    figure = new_figure(10, 3.6)
    bars, spread = figure.subplots(1, 2, width_ratios=(3, 1))
    shown = order[:top]
    bars.bar(range(len(shown)), [weights[i] for i in shown], color=COLOURS[0], width=0.75)
    bars.set_xticks(range(len(shown)), [str(i) for i in shown], fontsize=7, rotation=90 if len(shown) > 16 else 0)
    bars.axhline(
        1 / len(weights),
        color=COLOURS[1],
        linestyle="--",
        linewidth=1.2,
        label=f"equal use of all {len(weights)}",
    )
    bars.set_xlabel("Library token")
    bars.set_ylabel("Mean mixture weight")
    bars.set_title(literal(title), fontsize=10)
    bars.legend(fontsize=8, frameon=False)
    total, cumulative = 0.0, [0.0]
    for i in order:
        total += weights[i]
        cumulative.append(total)
    spread.plot(range(len(cumulative)), cumulative, color=COLOURS[0])
    spread.plot([0, len(weights)], [0, 1], color=COLOURS[1], linestyle="--", linewidth=1)
    spread.set_xlabel("Most-used tokens")
    spread.set_ylabel("Share of all weight")
    spread.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    spread.set_title(
        f"{usage['effective_tokens']:.1f} tokens per prompt,\n{usage['effective_library']:.1f} in total",
        fontsize=9,
    )
    for axes in (bars, spread):
        plain(axes)
    bars.grid(False, axis="x")
    return to_png(figure)


def accuracy_against_parameters(points: Sequence[tuple[str, int, float, float, float, str]]) -> bytes:
    """Plot accuracy over the number of trained parameters (logarithmic).

    `points`: (title, parameters, accuracy, lower and upper end of its interval, "test" or "validation").
    """
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    for number, (title, parameters, accuracy, low, high, _) in enumerate(points):
        axes.errorbar(
            parameters,
            accuracy,
            yerr=[[accuracy - low], [high - accuracy]],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=8,
            linestyle="none",
            elinewidth=1,
            capsize=3,
            label=literal(title),
        )
    axes.set_xscale("log")
    axes.set_xlabel("Trained parameters")
    splits = {point[-1] for point in points}
    axes.set_ylabel(f"{' or '.join(sorted(splits)).capitalize()} accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.margins(0.12)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return to_png(figure)


def latent_units(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Plot V²APT's KL and active latent units by epoch.

    If both are 0, the posterior has collapsed: the prompts no longer depend on the image.
    """
    figure = new_figure(10, 3)
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(
        panels, ("kl", "active_units"), ("KL to the prior (nats)", "Active latent units"), strict=True
    ):
        for number, (title, history) in enumerate(histories.items()):
            pairs = [(entry["epoch"], entry[key]) for entry in history if entry.get(key) is not None]
            if pairs:
                axes.plot(
                    *zip(*pairs, strict=True),
                    color=COLOURS[number % len(COLOURS)],
                    marker="o",
                    markersize=4,
                    label=literal(title),
                )
        axes.set_xlabel("Epoch")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes)
    panels[0].legend(fontsize=8, frameon=False)
    return to_png(figure)


def differences(rows: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, str], label: str) -> bytes:
    """Plot differences with intervals, one line for each task and a thick one for the mean, in percentage points.

    `rows`: title -> "mean" and "tasks" (name -> estimate), estimates with "mean", "low" and "high" (None: unknown).
    """
    lines = ["mean", *tasks]
    figure = new_figure(8, 1.2 + 0.26 * len(lines) * max(1, len(rows) / 2))
    axes = figure.subplots()
    step = 0.8 / len(rows)
    for number, (title, row) in enumerate(rows.items()):
        colour = COLOURS[number % len(COLOURS)]
        for place, name in enumerate(lines):
            each = row["mean"] if name == "mean" else row["tasks"][name]
            y = -(place + step * (number - (len(rows) - 1) / 2))
            if each["low"] is not None:
                width = 2.6 if name == "mean" else 1.0
                axes.plot([100 * each["low"], 100 * each["high"]], [y, y], color=colour, linewidth=width)
            shown = literal(title) if name == "mean" else None
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(100 * each["mean"], y, color=colour, marker=marker, markersize=5, linestyle="none", label=shown)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_yticks(
        [-i for i in range(len(lines))], ["mean", *(literal(title) for title in tasks.values())], fontsize=8
    )
    axes.set_xlabel(f"Accuracy {literal(label)}, points")
    plain(axes)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return to_png(figure)


def critical_differences(ranking: Ranking) -> bytes:
    """Plot mean ranks on a line, with a bar over each group of methods that do not differ significantly."""
    names, shown = list(ranking.ranks), len(ranking.ranks)
    figure = new_figure(8, 1.4 + 0.22 * (shown / 2 + len(ranking.alike)))
    axes = figure.subplots()
    depth, bars = 0.55 * math.ceil(shown / 2), 0.32 * len(ranking.alike)
    for place, name in enumerate(names):
        rank, best = ranking.ranks[name], place < math.ceil(shown / 2)
        line = -bars - 0.55 * ((place if best else shown - 1 - place) + 1)
        end = 1 - 0.15 if best else shown + 0.15
        axes.plot([rank, rank, end], [0, line, line], color="#333333", linewidth=0.9)
        label = f"{literal(name)} {rank:.2f}"
        axes.text(
            end, line, f"{label} " if best else f" {label}", ha="right" if best else "left", va="center", fontsize=8
        )
    for number, group in enumerate(ranking.alike):
        ends = [ranking.ranks[group[0]] - 0.04, ranking.ranks[group[-1]] + 0.04]
        axes.plot(ends, 2 * [-0.32 * (number + 0.6)], color=COLOURS[1], linewidth=3, solid_capstyle="round")
    axes.plot([1, 1 + ranking.critical], [0.55, 0.55], color=COLOURS[0], linewidth=2, clip_on=False)
    axes.text(1 + ranking.critical / 2, 0.65, f"critical difference {ranking.critical:.2f}", ha="center", fontsize=8)
    axes.set_xlim(1 - 0.3, max(shown, 1 + ranking.critical) + 0.3)
    axes.set_ylim(-bars - depth - 0.3, 0.95)
    axes.xaxis.tick_top()
    axes.set_xticks(range(1, shown + 1))
    axes.set_yticks([])
    axes.spines["top"].set_position(("data", 0))
    for side in ("left", "right", "bottom"):
        axes.spines[side].set_visible(False)
    return to_png(figure)


def pictures(shown: Sequence[tuple[bytes, str]], columns: int = 6) -> bytes:
    """Draw pictures, the bytes of PNG files, each under a caption of up to two lines."""
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(1.55 * columns, 1.95 * rows)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, (png, caption) in zip(cells, shown, strict=False):
        with Image.open(io.BytesIO(png)) as picture:
            axes.imshow(np.asarray(picture.convert("RGB")), interpolation="nearest")
        axes.set_title("\n".join(literal(line) for line in caption.splitlines()), fontsize=7)
    return to_png(figure)


def low_data(curves: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]) -> bytes:
    """Plot accuracy over training images of each class (logarithmic), with intervals.

    `curves`: title -> (images of each class, estimate with "mean", "low" and "high").
    """
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    for number, (title, values) in enumerate(curves.items()):
        ordered = sorted(values, key=lambda pair: pair[0])
        means = [each["mean"] for _, each in ordered]
        below = [0.0 if each["low"] is None else each["mean"] - each["low"] for _, each in ordered]
        axes.errorbar(
            [few for few, _ in ordered],
            means,
            yerr=[below, below],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            label=literal(title),
        )
    axes.set_xscale("log")
    ticks = sorted({few for values in curves.values() for few, _ in values})
    axes.set_xticks(ticks, [str(few) for few in ticks])
    axes.minorticks_off()
    axes.set_xlabel("Training images of each class")
    axes.set_ylabel("Accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plain(axes)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return to_png(figure)


def latent_kl(values: Sequence[float], units: Sequence[int]) -> bytes:
    """Plot the KL of latent units in nats, in the given order; `units` are their numbers."""
    figure = new_figure(10, 3)
    axes = figure.subplots()
    axes.bar(range(len(values)), values, color=COLOURS[0], width=0.75)
    if len(units) <= 64:
        axes.set_xticks(range(len(units)), [str(unit) for unit in units], fontsize=7, rotation=90)
    axes.set_xlabel("Latent unit")
    axes.set_ylabel("KL (nats)")
    plain(axes)
    axes.grid(False, axis="x")
    return to_png(figure)


def traversals(values: Sequence[float], curves: Mapping[str, Sequence[float]]) -> bytes:
    """Plot probabilities over the value of a latent unit, one curve for each unit."""
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    for number, (title, probabilities) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(values, probabilities, color=colour, marker=marker, markersize=4, label=literal(title))
    axes.set_xlabel("Value of the unit")
    axes.set_ylabel("Class probability")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plain(axes)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return to_png(figure)


def maps_beside_images(images: Any, maps: Any) -> bytes:
    """Draw each image (B, 3, H, W), uint8, and beside it its maps (B, P, rows, columns) from -1 (blue) to 1 (red)."""
    rows, columns = len(images), maps.shape[1] + 1
    figure = new_figure(1.6 * columns, 1.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, (image, of_image) in enumerate(zip(images, maps, strict=True)):
        panels[row][0].imshow(image.permute(1, 2, 0).numpy())
        for column, each in enumerate(of_image, 1):
            panels[row][column].imshow(each.numpy(), cmap="coolwarm", vmin=-1, vmax=1, interpolation="nearest")
            if row == 0:
                panels[row][column].set_title(f"prompt {column - 1}", fontsize=8)
    for axes in panels.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return to_png(figure)


def scatter(points: Any, labels: Any, names: Sequence[str]) -> bytes:
    """Plot points (N, 2), coloured by their label (N,); the axes have no meaning and no numbers."""
    figure = new_figure(7, 5)
    axes = figure.subplots()
    for number, name in enumerate(names):
        mine = points[labels == number]
        marker = MARKERS[number % len(MARKERS)]
        axes.scatter(
            mine[:, 0], mine[:, 1], s=12, color=COLOURS[number % len(COLOURS)], marker=marker, label=literal(name)
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return to_png(figure)
