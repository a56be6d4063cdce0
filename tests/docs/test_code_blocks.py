"""Every Python block of the documentation runs, and every command of the documentation parses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import pytest
from documented import blocks, commands, offline, prepare, run_page
from hub_stub import in_its_place

import fastprompt_client
from fastprompt.cli.main import parse
from fastprompt.generators import registry

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.fixture
def registered() -> Iterator[None]:
    """What a page registers is forgotten behind it."""
    methods = dict(registry._METHODS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(methods)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The client without a host, and the deployment without Ray: names and arguments are checked, nothing is asked.

    The Hub is a stand-in, with somebody logged in.
    """
    monkeypatch.setattr(fastprompt_client, "Client", create_autospec(fastprompt_client.Client))
    monkeypatch.setitem(sys.modules, "ray", MagicMock())
    known = "fastprompt.serve.cluster" in sys.modules
    with in_its_place(monkeypatch, tmp_path_factory.mktemp("hub")):
        monkeypatch.setenv("HF_TOKEN", "hf_documented")
        yield
    if not known:
        sys.modules.pop("fastprompt.serve.cluster", None)


@pytest.mark.usefixtures("registered", "elsewhere")
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(DOCS / page))])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_its_blocks_run_and_print_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny random models in place of the published ones."""
    prepare(tmp_path)
    offline(monkeypatch, tiny=True)
    monkeypatch.chdir(tmp_path)
    assert run_page(DOCS / page) > 0


def test_every_command_parses() -> None:
    found = [(page, line, words) for page in PAGES for line, words in commands(DOCS / page)]
    assert len(found) > 10
    for page, line, words in found:
        try:
            parse(words)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"docs/{page}:{line}: fastprompt {' '.join(words)}: {error}")


def test_a_command_that_does_not_parse_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nfastprompt adapt --data birds \\\n    --no-such-flag 1 --out runs\n```\n")
    [(line, words)] = commands(page)
    assert line == 2
    with pytest.raises((SystemExit, ValueError)):
        parse(words)


def test_what_a_block_prints_is_compared(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page)


def test_an_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nraise KeyError(x)\n```\n")
    with pytest.raises(KeyError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno == 4  # counted from 0
    assert caught.traceback[-1].path == page
