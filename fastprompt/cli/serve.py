"""`fastprompt serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import Plugins


@dataclass
class Serve:
    """Serve a frozen backbone and adapters over HTTP: /v1/embeddings, /v1/classify, /v1/models, /health.

    To require API keys, list them in the environment variable FASTPROMPT_API_KEYS, separated by commas, or in
    --api-keys-file, one per line. Clients send "Authorization: Bearer KEY" or "X-API-Key: KEY". The host does not
    speak TLS: put a proxy in front of it on a network that you do not trust.
    """

    adapter: Annotated[list[str], tyro.conf.arg(metavar="NAME=DIR"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """Name to serve an adapter under, and its adapter or run directory, or repository of the Hugging Face Hub, as
    owner/name; repeat for several."""
    config: Path | None = None
    """YAML file with any of these settings; flags override it."""
    backbone: str | None = None
    """Backbone; if not given, that of the first adapter's run, else clip-vit-b16."""
    image_size: int | None = None
    """Image side in pixels; if not given, the first adapter's, else the backbone's own."""
    any_size: bool = False
    """Compute pictures of any number of whole patches at their own size; clients with placement "extend" need it."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for the whole network."""
    port: int = 8000
    """Port to listen on; 0 picks a free one, which the host prints."""
    api_keys_file: Path | None = None
    """File with one API key per line; lines that start with '#' are comments."""
    allow_origin: Annotated[list[str], tyro.conf.arg(metavar="URL"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """Origin of a web page that may call the host, such as https://example.org, or '*'; repeat for several."""
    dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    """Data type of the backbone; auto uses bfloat16 if the hardware multiplies it. int8 runs on a CPU, with calibrated
    weights."""
    int8: Path | None = None
    """With --dtype int8: file of calibrated weights; those in the user cache if not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    backend: Literal["auto", "eager", "compile", "openvino", "cuda_graph", "compiled_cuda_graph"] = "auto"
    """Backend for batches of a single adapter. auto measures and picks the fastest one here, without compile, which is
    slow to build for each batch size and adapter."""
    fast_adapters: int = 1
    """Number of adapters that use that backend, in the order given; the others run in eager. Each one takes time to
    prepare and, with openvino and compile, memory for copies of the backbone."""
    batch_size: int = 8
    """Maximum number of images per batch."""
    batch_wait_ms: float = 5.0
    """Milliseconds that a request waits for others to join its batch."""
    max_body_mb: float = 8.0
    """Maximum size of a request in MiB."""
    max_held_mb: float | None = None
    """Maximum size of all bodies and pictures held at once, in MiB; 256 or twice --max-body-mb, whichever is larger, if
    not given."""
    max_images: int = 32
    """Maximum number of pictures per request."""
    max_decoded_mb: float = 256.0
    """Maximum size of a request's decoded pictures in MiB, at 4 bytes per RGB pixel, 8 with transparency."""
    max_pixels: int | None = None
    """Maximum number of pixels of a picture computed at its own size: at least the backbone's own number, four times
    that if not given."""
    body_timeout: float = 10.0
    """Seconds within which a request must arrive."""
    timeout: float = 30.0
    """Seconds within which a request must be answered."""
    max_waiting: int = 128
    """Maximum number of waiting requests; further ones are answered with status 503."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def serve(command: Serve) -> None:
    """Run `fastprompt serve`."""
    from importlib.util import find_spec

    if find_spec("litserve") is None:
        raise ImportError("litserve is not installed: pip install 'fastprompt[serve]'")
    from fastprompt.runs.devices import find_device
    from fastprompt.serve import host
    from fastprompt.serve.protocol import Limits
    from fastprompt.serve.routes import read_keys
    from fastprompt.serve.tenants import HostSettings

    adapters: dict[str, Path] = {}
    for text in command.adapter:
        name, equals, directory = text.partition("=")
        if not name or not equals or not directory:
            raise ArgumentError("adapter", f"must be NAME=DIR, got {text!r}")
        if name in adapters:
            raise ArgumentError("adapter", f"must not repeat a name, got {name!r} twice")
        adapters[name] = Path(directory)
    for flag in ("batch_wait_ms", "max_body_mb", "max_held_mb", "max_decoded_mb", "body_timeout", "timeout"):
        value = getattr(command, flag)
        if value is not None and not math.isfinite(value):
            raise ArgumentError(flag, f"must be finite, got {value}")
    device = find_device(command.device)
    settings = HostSettings(
        command.backbone,
        command.image_size,
        command.any_size,
        adapters,
        command.dtype,
        command.batch_size,
        command.threads,
        str(device),
        command.plugin,
        command.backend,
        command.fast_adapters,
        command.int8,
    )
    limits = Limits(
        int(command.max_body_mb * 2**20),
        command.max_images,
        command.max_pixels,
        command.body_timeout,
        command.timeout,
        command.max_waiting,
        None if command.max_held_mb is None else int(command.max_held_mb * 2**20),
        int(command.max_decoded_mb * 2**20),
    )
    host.run(
        settings,
        limits,
        read_keys(command.api_keys_file),
        command.host,
        command.port,
        command.batch_wait_ms / 1000,
        command.allow_origin,
    )
