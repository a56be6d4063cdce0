"""A prompted model as transformers' own tools take it. Importing this package does not import transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn as nn

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.extras import needed
from fastprompt.generators import PromptConfig
from fastprompt.model import PromptedViT
from fastprompt.vit import FrozenViT
from fastprompt.vit.source import BackboneSource

if TYPE_CHECKING:
    from fastprompt.huggingface.model import PromptedForImageClassification


def get_prompted_model(
    model: FrozenViT | nn.Module | str,
    config: PromptConfig,
    num_classes: int | None = None,
    **options: Any,
) -> PromptedForImageClassification:
    """Prompt a vision model of transformers, as `peft.get_peft_model` adds an adapter to one.

    The result takes `pixel_values=` and `labels=`, and returns `.loss` and `.logits`. It is a `PreTrainedModel`:
    Trainer, `pipeline("image-classification")`, accelerate and Lightning take it as it is. The given model is copied
    and frozen; generator and head train. Checkpoints (`save_pretrained`, `state_dict()`) hold these two alone.

    Args:
        model: a ViT, CLIP, SigLIP or DINOv2 model of transformers, its name on the Hub or its folder; or a model of
            timm, torchvision or open_clip; or a `FrozenViT`.
        config: the method and its options, e.g. `VAPTConfig(num_prompts=10)`.
        num_classes: C; None: that of the model's own configuration, if it is an image classifier (`num_labels`).
        options: the remaining arguments of `PromptedViT`: head, readout, class_names, ... The class names default to
            those of the model's configuration (`id2label`) if it has C of them.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no model of that name, or the Hub cannot be reached.
        TypeError, ValueError: an argument is invalid, or a part of the model cannot be represented.
    """
    with needed("hf", "get_prompted_model"):
        from fastprompt.huggingface.model import PromptedForImageClassification
    if not isinstance(model, (FrozenViT, nn.Module, str)):
        raise ArgumentTypeError("model", f"must be a model, its name or its folder, got {type(model).__name__}")
    if not isinstance(config, PromptConfig):
        raise ArgumentTypeError("config", f"must be a method's configuration, got {type(config).__name__}")
    theirs: Any = None
    architectures = [type(model).__name__]
    if isinstance(model, FrozenViT):
        backbone = model
    elif isinstance(model, str):
        from transformers import AutoConfig

        theirs, backbone = AutoConfig.from_pretrained(model), FrozenViT.from_transformers(model)
        architectures = theirs.architectures or []
    else:
        theirs, backbone = getattr(model, "config", None), FrozenViT(model)
        if name := getattr(model, "name_or_path", ""):
            # An adapter loads by this name only if the tensors there have this backbone's fingerprint.
            backbone.source = BackboneSource.of_call("transformers", name, True, None, {})
    names = None
    if any(architecture.endswith("ForImageClassification") for architecture in architectures):
        names = [str(theirs.id2label[i]) for i in sorted(theirs.id2label)]
    if num_classes is None and names is not None:
        num_classes = len(names)
    if num_classes is None and "head" not in options:
        raise ArgumentError(
            "num_classes", "must be given: the model's configuration is not that of an image classifier"
        )
    if names is not None and len(names) == num_classes and not all(name.startswith("LABEL_") for name in names):
        options.setdefault("class_names", names)
    return PromptedForImageClassification.of(PromptedViT(backbone, config, num_classes, **options))
