"""The page: drop pictures, choose adapters, see classes, maps and tokens."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fastprompt.data.images import open_image
from fastprompt.extras import needed
from fastprompt.model import PromptedViT
from fastprompt.webdemo.views import View, view

with needed("demo", "the web demo"):
    import gradio

MOST_PICTURES = 16
"""Number of pictures that are computed at once."""
LARGEST_FILE = "32mb"
STYLE = """
.picture {display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: 1.5rem}
.picture h3 {flex: 1 0 100%; margin: 0; overflow-wrap: anywhere}
.adapter {flex: 1 1 16rem; min-width: 0}
.adapter h4 {margin: 0.3rem 0; font-weight: 600; overflow-wrap: anywhere}
.bar {display: grid; grid-template-columns: 8rem 1fr 3.5rem; gap: 0.5rem; align-items: center; line-height: 1.7}
.bar span {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.bar meter {width: 100%}
.bar b {font-weight: 400; text-align: right}
.maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) !important}
.maps .caption-label {max-width: 100% !important; white-space: normal !important}
"""


def build_page(models: Mapping[str, PromptedViT]) -> Any:
    """Return the page as Gradio `Blocks` with the endpoint `/classify`: (files, names) -> (HTML, gallery of maps)."""
    names = list(models)

    def classify(files: Sequence[Any] | None, chosen: Sequence[str]) -> tuple[str, list[tuple[Image.Image, str]]]:
        return answer(models, [Path(file[0] if isinstance(file, tuple) else file) for file in files or ()], chosen)

    with gradio.Blocks(title="fastprompt", analytics_enabled=False) as page:
        gradio.Markdown(
            "# fastprompt\nDrop pictures and choose adapters. Every adapter prompts a frozen vision transformer; the "
            "maps show where its prompts act."
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                pictures = gradio.Gallery(
                    label=f"Pictures, {MOST_PICTURES} at most",
                    sources=["upload"],
                    type="filepath",
                    columns=3,
                    height=260,
                )
                adapters = gradio.CheckboxGroup(names, value=names, label="Adapters")
                button = gradio.Button("Classify", variant="primary")
            with gradio.Column(scale=2, min_width=280):
                classes = gradio.HTML(label="Classes", container=True, min_height=120)
                maps = gradio.Gallery(
                    label="Prompt maps",
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    elem_classes="maps",
                )
        button.click(classify, [pictures, adapters], [classes, maps], api_name="classify", concurrency_limit=1)
    return page


def answer(
    models: Mapping[str, PromptedViT], files: Sequence[Path], chosen: Sequence[str]
) -> tuple[str, list[tuple[Image.Image, str]]]:
    """Compute what the page shows: HTML with classes and tokens, and the maps with their captions.

    Raises `gradio.Error`, whose text the page shows, if there is no picture or adapter, or a file is no picture.
    """
    if not files:
        raise gradio.Error("Drop at least one picture.", print_exception=False)
    if len(files) > MOST_PICTURES:
        raise gradio.Error(f"Drop at most {MOST_PICTURES} pictures, got {len(files)}.", print_exception=False)
    if not chosen:
        raise gradio.Error("Choose at least one adapter.", print_exception=False)
    parts, maps = [], []
    for file in files:
        name = html.escape(file.name)
        found: dict[str, View] = {}
        for adapter in chosen:
            model = models[adapter]
            levels = None if model.preprocessing is None else model.preprocessing.intensity_range
            try:
                found[adapter] = view(model, open_image(file, intensity_range=levels))
            except ValueError as error:
                reason = html.escape(str(error).replace(str(file), file.name))
                raise gradio.Error(f"{name}: {reason}", print_exception=False) from error
            maps += [(image, f"{file.name}, {adapter}, {caption}") for caption, image in found[adapter].maps]
        parts.append(f"<section class='picture'><h3>{name}</h3>{''.join(map(_card, found, found.values()))}</section>")
    return "".join(parts), maps


def _card(adapter: str, shown: View) -> str:
    """Write what one adapter says of one picture."""
    lines = [f"<h4>{html.escape(adapter)}</h4>"]
    for domain, classes in shown.classes.items():
        lines += [f"<h4>{html.escape(domain)}</h4>"] if domain else []
        lines += [_bar(name, probability) for name, probability in classes]
    if shown.tokens:
        lines.append("<h4>library tokens in its prompts</h4>")
        lines += [_bar(f"token {token}", share) for token, share in shown.tokens]
    return f"<div class='adapter'>{''.join(lines)}</div>"


def _bar(name: str, share: float) -> str:
    text = html.escape(name)
    return (
        f"<div class='bar'><span title='{text}'>{text}</span><meter value='{share:.4f}'></meter>"
        f"<b>{100 * share:.1f} %</b></div>"
    )


def launch(models: Mapping[str, PromptedViT], host: str = "127.0.0.1", port: int = 7860) -> tuple[Any, str]:
    """Start the page in threads of this process; return it, for `page.close()`, and its address.

    Nothing is sent anywhere else: no analytics, no fonts, no tunnel.

    Raises:
        OSError: the port is taken.
    """
    page = build_page(models)
    system = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=LARGEST_FILE,
        enable_monitoring=False,
        theme=system,
        css=STYLE,
    )
    return page, address
