from __future__ import annotations

from typing import Any

import pytest

from fastprompt.report.bench import markdown, p_text, render


def estimate(mean: float, half: float | None = 0.02, **more: Any) -> dict[str, Any]:
    ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {"mean": mean, **ends, "p": 0.01, **more}


def row(name: str, title: str, accuracy: float, **more: Any) -> dict[str, Any]:
    task = {"lr": 0.5, "weight_decay": 0.001, "at_edge": False, "diverged": 0, "accuracy": estimate(accuracy)}
    return {
        "name": name,
        "method": name,
        "title": title,
        "per_class": None,
        "tasks": {"dtd": task},
        "groups": {"natural": estimate(accuracy)},
        "mean": estimate(accuracy),
        "trained_parameters": 1000.0,
        "trained_share": 0.0012,
        "images_per_second": 12.3,
        "peak_memory_mib": 456.0,
        "differences": {},
        **more,
    }


def summary(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": "VTAB-1k",
        "backbone": "a <b>",
        "image_size": 224,
        "split": "test",
        "recipe": "paper",
        "seeds": [42, 44],
        "tasks": {"dtd": "DTD | 47"},
        "rows": list(rows),
    }


def test_the_table_has_the_best_first_with_differences() -> None:
    difference = {"mean": estimate(0.05, p_holm=0.0004), "tasks": {"dtd": estimate(0.05, p_holm=0.02)}}
    text = markdown(summary(row("linear", "Probe", 0.6), row("vapt", "VAPT", 0.65, differences={"linear": difference})))
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    assert lines[header] == "| method | trained % | natural | mean of 1 | minus Probe | p | images/s | peak MiB |"
    assert lines[header + 2] == "| VAPT | 0.120 | 65.0 ± 2.0 | 65.0 ± 2.0 | +5.0 ± 2.0 | < 0.001 | 12.3 | 456 |"
    assert lines[header + 3].startswith("| Probe | 0.120 | 60.0 ± 2.0 | 60.0 ± 2.0 | – | – |")
    assert "| DTD \\| 47 | 60.0 ± 2.0 (lr 0.5, wd 0.001) |" in text


def test_edges_and_divergence_are_shown() -> None:
    task = {"lr": 4.0, "weight_decay": 0.0, "at_edge": True, "diverged": 2, "accuracy": None}
    text = markdown(summary(row("vapt", "VAPT", 0.5, tasks={"dtd": task}, mean=None)))
    assert "– (lr 4, wd 0, edge, 2 diverged)" in text
    assert "| VAPT | 0.120 | 50.0 ± 2.0 | – |" in text


def test_the_page_escapes_and_draws() -> None:
    difference = {"mean": estimate(0.05, None, p_holm=None), "tasks": {"dtd": estimate(0.05, None, p_holm=None)}}
    rows = [row("linear", "Probe", 0.6), row("vapt", "VAPT", 0.65, differences={"linear": difference})]
    page = render(summary(*rows))
    assert "a &lt;b&gt; at 224 px" in page
    assert page.count("data:image/png;base64") == 2
    few = [row("vapt", "VAPT", 0.4 + n / 100, per_class=n) for n in (1, 5)]
    page = render(summary(*few))
    assert "VAPT, 5 per class" in page
    assert "training images of each class" in page


@pytest.mark.parametrize(("p", "text"), [(None, "–"), (0.0, "< 0.001"), (0.0312, "0.031")])
def test_p_values(p: float | None, text: str) -> None:
    assert p_text(p) == text


def test_ranks_are_told_of_enough_tasks_and_all_images() -> None:
    def of(name: str, values: list[float], **more: Any) -> dict[str, Any]:
        made = row(name, name.upper(), values[0], **more)
        tasks = {f"t{i}": made["tasks"]["dtd"] | {"accuracy": estimate(value)} for i, value in enumerate(values)}
        return made | {"tasks": tasks}

    rows = [of("a", [0.9] * 6), of("b", [0.5] * 6), of("c", [0.4] * 6), of("a", [0.95] * 6, per_class=5)]
    many = summary(*rows) | {"tasks": {f"t{i}": f"Task {i}" for i in range(6)}}
    said = "Mean ranks over 6 tasks, 1 is the best: A 1.00, B 2.00, C 3.00. They differ significantly from 1.35 on"
    assert said in markdown(many)
    assert "Friedman's test that all are alike: p 0.002" in markdown(many)
    page = render(many)
    assert "Critical-difference diagram" in page
    assert "A bar joins methods" in page
    few = many | {"tasks": {f"t{i}": f"Task {i}" for i in range(4)}}
    for text in (markdown(few), render(few)):
        assert "Mean ranks" not in text
