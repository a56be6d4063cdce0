from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
from PIL import Image

from fastprompt.report import plots

HISTORY = [
    {
        "epoch": e,
        "train_loss": 2 / e,
        "val_loss": 2.2 / e,
        "train_accuracy": 0.2 * e,
        "val_accuracy": 0.19 * e,
    }
    for e in (1, 2, 3)
]


def picture(png: bytes) -> Image.Image:
    """The decoded picture; more than a few colours, so it is not an empty canvas."""
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert min(image.size) > 200
    assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 8
    return image


def usage(mean_weight: list[float]) -> dict[str, Any]:
    return {"mean_weight": mean_weight, "entropy": 1.0, "effective_tokens": 2.7, "effective_library": 3.3}


@pytest.mark.parametrize(
    ("plot", "one", "other"),
    [
        (plots.curves, ({"PGN": HISTORY},), ({"PGN": HISTORY[:2]},)),
        (plots.confusion_matrix, ([[5, 1], [0, 6]], ["a", "b"]), ([[1, 5], [0, 6]], ["a", "b"])),
        (plots.library_tokens, (usage([0.7, 0.1, 0.1, 0.1]),), (usage([0.4, 0.4, 0.1, 0.1]),)),
        (
            plots.accuracy_against_parameters,
            ([("PGN", 1000, 0.8, 0.7, 0.85, "test"), ("VPT", 10**5, 0.9, 0.8, 0.95, "test")],),
            ([("PGN", 1000, 0.8, 0.7, 0.85, "test"), ("VPT", 10**6, 0.9, 0.8, 0.95, "test")],),
        ),
        (
            plots.latent_units,
            (
                {
                    "V²APT": [
                        {"epoch": 1, "kl": 3.0, "active_units": 9},
                        {"epoch": 2, "kl": 2.0, "active_units": 4},
                    ]
                },
            ),
            (
                {
                    "V²APT": [
                        {"epoch": 1, "kl": 3.0, "active_units": 9},
                        {"epoch": 2, "kl": 0.0, "active_units": 0},
                    ]
                },
            ),
        ),
    ],
    ids=["curves", "confusion", "library", "scatter", "latent"],
)
def test_pictures_show_their_data(plot: Any, one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    first = plot(*one)
    picture(first)
    assert plot(*one) == first
    assert plot(*other) != first


def test_curves_take_records_without_a_validation_set() -> None:
    picture(plots.curves({"PGN": [{"epoch": 1, "train_loss": 1.0}, {"epoch": 2, "train_loss": 0.5}]}))


def test_confusion_matrix_takes_many_classes_and_names_a_wrong_shape() -> None:
    size = 45
    many = [[int(i == j) for j in range(size)] for i in range(size)]
    picture(plots.confusion_matrix(many, [f"class {i}" for i in range(size)]))
    with pytest.raises(ValueError, match="confusion"):
        plots.confusion_matrix([[1, 2]], ["a", "b"])


def test_class_names_are_drawn_as_they_are() -> None:
    picture(plots.confusion_matrix([[5, 1], [0, 6]], ["cost in $", "_under^score_"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture(plots.confusion_matrix([[5, 1], [0, 6]], ["\u8d64", "red"]))  # the font has no such glyph
    picture(plots.confusion_matrix([[5, 1], [0, 6]], ["$ or ^$", "in US$, not C$ or A^"]))


@pytest.mark.parametrize("name", ["$\\frac$", "US$ and C$", "\x1b[31m\x00", "a\udcff", "_hidden", "\\$x$"])
def test_names_are_drawn_as_they_are(name: str) -> None:
    """No formula, which may be a wrong one, and nothing that the font's library refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture(plots.confusion_matrix([[3, 1], [0, 2]], [name, "b"], name))
        picture(plots.library_tokens(usage([0.5, 0.3, 0.2]), name))
        picture(plots.curves({name: HISTORY}))
        picture(plots.accuracy_against_parameters([(name, 10, 0.5, 0.4, 0.6, "test")]))
        picture(plots.latent_units({name: [{"epoch": 1, "kl": 0.5, "active_units": 2}]}))
