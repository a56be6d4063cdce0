"""CUDA graphs of a `PromptedViT`: capture a forward or a training step once and replay it with one launch.

At small batches a GPU waits for the host, which launches hundreds of kernels one by one. A graph launches them all at
once, but it repeats what was captured on the same memory. So everything that a graph reads has a fixed address:

* Images and outputs are in static buffers of the largest batch size. A batch is padded to the next captured size. The
  contents of the padding rows do not matter, since no row of an inference batch reads another.
* Parameters stay in place. The next replay reads in-place changes directly. Rebinding a parameter (`p.data = ...`, a
  load with `assign=True`, `model.to(...)`) changes its address, which is checked before the replay. So are the folded
  weights of a changed backbone. If an address has changed, the graphs are captured again.
* Keys and values of static prompts (VPT) are kept outside the graphs, since inference computes them once per adapter
  and not once per batch. Before a replay, the model checks whether they are still valid
  (`PromptedViT.kept_prefixes`, which compares the prompts by value and so waits for the device). New ones are copied
  into the same memory.
* The noise of a sampling V²APT comes from a (seed, offset) tensor, which the graph itself advances.

The graphs of one manager share a memory pool, captured from the largest batch down, and run one at a time. Every call
takes the manager's lock and, if the previous call was on another stream, waits for it on the device. Any thread may
call.

All of this is written against `Capturer`, the few operations that a device must support. `CudaCapturer` is the real
one; the tests use one that records the operations of a CPU.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.kept import SeenObjects
from fastprompt.kernels import dispatch
from fastprompt.model import PromptedViT
from fastprompt.vit.prompts import NO_DRAWS, Draws, Prefix

MODE = "max-autotune-no-cudagraphs"  # of a compiled forward, which is captured by us
WARM_UPS = 3  # runs before a capture, in which kernels are compiled and libraries choose algorithms and workspaces
MAX_FORMS = 4  # number of image forms, each a dtype and size, for which one manager keeps graphs
MANY_DROPS = 3  # number of recaptures before a warning
NO_EFFECT_AT_INFERENCE = (
    "beta",
    "channel_dropout",
    "hidden_dropout",
    "prompt_dropout",
    "dropout_per",
    "pretrained_trunk",
    "group_lasso",
)

Loss = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
Predict = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class Graph(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Run it again on the current stream, without waiting for it to finish."""

    def reset(self) -> None:
        """Free it and its memory in the pool."""


class Capturer(Protocol):
    """The device operations that a manager needs."""

    def pool(self) -> Any:
        """Return a new memory pool that graphs can share as long as they run one at a time."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run `function` on the capture stream; make the current stream wait for it."""

    def capture(self, function: Callable[[], None], pool: Any) -> Graph:
        """Record what `function` launches, without running it. Raises if it cannot be recorded."""

    def mark(self) -> Any:
        """Mark the current point of the current stream."""

    def follow(self, mark: Any) -> None:
        """Make the current stream wait for a mark, possibly of another stream."""

    def synchronize(self) -> None:
        """Wait until the device is idle."""


class CudaCapturer:
    """`Capturer` for a CUDA or ROCm device. Other threads may use the device during a capture."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ArgumentError("model", f"must be on a CUDA or ROCm device to be captured, it is on {device}")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self.device)
        self._abandoned: list[torch.cuda.CUDAGraph] = []

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                function()
        finally:
            here.wait_stream(self._stream)

    def capture(self, function: Callable[[], None], pool: Any) -> Graph:
        graph, here, cause = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device), None
        with torch.cuda.device(self.device):
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        function()
                    except Exception as error:
                        cause = error
                        raise
            except Exception as error:
                torch.cuda.set_stream(here)  # if ending a capture fails, torch leaves its stream as the current one
                self._abandon(graph, pool)
                raise cause or error from None
        return graph

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Stop the allocator from using the pool of a capture that failed to end, and from asking its graph when to."""
        graph.reset()
        self._abandoned.append(graph)
        with contextlib.suppress(RuntimeError):  # it had already ended
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
            torch._C._cuda_releasePool(self.device.index, pool)

    def mark(self) -> Any:
        stream = torch.cuda.current_stream(self.device)
        return stream, stream.record_event()

    def follow(self, mark: Any) -> None:
        (stream, event), here = mark, torch.cuda.current_stream(self.device)
        if here != stream:
            here.wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class Signature(NamedTuple):
    """The key of a captured graph: `form` is (dtype, height, width) of the images and the requested kernel backend."""

    batch: int
    form: tuple[Any, ...]
    backbone: torch.dtype
    method: str

    def __str__(self) -> str:
        dtype, height, width, backend, *_ = self.form
        return (
            f"batch {self.batch} of {height} x {width} images in {dtype}, backbone in {self.backbone}, "
            f"kernels {backend!r}, {self.method}"
        )


def method_shape(model: PromptedViT) -> Hashable:
    """Return a key that is equal for models that can share a graph, each with its own parameters.

    It covers method and options (except those that only affect training), readout, head, and all parameter shapes.
    """
    options = {k: v for k, v in model.config.to_dict().items() if k not in NO_EFFECT_AT_INFERENCE}
    head = {} if model.head is None else model.head.describe()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.adapter_state_dict().items()}
    return (*options.items(), ("readout", model.readout), ("head", *head.items()), *shapes.items())


class _Graphs:
    """The graphs of one model, in one pool and behind one lock.

    Attributes:
        eager: signatures that run eagerly, and the reason for each.
        captures: the number of graphs captured so far.
    """

    def __init__(self, model: PromptedViT, capturer: Capturer | None) -> None:
        if not isinstance(model, PromptedViT):
            raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
        self.model, self.device = model, model.backbone.device
        self.capturer: Capturer = CudaCapturer(self.device) if capturer is None else capturer
        self.eager: dict[Signature, str] = {}
        self.captures = 0
        self._lock = threading.RLock()
        self._released = False
        self._graphs: dict[Signature, Graph] = {}
        self._pool: Any = None
        self._mark: Any = None
        self._drops = 0
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._read: SeenObjects | None = None  # the tensors and facts at the time of capture

    @contextlib.contextmanager
    def _turn(self, grad: bool = False) -> Iterator[None]:
        """Admit one caller at a time, on the host and on the device, with torch's modes set to known values."""
        with self._lock:
            if self._released:
                raise RuntimeError(f"this {type(self).__name__} was released; make a new one")
            if self.model.backbone.device != self.device:
                raise ValueError(
                    f"model was moved from {self.device} to {self.model.backbone.device}; make a new "
                    f"{type(self).__name__}"
                )
            if self._mark is not None:
                self.capturer.follow(self._mark)
            try:
                with (
                    torch.inference_mode(False),
                    torch.set_grad_enabled(grad),
                    torch.autocast(self.device.type, enabled=False, cache_enabled=False),
                ):
                    yield
            finally:
                self._mark = self.capturer.mark()

    def _signature(self, batch: int, form: tuple[Any, ...]) -> Signature:
        model = self.model
        head = "no head" if model.head is None else f"head {model.head.kind!r} of {model.num_classes} classes"
        return Signature(batch, form, model.backbone_dtype, f"{model.config}, {head}, readout {model.readout!r}")

    def _facts(self) -> tuple[Any, ...]:
        """Return what graphs assume besides the tensors' addresses: modules and switches.

        Folded blocks represent the backbone's own blocks; `folded` detects their changes.
        """
        model, generator = self.model, self.model.generator
        folded = model.backbone.folded()
        parts = (model.backbone, generator, model.head, None if folded is None else folded.blocks[0])
        if self._read is None:
            modules = list(model.modules())
            if folded is not None:
                unread = {module for block in model.backbone.blocks for module in block.modules()}
                modules = [module for module in modules if module not in unread]
                folds = (*folded.blocks, folded.pixels)
                modules += [module for part in folds if part is not None for module in part.modules()]
            self._slots = [
                (slots, name) for module in modules for slots in (module._parameters, module._buffers) for name in slots
            ]
        return (
            *(None if part is None else weakref.ref(part) for part in parts),
            None if generator is None else generator.config,
            model.readout,
            model.backbone_dtype,
        )

    def _look(self) -> SeenObjects:
        """Record the state that graphs captured now depend on."""
        facts = self._facts()  # also finds the slots
        return SeenObjects(self._read_tensors(), facts, contents=False)

    def _read_tensors(self) -> list[Tensor]:
        """Return all tensors whose memory a graph reads; none for a private model, whose owner keeps them in place."""
        return [] if self.model.private else self._tensors()

    def _tensors(self) -> list[Tensor]:
        """Return the current parameters and buffers; their number changes if one was added or removed."""
        return [tensor for slots, name in self._slots if (tensor := slots.get(name)) is not None]

    def _drop_if_rebound(self) -> None:
        """Drop the graphs if something that they read has a different address now."""
        if self._read is None or self._read.same(self._read_tensors(), self._facts()):
            return
        self._drop()
        self._drops += 1
        if self._drops == MANY_DROPS:
            warnings.warn(
                f"the graphs of this {type(self).__name__} had to be captured again {MANY_DROPS} times, as "
                "parameters were rebound or options changed; that takes far longer than a call. Change "
                "parameters in place",
                stacklevel=4,
            )

    def _drop(self) -> None:
        self.capturer.synchronize()
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._slots.clear()
        self._pool = self._read = None

    def _capture(self, signature: Signature, function: Callable[[], None]) -> Graph | None:
        """Capture `function` as a graph; None if it must run eagerly, as known before or found now."""
        if signature in self.eager:
            return None
        try:
            self._pool = self.capturer.pool() if self._pool is None else self._pool
            with dispatch.for_graphs():
                graph = self.capturer.capture(function, self._pool)
        except Exception as error:
            self._pool = None  # it may be unusable now; the graphs in it keep it alive
            self._run_eagerly(signature, f"{type(error).__name__}: {error}")
            return None
        self._graphs[signature] = graph
        self.captures += 1
        return graph

    def _warm_up(self, function: Callable[[], None]) -> None:
        """Run what is to be captured; ops choose between their implementations as they are fast in graphs."""
        with dispatch.for_graphs():
            self.capturer.warm_up(function)

    def _run_eagerly(self, signature: Signature, reason: str) -> None:
        if signature not in self.eager:
            self.eager[signature] = reason
            warnings.warn(f"no CUDA graph for {signature}: it runs eagerly. {reason}", stacklevel=6)

    def release(self) -> None:
        """Free graphs, pool and buffers once the device has finished with them. Later calls raise RuntimeError."""
        with self._lock:
            if not self._released:
                self._drop()
                self._released = True


class _Form:
    """Graphs by batch size for images of one dtype and size, with static buffers for the largest batch.

    images: (B, 3, H, W). output: (B, C) or (B, D).
    """

    def __init__(self, images: Tensor, output: Tensor) -> None:
        self.images, self.output = images, output
        self.graphs: dict[int, Graph] = {}


class GraphedForward(_Graphs):
    """The whole inference forward of a model, including the generator, as CUDA graphs: `graphed(images)` → logits.

    There is one graph per batch size, image dtype and image size, captured when such images first arrive. Smaller
    batches are padded and larger ones split. Anything that cannot be captured runs eagerly, with one warning per
    signature. The model must stay in eval mode. Outputs have no gradient, and `torch.autocast` around a call has no
    effect: the model's own dtypes apply. For threads and changing parameters see the module's docstring; for adapters
    see `load_adapter`.

    Args:
        model: on a CUDA or ROCm device.
        batch_sizes: the batch sizes to capture.
        seed: for a V²APT with `inference_samples` > 0, each replay draws new noise for its images from this seed. None:
            the same noise for every image and call, as in the model itself.
        compiled: capture what `torch.compile` makes of the forward (mode "max-autotune-no-cudagraphs"), the ops of
            fastprompt inside it. The first batch of each size takes minutes. Parameters are read in place all the same.
        capturer: how to capture; None: on the model's device.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it.
    """

    def __init__(
        self,
        model: PromptedViT,
        batch_sizes: Iterable[int] = (1, 8, 32),
        *,
        seed: int | None = None,
        compiled: bool = False,
        capturer: Capturer | None = None,
    ) -> None:
        super().__init__(model, capturer)
        self._predict: Predict = torch.compile(model.predict, mode=MODE, dynamic=False) if compiled else model.predict
        try:
            sizes = sorted(set(batch_sizes), reverse=True)
        except TypeError as error:
            raise ArgumentTypeError("batch_sizes", f"must be positive integers, got {batch_sizes!r}") from error
        if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise ArgumentError("batch_sizes", f"must be positive integers, at least one, got {batch_sizes!r}")
        if seed is not None and not getattr(model.config, "inference_samples", 0):
            raise ArgumentError(
                "seed",
                "is for a V2APT with inference_samples of at least 1; this model draws no noise at "
                f"inference: {model.config}",
            )
        self.batch_sizes: tuple[int, ...] = tuple(sizes)
        self._forms: dict[tuple[Any, ...], _Form | None] = {}
        self._samples: Sequence[Draws] = ()
        self._prefixes: dict[int, Prefix] | None = None
        self._source: dict[int, Prefix] | None = None  # what the model had cached when `_prefixes` were written
        self._borrower: int | None = None
        self._noise: Tensor | None = None  # (2,) int64, seed and offset
        if seed is not None:
            self._noise = torch.zeros(2, dtype=torch.int64, device=self.device)
            self.manual_seed(seed)

    def __call__(self, images: Tensor, *, borrow: bool = False) -> Tensor:
        """Compute logits (B, C), or features (B, D) for a model without a head.

        Args:
            images: (B, 3, H, W), as for the model; B may be 0 or exceed the largest of `batch_sizes`.
            borrow: return the static buffer's rows instead of a copy. They are valid on this stream until this thread's
                next call; until then, calls from other threads raise. A batch that was split or ran eagerly returns a
                tensor of its own.

        Raises:
            TypeError, ValueError: `images` are invalid.
            RuntimeError: the model is in training mode, another thread has a borrowed output, or `release` was called.
        """
        with self._turn():
            self.model.backbone.check_images(images)
            if self.model.training:
                raise RuntimeError("the model is in training mode, its graphs are of inference; call model.eval()")
            if self._borrower not in (None, threading.get_ident()):
                raise RuntimeError(
                    "another thread holds the output that it borrowed, which this call would overwrite; "
                    "threads that share a GraphedForward must not use borrow=True"
                )
            self._borrower = None
            self._settle()
            count, largest = len(images), self.batch_sizes[0]
            if count == 0:
                return self._forward(images)
            if count > largest:
                return torch.cat([self._replay(images[i : i + largest])[0].clone() for i in range(0, count, largest)])
            output, static = self._replay(images)
            if static and borrow:
                self._borrower = threading.get_ident()
            return output.clone() if static and not borrow else output

    def prepare(self, images: Tensor) -> None:
        """Capture all batch sizes now for images of this dtype and size. `images` must have at least one row.

        Raises:
            TypeError, ValueError: `images` are invalid.
        """
        self.model.backbone.check_images(images)
        if not len(images):
            raise ArgumentError("images", "must hold at least one image to capture from, got none")
        self(images[:1])

    def load_adapter(self, adapter: PromptedViT | Mapping[str, Tensor]) -> None:
        """Serve another adapter with the same method shape: copy its parameters into the model without a new capture.

        Args:
            adapter: a model on the same backbone, or the result of its `adapter_state_dict()`.

        Raises:
            TypeError, ValueError: it has another `method_shape` or backbone; nothing changes in this case.
        """
        if isinstance(adapter, PromptedViT):
            if not self.model.backbone.is_same(adapter.backbone):
                raise ArgumentError(
                    "adapter",
                    "is of another backbone: fingerprint "
                    f"{adapter.backbone.fingerprint[:12]}, the graphs have "
                    f"{self.model.backbone.fingerprint[:12]}",
                )
            ours, theirs = method_shape(self.model), method_shape(adapter)
            if ours != theirs:
                raise ArgumentError(
                    "adapter", f"has another method shape than the model that was captured: {theirs}, not {ours}"
                )
            adapter = adapter.adapter_state_dict()
        with self._turn():
            self.model.load_adapter_state_dict(adapter)

    def refresh(self) -> None:
        """Pick up changes that no call detects: a write through `.data` to a frozen backbone (`FrozenViT.refold`)."""
        with self._turn():
            self.model.backbone.refold()

    def manual_seed(self, seed: int) -> None:
        """Restart the noise from `seed`, at offset 0.

        Raises:
            ValueError: `seed` is not an integer from 0 to 2⁶³ − 1, or this manager was created without a seed.
        """
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ArgumentError("seed", f"must be an integer from 0 to 2^63 - 1, got {seed!r}")
        with self._turn():
            if self._noise is None:
                raise ArgumentError("seed", "must be given when a GraphedForward is made, this one was made without")
            self._noise[0].fill_(seed)
            self._noise[1].fill_(0)

    def _settle(self) -> None:
        """Update what is kept outside the graphs."""
        self._drop_if_rebound()
        generator, current = self.model.generator, self.model.kept_prefixes()
        if self._read is None:
            self._samples = [NO_DRAWS] if generator is None else generator.inference_draws()
            self._source = current
            if current is not None:
                self._prefixes = {i: tuple(part.clone() for part in parts) for i, parts in current.items()}
            self._read = self._look()
        elif self._prefixes is not None and current is not self._source:
            for layer, parts in (current or {}).items():
                for kept, new in zip(self._prefixes[layer], parts, strict=True):
                    kept.copy_(new)
            self._source = current

    def _replay(self, images: Tensor) -> tuple[Tensor, bool]:
        """Compute outputs for 1 to `batch_sizes[0]` images; also return whether they are in the static buffer."""
        key = (images.dtype, *images.shape[2:], dispatch.wanted())
        if key not in self._forms:
            self._capture_form(images, key)
        count, form = len(images), self._forms[key]
        graph = None if form is None else form.graphs.get(min(b for b in self.batch_sizes if b >= count))
        if form is None or graph is None:
            return self._forward(images), False
        form.images[:count].copy_(images)
        graph.replay()
        return form.output[:count], True

    def _capture_form(self, images: Tensor, key: tuple[Any, ...]) -> None:
        """Capture the graphs of all batch sizes, largest first, so that the others fit into its memory."""
        signatures = [self._signature(batch, key) for batch in self.batch_sizes]
        if sum(form is not None for form in self._forms.values()) == MAX_FORMS:
            self._forms[key] = None
            for signature in signatures:
                self._run_eagerly(signature, f"graphs for {MAX_FORMS} kinds of images are held already")
            return
        noise = None if self._noise is None else self._noise.clone()
        first = self._forward(images[:1])  # invalid images or models raise here
        largest = self.batch_sizes[0]
        form = _Form(images.new_zeros(largest, *images.shape[1:]), first.new_zeros(largest, *first.shape[1:]))
        for signature in signatures:
            graph = self._capture_batch(signature, form)
            if graph is not None:
                form.graphs[signature.batch] = graph
        self._forms[key] = form
        if self._noise is not None and noise is not None:
            self._noise.copy_(noise)

    def _capture_batch(self, signature: Signature, form: _Form) -> Graph | None:
        images, output = form.images[: signature.batch], form.output[: signature.batch]

        def function() -> None:
            output.copy_(self._forward(images, self._predict))

        try:
            for _ in range(0 if signature in self.eager else WARM_UPS):
                self._warm_up(function)
        except Exception as error:  # most likely out of memory
            self._run_eagerly(signature, f"{type(error).__name__}: {error}")
        return self._capture(signature, function)

    def _forward(self, images: Tensor, predict: Predict | None = None) -> Tensor:
        predict, samples = predict or self.model.predict, self._samples
        if self._noise is None:
            return predict(images, samples, self._prefixes)[0]
        noise, drawn = self._noise, []
        for _ in samples:
            drawn.append({"noise": noise.clone()})
            noise[1].add_(1)
        return predict(images, drawn, self._prefixes)[0]

    def _drop(self) -> None:
        super()._drop()
        self._forms.clear()
        self._samples, self._prefixes, self._source = (), None, None


class _Step:
    """The step for one kind of batch: its graph once captured, static images, labels and loss ()."""

    def __init__(self, signature: Signature, images: Tensor, labels: Tensor, loss: Tensor) -> None:
        self.signature, self.images, self.labels, self.loss = signature, images, labels, loss
        self.graph: Graph | None = None
        self.eager_steps = 0


class GraphedTrainStep(_Graphs):
    """Forward, backward and optimizer step as one CUDA graph: `step(images, labels)` → loss.

    For each kind of batch (size, dtypes, modes), the first `WARM_UPS` steps run eagerly and count as steps; then the
    step is captured. Batches are not padded.

    Gradients stay in place, as with `zero_grad(set_to_none=False)`. Each step restores them if the caller has set them
    to None, and leaves its own gradients there. Learning rates become tensors on the device: set `group["lr"]` or use a
    scheduler as usual. The optimizer's other options, its state and the set of trained parameters are captured; if one
    changes, the graphs are captured again. SGD runs its fused step, the only one that reads the learning rate on the
    device. Dropout masks and latent noise come from torch's generator for the device, as in an eager step.

    Args:
        model: on a CUDA or ROCm device. optimizer: over its parameters: SGD, or one with `capturable=True`.
        loss: (logits (B, C), labels, aux) → (); it must not read tensors on the host. None: cross-entropy, plus
            beta · mean(KL) if the generator has a KL (V²APT).
        compiled: capture what `torch.compile` makes of the model's forward and backward, as `GraphedForward` does.
        capturer: how to capture; None: on the model's device.

    Raises:
        TypeError, ValueError: an argument is invalid (the error names it), or the optimizer's step cannot be captured.
    """

    def __init__(
        self,
        model: PromptedViT,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None = None,
        *,
        compiled: bool = False,
        capturer: Capturer | None = None,
    ) -> None:
        super().__init__(model, capturer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentTypeError("optimizer", f"must be a torch optimizer, got {type(optimizer).__name__}")
        if loss is not None and not callable(loss):
            raise ArgumentTypeError("loss", f"must be a function of (logits, labels, aux), got {type(loss).__name__}")
        self._module = torch.compile(model, mode=MODE, dynamic=False) if compiled else model
        own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in own for parameter in self._parameters):
            raise ArgumentError("optimizer", "must be over parameters of the model that train, it has others")
        make_capturable(optimizer)
        self.optimizer, self.loss = optimizer, cross_entropy(model) if loss is None else loss
        self._rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
        self._grads: dict[nn.Parameter, Tensor | None] = {}  # of all trained parameters, in the optimizer or not
        self._steps: dict[Hashable, _Step] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run one step and return the loss () before it, detached.

        Args:
            images: (B, 3, H, W), as for the model, B ≥ 1. labels: (B, ...), on the same device, as for `loss`.

        Raises:
            TypeError, ValueError: `images` or `labels` are invalid. RuntimeError: `release` was called.
        """
        with self._turn(grad=True):
            self.model.backbone.check_images(images)
            if not isinstance(labels, Tensor):
                raise ArgumentTypeError("labels", f"must be a tensor, got {type(labels).__name__}")
            if not len(images) or labels.shape[:1] != images.shape[:1] or labels.device != images.device:
                raise ArgumentError(
                    "labels",
                    f"must be ({len(images) or 'at least 1'}, ...) on {images.device} as the "
                    f"images, got {tuple(labels.shape)} on {labels.device}",
                )
            self._settle_rates()
            self._drop_if_rebound()
            key = (
                len(images),
                images.dtype,
                *images.shape[2:],
                dispatch.wanted(),
                labels.dtype,
                labels.shape[1:],
                self.model.training,
            )
            if key not in self._steps:
                dtype = torch.promote_types(self.model.backbone.dtype, torch.float32)
                self._steps[key] = _Step(
                    self._signature(key[0], key[1:]),
                    torch.empty_like(images),
                    torch.empty_like(labels),
                    torch.zeros((), device=self.device, dtype=dtype),
                )
            step = self._steps[key]
            with torch.no_grad():
                step.images.copy_(images)
                step.labels.copy_(labels)
            self._run(step)
            return step.loss.clone()

    def _run(self, step: _Step) -> None:
        def function() -> None:
            self.optimizer.zero_grad(set_to_none=False)
            logits, aux = self._module(step.images, return_aux=True)
            loss = self.loss(logits, step.labels, aux)
            loss.backward()
            self.optimizer.step()
            step.loss.copy_(loss.detach())

        for parameter, grad in self._grads.items():
            parameter.grad = grad
        if step.graph is None and step.eager_steps == WARM_UPS:
            step.graph = self._capture(step.signature, function)
            self._read = self._look() if self._graphs else None
        if step.graph is None:
            self._warm_up(function)
            self._grads = {p: p.grad for p in self.model.parameters() if p.requires_grad}
            step.eager_steps = min(step.eager_steps + 1, WARM_UPS)
        else:
            step.graph.replay()
        # replays and fused steps change tensors without a new version, so caches of derived values would not notice
        generator = self.model.generator
        torch.autograd.graph.increment_version([*self._parameters, *(generator.buffers() if generator else ())])

    def _settle_rates(self) -> None:
        """Copy learning rates that were set since the last step into the tensors that graphs read."""
        if len(self.optimizer.param_groups) != len(self._rates):
            raise RuntimeError("optimizer has got another parameter group since; make a new GraphedTrainStep")
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            given = group["lr"]
            if given is rate:
                continue
            with torch.no_grad():
                if isinstance(given, Tensor):
                    rate.copy_(given.squeeze())
                else:
                    rate.fill_(given)
            group["lr"] = rate

    def _facts(self) -> tuple[Any, ...]:
        facts, options = super()._facts(), self._options()
        trains = [tensor.requires_grad for tensor in self._tensors()]
        return (*facts, trains, [value for value in options if not isinstance(value, Tensor)])

    def _read_tensors(self) -> list[Tensor]:
        states = (self.optimizer.state.get(parameter, {}) for parameter in self._parameters)
        others = [value for state in states for value in state.values()] + self._options()
        return super()._read_tensors() + [value for value in others if isinstance(value, Tensor)]

    def _options(self) -> list[Any]:
        return [value for group in self.optimizer.param_groups for name, value in group.items() if name != "params"]

    def _drop(self) -> None:
        super()._drop()
        self._steps.clear()
        for parameter in self._grads:
            parameter.grad = None  # its dtype may be different now
        self._grads.clear()


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Make SGD run its fused step, which reads its learning rate on the device.

    Raises:
        ValueError: the optimizer's step would read tensors on the host, so no graph can capture it.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if isinstance(optimizer, torch.optim.SGD):
        if any(group["differentiable"] for group in groups):
            raise ArgumentError("optimizer", "must not be differentiable to be captured")
        for group in groups:
            group["fused"], group["foreach"] = True, False
        return
    if not all("capturable" in group for group in groups):
        raise ValueError(
            f"optimizer {name} has no step that a CUDA graph can hold; SGD has, and AdamW(..., capturable=True)"
        )
    if not all(group["capturable"] for group in groups):
        raise ValueError(f"optimizer {name} must be made with capturable=True for its step to be captured")


def cross_entropy(model: PromptedViT) -> Loss:
    """Cross-entropy in float32 or wider, plus beta · mean(KL) and a penalty if the model has them, as in `fit`."""
    beta = float(getattr(model.config, "beta", 0.0))

    def loss(logits: Tensor, labels: Tensor, aux: dict[str, Tensor]) -> Tensor:
        value = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        value = value + beta * aux["kl"].mean() if "kl" in aux else value
        return value + aux["penalty"] if "penalty" in aux else value

    return loss
