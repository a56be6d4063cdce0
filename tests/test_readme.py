"""The README runs as it stands, is short, and says what the registry and the records say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documented import blocks, commands, offline, prepare, run_page

import fastprompt as fp
from fastprompt.cli.main import parse
from fastprompt.generators import get_method

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def test_the_quickstart_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in place of the published ones, on which nothing that is printed depends."""
    prepare(tmp_path)
    offline(monkeypatch, tiny=False)
    monkeypatch.chdir(tmp_path)
    assert [block.language for block in blocks(README)].count("text") == 1
    assert run_page(README) == 1


def test_its_commands_parse() -> None:
    found = list(commands(README))
    assert found
    for _, words in found:
        parse(words)


def test_it_can_be_read_in_five_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_it_has_every_method_with_its_paper() -> None:
    text = README.read_text(encoding="utf-8")
    rows = {
        tuple(re.findall(r"`([\w-]+)`", names)): row
        for names, row in re.findall(r"^\| (`[^|]*) \| (.*) \|$", text, re.MULTILINE)
    }
    assert sorted(name for names in rows for name in names) == fp.list_methods()
    for names, row in rows.items():
        method = get_method(names[0])
        assert f"`{method.config_class.__name__}`" in row
        arxiv = re.search(r"arXiv ([\d.]+)", method.paper)
        assert arxiv is None or f"https://arxiv.org/abs/{arxiv[1]}" in row


def test_what_it_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", README.read_text(encoding="utf-8"))
    local = [target for pair in links for target in pair if target and "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
