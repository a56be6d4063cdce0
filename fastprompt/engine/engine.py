"""`Engine`: serve a frozen backbone with one adapter, or with many in the same batch, as fast as the machine can."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import statistics
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.adapters import Int8Check, state_digest
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.changes import unchanging, watch_optimizers
from fastprompt.engine import mixed
from fastprompt.engine.backends import BACKENDS, Run
from fastprompt.files import atomic_write, parse_json
from fastprompt.generators import LinearProbeConfig
from fastprompt.int8 import native
from fastprompt.int8.weights import Int8Weights, find_weights
from fastprompt.kept import Seen, SeenObjects, SeenValues, tensors_of
from fastprompt.kernels import stopwatch
from fastprompt.model import PromptedViT
from fastprompt.streams import Written
from fastprompt.vit import FrozenViT
from fastprompt.vit.linear import bfloat16_is_fast, pack

BASE, DEFAULT = "__base__", "default"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROUNDS = 5
KEPT = 32
"""Number of backend functions that an engine keeps. A backbone for images of any size could otherwise fill memory."""
CALL_IMAGES = 2
"""Fixed cost of a call, in images. It decides between padding and one more call."""
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3, torch.float64: 1e-3}
"""How far a backend's output may be from eager's, relative to its norm, before the backend is considered broken."""

CHOICES = "fastprompt choices 1"
"""Format of the files that `Engine.save_choices` writes."""

PATIENCE = 1.0
"""Seconds to wait for another thread's change of the model, from its start. After that the old state answers."""

Signature = tuple[int, tuple[int, int], torch.dtype]
"""Batch size, (height, width) in pixels and dtype of the images that a backend's function is built for."""


@dataclasses.dataclass
class Measured:
    """An engine's measurements of its backends for batches of one signature.

    Attributes:
        chosen: the backend that runs. seconds: median time per batch, by backend; {} if nothing was measured.
        reasons: why other backends cannot run.
    """

    chosen: str
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


class _Change(NamedTuple):
    """A new state of the model to run: the copy's sequence number, the `Seen` state, and copies of the tensors.

    `model` is a copy of the whole model if a part or the readout was replaced.
    """

    number: int
    seen: Seen
    tensors: list[Tensor]
    model: PromptedViT | None


def _not_checked(model: PromptedViT | FrozenViT, check: Int8Check | None, weights: Int8Weights) -> str:
    """Return why a comparison with float32 says nothing of this adapter on these weights; "" if it does."""
    assert isinstance(model, PromptedViT)
    assert check is not None
    if check.weights != weights.digest:
        return "the adapter was compared with float32 on other int8 weights"
    same = check.adapter == state_digest(model.adapter_state_dict())
    return "" if same else "the adapter has changed since it was compared with float32"


def _not_faster(weights: Int8Weights, device: torch.device) -> str:
    """Return why int8 is slower than bfloat16 here; "" if it is faster, or bfloat16 is emulated."""
    if not bfloat16_is_fast(device):
        return ""
    if not native.beats_bfloat16():
        return "bfloat16 is faster on this processor"
    every = sum(len(block) for block in weights.blocks)
    if 2 * weights.num_bytes < every:
        return (
            f"activations of {every - weights.num_bytes} of {every} Linears have 12 bits, and bfloat16 is faster than "
            "those; calibrate with activation_bits=8"
        )
    return ""


class Engine:
    """Run a `PromptedViT`, or a bare backbone, in production: `engine(images)`.

    The engine computes on its own copies of backbone and adapters, in its own dtype. The next call picks up any change
    to the model's generator, head or readout, including writes through `.data` and replaced parts. For a fully
    fine-tuned backbone, it picks up only those writes through `.data` that `fastprompt.kept.SeenObjects` detects; call
    `refresh()` after others. A frozen backbone is copied once, when the engine is created.

    Threads may share an engine. One call runs at a time, on all of torch's threads, and others wait. Adapters are
    added, replaced and deleted between calls. The model may change while other threads call: every answer comes from
    one consistent state, as left by a completed optimizer step or state load. Your own code that writes parameters must
    do so in `model.changing()`.

    Args:
        model: a `PromptedViT`, or a `FrozenViT`, for which the engine returns the features.
        batch_sizes: the batch sizes to prepare a backend for; other batches are padded or split.
        dtype: the backbone's dtype; "auto" and None: bfloat16 if the hardware multiplies it, else float32, or int8
            where that is allowed. "int8": frozen Linears in int8 on a CPU, everything else in float32 (`docs/int8.md`).
        backend: "eager", "cuda_graph", "compiled_cuda_graph", "compile", "openvino", or "auto": the fastest of those
            that can run, measured at the first batch of each size and remembered. `fp.explain(engine)` shows which one
            runs and why.
        backends: names that "auto" chooses from, besides "eager"; None: all.
        choices: a file that `save_choices` of such an engine wrote. What was measured there is not measured again, so
            that engines in several processes compute the same bits.
        int8: the weights that `dtype="int8"` runs, or their file; None: those that `Int8Weights.save()` keeps in the
            user cache.
        allow_int8: whether "auto" may mean int8, where it can run and is faster than bfloat16. It also does for an
            adapter that was compared in int8 with float32 and passed (`PromptedViT.int8_check`), on the same weights.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it.
        ImportError: `backend` needs a package that is not installed; the error names the extra that installs it.
        RuntimeError: `backend` cannot run here.
    """

    def __init__(
        self,
        model: PromptedViT | FrozenViT,
        batch_sizes: Sequence[int] = (1, 8, 32),
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        backends: Sequence[str] | None = None,
        choices: str | os.PathLike[str] | None = None,
        int8: Int8Weights | str | os.PathLike[str] | None = None,
        allow_int8: bool = False,
    ) -> None:
        if not isinstance(model, (PromptedViT, FrozenViT)):
            raise ArgumentTypeError("model", f"must be a PromptedViT or a FrozenViT, got {type(model).__name__}")
        sizes = tuple(batch_sizes) if isinstance(batch_sizes, (tuple, list)) else ()
        if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
            raise ArgumentError("batch_sizes", f"must be positive integers, got {batch_sizes!r}")
        if dtype is not None and dtype not in ("int8", "auto") and dtype not in DTYPES:
            raise ArgumentError("dtype", f"must be one of {DTYPES}, 'int8', 'auto' or None, got {dtype!r}")
        dtype = None if dtype == "auto" else dtype
        check = model.int8_check if isinstance(model, PromptedViT) else None
        checked = check is not None and check.passed
        if int8 is not None and dtype != "int8" and not (dtype is None and (allow_int8 or checked)):
            raise ArgumentError("int8", f"must be None with dtype={dtype!r}: give dtype='int8' or allow_int8=True")
        if backend != "auto" and backend not in BACKENDS:
            raise ArgumentError("backend", f"must be 'auto' or one of {tuple(BACKENDS)}, got {backend!r}")
        if backends is not None and (isinstance(backends, str) or not set(backends) <= set(BACKENDS)):
            raise ArgumentError("backends", f"must be a list of some of {tuple(BACKENDS)} or None, got {backends!r}")
        given = model.backbone if isinstance(model, PromptedViT) else model
        self.batch_sizes, self.backend = tuple(sorted(set(sizes))), backend
        self.backends = None if backends is None else ("eager", *backends)
        self.int8: Int8Weights | None = None
        self.not_int8 = ""
        if dtype == "int8":
            self.int8 = find_weights(given, int8)
        elif dtype is None and (allow_int8 or checked):
            try:
                found = find_weights(given, int8)
            except (ArgumentError, RuntimeError) as reason:
                self.not_int8 = str(reason)
            else:
                self.not_int8 = "" if allow_int8 else _not_checked(model, check, found)
                self.not_int8 = self.not_int8 or _not_faster(found, given.device)
                self.int8 = None if self.not_int8 else found
        if self.int8 is not None:
            self.dtype = torch.float32  # of all that is not a frozen Linear
        else:
            fast = bfloat16_is_fast(given.device)
            self.dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16 if fast else torch.float32
        given_choices = {} if choices is None else read_choices(choices)
        self._given, self._choices = frozenset(given_choices), stopwatch.Choices(given_choices)
        self._lock = threading.RLock()
        self._released = False
        self._written: Written | None = None
        self._runs: dict[tuple[str, str, Signature], Run] = {}  # by adapter, backend and signature
        self._measured: dict[tuple[str, Signature], Measured] = {}
        self._source = model if isinstance(model, PromptedViT) else None
        self._own = BASE if self._source is None else DEFAULT
        self._unmixed: set[str] = set()
        self._pixels: dict[str, FrozenViT] = {}  # the backbone that normalises raw pixels, for each added adapter
        self._states, self._state = itertools.count(1), 0
        watch_optimizers()
        self._backbone = _copy_backbone(given, self.dtype, self.int8)
        self._adapters = {BASE: _copy_adapter(PromptedViT(self._backbone, LinearProbeConfig()), self._backbone)}
        if self._source is not None:
            with _whole(self._source):
                self._seen = _look(self._source)
                self._adapters[DEFAULT] = _copy_adapter(self._source, self._backbone)
        if backend != "auto":
            obstacle = BACKENDS[backend].reason(self.model)
            if obstacle:
                error = RuntimeError if BACKENDS[backend].is_installed() else ImportError
                raise error(f"backend {backend!r} cannot run: {obstacle}")
        self._written = Written(self._backbone.device)

    def __call__(self, images: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor | list[Tensor]:
        """Compute logits (B, C), or features (B, D) without a head; with `adapter_names`, a list of B outputs.

        Each output of the list is (C,) or (D,).

        Args:
            images: (B, C, H, W), float (normalised) or uint8 (raw pixels); B may be 0 or exceed `batch_sizes`.
            adapter_names: the adapter of each image: the name of an added adapter, "__base__" for the backbone's
                features, or "default" for the model that the engine was created with.

        Raises:
            TypeError, ValueError: `images` do not fit the backbone, or `adapter_names` do not fit images or adapters.
                On a CPU: an output is NaN or infinite. (On a GPU the call does not wait for the outputs; see
                `PromptedViT.check_outputs`.)
            RuntimeError: the engine was released, or the requested backend failed.
        """
        change = self._change()
        with self.alone():
            images = self._taken(images)
            self._follow(change)
            if adapter_names is not None:
                found = self._mixed(images, adapter_names)
                if images.device.type == "cpu":
                    for i, (name, output) in enumerate(zip(adapter_names, found, strict=True)):
                        self._adapters[name].check_outputs(images[i : i + 1], output[None])
                return found
            outputs, start = [], 0
            for size in self._sizes(images):
                outputs.append(self._run(images[start : start + size], size, self._own))
                start += size
            whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            if images.device.type == "cpu":
                self.model.check_outputs(images, whole)
            return whole

    def add_adapter(self, name: str, model: PromptedViT | str | os.PathLike[str]) -> None:
        """Serve images of adapter `name` with `model` from the next call on; replace an adapter with that name.

        The engine takes a copy: if the model trains further, add it again. Raw pixels of its images are normalised by
        the mean and std of the model's own backbone.

        Args:
            name: any string but "__base__", and but "default" if the engine was created with a model.
            model: a `PromptedViT` on this backbone, or a directory or Hub repository that `PromptedViT.from_pretrained`
                takes.

        Raises:
            TypeError, ValueError: an argument is invalid, or the adapter is damaged or belongs to another backbone.
            FileNotFoundError: there is no adapter in the directory.
            RuntimeError: the engine was released, or this thread is changing the model (`model.changing()`).
        """
        self._check_name(name)
        if not isinstance(model, (PromptedViT, str, os.PathLike)):
            raise ArgumentTypeError("model", f"must be a PromptedViT or a directory, got {type(model).__name__}")
        with self._lock:
            self._check_open()
            backbone = self._backbone
            if self._source is not None and self._source.full:
                raise ValueError("this engine serves a fully fine-tuned model, whose backbone no adapter shares")
        if not isinstance(model, PromptedViT):
            model = PromptedViT.from_pretrained(backbone, model)
        if model.full:
            raise ValueError("model was fully fine-tuned and has a backbone of its own: give it an engine of its own")
        if not backbone.is_same(model.backbone):
            raise ArgumentError(
                "model",
                f"is on another backbone, {model.backbone.spec.name} with fingerprint "
                f"{model.backbone.fingerprint[:12]}; this engine's is {backbone.spec.name} with "
                f"{backbone.fingerprint[:12]}",
            )
        with _whole(model):
            adapter = _copy_adapter(model, backbone)
        with self.alone():
            self._forget(name)
            self._adapters[name] = adapter
            self._pixels[name] = backbone.normalising_by(model.backbone.mean, model.backbone.std)

    def delete_adapter(self, name: str) -> None:
        """Stop serving this adapter and free its memory.

        Raises:
            ValueError: there is no such adapter, or it was not added.
            RuntimeError: the engine was released.
        """
        self._check_name(name)
        with self._lock:
            self._check_open()
            if name not in self._adapters:
                raise ArgumentError(
                    "name", f"is {name!r}, which is no adapter of this engine; it has {self.adapter_names}"
                )
            self._forget(name)
            del self._adapters[name]

    @property
    def adapter_names(self) -> list[str]:
        """The names that a call can use, in the order in which they were added."""
        with self._lock:
            return list(self._adapters)

    @property
    def measured(self) -> dict[Signature, Measured]:
        """The measurements of the backends, by batch signature."""
        return self.measured_of(self._own)

    def measured_of(self, name: str) -> dict[Signature, Measured]:
        """Return the measurements of the backends for batches of this adapter alone, by signature; see `warm_up`."""
        with self._lock:
            return {signature: known for (adapter, signature), known in self._measured.items() if adapter == name}

    def warm_up(self, image_dtype: torch.dtype = torch.float32, adapter_names: Sequence[str] = ()) -> None:
        """Prepare backends for every batch size now, not at its first batch. `torch.compile` can take minutes.

        Args:
            image_dtype: dtype of the images to come, torch.uint8 (raw pixels) or a floating-point dtype.
            adapter_names: adapters to prepare. From now on, until such an adapter is replaced, a batch of exactly
                one of these sizes that belongs entirely to this adapter runs on a backend; other batches run as
                before. Each adapter has its own functions, from the backend that was fastest for the engine's own
                model. "compile" and "openvino" put a copy of the backbone into each function.

        Raises:
            ValueError: an argument is invalid, or needs more functions than an engine keeps.
            RuntimeError: the engine was released, or the requested backend failed.
        """
        if image_dtype != torch.uint8 and not image_dtype.is_floating_point:
            raise ArgumentError("image_dtype", f"must be torch.uint8 or a floating-point dtype, got {image_dtype!r}")
        change = self._change()
        with self.alone():
            self._follow(change)
            for name in adapter_names:
                if name not in self._adapters:
                    raise ArgumentError("adapter_names", f"has {name!r}, which is no adapter of this engine")
            names = self._unmixed | {self._own, *adapter_names}
            if len(names) * len(self.batch_sizes) > KEPT:
                raise ArgumentError(
                    "adapter_names",
                    f"must be at most {KEPT // len(self.batch_sizes) - 1} names: an engine keeps {KEPT} functions, one "
                    f"for each of its {len(self.batch_sizes)} batch sizes of each adapter and of its own model, got "
                    f"{len(names - {self._own})}",
                )
            shape = (self._backbone.channels, *self._backbone.image_size)
            for size in self.batch_sizes:
                images = self._taken(torch.zeros(size, *shape, dtype=image_dtype, device=self._backbone.device))
                self(images)
                for name in adapter_names:
                    self._run(self._normalised(images, [name] * size), size, name)
            self._unmixed |= set(adapter_names)

    def refresh(self) -> None:
        """Copy the model's generator and head again, however they were changed.

        Raises:
            RuntimeError: the engine was released, or this thread is changing the model (`model.changing()`).
        """
        source = self._open_source()
        if source is not None:
            with _whole(source):
                change = self._take(source)
            with self.alone():
                self._follow(change)

    def release(self) -> None:
        """Free the engine's resources after the running call. Later calls raise RuntimeError."""
        with self._lock:
            self._released, self._source = True, None
            for held in (self._runs, self._measured, self._adapters, self._pixels):
                held.clear()
            self.__dict__.pop("_backbone", None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def save_choices(self, path: str | os.PathLike[str]) -> None:
        """Write what this engine has chosen by measurement so far, backends and implementations of ops, for `choices=`.

        Call `warm_up` first. The file is JSON.

        Raises:
            OSError: it cannot be written.
            RuntimeError: the engine was released.
        """
        with self._lock:
            self._check_open()
            content = {"format": CHOICES, "made": dict(sorted(self._choices.made.items()))}
        atomic_write(path, json.dumps(content, indent=1).encode())

    def describe(self) -> str:
        """Return dtype, threads, batch sizes and adapters in one line."""
        with self._lock:
            self._check_open()
            added = len(self._adapters) - 1 - (self._source is not None)
            return (
                f"{self.backend} engine in {self.precision} on {self._backbone.device} "
                f"with {torch.get_num_threads()} threads, batches of {', '.join(map(str, self.batch_sizes))}, "
                f"{added} added adapters" + (f"\nnot int8: {self.not_int8}" if self.not_int8 else "")
            )

    @property
    def precision(self) -> str:
        """The number format of the frozen Linears: "int8", "bfloat16", "float16", "float32" or "float64"."""
        return "int8" if self.int8 is not None else str(self.dtype).removeprefix("torch.")

    @property
    def model(self) -> PromptedViT:
        """The engine's copy of the model, which calls without names run; do not change it."""
        with self._lock:
            self._check_open()
            return self._adapters[self._own]

    def _check_open(self) -> None:
        if self._released:
            raise RuntimeError("this engine was released; make a new one")

    def _check_name(self, name: str) -> None:
        own = (BASE,) if self._source is None else (BASE, DEFAULT)
        if not isinstance(name, str) or name in own:
            raise ArgumentError("name", f"must be a text other than {own}, got {name!r}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which no other thread's call runs, on host and device, and gradients and autocast are off."""
        with self._lock:
            self._check_open()
            device = self._backbone.device
            if self._written is not None:
                self._written.read()
            try:
                with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                    with stopwatch.kept(self._choices):
                        yield
            finally:
                self._written = Written(device)

    def _open_source(self) -> PromptedViT | None:
        with self._lock:
            self._check_open()
            return self._source

    def _change(self) -> _Change | None:
        """Return the model's new state if it has changed. Called before the engine is locked, since it may wait."""
        source = self._open_source()
        if source is None or self._seen.same(tensors_of(*source.own_parts()), _facts(source)):
            return None
        with unchanging(source, source.own_parts(), PATIENCE) as whole:
            return self._take(source) if whole else None

    def _take(self, source: PromptedViT) -> _Change:
        """Return the model's current state. The caller ensures that nobody changes the model meanwhile."""
        number, model = next(self._states), None
        with torch.inference_mode(False), torch.no_grad():
            seen, current = _look(source), tensors_of(*source.own_parts())
            tensors = seen.copies if isinstance(seen, SeenValues) else [tensor.clone() for tensor in current]
            if seen.facts != self._seen.facts or not _fit(tensors, self.model):
                model = _copy_adapter(source, self._backbone)
        return _Change(number, seen, tensors, model)

    def _follow(self, change: _Change | None) -> None:
        """Run the model in its changed state from now on, unless another thread brought a later one."""
        if change is None or change.number < self._state:
            return
        if change.model is not None:
            self._adapters[DEFAULT] = change.model
            self._drop_runs(DEFAULT)
        if not _fit(change.tensors, self.model):  # taken before another thread brought a replaced part
            return
        for new, old in zip(change.tensors, tensors_of(*self.model.own_parts()), strict=True):
            old.copy_(new)
        self.model.refresh()
        self._drop_runs(DEFAULT, only_baked=True)
        self._state, self._seen = change.number, change.seen

    def _taken(self, images: Tensor) -> Tensor:
        """Check that images fit the backbone and return them in the dtype that backends are built for."""
        self._backbone.check_images(images)
        return images.to(torch.promote_types(self.dtype, torch.float32)) if images.is_floating_point() else images

    def _normalised(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Normalise raw pixels by each image's own adapter if one of them differs from the backbone."""
        own = [self._pixels.get(name, self._backbone) for name in names]
        if images.dtype != torch.uint8 or all(backbone is self._backbone for backbone in own):
            return images
        return torch.cat([backbone.normalise(images[i : i + 1]) for i, backbone in enumerate(own)])

    def _drop_runs(self, adapter: str, only_baked: bool = False) -> None:
        """Drop an adapter's functions, so that they are rebuilt before they run."""
        for key in [key for key in self._runs if key[0] == adapter]:
            if BACKENDS[key[1]].bakes or not only_baked:
                del self._runs[key]

    def _forget(self, adapter: str) -> None:
        """Forget everything about an adapter's backends."""
        self._drop_runs(adapter)
        self._unmixed.discard(adapter)
        self._pixels.pop(adapter, None)
        for key in [key for key in self._measured if key[0] == adapter]:
            del self._measured[key]

    def _sizes(self, images: Tensor) -> list[int]:
        """Return the batch sizes in which `images` run."""
        batch, largest = len(images), self.batch_sizes[-1]
        fits = next((size for size in self.batch_sizes if size >= batch), largest)
        known = self._measured.get((self._own, _signature(images, fits)))
        if batch == 0 or self.backend == "eager" or (known is not None and BACKENDS[known.chosen].any_batch):
            return [largest] * (batch // largest) + [fits] * (batch % largest > 0 or batch == 0)
        return cover(batch, self.batch_sizes)

    def _run(self, images: Tensor, size: int, adapter: str) -> Tensor:
        """Compute an adapter's output for at most `size` images."""
        model = self._adapters[adapter]
        if len(images) == 0:
            return model(images)
        signature = _signature(images, size)
        if (adapter, signature) not in self._measured:
            self._measured[adapter, signature] = self._measure(adapter, signature)
        measured = self._measured[adapter, signature]
        backend, padding = BACKENDS[measured.chosen], size - len(images)
        if padding and not backend.any_batch:
            images = torch.cat([images, images.new_zeros(padding, *images.shape[1:])])
        try:
            return self._function(adapter, measured.chosen, signature)(images)[: size - padding]
        except Exception as error:
            if measured.chosen == "eager":
                raise
            if self.backend != "auto":
                raise RuntimeError(f"backend {self.backend!r} failed: {error}") from error
            measured.reasons[measured.chosen] = f"it failed: {_first_line(error)}"
            warnings.warn(
                f"{measured.chosen} failed on a batch of {size}, eager runs from now on: {_first_line(error)}",
                stacklevel=5,
            )
            self._runs.pop((adapter, measured.chosen, signature), None)
            measured.chosen = "eager"
            return model(images)[: size - padding]

    def _function(self, adapter: str, name: str, signature: Signature) -> Run:
        """Return a backend's function, building it if needed."""
        key = (adapter, name, signature)
        if key not in self._runs:
            run = BACKENDS[name].build(self._adapters[adapter], _examples(signature, self._backbone))
            while len(self._runs) >= KEPT:
                del self._runs[next(iter(self._runs))]
            self._runs[key] = run
        return self._runs[key]

    def _measure(self, adapter: str, signature: Signature) -> Measured:
        """Try every backend on random images and choose the fastest one whose outputs match eager's.

        For an added adapter, try only eager and the backend chosen for the engine's own model, once that is known.
        """
        if self.backend != "auto":
            return Measured(self.backend)
        own = self._measured.get((self._own, signature))
        names = (self.backends or BACKENDS) if own is None else ("eager", own.chosen)
        tried = {name: BACKENDS[name] for name in dict.fromkeys(names)}
        images, expected = _examples(signature, self._backbone), None
        found, runs = Measured("eager"), {}
        key = ("backend", str(self._adapters[adapter].config), adapter, signature, tuple(tried))
        before = self._choices.recall(key) if str(key) in self._given else None
        if before is not None and before in tried:
            tried = {name: tried[name] for name in dict.fromkeys(("eager", before))}
        for name, backend in tried.items():
            reason = backend.reason(self._adapters[adapter])
            if not reason:
                try:
                    run = self._function(adapter, name, signature)
                    output = run(images).double()
                    expected = output if expected is None else expected
                    error = float((output - expected).norm() / expected.norm().clamp_min(1e-30))
                    reason = "" if error <= TOLERANCE[self.dtype] else f"its output is off by {error:.2g}"
                except Exception as failure:
                    if name == "eager":
                        raise
                    reason = f"it failed: {_first_line(failure)}"
            if reason:
                found.reasons[name] = reason
            else:
                runs[name] = run
        if before is not None and before in runs:
            found.chosen = before
        elif len(runs) > 1:
            rounds: dict[str, list[float]] = {name: [] for name in runs}
            for _, name in itertools.product(range(ROUNDS), runs):
                rounds[name].append(_seconds(functools.partial(runs[name], images), images.device))
            found.seconds = {name: statistics.median(times) for name, times in rounds.items()}
            found.chosen = min(found.seconds, key=lambda name: found.seconds[name])
        for name in tried:
            if name != found.chosen:
                self._runs.pop((adapter, name, signature), None)
        self._choices.note(key, found.chosen)
        return found

    def _mixed(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != len(images):
            raise ArgumentError("adapter_names", f"must be a list of {len(images)} names, one per image, got {names!r}")
        for i, name in enumerate(names):
            if name not in self._adapters:
                raise ValueError(
                    f"adapter_names[{i}] is {name!r}, which is no adapter of this engine; it has "
                    f"{list(self._adapters)[:20]}"
                )
        images = self._normalised(images, names)
        largest, found = self.batch_sizes[-1], list[Tensor]()
        for start in range(0, len(images), largest):
            part, own = images[start : start + largest], names[start : start + largest]
            if self._runs_unmixed(part, own):
                found += self._run(part, len(part), own[0])
            else:
                found += mixed.outputs(part, [self._adapters[name] for name in own])
        return found

    def _runs_unmixed(self, images: Tensor, names: Sequence[str]) -> bool:
        """Whether a backend is prepared for a batch that belongs entirely to one adapter."""
        if len(set(names)) > 1 or names[0] not in self._unmixed:
            return False
        known = self._measured.get((names[0], _signature(images, len(images))))
        return known is not None and known.chosen != "eager"


def read_choices(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file of `Engine.save_choices`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file; the error names `choices`.
    """
    content = parse_json(Path(path).read_bytes(), path)
    made = content.get("made") if isinstance(content, dict) and content.get("format") == CHOICES else None
    if not isinstance(made, dict) or not all(isinstance(name, str) for name in made.values()):
        raise ArgumentError("choices", f"must be a file that Engine.save_choices wrote, {os.fspath(path)} is none")
    return made


def cover(batch: int, sizes: Sequence[int]) -> list[int]:
    """Return sizes, largest first, that hold `batch` images at least cost: their sum, plus `CALL_IMAGES` per call."""
    largest = max(sizes)
    whole = max(0, batch // largest - 1)
    best: list[tuple[int, list[int]]] = [(0, [])]  # cost and sizes for 0, 1, 2, ... images
    for images in range(1, batch - whole * largest + 1):
        options = ((size, *best[max(0, images - size)]) for size in sizes)
        best.append(min((size + CALL_IMAGES + cost, [size, *others]) for size, cost, others in options))
    return [largest] * whole + sorted(best[-1][1], reverse=True)


def _signature(images: Tensor, size: int) -> Signature:
    return size, (images.shape[2], images.shape[3]), images.dtype


def _examples(signature: Signature, backbone: FrozenViT) -> Tensor:
    """Return random images for a backbone, leaving torch's random state unchanged."""
    size, (height, width), dtype = signature
    random, shape = torch.Generator().manual_seed(0), (size, backbone.channels, height, width)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=random, dtype=dtype).to(backbone.device)
    return torch.randn(shape, generator=random, dtype=dtype).to(backbone.device)


def _seconds(run: Any, device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _copy_backbone(backbone: FrozenViT, dtype: torch.dtype, int8: Int8Weights | None = None) -> FrozenViT:
    """Return the engine's own backbone, which nobody casts, moves or trains."""
    backbone.pin_fingerprint()
    with torch.inference_mode(False):
        copied = copy.deepcopy(backbone).requires_grad_(False).to(dtype)
    copied.set_copies("folded")
    folded, copied.private = copied.folded(), True
    if int8 is not None:
        int8.put_into(copied)
    elif folded is not None:
        for block in folded.blocks:
            pack(block)
    return copied


def _copy_adapter(model: PromptedViT, backbone: FrozenViT) -> PromptedViT:
    """Return a frozen copy of the model on the engine's backbone.

    Prompts that are parameters are kept in the backbone's dtype, with their keys and values.
    """
    with torch.inference_mode(False):
        copied = copy.deepcopy(model, {id(model.backbone): backbone})
    copied.eval().requires_grad_(False).set_grad_checkpointing(False)
    copied.set_graph("rewritten")
    copied._autocast, copied.private = None, True
    for part in (copied.generator, copied.head):
        if part is not None:
            part.to(backbone.device)
    generator = copied.generator
    if (
        generator is not None
        and generator.known_at == "static"
        and not any(isinstance(module, nn.Linear) for module in generator.modules())
    ):
        generator.to(backbone.dtype)
    with torch.no_grad():
        copied.kept_prefixes()
    return copied


@contextmanager
def _whole(model: PromptedViT) -> Iterator[None]:
    """Wait until no other thread is changing the model, and keep others from changing it."""
    with unchanging(model, model.own_parts()) as whole:
        if not whole:
            raise RuntimeError("model is being changed by this thread: end `with model.changing()` first")
        yield


def _look(model: PromptedViT) -> Seen:
    """Record the model's state. A backbone that trains is too large to be compared by value in every call."""
    tensors, facts = tensors_of(*model.own_parts()), _facts(model)
    if model.full and not any(tensor.is_inference() for tensor in tensors):
        return SeenObjects(tensors, facts, waits=True)
    return SeenValues(tensors, facts)


def _facts(model: PromptedViT) -> tuple[Any, ...]:
    """Return what else a copy of the model depends on."""
    parts = (model.generator, model.head, model.backbone)
    return (model.readout, *(None if part is None else weakref.ref(part) for part in parts))


def _fit(tensors: Sequence[Tensor], model: PromptedViT) -> bool:
    """Whether these tensors can be copied into the model's own."""
    pairs = itertools.zip_longest(tensors, tensors_of(*model.own_parts()))
    return all(new is not None and old is not None and new.shape == old.shape for new, old in pairs)
