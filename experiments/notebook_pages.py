"""A hook of MkDocs: the notebooks of `examples/` are pages of the documentation, with their outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page `notebooks/NAME.md` for each `examples/NAME.ipynb`."""
    from mkdocs.structure.files import File

    for path in sorted(EXAMPLES.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page(notebook)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to the notebooks' files, which are right beside the sources, lead to these pages."""
    return re.sub(r"\]\(\.\./examples/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def page(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown: code in fences, printed text behind it, pictures as data."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [fenced("python", source), *map(shown, cell["outputs"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def shown(output: dict[str, Any]) -> str:
    """Return one output of a cell as Markdown; a picture is shown without the text that stands for it."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png'].split())})"
    return fenced("text", "".join(data["text/plain"]).rstrip("\n"))


def fenced(language: str, text: str) -> str:
    """Return text in a fence."""
    return f"```{language}\n{text}\n```"
