"""The documentation is complete: every page, public name, method and option is there, tables are the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import method_tables
import pytest
import yaml

import fastprompt as fp
from fastprompt.generators import get_method
from fastprompt.train.recipes import COMMON_RECIPE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in navigation(child)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")]  # notebook_pages.py
    assert sorted(navigation(settings["nav"])) == sorted(pages + notebooks)


def test_every_public_name_has_its_place_in_the_reference() -> None:
    found = re.findall(r"^::: fastprompt\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*found, "__version__"]) == sorted(fp.__all__)


def test_every_method_has_a_page() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in (DOCS / "methods").glob("*.md")}
    shown = {name for text in pages.values() for name in re.findall(r"<!-- method: ([\w-]+) -->", text)}
    configurations = {get_method(name).config_class for name in shown}
    assert configurations == {get_method(name).config_class for name in fp.list_methods()}


@pytest.mark.parametrize("page", sorted(path.name for path in (DOCS / "methods").glob("*.md")))
def test_the_tables_are_those_of_the_registry(page: str) -> None:
    text = (DOCS / "methods" / page).read_text(encoding="utf-8")
    assert text == method_tables.filled(text), "python experiments/method_tables.py writes them again"


def test_every_option_is_explained() -> None:
    """The tables take the explanations from the docstrings, as `--help` does."""
    for name in fp.list_methods():
        for line in method_tables.options(get_method(name)):
            assert not re.search(r"\|\s*\|$", line), f"{name}: {line}"


def test_what_pages_link_to_is_there() -> None:
    """Files; `make docs` checks the anchors too."""
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fp.__version__
    assert f"\n## {fp.__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_commits_are_checked_by_the_pinned_ruff() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [ruff] = settings["repos"]
    assert f"ruff=={ruff['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_shared_recipe_is_as_described() -> None:
    text = " ".join((DOCS / "methods" / "index.md").read_text(encoding="utf-8").split())
    recipe = fp.Recipe.from_dict(COMMON_RECIPE)
    assert recipe.optimizer == "adamw"
    assert (recipe.warmup_epochs, recipe.select_by) == (1, "loss")
    assert f"AdamW, {recipe.epochs} epochs, batch {recipe.batch_size}, a warm-up of one epoch and a cosine" in text
    assert "a head that learns at 1e-3, smoothed labels, the epoch with the lowest validation loss" in text
    assert recipe.head_lr == 1e-3
    assert recipe.label_smoothing > 0
