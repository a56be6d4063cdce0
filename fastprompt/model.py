"""A frozen backbone, a prompt generator and a head in one module."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.adapters import (
    Int8Check,
    Preprocessing,
    as_trained,
    check_sizes,
    config_from,
    domains_of,
    head_from,
    int8_check_of,
    predicts_of,
    preprocessing_of,
    registered_by,
    source_of,
    state_digest,
    with_resampled,
    without_resampled,
    write_adapter,
)
from fastprompt.arguments import ArgumentError, ArgumentTypeError, NotFiniteError
from fastprompt.changes import changing
from fastprompt.domains import Domains
from fastprompt.generators import (
    PromptConfig,
    PromptGenerator,
    build_generator,
    method_of,
)
from fastprompt.heads import CLIP_LOGIT_SCALE, Head, LinearHead, build_head
from fastprompt.hub import CARD_FILE, check_push, model_card, push, read_pretrained, run_facts
from fastprompt.kept import Kept, SeenValues, arithmetic, can_compare, tensors_of
from fastprompt.vit import FrozenViT, compressed, constants, recomputed
from fastprompt.vit.assets import load_source
from fastprompt.vit.attention_maps import AttentionMap
from fastprompt.vit.prompts import NO_DRAWS, Draws, Embedding, Group, Prefix
from fastprompt.vit.reference import READOUTS
from fastprompt.vit.source import BackboneSource
from fastprompt.vit.weights import Folded, is_finite

GRAPHS = ("rewritten", "papers")

Features = Callable[[Tensor, Draws], tuple[Tensor, dict[str, Tensor]]]
"""(images, draws) → the head's input, and what a loss needs in addition."""


class PromptedViT(nn.Module):
    """A frozen ViT adapted by prompts: `model(images)` → logits.

    Only generator and head train; the backbone is constant and stays in eval mode. (Full fine-tuning, a baseline, and
    prompts with `train_backbone` train their own copy of the backbone.)

    Args:
        backbone: the frozen ViT; it is shared, not copied.
        config: the method and its options, e.g. `PGNConfig(num_prompts=16)`.
        num_classes: C; None: no head, the model returns features.
        head: "linear", "text", "label_map", "prototypes", or a head of `fastprompt.heads`.
        readout: the head's input: "cls", "patches", "patches+prompts", "prompts", "map" or "cls+dist". None: that of
            the backbone's own head, with two exceptions that follow the authors' code. It is the mean of patches and
            prompts for any prompts on a Swin transformer, and for VPT and VAPT on a ViT that averages patches (MAE).
        class_names: list of C names, saved with the adapter; None: those of the data set, once `fit` sees one.
        class_embeddings, logit_scale: for head "text". prototypes: for head "prototypes".
        train_backbone: train a copy of the backbone along with prompts and head, as in PGN with full fine-tuning.

    Attributes:
        predicts: what the outputs stand for: "class", "labels" (several per image) or "values". `fit` sets it.
        private: only the owner changes this model, and calls `refresh` afterwards. Nothing else checks it for changes.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it.
    """

    def __init__(
        self,
        backbone: FrozenViT,
        config: PromptConfig,
        num_classes: int | None = None,
        head: str | Head = "linear",
        readout: str | None = None,
        *,
        class_names: Sequence[str] | None = None,
        class_embeddings: Any = None,
        logit_scale: float = CLIP_LOGIT_SCALE,
        prototypes: Any = None,
        train_backbone: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, FrozenViT):
            raise ArgumentTypeError(
                "backbone",
                f"must be a FrozenViT, got {type(backbone).__name__}; wrap a timm model as FrozenViT(module)",
            )
        if num_classes is not None and (
            not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1
        ):
            raise ArgumentError("num_classes", f"must be a positive integer or None, got {num_classes!r}")
        for name, rows, reader in (
            ("class_embeddings", class_embeddings, "text"),
            ("prototypes", prototypes, "prototypes"),
        ):
            if rows is not None and head != reader:
                raise ArgumentError(name, f"is for head {reader!r}, head is {head!r}")
        if class_names is not None and not isinstance(class_names, Iterable):
            raise ArgumentTypeError("class_names", f"must be a sequence of names, got {type(class_names).__name__}")
        if not isinstance(train_backbone, bool):
            raise ArgumentTypeError("train_backbone", f"must be True or False, got {train_backbone!r}")
        self.config, self.full = config, train_backbone or method_of(config).config_class.trains_backbone
        backbone.pin_fingerprint()
        self.backbone = backbone
        if self.full:
            self.backbone = copy.deepcopy(backbone).requires_grad_(True)
            if self.backbone.head is not None:
                self.backbone.head.requires_grad_(False)  # the pretrained classifier is not part of the features
        self.generator = build_generator(config, self.backbone)
        self.readout = check_readout(backbone, self.generator, readout)
        self.head: Head | None = None
        if isinstance(head, Head):
            if num_classes not in (None, head.num_classes):
                raise ArgumentError("num_classes", f"is {num_classes}, the given head has {head.num_classes}")
            self.head = head
        elif num_classes is not None:
            self.head = build_head(
                head, backbone, num_classes, class_embeddings, logit_scale, prototypes, width=self.feature_width
            )
        elif head != "linear":
            raise ArgumentError("head", f"{head!r} needs num_classes; without it the model returns features")
        if self.head is not None and self.head.width != self.feature_width:
            whose = "the backbone" if self.feature_width == backbone.feature_width else "the method"
            raise ArgumentError(
                "head",
                f"{self.head.kind!r} reads features of width {self.head.width}, "
                f"those of {whose} have {self.feature_width}",
            )
        self.num_classes = None if self.head is None else self.head.num_classes
        if class_names is not None:
            class_names = [str(name) for name in class_names]
            if len(class_names) != self.num_classes:
                raise ArgumentError("class_names", f"has {len(class_names)} names, num_classes is {self.num_classes}")
        self.class_names = class_names
        self.preprocessing: Preprocessing | None = None
        self.int8_check: Int8Check | None = None
        self.predicts = "class"
        self.domains: Domains | None = None
        self._autocast: torch.dtype | None = None
        self._recompute = False
        self._activation_bits: int | None = None
        self._graph = "rewritten"
        self.private = False
        self._prefixes: Kept[dict[int, Prefix]] = Kept()
        self.backbone.folded()
        for module in (self.generator, self.head):
            if module is not None:
                module.to(
                    device=backbone.device, dtype=torch.float64 if backbone.dtype == torch.float64 else torch.float32
                )

    @property
    def feature_width(self) -> int:
        """The width of what the head reads: the backbone's, to which a method of role "queries" adds its own."""
        width = self.backbone.feature_width
        return width if self.generator is None else self.generator.feature_width(width)

    def forward(
        self, images: Tensor, return_aux: bool = False, draws: Draws | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute logits (B, C), or features (B, D) without a head.

        Args:
            images: (B, 3, H, W), float (normalised) or uint8 (raw pixels).
            return_aux: also return what a loss needs besides the logits: "kl" (B,) in nats for V²APT, "penalty" () for
                VQT with group lasso.
            draws: the random tensors of a training step (`draw`); None: in training mode they are drawn here.
        """
        features = self._papers_features if self._graph == "papers" else self._features
        output, aux = self._outputs(images, draws, features)
        return (output, aux) if return_aux else output

    def reference_forward(
        self, images: Tensor, return_aux: bool = False, draws: Draws | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute `forward` by the papers' own graph, unoptimised, as a reference and baseline.

        Blocks, Linears and norms of the backbone are called as modules, so that forward hooks on them fire.
        """
        output, aux = self._outputs(images, draws, self._papers_features)
        return (output, aux) if return_aux else output

    def predict(
        self, images: Tensor, samples: Sequence[Draws], prefixes: Mapping[int, Prefix] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute `forward` for a caller that keeps image-independent values itself, as a captured graph must.

        Args:
            samples: the draws of each forward; their class probabilities are averaged. [{}]: one forward without
                randomness.
            prefixes: the result of `static_prefixes`; None: computed here, or reused from the last call.

        Returns:
            Logits (B, C), or features (B, D) without a head, and what a loss needs in addition, from the last sample.
        """
        self._check(images)
        return self._averaged(images, samples, functools.partial(self._features, prefixes=prefixes))

    def _outputs(self, images: Tensor, draws: Draws | None, features: Features) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute `forward`'s result by one of the two graphs, with the caller's draws or those of the model's mode."""
        self._check(images)
        return self._averaged(images, self._samples(images.shape[0]) if draws is None else [draws], features)

    def _samples(self, batch: int) -> Sequence[Draws]:
        """Return the draws of each forward that the model's mode requires."""
        if self.training or self.generator is None:
            return [self.draw(batch)]
        return self.generator.inference_draws()

    def _averaged(
        self, images: Tensor, samples: Sequence[Draws], features: Features
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: list[Tensor] = []
        aux: dict[str, Tensor] = {}
        for draws in samples:
            output, aux = features(images, draws)
            outputs.append(output if self.head is None else self.head(output))
        return self.average(outputs), {**aux, **self.penalty()}

    def penalty(self) -> dict[str, Tensor]:
        """Return the term of the loss that depends on parameters alone as "penalty", (); {} if there is none."""
        if self.generator is None or not self.training:
            return {}
        penalty = self.generator.penalty(self.head.weight if isinstance(self.head, LinearHead) else None)
        return {} if penalty is None else {"penalty": penalty}

    def average(self, outputs: Sequence[Tensor]) -> Tensor:
        """Average several samples' (B, C): the logarithm of their mean probabilities, or their mean features."""
        if len(outputs) == 1:
            return outputs[0]
        stacked = torch.stack(list(outputs))
        return stacked.mean(0) if self.head is None else stacked.softmax(-1).mean(0).log()

    def check_outputs(self, images: Tensor, outputs: Tensor) -> None:
        """Raise `NotFiniteError`, a `ValueError`, if outputs (B, C) of `images` are NaN or infinite.

        This waits for the device, so call it where the outputs are read on the host anyway.
        """
        if is_finite(outputs):
            return
        for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers()):
            if not is_finite(tensor):
                raise NotFiniteError("model", f"must have finite parameters, got NaN or infinite values in {name}")
        position = next(i for i, output in enumerate(outputs) if not is_finite(output))
        largest = float(images[position].abs().max())
        raise NotFiniteError(
            "images",
            f"must give finite outputs, got NaN or infinite ones for image {position}, whose values reach "
            f"{largest:.3g}: the forward overflows in {str(self.backbone_dtype).removeprefix('torch.')}",
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute (B, D), the head's input; with queries (B, F), F being `feature_width`.

        `model.head(model.forward_features(images))` equals `model(images)`, with one exception. If a generator averages
        several samples at inference (`V2APTConfig.inference_samples` above 1), this returns the samples' mean features,
        while the model averages their class probabilities.
        """
        self._check(images)
        samples = [self._features(images, draws)[0] for draws in self._samples(images.shape[0])]
        return samples[0] if len(samples) == 1 else torch.stack(samples).mean(0)

    def has_constants(self) -> str:
        """Return why nothing but the features of a model without prompts is constant in training; "" if something is.

        What `constants` returns is what is.
        """
        vit, generator = self.backbone, self.generator
        if self.full:
            return "the backbone trains"
        if vit.folded() is None:
            return "a Swin transformer keeps no constants"
        if generator is None:
            return "there are no prompts"
        if generator.role == "queries":
            return "" if generator.known_at == "static" else "the queries depend on the image"
        if generator.changes_images or not generator.layers:
            return "the images that the backbone reads change"
        return "" if min(generator.layers) > 0 else "prompts enter the first block"

    @torch.no_grad()
    def constants(self, images: Tensor, keep: str = "inputs") -> dict[str, Tensor]:
        """Compute what no parameter that trains has a part in, with a row per image, for `from_constants`.

        For queries these are the frozen features and the inputs of all blocks with queries, or with `keep` "keys" the
        keys and values there. If prompts start at block k, they are the rows that enter it, and what the generator
        reads of an image.

        Raises:
            TypeError, ValueError: `images` do not fit, or nothing is constant (`has_constants`).
        """
        self._check(images)
        reason, folded, generator, vit = self.has_constants(), self.backbone.folded(), self.generator, self.backbone
        if reason or folded is None or generator is None:
            raise ArgumentError("model", f"must have something constant in training, but {reason}")
        if keep not in constants.KEEPS:
            raise ArgumentError("keep", f"must be one of {constants.KEEPS}, got {keep!r}")
        inputs = vit.normalise(images)
        embedded = vit.graph.rewritten.embed(vit, images, inputs, folded)
        if generator.role == "queries":
            return constants.of_queries(vit, embedded, generator.layers, self.readout, folded, keep)
        rows = constants.before(vit, embedded, min(generator.layers), folded)
        found = {"rows": rows, "grid": constants.of_grid(embedded, rows)}
        if generator.known_at == "image":
            found["images"] = inputs
        if generator.known_at == "embeddings":
            patches = embedded.patches
            found["embeddings"] = patches if vit.norm_pre is None else vit.norm_pre(patches)
        return found

    def from_constants(
        self, kept: Mapping[str, Tensor], return_aux: bool = False, draws: Draws | None = None
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute `forward` from the `constants` of a batch, which may have been cast to another dtype."""
        batch = len(next(iter(kept.values())))
        output, aux = self._averaged(
            next(iter(kept.values())),
            self._samples(batch) if draws is None else [draws],
            lambda _, of_sample: self._features_from(kept, of_sample),
        )
        return (output, aux) if return_aux else output

    def _features_from(self, kept: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute `_features` from constants."""
        vit, generator, folded = self.backbone, self.generator, self.backbone.folded()
        assert generator is not None
        assert folded is not None
        if generator.role == "queries":
            answers = []
            grid = tuple(kept["grid"][0].tolist()) if "grid" in kept else vit.spec.grid
            turns = vit.turns(grid, vit.dtype)
            for i in generator.layers:
                tokens = generator.prompts(i, None, None, draws).to(vit.dtype)
                answers.append(constants.answers(i, tokens, kept, folded, turns[i]))
            return generator.gather(kept["features"].to(vit.dtype), answers), generator.aux(None)
        context = None
        if generator.known_at in ("image", "embeddings"):
            x = kept["images"] if generator.known_at == "image" else kept["embeddings"].to(vit.dtype)
            context = generator.context(x, draws)
        prefixes = None if draws else self.kept_prefixes(folded)
        group = Group(generator, context, draws, self.readout, prefixes)
        rows, columns = kept["grid"][0].tolist()
        features = constants.features_behind(
            vit,
            kept["rows"].to(vit.dtype),
            (rows, columns),
            min(generator.layers),
            [group],
            folded,
            self._recompute,
            self._activation_bits,
        )[0]
        return features, generator.aux(context)

    def draw(self, batch: int) -> Draws:
        """Draw the random tensors of one training step for `batch` images: dropout masks, latent noise."""
        return NO_DRAWS if self.generator is None else self.generator.draw(batch)

    def _check(self, images: Tensor) -> None:
        """Raise TypeError or ValueError if backbone, generator and head cannot run on `images`."""
        vit = self.backbone
        vit.check_images(images)
        for name, module in (("generator", self.generator), ("head", self.head)):
            tensor = None if module is None else next(itertools.chain(module.parameters(), module.buffers()), None)
            if tensor is not None and tensor.device != vit.device:
                raise ValueError(
                    f"the {name} is on {tensor.device}, the backbone is on {vit.device}; a backbone that "
                    f"models share moves with any of them: call model.to({str(vit.device)!r})"
                )

    def _inputs(self, images: Tensor) -> tuple[Tensor, PromptGenerator | None]:
        """Return the backbone's input, normalised, and the generator if it adds prompt tokens to it, else None."""
        generator, images = self.generator, self.backbone.normalise(images)
        if generator is not None and generator.changes_images:
            return generator.prompt_images(images), None
        return images, generator

    def _features(
        self, images: Tensor, draws: Draws, prefixes: Mapping[int, Prefix] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the head's input (B, D) by the optimised graph, and what a loss needs in addition."""
        vit, graph = self.backbone, self.backbone.graph
        inputs, generator = self._inputs(images)
        with self._own_autocast(images.device):
            folded = vit.folded()
            raw = images if generator is self.generator else inputs
            embedded = graph.rewritten.embed(vit, raw, inputs, folded)
            context = None if generator is None else self.prompt_context(inputs, embedded, draws)
            aux = {} if generator is None else generator.aux(context)
            if prefixes is None and not draws:
                prefixes = self.kept_prefixes(folded)
            group = Group(generator, context, draws, self.readout, prefixes)
            bits = self._activation_bits
            return graph.rewritten.features(vit, embedded, [group], folded, self._recompute, bits=bits)[0], aux

    def _papers_features(self, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute `_features` by the papers' own graph."""
        vit, papers = self.backbone, self.backbone.graph.papers
        inputs, generator = self._inputs(images)
        with self._own_autocast(images.device):
            embedded = papers.embed(vit, inputs.to(vit.dtype))
            context = None if generator is None else self.prompt_context(inputs, embedded, draws)
            aux = {} if generator is None else generator.aux(context)
            sequence = papers.encode(vit, inputs, generator, context, draws, embedded)
            features = papers.read_out(vit, sequence, self.readout)
            if generator is not None and generator.role == "queries":
                features = generator.gather(features, sequence.answers)
            return features, aux

    def _own_autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast if the backbone trains in float32 and computes in 16 bits; otherwise do nothing."""
        return contextlib.nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)

    def prompt_context(self, images: Tensor, patches: Tensor | Embedding, draws: Draws) -> Any:
        """Compute the generator's context once for a batch.

        It depends on normalised images (B, 3, H, W), on their patch embeddings (B, N, D), or on nothing. `patches` is
        either the patch embeddings or the whole embedding.
        """
        vit, generator = self.backbone, self.generator
        if generator is not None and generator.known_at == "image":
            return generator.context(images, draws)
        if generator is not None and generator.known_at == "embeddings":
            patches = patches if isinstance(patches, Tensor) else patches.patches
            return generator.context(patches if vit.norm_pre is None else vit.norm_pre(patches), draws)
        return None

    def static_prefixes(self) -> dict[int, Prefix] | None:
        """Compute a map from block to what it reads of prompts, such as keys and values, if parameters determine it.

        None if the method has no such prompts.
        """
        vit, generator = self.backbone, self.generator
        if generator is None or generator.known_at != "static":
            return None
        return vit.graph.rewritten.static_prefixes(vit, generator, self.readout, vit.folded())

    def kept_prefixes(self, folded: Folded | None = None) -> dict[int, Prefix] | None:
        """Return `static_prefixes`, computed once per adapter and again when anything that they depend on changes.

        None if nothing is kept: gradients are recorded, the backbone trains, or values cannot be read (in a compiler, a
        transform of `torch.func`, or a CUDA graph capture).

        Args:
            folded: the result of a `backbone.folded()` call made just now, which saves checking the backbone again;
                None: call it here.
        """
        generator, vit = self.generator, self.backbone
        if generator is None or generator.known_at != "static" or torch.is_grad_enabled() or not can_compare():
            return None
        folded = vit.folded() if folded is None else folded
        if folded is None:
            return None
        switches = (vit.spec, self.readout, generator.config, generator.layers, *arithmetic(vit.device))
        facts = (weakref.ref(folded.blocks[0]), weakref.ref(generator), *switches)
        tensors = [] if self.private else tensors_of(generator)
        return self._prefixes.get(SeenValues, tensors, facts, lambda: self.static_prefixes() or {})

    def refresh(self) -> None:
        """Recompute cached values of the parameters. Only a `private` model needs this, after each change."""
        self._prefixes.clear()
        if self.full:
            self.backbone.refold()

    def set_graph(self, graph: str) -> None:
        """Choose the graph that `forward` computes: "rewritten", the fast one, or "papers" (`reference_forward`).

        In the papers' graph blocks, Linears and norms of the backbone are called as modules, with every row. So forward
        hooks fire, tools that record modules (torchinfo) see them, and Linears whose weights were replaced by quantised
        ones are used. In the rewritten graph constants have moved between modules, and many rows are never computed.
        `fp.Engine` computes the rewritten graph whatever is set here.

        Raises:
            ValueError: `graph` is neither, or it is "papers" and activations are kept in few bits.
        """
        if graph not in GRAPHS:
            raise ArgumentError("graph", f"must be one of {GRAPHS}, got {graph!r}")
        if graph == "papers" and self._activation_bits is not None:
            raise ArgumentError("graph", "must be 'rewritten' with set_activation_bits, got 'papers'")
        self._graph = graph

    @torch.no_grad()
    def attention_maps(self, images: Tensor, graph: str = "rewritten") -> list[AttentionMap]:
        """Return the attention weights of each block, in eval mode and without gradients.

        `maps[i].between("cls", "patches")` is (B, heads, 1, N): how the class token attends to the patches in block i;
        `between("patches", "prompts")` how the patches attend to the prompts. All weights of a block take
        B · heads · Q · K numbers.

        Args:
            images: (B, 3, H, W), float (normalised) or uint8 (raw pixels).
            graph: "rewritten": only the queries that the fast graph computes, which has no prompts as queries unless
                their rows stay, and only the rows that are read in the last block. "papers": every token is a query.
                The weights of the same query are equal up to rounding.

        Raises:
            TypeError, ValueError: an argument is invalid, the model is in training mode, or its attention runs in
                windows (a Swin transformer), or its prompts are no tokens of the sequence (VQT, CVPT).
        """
        self._check(images)
        vit, maps = self.backbone, self.backbone.graph.maps
        if graph not in GRAPHS:
            raise ArgumentError("graph", f"must be one of {GRAPHS}, got {graph!r}")
        if maps is None:
            raise ArgumentError("model", f"must attend to all tokens; {vit.spec.name} attends in windows")
        if self.generator is not None and self.generator.role != "sequence":
            raise ArgumentError(
                "model", f"must have prompts that are tokens of the sequence, those of {self.config.kind!r} are not"
            )
        if self.training:
            raise ArgumentError("model", "must be in eval mode: call model.eval()")
        draws = NO_DRAWS if self.generator is None else self.generator.inference_draws()[0]
        inputs, generator = self._inputs(images)
        with self._own_autocast(images.device):
            if graph == "papers":
                sequence = vit.graph.papers.embed(vit, inputs.to(vit.dtype))
                context = None if generator is None else self.prompt_context(inputs, sequence, draws)
                return maps.papers_maps(vit, inputs, generator, context, draws, sequence)
            folded = vit.folded()
            raw = images if generator is self.generator else inputs
            embedded = vit.graph.rewritten.embed(vit, raw, inputs, folded)
            context = None if generator is None else self.prompt_context(inputs, embedded, draws)
            prefixes = None if draws else self.kept_prefixes(folded)
            return maps.rewritten_maps(vit, embedded, Group(generator, context, draws, self.readout, prefixes), folded)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass, and compute the blocks again there.

        Outputs and gradients stay the same; memory falls, and a training step takes longer.
        """
        self._recompute = bool(enable)

    @property
    def recomputes(self) -> bool:
        """Whether `set_grad_checkpointing` is on."""
        return self._recompute

    def set_activation_bits(self, bits: int | None) -> None:
        """Keep the derivatives of the frozen MLPs' activations for the backward in 8 or 2 bits; None: their inputs.

        These inputs are the largest part of what a training step keeps. Outputs stay the same; gradients are those of
        the rounded derivatives (`fastprompt.vit.compressed`). With 0 bits nothing is kept: norm, first Linear and
        activation are computed again in the backward, some rows at a time, and gradients stay exact
        (`fastprompt.vit.recomputed`). `Recipe.activation_bits` sets this for a run.

        Raises:
            ValueError: `bits` is none of these, or the model keeps no such inputs: the backbone trains, no gradient
                passes the blocks (a linear probe, VQT), or the papers' graph is set. For 8 and 2 bits also: its MLPs
                are gated, or have another activation than GELU or SiLU.
        """
        if bits is not None and (bits not in recomputed.BITS or isinstance(bits, bool)):
            raise ArgumentError("bits", f"must be 8, 2, 0 or None, got {bits!r}")
        if bits is not None and (reason := self._no_compression(bits)):
            raise ArgumentError("bits", f"must be None here, got {bits}: {reason}")
        self._activation_bits = bits

    @property
    def activation_bits(self) -> int | None:
        """In how many bits the derivatives of activations are kept; 0 keeps none (`set_activation_bits`)."""
        return self._activation_bits

    def _no_compression(self, bits: int) -> str:
        """Return why activations cannot be kept in so few bits; "" if they can."""
        if self.full:
            return "the backbone trains, so its Linears keep what the activations put out"
        if self.generator is None or self.generator.role == "queries":
            return f"no gradient of {self.config.kind!r} passes the frozen MLPs"
        if self.backbone.staged and self.generator.changes_images:
            return f"{self.config.kind!r} runs the plain graph of a Swin transformer"
        if self._graph == "papers":
            return "the papers' graph keeps what its authors' code keeps"
        blocks = self.backbone.blocks if bits else ()
        found = next((reason for block in blocks if (reason := compressed.obstacle(block))), "")
        return f"{self.backbone.spec.name} has {found}" if found else ""

    def set_backbone_dtype(self, dtype: torch.dtype) -> None:
        """Run the backbone in `dtype`. Generator and head keep theirs, and logits have the head's.

        A frozen backbone is cast for every model that shares it, and casting it back does not restore the lost bits.
        Under full fine-tuning the weights train in float32 and are cast when they are used (autocast).
        """
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ArgumentError("dtype", f"must be a floating-point dtype, got {dtype!r}")
        if self.full:
            self._autocast = dtype if dtype in (torch.float16, torch.bfloat16) else None
        else:
            self.backbone.to(dtype)

    @property
    def backbone_dtype(self) -> torch.dtype:
        """The dtype in which the backbone computes."""
        return self._autocast or self.backbone.dtype

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) for each trained parameter."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def num_trainable(self) -> dict[str, int]:
        """Count trained parameters: "total", and those of "generator", "head" and "backbone"."""
        counts = {"generator": 0, "head": 0, "backbone": 0}
        for name, p in self.trainable_parameters():
            counts[name.partition(".")[0]] += p.numel()
        return {"total": sum(counts.values()), **counts}

    def paper_parameter_count(self) -> int | None:
        """Count trained parameters without the head by the formula in the method's paper; None if it has none."""
        return None if self.generator is None else self.generator.paper_num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained and of all parameters, in PEFT's format."""
        trained, total = self.num_trainable()["total"], sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return every tensor outside the frozen backbone: parameters and buffers of generator and head."""
        parts = ("generator.", "head.", "backbone.") if self.full else ("generator.", "head.")
        return {k: v for k, v in self.state_dict().items() if k.startswith(parts)}

    def check_all_saved(self) -> None:
        """Raise `ValueError` if a trained parameter is not in `adapter_state_dict`, as with an unfrozen backbone."""
        held = self.adapter_state_dict().keys()
        lost = [name for name, _ in self.trainable_parameters() if name not in held]
        if lost:
            raise ArgumentError(
                "model",
                f"must train nothing that its adapter does not hold, got {len(lost)} such parameters: "
                f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}. Freeze them "
                "(model.backbone.requires_grad_(False)), or train the whole backbone with fp.FullFineTuneConfig(), "
                "whose adapter holds it",
            )

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of `adapter_state_dict`.

        Floating-point tensors are cast to the dtypes of this model's tensors.

        Raises:
            TypeError: `state` is not a mapping of tensors.
            ValueError: a tensor is missing or unknown, has another shape or kind of dtype, or is not finite in this
                model's dtype. The model is unchanged in this case.
        """
        if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
            raise ArgumentTypeError(
                "state", f"must be a mapping of tensors, as of adapter_state_dict, got {type(state).__name__}"
            )
        own = self.adapter_state_dict()
        missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if missing or unknown:
            raise ArgumentError("state", f"does not fit this model: missing {missing[:5]}, unknown {unknown[:5]}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ArgumentError(
                    "state", f"{name} has shape {tuple(tensor.shape)}, this model has {tuple(own[name].shape)}"
                )
            same = tensor.is_floating_point() and own[name].is_floating_point()
            if tensor.dtype != own[name].dtype and not same:
                raise ArgumentError("state", f"{name} has dtype {tensor.dtype}, this model has {own[name].dtype}")
        cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
        for name, tensor in cast.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ArgumentError("state", f"{name} contains NaN or infinite values in {own[name].dtype}")
        with self.changing(), torch.no_grad():
            for name, tensor in cast.items():
                own[name].copy_(tensor)

    def select_features(self, keep: float | int) -> None:
        """Let the linear head read only the features that matter most to it: those with the largest ‖W[:, f]‖₂.

        Train with group lasso first (`VQTConfig.group_lasso`), select, and train again, as VQT does. The head is
        replaced by a smaller one with the same weights for the features it keeps.

        Args:
            keep: the share of the features to keep, in (0, 1], or their number, an int.

        Raises:
            TypeError, ValueError: the head is not linear, or `keep` is out of range.
        """
        if not isinstance(self.head, LinearHead):
            kind = None if self.head is None else self.head.kind
            raise ArgumentError("model", f"must have a linear head to select features, got {kind!r}")
        with self.changing():
            self.head = self.head.selecting(keep)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, as one change for an engine that follows the model."""
        with self.changing():
            return super().load_state_dict(*args, **options)

    def own_parts(self) -> list[nn.Module]:
        """Return the parts that can change: generator, head, and the backbone if it trains."""
        parts = (self.generator, self.head, self.backbone if self.full else None)
        return [part for part in parts if part is not None]

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Context for changing several tensors or parts as one; engines in other threads see all of it or nothing.

        `load_adapter_state_dict`, `load_state_dict` and the steps of torch's optimizers use it already. Other code
        that writes parameters while other threads call an engine of this model must use it:

            with model.changing():
                for (_, parameter), average in zip(model.trainable_parameters(), averages):
                    parameter.copy_(average)

        Meanwhile the engine waits for up to a second, and then continues with the model's previous state.
        """
        return changing(self, self.own_parts())

    def describe_data(self, data: Any) -> None:
        """Take over from a data set what the adapter needs to be used without it: class names, domains, preprocessing.

        Args:
            data: a data set, or a DataLoader or Subset of one. Names come from its `class_names` or `classes` (as in
                torchvision) if the model has none; preprocessing comes from its `preprocessing`.

        Raises:
            ValueError: model and data have the same names in different orders, so labels would change their meaning.
        """
        preprocessing = stated_by(data, "preprocessing")
        if isinstance(preprocessing, Preprocessing):
            self.preprocessing = preprocessing
        domains = stated_by(data, "domains")
        if isinstance(domains, Domains):
            domains.check_fits(self.num_classes or 0)
            self.domains = domains
        names = class_names_of(data)
        if names is None:
            return
        if self.class_names is None and len(names) == self.num_classes:
            self.class_names = names
        if self.class_names is not None and names != self.class_names and set(names) == set(self.class_names):
            raise ArgumentError(
                "class_names", f"must be in the order of the data's labels, {names[:5]}, got {self.class_names[:5]}"
            )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `directory`, both or neither.

        The adapter is self-contained. It records the call that loaded the backbone (`FrozenViT.source`), class names
        and preprocessing. It also records the backbone's fingerprint, so that another backbone is rejected.

        Raises:
            ValueError: a parameter of the backbone trains, and an adapter cannot hold it.
            OSError: the disk is full or the directory is not writable. Nothing has changed in this case.
        """
        self._save(directory, self.backbone.source)

    def _save(self, directory: str | os.PathLike[str], source: BackboneSource | None) -> dict[str, Any]:
        """Write the adapter with `source` as the call that loads its backbone; return its configuration."""
        self.check_all_saved()
        backbone, optional = self.backbone, dict[str, Any]()
        described = (("source", source), ("preprocessing", self.preprocessing), ("domains", self.domains))
        for key, value in described:
            if value is not None:
                optional[key] = dataclasses.asdict(value)
        if self.int8_check is not None and self.int8_check.adapter == state_digest(self.adapter_state_dict()):
            optional["int8_check"] = dataclasses.asdict(self.int8_check)
        if self.full and not self.config.trains_backbone:
            optional["train_backbone"] = True
        if self.predicts != "class":
            optional["predicts"] = self.predicts
        if (module := registered_by(self.config)) is not None:
            optional["registered_by"] = module
        config = {
            "method": self.config.to_dict(),
            "num_classes": self.num_classes,
            "head": None if self.head is None else self.head.describe(),
            "readout": self.readout,
            "class_names": self.class_names,
            "backbone": {
                "name": backbone.spec.name,
                "fingerprint": backbone.fingerprint,
                "image_size": list(backbone.image_size),
                "patch_size": backbone.patch_size,
                "width": backbone.width,
                "depth": backbone.depth,
                "mean": list(backbone.mean),
                "std": list(backbone.std),
                "optional": optional,
            },
        }
        write_adapter(directory, config, with_resampled(self.adapter_state_dict(), backbone))
        return config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run_dir: str | os.PathLike[str] | None = None,
        license: str | None = None,
        commit_message: str = "Upload adapter",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the adapter to the Hugging Face Hub with a model card; create the repository if it is missing.

        The card states method, options, backbone and fingerprint, head, how to load the adapter, its classes and its
        licence; with `run_dir` also data, recipe and metrics with 95 % intervals. A path on this machine, such as that
        of a backbone's file, is not uploaded: such an adapter is loaded with `from_pretrained(backbone, repo_id)`.

        Args:
            repo_id: "owner/name".
            run_dir: directory of the run that trained this model (`fit(out_dir=...)`, `fastprompt adapt --out`).
            license: identifier of the adapter's licence on the Hub, such as "apache-2.0".
            private: create a private repository; None: the owner's default. An existing one stays as it is.
            token: with write access; None: the one that `hf auth login` saved.
            revision: branch to commit to; None: "main".
            create_pr: open a pull request with the commit.

        Returns:
            The address of the commit.

        Raises:
            TypeError, ValueError: an argument is invalid.
            FileNotFoundError: `run_dir` is not the directory of a finished run.
            PermissionError: the token may not write there.
            FetchError: the Hub cannot be reached.
        """
        check_push(repo_id, license, run_dir)
        facts = None if run_dir is None else run_facts(run_dir)
        source = self.backbone.source
        with tempfile.TemporaryDirectory(prefix="fastprompt-") as folder:
            config = self._save(folder, None if source is None or source.is_local else source)
            card = model_card(config, repo_id, facts, license)
            (Path(folder) / CARD_FILE).write_text(card, encoding="utf-8")
            to = {"revision": revision, "create_pr": create_pr}
            return push(Path(folder), repo_id, commit_message, token, private, **to)

    @classmethod
    def from_pretrained(
        cls,
        backbone: FrozenViT | str | os.PathLike[str],
        directory: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> PromptedViT:
        """Load the model that `save_pretrained` wrote into a directory or `push_to_hub` uploaded, in eval mode.

        `from_pretrained(where)` loads the backbone that the adapter records. `from_pretrained(backbone, where)`
        uses a loaded one, which several adapters may share. `where` is a directory or a repository of the Hugging Face
        Hub, "owner/name"; an existing directory of that name wins. Raw pixels are normalised by the mean and std of the
        adapter's training, even if those of `backbone` differ.

        Args:
            revision: branch, tag or commit of the repository; None: "main".
            token: for a private repository; None: the one that `hf auth login` saved.
            cache_dir: folder for fetched files; None: that of `huggingface_hub`.
            local_files_only: use only what was fetched before.

        Raises:
            TypeError: `backbone` is not a FrozenViT or, without `directory`, not a path.
            FileNotFoundError: there is no adapter, neither in such a directory nor in such a repository.
            PermissionError: the repository is not open to this token.
            ValueError: a file is corrupted, the adapter was trained on another backbone, or it does not record how its
                backbone was loaded.
            FetchError: the adapter or the weights of the recorded backbone cannot be fetched.
        """
        hub = (revision, token, cache_dir, local_files_only)
        if directory is None and isinstance(backbone, (str, os.PathLike)):
            directory = backbone
            config, state = read_pretrained(directory, *hub)
            backbone = _load_recorded(config, directory)
        elif not isinstance(backbone, FrozenViT):
            raise ArgumentTypeError(
                "backbone",
                f"must be a FrozenViT, or a directory alone, got {type(backbone).__name__}; "
                "from_pretrained(backbone, directory) or from_pretrained(directory)",
            )
        elif directory is None:
            raise ArgumentTypeError("directory", "must be that of an adapter, got None")
        else:
            config, state = read_pretrained(directory, *hub)
        state, resampled = without_resampled(state)
        backbone = as_trained(f"the adapter in {directory}", config["backbone"], resampled, backbone)
        try:
            info, num_classes = config["head"], config["num_classes"]
            method = config_from(config)
            check_sizes(method, num_classes, backbone, state)
            head: str | Head = "linear" if info is None else head_from(info, backbone, num_classes, state, method)
            model = cls(
                backbone,
                method,
                num_classes,
                head,
                config["readout"],
                class_names=config["class_names"],
                train_backbone=config["backbone"].get("optional", {}).get("train_backbone", False),
            )
            model.load_adapter_state_dict(state)
            model.preprocessing = preprocessing_of(config)
            model.domains = domains_of(config)
            model.int8_check = int8_check_of(config)
            model.predicts = predicts_of(config)
            if model.domains is not None:
                model.domains.check_fits(num_classes or 0)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the adapter in {directory} cannot be read: {error}") from error
        return model.eval()

    def extra_repr(self) -> str:
        return f"{self.config}, num_classes={self.num_classes}, readout={self.readout!r}"


def _load_recorded(config: Mapping[str, Any], directory: str | os.PathLike[str]) -> FrozenViT:
    """Load the backbone that an adapter's configuration names."""
    try:
        source = source_of(config)
    except ValueError as error:
        raise ValueError(f"the adapter in {directory} cannot load its backbone: {error}") from error
    if source is None:
        raise ValueError(
            f"the adapter in {directory} does not record how its backbone, {config['backbone']['name']}, was loaded: "
            "it was not loaded by name with published weights, or the adapter is of an earlier version; load the "
            "backbone and give it: PromptedViT.from_pretrained(backbone, directory)"
        )
    return load_source(source)


def stated_by(data: Any, *attributes: str) -> Any:
    """Return the first of the attributes that a data set, or the one inside a DataLoader or Subset, has; else None."""
    for _ in range(8):
        for attribute in attributes:
            value = getattr(data, attribute, None)
            if value is not None:
                return value
        data = getattr(data, "dataset", None)
    return None


def class_names_of(data: Any) -> list[str] | None:
    """Return the names of a data set's labels, its `class_names` or `classes` (as in torchvision); None if missing."""
    names = stated_by(data, "class_names", "classes")
    if isinstance(names, (tuple, list)) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def check_readout(backbone: FrozenViT, generator: PromptGenerator | None, readout: str | None) -> str:
    """Return the readout to use; raise ValueError if backbone or generator cannot provide it."""
    prompted = generator is not None and generator.num_prompts > 0 and generator.role == "sequence"
    if readout is None:
        readout = (backbone.graph.prompted_readout if prompted else None) or backbone.spec.pool
        if readout == "patches" and generator is not None and generator.read_with_patches:
            readout = "patches+prompts"
    if readout not in READOUTS:
        raise ArgumentError("readout", f"must be one of {READOUTS} or None, got {readout!r}")
    if readout == "cls" and not backbone.spec.has_cls:
        raise ArgumentError("readout", "'cls' needs a class token; this backbone has none")
    if readout == "cls+dist" and backbone.spec.pool != "cls+dist":
        raise ArgumentError("readout", "'cls+dist' needs a distillation token; this backbone has none")
    if readout == "map" and backbone.map_pool is None:
        raise ArgumentError("readout", "'map' needs an attention-pooling head; this backbone has none")
    if "prompts" in readout and not prompted:
        raise ArgumentError("readout", f"{readout!r} needs prompt tokens; this method has none")
    return readout
