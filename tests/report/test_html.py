from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastprompt.report import build_report

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link"}


def record(labels: list[int], predictions: list[int], size: int) -> dict[str, Any]:
    confusion = [[0] * size for _ in range(size)]
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label][prediction] += 1
    per_class = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]
    known = [p for p in per_class if p is not None]
    return {
        "accuracy": sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels),
        "mean_per_class": sum(known) / len(known),
        "per_class": per_class,
        "confusion": confusion,
        "num_images": len(labels),
        "labels": labels,
        "predictions": predictions,
        "seconds": 1.0,
    }


def results(title: str, **changes: Any) -> dict[str, Any]:
    history = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 1.1 / e, "train_accuracy": 0.5, "val_accuracy": 0.6}
        for e in (1, 2, 3)
    ]
    return {
        "fastprompt_version": "0", "torch_version": "0", "machine": "test", "method": "pgn", "title": title,
        "config": {"kind": "pgn", "num_prompts": 4}, "recipe": {"lr": 0.1, "seed": 0, "epochs": 3},
        "backbone": "tiny", "backbone_fingerprint": "f" * 64, "image_size": 32,
        "data": {"name": "folder", "num_train": 8}, "class_names": ["cat", "dog", EVIL],
        "trained_parameters": {"total": 1234, "generator": 1000, "head": 234, "backbone": 0},
        "paper_parameter_count": 1000, "best_epoch": 3, "history": history, "seconds": 5.0,
        "images_per_second": 20.0, "peak_memory_mib": 512.0,
        "validation": record([0, 0, 1, 1, 2], [0, 1, 1, 1, 2], 3),
        "test": record([0, 1, 2, 2], [0, 1, 2, 0], 3),
    } | changes  # fmt: skip


LIBRARY = {
    "mean_weight": [0.4, 0.3, 0.2, 0.1], "entropy": 1.1, "effective_tokens": 3.0, "effective_library": 3.6,
    "num_images": 5,
}  # fmt: skip


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests look at."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


@pytest.fixture
def page_text(tmp_path: Path) -> str:
    vae = [{"epoch": e, "train_loss": 1.0, "kl": 2.0 / e, "active_units": 5} for e in (1, 2)]
    runs = [
        results("Linear probe (L-BFGS)", history=[]),
        results("PGN", library=LIBRARY),
        results("V²APT", history=vae, test=None),
    ]
    return build_report(runs, tmp_path / "report.html", f"Report {EVIL}").read_text(encoding="utf-8")


def test_it_needs_nothing_from_outside(page_text: str) -> None:
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page_text)
    assert "http" not in without_pictures
    assert "//" not in without_pictures
    page = parse(page_text)
    assert not {tag for tag, _ in page.seen} & {"script", "link", "iframe", "object"}
    for tag, attributes in page.seen:
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert base64.b64decode((attributes["src"] or "").split(",")[1]).startswith(b"\x89PNG")
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")


def test_sections_links_and_accessible_names(page_text: str) -> None:
    page = parse(page_text)
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert ids == ["summary", "parameters", "curves", "run-0", "run-1", "run-2", "data"]
    assert {(a["href"] or "")[1:] for tag, a in page.seen if tag == "a"} == set(ids)
    assert ("html", {"lang": "en"}) in page.seen
    tags = [tag for tag, _ in page.seen]
    assert tags.count("table") == tags.count("caption")
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.seen if tag == "th")
    pictures = [attributes for tag, attributes in page.seen if tag == "img"]
    # scatter, curves, a confusion matrix a run, library tokens, latent
    assert len(pictures) == 1 + 1 + 3 + 1 + 1
    assert all(len(attributes["alt"] or "") > 15 for attributes in pictures)
    assert len({attributes["src"] for attributes in pictures}) == len(pictures)


def test_class_names_and_headings_are_escaped(page_text: str) -> None:
    assert "<script>" not in page_text
    page = parse(page_text)
    assert EVIL in page.text
    assert f"Report {EVIL}" in page.text


def test_every_text_of_a_run_is_escaped(tmp_path: Path) -> None:
    """Whatever a results.json holds in whatever place: names of classes, sizes, settings, data, fingerprints."""
    run = results(
        f"PGN {EVIL}", backbone=EVIL, image_size=EVIL, machine=EVIL, backbone_fingerprint=EVIL, torch_version=EVIL,
        config={"kind": EVIL, EVIL: 1}, recipe={"seed": EVIL, EVIL: EVIL}, data={EVIL: EVIL},
        class_names=['" onerror="x', "</table>", EVIL],
    )  # fmt: skip
    text = build_report([run, run], tmp_path / "report.html", EVIL).read_text(encoding="utf-8")
    assert "<script" not in text
    page = parse(text)
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)
    assert sum(EVIL in part for part in page.text) > 15


def test_numbers_are_those_of_the_runs(page_text: str) -> None:
    text = " ".join(parse(page_text).text)
    assert "1,234" in text
    assert "75.0%" in text  # 3 of 4 test images
    assert "30.1–95.4%" in text  # Wilson's interval of 3 of 4
    assert "80.0%" in text  # 4 of 5 validation images
    assert "3.6 of 4 tokens" in text


def test_runs_of_several_seeds_are_summed_up(tmp_path: Path) -> None:
    def run(seed: int, right: int, **recipe: Any) -> dict[str, Any]:
        test = record([0] * 10, [0] * right + [1] * (10 - right), 3)
        return results("PGN", test=test, recipe={"lr": 0.1, "epochs": 3, "seed": seed, **recipe})

    alone = build_report([run(0, 5), run(1, 7, lr=0.2)], tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "differ in their seed alone" not in alone
    page = build_report([run(0, 5), run(1, 7), run(2, 9)], tmp_path / "page.html").read_text(encoding="utf-8")
    cells = ["0, 1, 2", "test", "70.0%", "20.0%", "20.3%–119.7%"]  # t(0.975, 2) = 4.303
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page


def test_all_right_and_all_wrong(tmp_path: Path) -> None:
    """Accuracies of 1 and 0 have intervals too, with no end beyond them."""
    right, wrong = record([0, 1, 2] * 3, [0, 1, 2] * 3, 3), record([0, 1, 2] * 3, [1, 2, 0] * 3, 3)
    out = build_report([results("PGN", test=right), results("VAPT", test=wrong)], tmp_path / "r.html")
    text = " ".join(parse(out.read_text()).text)
    assert "70.1–100.0%" in text
    assert "0.0–29.9%" in text


def test_from_run_directories(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(results("PGN")))
    out = build_report([run, run], tmp_path / "r.html")
    assert "PGN (2, seed 0)" in " ".join(parse(out.read_text()).text)


def test_files_that_are_no_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json has no 'title'"):
        build_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_wrong_runs_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(ValueError, match="runs"):
        build_report([], out)
    with pytest.raises(FileNotFoundError, match=r"runs.*results\.json"):
        build_report([tmp_path / "nowhere"], out)
    (tmp_path / "results.json").write_text('{"half')
    with pytest.raises(ValueError, match=r"results\.json"):
        build_report([tmp_path], out)
    assert not out.exists()
