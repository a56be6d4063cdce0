"""`PromptedForImageClassification`: a `PromptedViT` behind the interface of a transformers model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from fastprompt.adapters import WEIGHTS_FILE, Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.files import atomic_write
from fastprompt.model import PromptedViT

TRAINERS_FILE = "model.safetensors"
"""The name by which Trainer finds the weights of a checkpoint; the file is a copy of `adapter_model.safetensors`."""
_BICUBIC = 3
_INNER = "prompted."


class PromptedConfig(PretrainedConfig):
    """The configuration that transformers' tools read: labels and sizes. The adapter's own file holds all the rest."""

    model_type = "fastprompt"


class PromptedForImageClassification(PreTrainedModel):
    """A `PromptedViT` with a head as a transformers image classifier; `get_prompted_model` makes one.

    `state_dict()` holds generator and head under the names of `PromptedViT.adapter_state_dict`, without the frozen
    backbone, and `load_state_dict` takes that. `prompted` is the model itself, for `fp.Engine` and `fp.evaluate`.
    """

    config_class = PromptedConfig
    base_model_prefix = "prompted"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True

    def __init__(self, config: PromptedConfig, prompted: PromptedViT) -> None:
        super().__init__(config)
        self.prompted = prompted
        self.post_init()
        self.register_state_dict_post_hook(_without_backbone)
        self.register_load_state_dict_pre_hook(_with_inner_names)
        self.register_load_state_dict_post_hook(_backbone_is_not_missing)

    @classmethod
    def of(cls, prompted: PromptedViT) -> PromptedForImageClassification:
        """Put a model behind this interface; it is shared, not copied.

        Raises:
            TypeError: `prompted` is not a PromptedViT. ValueError: it has no head.
        """
        if not isinstance(prompted, PromptedViT):
            raise ArgumentTypeError("prompted", f"must be a PromptedViT, got {type(prompted).__name__}")
        if prompted.num_classes is None:
            raise ArgumentError("prompted", "must have a head: give num_classes")
        names = prompted.class_names or [f"LABEL_{i}" for i in range(prompted.num_classes)]
        config = PromptedConfig(
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="single_label_classification",
            image_size=list(prompted.backbone.image_size),
            architectures=[cls.__name__],
        )
        return cls(config, prompted)

    def _init_weights(self, module: nn.Module) -> None:
        """Keep every value: the backbone is pretrained, and generator and head have initialised themselves."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Compute logits (B, C) and, with labels, the loss: mean cross-entropy, for V²APT plus beta · mean KL.

        Args:
            pixel_values: (B, 3, H, W), float (normalised) or uint8 (raw pixels).
            labels: (B,), int64.
            return_dict: False: return (loss, logits) or (logits,) instead of an object.
        """
        logits, aux = self.prompted(pixel_values, return_aux=True)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
            if "kl" in aux:
                loss = loss + getattr(self.prompted.config, "beta", 0.0) * aux["kl"].float().mean()
            if "penalty" in aux:
                loss = loss + aux["penalty"]
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the blocks again in the backward (`PromptedViT.set_grad_checkpointing`), with its own options.

        Raises:
            ValueError: `every_n_layers` is not 1, or `offload` is True.
        """
        if every_n_layers != 1:
            raise ArgumentError("every_n_layers", f"must be 1, every block is computed again, got {every_n_layers}")
        if offload:
            raise ArgumentError("offload", "must be False, got True")
        self.prompted.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self.prompted.set_grad_checkpointing(False)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained and of all parameters, in PEFT's format."""
        self.prompted.print_trainable_parameters()

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, as one change for an engine that follows the model."""
        with self.prompted.changing():
            return super().load_state_dict(*args, **options)

    def image_processor(self) -> CLIPImageProcessor | ViTImageProcessor:
        """Return transformers' image processor for this model's size, mean, std and way of resizing.

        It squashes images if the model was trained on squashed ones (`fp.load_data(resize="squash")`), else it crops.
        """
        backbone = self.prompted.backbone
        height, width = backbone.image_size
        shared = {"image_mean": list(backbone.mean), "image_std": list(backbone.std), "resample": _BICUBIC}
        preprocessing = self.prompted.preprocessing or Preprocessing()
        if preprocessing.resize == "squash" or height != width:
            return ViTImageProcessor(size={"height": height, "width": width}, **shared)
        crop = {"height": height, "width": width}
        return CLIPImageProcessor(size={"shortest_edge": height}, crop_size=crop, **shared)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter (`PromptedViT.save_pretrained`), and what transformers' tools look for beside it.

        `config.json` holds the labels, `model.safetensors` is a copy of `adapter_model.safetensors` by which Trainer
        resumes, and `preprocessor_config.json` describes `image_processor`.

        Args:
            is_main_process: False: write nothing.
            state_dict: tensors to write instead of the model's, as a distributed Trainer gathers them.
            options: transformers' other options; they have no effect on an adapter.

        Raises:
            ValueError: `state_dict` does not fit. OSError: the directory is not writable.
        """
        if not is_main_process:
            return
        if state_dict is not None:
            self.load_state_dict(dict(state_dict), strict=True)
        directory = Path(save_directory)
        self.prompted.save_pretrained(directory)
        atomic_write(directory / TRAINERS_FILE, (directory / WEIGHTS_FILE).read_bytes())
        self.config.save_pretrained(directory)
        self.image_processor().save_pretrained(directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the adapter with a model card; the options are those of `PromptedViT.push_to_hub`."""
        return self.prompted.push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, *where: Any, **options: Any) -> PromptedForImageClassification:
        """Load an adapter from a directory or a repository; takes the arguments of `PromptedViT.from_pretrained`."""
        return cls.of(PromptedViT.from_pretrained(*where, **options))


# `pipeline` asks the auto classes which models it supports.
AutoConfig.register(PromptedConfig.model_type, PromptedConfig)
AutoModelForImageClassification.register(PromptedConfig, PromptedForImageClassification)


def _without_backbone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Leave the frozen backbone out of a state dict, and the inner name out of its keys."""
    assert isinstance(module, PromptedForImageClassification)
    for key in [key for key in state if key.startswith(prefix + _INNER)]:
        tensor, name = state.pop(key), key.removeprefix(prefix + _INNER)
        if module.prompted.full or not name.startswith("backbone."):
            state[prefix + name] = tensor


def _with_inner_names(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Undo the renaming of `_without_backbone` in a state dict that is about to be loaded."""
    assert isinstance(module, PromptedForImageClassification)
    parts = tuple(f"{prefix}{name}." for name, _ in module.prompted.named_children())
    for key in [key for key in state if key.startswith(parts)]:
        state[prefix + _INNER + key.removeprefix(prefix)] = state.pop(key)


def _backbone_is_not_missing(module: nn.Module, keys: Any) -> None:
    """Accept a state dict without the frozen backbone."""
    assert isinstance(module, PromptedForImageClassification)
    if not module.prompted.full:
        keys.missing_keys[:] = [key for key in keys.missing_keys if f"{_INNER}backbone." not in key]
