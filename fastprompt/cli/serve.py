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

    API keys, if clients need one, stand in the environment variable FASTPROMPT_API_KEYS, separated by commas, or in
    --api-keys-file, one in a line. Clients send "Authorization: Bearer KEY" or "X-API-Key: KEY". Without TLS: put a
    proxy in front where the network is not yours.
    """

    adapter: Annotated[list[str], tyro.conf.arg(metavar="NAME=DIR"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """Adapter or run directory and the name it is served under; once for each."""
    config: Path | None = None
    """YAML file with any of these settings; flags take the place of what it says."""
    backbone: str | None = None
    """That of the first adapter's run if not given, else clip-vit-b16."""
    image_size: int | None = None
    """Side in pixels; that of the first adapter, else the backbone's own, if not given."""
    any_size: bool = False
    """Compute pictures of any number of whole patches at their own size; clients with placement "extend" need it."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for the whole network."""
    port: int = 8000
    """0: any that is free; the host prints it."""
    api_keys_file: Path | None = None
    """One key in a line; lines that start with '#' are none."""
    allow_origin: Annotated[list[str], tyro.conf.arg(metavar="URL"), tyro.conf.UseAppendAction] = field(
        default_factory=list
    )
    """Origin of a web page whose scripts may ask, https://example.org; once for each, or '*'."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the backbone; auto: bfloat16 where the hardware multiplies it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes a GPU where there is one."""
    backend: Literal["auto", "eager", "compile", "openvino", "cuda_graph"] = "auto"
    """Runs batches that are all of one adapter; auto: the fastest here, of all but compile, which takes up to a minute
    for each batch size of each adapter."""
    fast_adapters: int = 1
    """How many adapters have that backend, the first ones given; others run in eager. Each takes seconds at the start
    and, with openvino and compile, about five times the memory of the backbone."""
    batch_size: int = 8
    """Images that are computed at once at most."""
    batch_wait_ms: float = 5.0
    """How long a request waits for others to join its batch."""
    max_body_mb: float = 8.0
    """Size of a request."""
    max_held_mb: float | None = None
    """Bodies and pictures of all requests at once; 256, or twice --max-body-mb where that is more, if not given."""
    max_images: int = 32
    """Pictures of a request."""
    max_decoded_mb: float = 256.0
    """Pictures of a request as they are decoded: 4 bytes a pixel of RGB, 8 with transparency."""
    max_pixels: int | None = None
    """Pixels of a picture that is computed at its own size, at least the backbone's; four times those if not given."""
    body_timeout: float = 10.0
    """Seconds in which a request has to arrive."""
    timeout: float = 30.0
    """Seconds in which a request has to be answered."""
    max_waiting: int = 128
    """Requests that wait at once; others are answered 503."""
    threads: int | None = None
    plugin: Plugins = field(default_factory=list)
    """Module that registers methods of your own: its name or its .py file; once for each."""
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
