"""The notebooks run from the first cell to the last, and are committed with the pictures of a run at real size."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import notebook_pages
import pytest
import timm
import torch
from documented import prepare
from nbclient import NotebookClient
from timm.models import save_for_hf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SMALL = """
BACKBONE, IMAGE_SIZE, DATA = "local-dir:vit", 32, "birds"
NUM_TRAIN, NUM_VAL, NUM_TEST, EPOCHS, LIBRARY = 6, 2, 4, 1, 16
"""
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures_in(notebook: nbformat.NotebookNode) -> list[bytes]:
    found = [output.get("data", {}).get("image/png") for output in outputs_of(notebook)]
    return [base64.b64decode(text) for text in found if text]


def kinds_of_outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell shows: printed text or pictures."""
    return [
        sorted({"picture" if "image/png" in o.get("data", {}) else "text" for o in c.outputs})
        for c in code_cells(notebook)
    ]


@by_name
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder of pictures and a tiny ViT, which the cell of parameters names."""
    prepare(tmp_path)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes), tmp_path / "vit")
    notebook = nbformat.read(path, as_version=4)
    committed = kinds_of_outputs(notebook)
    for cell in code_cells(notebook):
        cell.outputs = []
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALL
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    limits = {"timeout": 300, "startup_timeout": 300}  # seconds, on a busy machine
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, **limits).execute()
    assert kinds_of_outputs(notebook) == committed


@by_name
def test_it_is_committed_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert len(pictures_in(notebook)) >= 3
    assert {output.output_type for output in outputs_of(notebook)} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs_of(notebook))
    assert not re.search(r"/(root|home|tmp|work|Users)/", path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 450_000


@by_name
def test_its_page_shows_what_it_shows(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    page = notebook_pages.page(notebook)
    assert page.count("```python\n") == len(code_cells(notebook))
    assert page.count("](data:image/png;base64,") == len(pictures_in(notebook))
    printed = ["".join(output.text).rstrip("\n") for output in outputs_of(notebook) if output.output_type == "stream"]
    assert printed
    assert all(f"```text\n{text}\n```" in page for text in printed)


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")}
    assert {name for name in names if f"`{name}`" not in listed} == set()
