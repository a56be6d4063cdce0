"""Heads: from backbone features (B, D) to class logits (B, C)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.changes import changing
from fastprompt.vit import FrozenViT

CLIP_LOGIT_SCALE = 100.0
CLIP_TEMPLATE = "This is a photo of a {}"


class Head(nn.Module):
    """Features (B, D) → logits (B, num_classes), in the dtype of the head's own tensors.

    Attributes:
        kind: name of the head in files and on the command line. width: D.
    """

    kind: ClassVar[str]
    num_classes: int
    width: int
    classifier_weight: Tensor | None
    classifier_bias: Tensor | None

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, as one atomic change for an engine that follows the model."""
        with changing(self, [self]):
            return super().load_state_dict(*args, **options)

    def describe(self) -> dict[str, Any]:
        """Return what is needed, beside the tensors, to rebuild this head."""
        return {"kind": self.kind}


class LinearHead(Head):
    """A trained linear head, W f + b, initialised with W ~ truncated N(0, 0.01²) and b = 0.

    Args:
        width: D, of the features. num_classes: C.
        selected: (S,) int64, increasing: the features that the head reads. None: all of them.
    """

    kind = "linear"
    selected: Tensor | None

    def __init__(self, width: int, num_classes: int, selected: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.num_classes = width, num_classes
        if selected is not None:
            fits = selected.ndim == 1 and len(selected) > 0 and selected.dtype == torch.int64
            if not fits or int(selected[0]) < 0 or int(selected[-1]) >= width or not (selected.diff() > 0).all():
                raise ArgumentError(
                    "selected", f"must be (S,) int64, increasing from 0 to at most {width - 1}, got {selected}"
                )
        self.register_buffer("selected", selected)
        read = width if selected is None else len(selected)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_classes, read), std=0.01))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def chosen(self, features: Tensor) -> Tensor:
        """Return the columns of features (N, D) that the head reads."""
        return features if self.selected is None else features[:, self.selected.to(features.device)]

    @torch.no_grad()
    def selecting(self, keep: float | int) -> LinearHead:
        """Return a head that reads only the features f with the largest ‖W[:, f]‖₂, with the same weights for them.

        `keep`: the share of the features that this head reads, in (0, 1], or their number, an int.
        """
        read = self.weight.shape[1]
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise ArgumentTypeError("keep", f"must be a share in (0, 1] or a number of features, got {keep!r}")
        count = keep if isinstance(keep, int) else math.ceil(keep * read) if 0 < keep <= 1 else 0
        if not 1 <= count <= read:
            raise ArgumentError("keep", f"must be a share in (0, 1] or from 1 to {read} features, got {keep!r}")
        columns = self.weight.norm(dim=0).topk(count).indices.sort().values
        head = LinearHead(self.width, self.num_classes, columns if self.selected is None else self.selected[columns])
        head.to(self.weight)
        head.weight.copy_(self.weight[:, columns])
        head.bias.copy_(self.bias)
        return head.train(self.training)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        return described if self.selected is None else {**described, "selected": len(self.selected)}

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise as VPT's and VAPT's code does: W Kaiming-normal over the outputs, N(0, 2 / C), and b = −log 99.

        With this bias, a sigmoid gives every class probability 0.01, as in RetinaNet.
        """
        nn.init.kaiming_normal_(self.weight, a=0, mode="fan_out")
        nn.init.constant_(self.bias, -math.log(99))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(self.chosen(features).to(self.weight.dtype), self.weight, self.bias)


class TextHead(Head):
    """CLIP's frozen head: scale · cos(P f, t_c) with class-text embeddings t_c (PGN §4, CLIP).

    Args:
        class_embeddings: (C, E), one per class; normalised here and stored in the adapter.
        backbone: its classifier is the projection P (E, D); without a classifier, E must be D.
        logit_scale: exp of CLIP's logit scale, frozen.
    """

    kind = "text"

    def __init__(self, class_embeddings: Any, backbone: FrozenViT, logit_scale: float = CLIP_LOGIT_SCALE) -> None:
        super().__init__()
        texts = _tensor("class_embeddings", class_embeddings)
        outputs = backbone.feature_width if backbone.head is None else backbone.head.weight.shape[0]
        if texts.ndim != 2 or texts.shape[1] != outputs:
            raise ArgumentError(
                "class_embeddings", f"must have shape (C, {outputs}) for this backbone, got {tuple(texts.shape)}"
            )
        if not torch.isfinite(texts).all() or (texts.norm(dim=-1) == 0).any():
            raise ValueError("class_embeddings must be finite, non-zero rows, got NaN, infinite or all-zero rows")
        if not isinstance(logit_scale, (int, float)) or not logit_scale > 0 or math.isinf(logit_scale):
            raise ArgumentError("logit_scale", f"must be positive, got {logit_scale!r}")
        self.width, self.num_classes, self.logit_scale = backbone.feature_width, texts.shape[0], float(logit_scale)
        self.register_buffer("class_embeddings", F.normalize(texts, dim=-1))
        _register_classifier(self, backbone)

    def forward(self, features: Tensor) -> Tensor:
        texts: Tensor = self.class_embeddings  # type: ignore[assignment]
        features = _classifier(self, features.to(texts.dtype))
        return self.logit_scale * F.normalize(features, dim=-1) @ texts.T

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "logit_scale": self.logit_scale}


class LabelMapHead(Head):
    """Class c reads output c of the pretrained classifier (PGN §4, supervised ViT).

    Args:
        num_classes: C, the number of first outputs of the classifier to use. PGN's code keeps all outputs, so its
            cross-entropy and predictions also run over outputs without a class.
        trainable: train a copy of the classifier along with the prompts, as PGN's code does; otherwise it is frozen.
    """

    kind = "label_map"
    classifier_weight: Tensor

    def __init__(self, backbone: FrozenViT, num_classes: int, *, trainable: bool = False) -> None:
        super().__init__()
        if not isinstance(trainable, bool):
            raise ArgumentTypeError("trainable", f"must be True or False, got {trainable!r}")
        if backbone.head is None:
            raise ValueError("head 'label_map' needs a backbone with a pretrained classifier; this one has none")
        outputs = backbone.head.weight.shape[0]
        if num_classes > outputs:
            raise ArgumentError(
                "num_classes", f"must be at most the {outputs} outputs of the pretrained classifier, got {num_classes}"
            )
        self.width, self.num_classes, self.trainable = backbone.feature_width, num_classes, trainable
        _register_classifier(self, backbone, num_classes, trainable)

    def forward(self, features: Tensor) -> Tensor:
        return _classifier(self, features.to(self.classifier_weight.dtype))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **({"trainable": True} if self.trainable else {})}


class PrototypeHead(Head):
    """A frozen head that compares projected features with C fixed prototypes (PGN §4, DINO).

    logits = normalise(MLP(f)) Vᵀ: DINO's projection head with C of its prototypes as the rows of V.

    Args:
        prototypes: (C, E).
        layers: [(weight, bias or None), ...] of the MLP, with GELU between layers but not after the last; [] uses the
            features themselves.
        normalise: make the rows of V unit vectors, so that logits are cosines; otherwise keep the rows unchanged.
    """

    kind = "prototypes"

    def __init__(self, prototypes: Any, layers: Sequence[tuple[Any, Any]] = (), *, normalise: bool = True) -> None:
        super().__init__()
        if not isinstance(normalise, bool):
            raise ArgumentTypeError("normalise", f"must be True or False, got {normalise!r}")
        rows = _tensor("prototypes", prototypes)
        if rows.ndim != 2 or not torch.isfinite(rows).all() or (rows.norm(dim=-1) == 0).any():
            raise ArgumentError("prototypes", f"must be finite, non-zero rows (C, E), got {tuple(rows.shape)}")
        self.num_classes, self.num_layers, self.normalise = rows.shape[0], len(layers), normalise
        self.register_buffer("prototypes", F.normalize(rows, dim=-1) if normalise else rows)
        outputs = None
        for i, (weight, bias) in enumerate(layers):
            weight = _tensor(f"layers[{i}][0]", weight)
            bias = weight.new_zeros(weight.shape[:1]) if bias is None else _tensor(f"layers[{i}][1]", bias)
            if weight.ndim != 2 or bias.shape != weight.shape[:1] or outputs not in (None, weight.shape[1]):
                raise ValueError(
                    f"layers[{i}] must be (out, {outputs or 'in'}) and (out,), got {tuple(weight.shape)} "
                    f"and {tuple(bias.shape)}"
                )
            outputs = weight.shape[0]
            self.register_buffer(f"weight{i}", weight)
            self.register_buffer(f"bias{i}", bias)
        if outputs not in (None, rows.shape[1]):
            raise ValueError(f"prototypes must have the width of the last of layers, {outputs}, got {rows.shape[1]}")
        self.width = self.get_buffer("weight0").shape[1] if layers else rows.shape[1]

    @classmethod
    def from_dino(
        cls, state_dict: Mapping[str, Tensor], num_classes: int, seed: int = 0, *, rows: str = "prototypes"
    ) -> PrototypeHead:
        """Build the head from a DINO checkpoint, with `num_classes` rows chosen by `random.sample` under `seed`.

        PGN's code intends to use the released prototypes but does not: it reads the last layer's `.weight` after
        `load_state_dict` and before a forward, when weight normalisation has not yet computed it from the loaded
        tensors. Its rows are therefore the layer's random initialisation, with norm about 0.58 and nearly orthogonal
        to the prototypes.

        Args:
            state_dict: has `mlp.{0,2,4}.{weight,bias}` and `last_layer.weight_v` (or `.weight`), under any prefix
                ending in "head." ("module.head." in the released student checkpoints).
            seed: seed of the choice and of random rows.
            rows: "prototypes" uses those of the checkpoint, g v / ‖v‖. "authors" uses random ones, as PGN's code does:
                the head is initialised under `seed` as in DINO's code. Their script first draws random numbers for its
                backbone; these are not drawn here, so the rows differ but have the same distribution.

        Raises:
            ValueError: the keys are missing, `rows` is unknown, or there are fewer prototypes than classes.
        """
        if rows not in ("prototypes", "authors"):
            raise ArgumentError("rows", f"must be 'prototypes' or 'authors', got {rows!r}")
        names = [k for k in state_dict if k.endswith(("last_layer.weight_v", "last_layer.weight"))]
        if len(names) != 1:
            raise ArgumentError("state_dict", "must hold a DINO head: no single key ends in 'last_layer.weight_v'")
        prefix = names[0].rpartition("last_layer.")[0]
        weight, scale = state_dict[names[0]], state_dict.get(f"{prefix}last_layer.weight_g")
        if not 1 <= num_classes <= weight.shape[0]:
            raise ArgumentError("num_classes", f"must be from 1 to the {len(weight)} prototypes, got {num_classes}")
        layers = dino_layers(state_dict, prefix)
        chosen = random.Random(seed).sample(range(weight.shape[0]), num_classes)
        if rows == "authors":
            return cls(_initial_rows([w for w, _ in layers], weight, seed)[chosen], layers, normalise=False)
        if scale is None:
            return cls(weight[chosen], layers)
        return cls(F.normalize(weight[chosen].float(), dim=-1) * scale[chosen].float(), layers, normalise=False)

    def forward(self, features: Tensor) -> Tensor:
        rows: Tensor = self.prototypes  # type: ignore[assignment]
        x = features.to(rows.dtype)
        for i in range(self.num_layers):
            x = F.linear(F.gelu(x) if i else x, getattr(self, f"weight{i}"), getattr(self, f"bias{i}"))
        return F.normalize(x, dim=-1) @ rows.T

    def describe(self) -> dict[str, Any]:
        described = {"kind": self.kind, "num_layers": self.num_layers}
        return described if self.normalise else {**described, "normalise": False}


def dino_layers(state_dict: Mapping[str, Tensor], prefix: str) -> list[tuple[Tensor, Tensor | None]]:
    """Return (weight, bias) of the Linears of a DINO head's MLP, in order."""
    names = [k for k in state_dict if k.startswith(prefix + "mlp.") and k.endswith(".weight")]
    indices = sorted({int(k[len(prefix) + 4 :].split(".")[0]) for k in names})
    stems = [f"{prefix}mlp.{i}." for i in indices if state_dict[f"{prefix}mlp.{i}.weight"].ndim == 2]
    return [(state_dict[stem + "weight"], state_dict.get(stem + "bias")) for stem in stems]


def _initial_rows(layers: Sequence[Tensor], last: Tensor, seed: int) -> Tensor:
    """Return the last layer's initial rows in DINO's head under torch's seed `seed`, for weights of these shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in [nn.Linear(weight.shape[1], weight.shape[0]) for weight in layers]:
            nn.init.trunc_normal_(module.weight, std=0.02)
        return nn.Linear(last.shape[1], last.shape[0], bias=False).weight.detach()


HEADS = ("linear", "text", "label_map", "prototypes")


def build_head(
    head: str,
    backbone: FrozenViT,
    num_classes: int,
    class_embeddings: Any = None,
    logit_scale: float = CLIP_LOGIT_SCALE,
    prototypes: Any = None,
    *,
    width: int | None = None,
) -> Head:
    """Build a head by name; "text" needs `class_embeddings` (C, E), "prototypes" needs `prototypes` (C, E).

    `width` is that of the features which a linear head reads; None is the backbone's.

    Raises:
        ValueError: the name is unknown, or the rows are missing or do not match the number of classes.
    """
    if head not in HEADS:
        raise ArgumentError("head", f"must be one of {HEADS} or a fastprompt head, got {head!r}")
    if head == "linear":
        return LinearHead(backbone.feature_width if width is None else width, num_classes)
    if head == "label_map":
        return LabelMapHead(backbone, num_classes)
    name, rows = ("class_embeddings", class_embeddings) if head == "text" else ("prototypes", prototypes)
    if rows is None:
        raise ValueError(f"head {head!r} needs {name} (C, E), one row per class")
    rows = _tensor(name, rows)
    if rows.ndim and len(rows) != num_classes:
        raise ArgumentError(name, f"must have one row for each of {num_classes} classes, got {len(rows)} rows")
    return TextHead(rows, backbone, logit_scale) if head == "text" else PrototypeHead(rows)


def encode_class_texts(
    class_names: Sequence[str],
    encode: str | Callable[[list[str]], Any],
    *,
    template: str = CLIP_TEMPLATE,
    library: str = "open_clip",
    pretrained: str | None = None,
) -> Tensor:
    """Compute class-text embeddings (C, E) for `head="text"` (PGN §4: one template per data set).

    Args:
        class_names: names; underscores become spaces, and letters become lower case.
        encode: a function from a list of C texts to (C, E), or the name of a model of `library`.
        template: a text with one {} for the class name.
        library: library of the named model: "open_clip" (`encode="ViT-B-16"`, `pretrained="openai"`) or "transformers"
            (`encode="openai/clip-vit-base-patch16"`).
        pretrained: name of open_clip's weights; required unless `encode` names a hub or a directory ("hf-hub:...").

    Raises:
        TypeError: `encode` is neither a function nor a name.
        ValueError: there are no class names, the template has no {}, or there are no weights to encode with.
        ImportError: `library` is not installed.
    """
    if isinstance(class_names, str) or not class_names or not all(isinstance(n, str) for n in class_names):
        raise ArgumentError("class_names", f"must be a list of names, got {class_names!r}")
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ArgumentError("template", f"must have one {{}} for the class name, got {template!r}")
    texts = [template.replace("{}", name.replace("_", " ").lower()) for name in class_names]
    if isinstance(encode, str):
        if library not in ("open_clip", "transformers"):
            raise ArgumentError("library", f"must be 'open_clip' or 'transformers', got {library!r}")
        encode = _open_clip_encoder(encode, pretrained) if library == "open_clip" else _transformers_encoder(encode)
    if not callable(encode):
        raise ArgumentTypeError("encode", f"must be a function or the name of a model, got {type(encode).__name__}")
    embeddings = torch.as_tensor(encode(texts)).detach().float().cpu()
    if embeddings.ndim != 2 or embeddings.shape[0] != len(texts):
        raise ArgumentError("encode", f"must return ({len(texts)}, E), got {tuple(embeddings.shape)}")
    if not torch.isfinite(embeddings).all() or (embeddings.norm(dim=-1) == 0).any():
        raise ValueError("encode must return finite, non-zero rows, got NaN, infinite or all-zero rows")
    return F.normalize(embeddings, dim=-1)


def _open_clip_encoder(name: str, pretrained: str | None) -> Callable[[list[str]], Tensor]:
    if pretrained is None and ":" not in name:  # open_clip would initialise the tower at random
        raise ArgumentError(
            "pretrained",
            f"must name the weights of open_clip's {name!r}, such as 'openai'; open_clip.list_pretrained() lists them",
        )
    import open_clip

    model = open_clip.create_model(name, pretrained=pretrained).eval()
    tokenizer = open_clip.get_tokenizer(name)
    return lambda texts: _without_gradient(model.encode_text, tokenizer(texts))


def _transformers_encoder(name: str) -> Callable[[list[str]], Tensor]:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    model, tokenizer = CLIPTextModelWithProjection.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    return lambda texts: _without_gradient(
        lambda batch: model(**batch).text_embeds, tokenizer(texts, padding=True, return_tensors="pt")
    )


def _without_gradient(function: Callable[[Any], Tensor], argument: Any) -> Tensor:
    with torch.no_grad():
        return function(argument)


def _tensor(name: str, values: Any) -> Tensor:
    """Return a float32 copy of `values`; raise TypeError unless they are an array of numbers."""
    if isinstance(values, (list, tuple)) and values and all(isinstance(v, Tensor) for v in values):
        values = torch.stack(list(values))
    try:
        return torch.as_tensor(values).detach().to(torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(name, f"must be an array of numbers, got {type(values).__name__}: {error}") from error


def _register_classifier(head: Head, backbone: FrozenViT, rows: int | None = None, trainable: bool = False) -> None:
    """Register float32 copies of the backbone's classifier rows, to be stored in the adapter.

    They are stored because the backbone's fingerprint does not cover the classifier.
    """
    if backbone.head_dist is not None:
        raise ArgumentError(
            "head", f"{head.kind!r} reads one pretrained classifier; this backbone, a distilled DeiT, has two"
        )
    for name in ("weight", "bias"):
        tensor = None if backbone.head is None else getattr(backbone.head, name)
        copied = None if tensor is None else tensor[:rows].detach().float().clone()
        if trainable:
            head.register_parameter(f"classifier_{name}", None if copied is None else nn.Parameter(copied))
        else:
            head.register_buffer(f"classifier_{name}", copied)


def _classifier(head: Head, features: Tensor) -> Tensor:
    weight = head.classifier_weight
    return features if weight is None else F.linear(features, weight, head.classifier_bias)
