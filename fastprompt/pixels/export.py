"""`export_client`: write the folder for a client without torch and without the backbone (`fastprompt-client`)."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import fastprompt
from fastprompt.adapters import RESIZES, Preprocessing
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.files import Content, atomic_write_many
from fastprompt.generators.pixel import PixelPrompt
from fastprompt.generators.rgb_pgn import RGBPGN
from fastprompt.heads import Head, LabelMapHead, LinearHead, PrototypeHead, TextHead
from fastprompt.model import PromptedViT
from fastprompt.pixels.prompts import RGBPrompts
from fastprompt.vit import FrozenViT
from fastprompt.vit.weights import per_channel

FORMAT = 1
MANIFEST = "manifest.json"
THRESHOLD = 0.999
"""Lowest threshold of the cosine between the host's embedding of the golden picture and ours."""
ROOM, NOISE = 3, 1e-5
"""A model's own threshold allows a host ROOM times the larger of NOISE and the bfloat16 backbone's 1 - cosine."""

NORMALISATIONS = {
    "ImageNet's mean and std": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CLIP's mean and std": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "mean and std 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "pixels from 0 to 1, not normalised": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "pixels from 0 to 255, not normalised": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}


class Mistake(NamedTuple):
    """A mistake that a host may make with the golden picture.

    Attributes:
        name: name of the mistake, as the client reports it.
        detail: how it was simulated.
        features: (D,) the backbone's features with this mistake.
    """

    name: str
    detail: str
    features: Tensor


def export_client(
    model: PromptedViT, out_dir: str | os.PathLike[str], golden: Tensor | None = None, resize: str | None = None
) -> dict[str, Any]:
    """Write the files that `fastprompt-client` needs into `out_dir`, all or none, and return the manifest.

    The client makes the pictures of `RGBPrompts(model).pictures` and applies the model's head to the features that a
    host returns for them. The files are:

    * `manifest.json`: backbone and fingerprint, preprocessing, placement of the prompts, sizes and sha256 of the other
      files.
    * `generator.onnx`: raw pixels → weights of the library.
    * `library.npy`: (M, 3p²) patches in levels of 0 to 255, uint8, and `library_rest.npy`: their rounding errors,
      float16, so that the client mixes the same values as in training. A library outside [0, 1], as inversion makes,
      is float32.
    * `offset.npy` (K, 3p²), `added.npy` (H', W, 3): levels added to patches and image, if the method has them.
    * the head's matrices, each as a .npy file.
    * `golden_image.png`; `golden_picture.png`, the picture with prompts made from it; and `golden_embedding.npy` (D,),
      the features that the host should return for it. `mistakes.npy` (n, D): the features if the host resizes, crops,
      mirrors or compresses the picture, normalises it differently, or changes its colours. The manifest's threshold of
      the cosine is computed by `threshold` from these and from the backbone's features in bfloat16.

    Args:
        model: a model that `RGBPrompts` accepts.
        golden: uint8 (3, H, W) of the backbone's size; None uses an image of gradients, edges and noise, which every
            likely mistake of a host changes.
        resize: how the client resizes images to the backbone's size, "crop" or "squash" of `load_data`; None does as
            in training, or "crop" if the model does not record it.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model holds NaN or infinite values.
        OSError: a file could not be written; nothing has changed.
    """
    preprocessing = getattr(model, "preprocessing", None) or Preprocessing()
    if resize is None:
        resize = preprocessing.resize
    if resize not in RESIZES:
        raise ArgumentError("resize", f"must be one of {RESIZES}, got {resize!r}")
    if not isinstance(out_dir, (str, os.PathLike)) or not os.fspath(out_dir):
        raise ArgumentTypeError("out_dir", f"must be a folder's path, got {out_dir!r}")
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise NotADirectoryError(f"out_dir must be a folder, got the file {os.fspath(out_dir)}")
    client = RGBPrompts(model)
    _check_finite(model)
    class_names = _class_names(model)
    backbone, generator = model.backbone, model.generator
    golden = golden_image(*backbone.image_size) if golden is None else golden
    if (
        not isinstance(golden, Tensor)
        or golden.dtype != torch.uint8
        or tuple(golden.shape) != (3, *backbone.image_size)
    ):
        got = f"{golden.dtype} {tuple(golden.shape)}" if isinstance(golden, Tensor) else type(golden).__name__
        raise ArgumentError("golden", f"must be a uint8 tensor {(3, *backbone.image_size)}, got {got}")
    picture = client.pictures(golden[None].to(backbone.device))[0]  # (3, H', W)
    embedding = host_features(backbone, backbone.normalise(picture[None]), model.readout)
    if not embedding.isfinite().all():
        raise ValueError("model.backbone's features of the golden picture must be finite, got NaN or infinite values")
    mistakes = list(likely_mistakes(backbone, picture, model.readout))
    cosines = [round(cosine(mistake.features, embedding), 6) for mistake in mistakes]
    rounded = cosine(_other_format(backbone, picture, model.readout), embedding)
    head, arrays = _head_files(model.head)
    files: dict[str, bytes] = {
        "golden_image.png": _png(golden),
        "golden_picture.png": _png(picture),
        "golden_embedding.npy": _npy(embedding),
        "mistakes.npy": _npy(torch.stack([mistake.features for mistake in mistakes])),
    }
    assert isinstance(generator, (RGBPGN, PixelPrompt))
    prompts = (
        _pixel_prompt(generator, backbone, files)
        if isinstance(generator, PixelPrompt)
        else _patches(generator, backbone, files)
    )
    files |= {name: _npy(array) for name, array in arrays.items()}
    manifest = {
        "format": FORMAT,
        "fastprompt_version": fastprompt.__version__,
        "method": model.config.to_dict(),
        "backbone": {
            "name": backbone.spec.name,
            "fingerprint": backbone.fingerprint,
            "width": backbone.feature_width,
            "readout": model.readout,
            "image_size": list(backbone.image_size),
            "patch_size": backbone.patch_size,
            "grid": list(backbone.grid),
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "preprocessing": {
            "size": list(backbone.image_size),
            "resize": resize,
            "filter": "bicubic, antialiased",
            "upright": "EXIF",
            "transparency": "over white",
            "intensity_range": preprocessing.intensity_range and list(preprocessing.intensity_range),
        },
        "prompts": prompts,
        "picture_size": list(picture.shape[1:]),
        "head": head,
        "class_names": class_names,
        "golden": {
            "threshold": threshold(rounded, cosines),
            "bfloat16_cosine": round(rounded, 6),
            "mistakes": [
                {"name": mistake.name, "detail": mistake.detail, "cosine": found}
                for mistake, found in zip(mistakes, cosines, strict=True)
            ],
        },
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    written: dict[str, Content] = {**files, MANIFEST: text}
    atomic_write_many(out_dir, written)
    return json.loads(text)


def unnoticed(manifest: dict[str, Any]) -> list[str]:
    """Return the mistakes that change the golden picture's embedding too little to be detected in every host.

    A host that makes exactly the recorded mistake is still refused, unless the mistake changes nothing.
    """
    golden = manifest["golden"]
    return [
        f"{mistake['name']}, {mistake['detail']} (cosine {mistake['cosine']})"
        for mistake in golden["mistakes"]
        if mistake["cosine"] >= golden["threshold"]
    ]


def threshold(rounded: float, mistakes: Sequence[float]) -> float:
    """Return the lowest cosine that a client accepts, at least THRESHOLD.

    It is raised to detect mistakes as long as that leaves room for a host in bfloat16: half way between the nearest
    detectable mistake and 1 minus ROOM times that host's 1 - cosine.

    Args:
        rounded: cosine of the golden picture's embedding in bfloat16.
        mistakes: cosines of the mistakes.
    """
    highest = 1 - ROOM * max(1 - rounded, NOISE)
    nearest = max((found for found in mistakes if found < highest), default=0.0)
    return round(max(THRESHOLD, (nearest + highest) / 2), 6)


def _other_format(backbone: FrozenViT, picture: Tensor, readout: str) -> Tensor:
    """Return (D,) features of a picture in bfloat16, or in float32 if the backbone is in half precision already."""
    half = backbone.dtype in (torch.bfloat16, torch.float16)
    other = copy.deepcopy(backbone).to(torch.float32 if half else torch.bfloat16)
    return host_features(other, other.normalise(picture[None].to(other.device)), readout)


def golden_image(height: int, width: int) -> Tensor:
    """Make a uint8 (3, height, width) image: a gradient per channel, squares of random colours, and noise."""
    random = np.random.default_rng(0)
    across, down = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    image = (
        np.stack(
            [np.broadcast_to(across, (height, width)), np.broadcast_to(1 - down, (height, width)), 0.8 * across * down],
            axis=-1,
        )
        * 255
    )  # (H, W, 3)
    for _ in range(24):
        side = int(random.integers(2, max(3, min(height, width) // 4)))
        top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
        image[top : top + side, left : left + side] = random.integers(0, 256, 3)
    noise = random.integers(-64, 65, (height, width, 3))
    pixels = np.clip(np.rint(image) + noise, 0, 255).astype(np.uint8)
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


@torch.no_grad()
def host_features(backbone: FrozenViT, images: Tensor, readout: str) -> Tensor:
    """Compute a host's features: normalised image (1, 3, H', W') of any valid size → (D,) float32 on the CPU."""
    papers = backbone.graph.papers
    sequence = papers.encode(backbone, images.to(device=backbone.device, dtype=backbone.dtype))
    return papers.read_out(backbone, sequence, readout)[0].float().cpu()


def likely_mistakes(backbone: FrozenViT, picture: Tensor, readout: str) -> Iterator[Mistake]:
    """Yield what a host returns for a picture, uint8 (3, H', W), if it makes a likely mistake."""
    for name, detail, changed in _changed(_pil(picture), backbone.image_size):
        pixels = rearrange(torch.from_numpy(np.array(changed)), "h w c -> 1 c h w").to(backbone.device)
        yield Mistake(name, detail, host_features(backbone, backbone.normalise(pixels), readout))
    unit = picture[None].to(torch.promote_types(backbone.dtype, torch.float32)) / 255
    for detail, (mean, std) in NORMALISATIONS.items():
        if np.allclose((*mean, *std), (*backbone.mean, *backbone.std), atol=1e-4):
            continue
        images = (unit - per_channel(mean, unit, unit.dtype)) / per_channel(std, unit, unit.dtype)
        yield Mistake("other mean and standard deviation", detail, host_features(backbone, images, readout))
    for other in ["patches", *(["cls"] if backbone.spec.has_cls else [])]:
        if other != readout:
            images = backbone.normalise(picture[None])
            yield Mistake("another readout", f"readout {other}", host_features(backbone, images, other))


def _changed(picture: Image.Image, size: tuple[int, int]) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield (name, detail, picture) for every mistake in the pixels; `size` is (H, W) of the backbone's own images."""
    height, width = size
    kinds = [(quality, "4:4:4") for quality in (98, 97, 95, 93, 90, 85, 80, 75, 65, 50, 30)]
    kinds += [(quality, "4:2:0") for quality in (95, 85, 75, 50, 30)]  # chroma subsampling outweighs small steps
    for quality, subsampling in kinds:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality, subsampling=subsampling)
        yield "JPEG compression", f"quality {quality}, {subsampling}", Image.open(stream).convert("RGB")
    if picture.size != (width, height):
        yield "resizing", f"squeezed to {height} x {width}", picture.resize((width, height), Image.Resampling.BICUBIC)
        top = (picture.height - height) // 2
        yield "cropping", f"the middle {height} x {width}", picture.crop((0, top, width, top + height))
        yield "cropping", f"the upper {height} x {width}", picture.crop((0, 0, width, height))
        yield (
            "cropping",
            f"the lower {height} x {width}",
            picture.crop((0, picture.height - height, width, picture.height)),
        )
    for side in (0.5, 0.75):
        small = picture.resize(
            (max(1, round(picture.width * side)), max(1, round(picture.height * side))), Image.Resampling.BILINEAR
        )
        yield "resizing", f"to {side:.0%} of the sides and back", small.resize(picture.size, Image.Resampling.BILINEAR)
    for part in (0.8, 0.875, 0.9, 0.95):  # timm's evaluation transforms; 224 of 256 pixels is torchvision's
        large = picture.resize(
            (round(width / part), round(picture.height * width / part / picture.width)), Image.Resampling.BICUBIC
        )
        left, top = (large.width - width) // 2, (large.height - height) // 2
        yield ("resizing and cropping", f"the middle {part:.1%}", large.crop((left, top, left + width, top + height)))
    red, green, blue = picture.split()
    yield "blue and red swapped (BGR)", "OpenCV's order", Image.merge("RGB", (blue, green, red))
    yield "mirroring", "left and right", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    yield "no colours", "grey", picture.convert("L").convert("RGB")
    yield "few colours", "a palette of 256, as a GIF file has", picture.quantize(256).convert("RGB")


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two vectors, or 0 if one of them is zero or not finite."""
    value = float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0, eps=1e-30))
    return value if np.isfinite(value) else 0.0


def _check_finite(model: PromptedViT) -> None:
    for part in ("generator", "head"):
        module = getattr(model, part)
        tensors = () if module is None else itertools.chain(module.named_parameters(), module.named_buffers())
        for name, values in tensors:
            if not values.isfinite().all():
                raise ValueError(f"model.{part}.{name} must be finite, got NaN or infinite values")


def _pixel_prompt(generator: PixelPrompt, backbone: FrozenViT, files: dict[str, bytes]) -> dict[str, Any]:
    std = torch.tensor(backbone.std, dtype=torch.float64).view(3, 1, 1)
    frame = generator.frame()[0].detach().double().cpu()  # (3, H, W), of normalised pixels
    files["added.npy"] = _npy(rearrange(frame * std * 255, "c h w -> h w c"))
    return {"kind": "border", "added": True}


def _patches(generator: RGBPGN, backbone: FrozenViT, files: dict[str, bytes]) -> dict[str, Any]:
    from fastprompt.pixels.graph import selection_graph

    config = generator.config
    files["generator.onnx"] = selection_graph(generator, backbone)
    levels = generator.pixel_library().detach().double().cpu() * 255  # (M, 3p²)
    if config.bounded:
        rounded = levels.round()
        files["library.npy"] = _npy(rounded.to(torch.uint8))
        files["library_rest.npy"] = _npy((levels - rounded).half())
    else:
        files["library.npy"] = _npy(levels)
    if config.offset:
        files["offset.npy"] = _npy(generator.offset.detach().double().cpu() * 255)
    if config.compensate:
        added = generator.compensation.detach().double().cpu() * 255  # (3, H, W)
        files["added.npy"] = _npy(rearrange(added, "c h w -> h w c"))
    return {
        "kind": "patches",
        "placement": config.placement,
        "rows": generator.prompt_rows,
        "num_prompts": config.num_prompts,
        "library_size": config.library_size,
        "offset": config.offset,
        "added": config.compensate,
        "rest": config.bounded,
        "round_pixels": config.round_pixels,
    }


def _head_files(head: Head | None) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return the head as a client computes it, and its matrices.

    "linear" is W f + b. "cosine" is scale · cos(MLP(f), rows), with GELU between the layers of the MLP, which may have
    no layers.
    """
    if head is None:
        return None, {}
    if isinstance(head, (LinearHead, LabelMapHead)):
        weight, bias = (
            (head.weight, head.bias) if isinstance(head, LinearHead) else (head.classifier_weight, head.classifier_bias)
        )
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return {"kind": "linear"}, {"head_weight.npy": weight, "head_bias.npy": bias}
    if isinstance(head, TextHead):
        rows, scale = head.get_buffer("class_embeddings"), head.logit_scale
        layers = [] if head.classifier_weight is None else [(head.classifier_weight, head.classifier_bias)]
    elif isinstance(head, PrototypeHead):
        rows, scale = head.get_buffer("prototypes"), 1.0
        layers = [(head.get_buffer(f"weight{i}"), head.get_buffer(f"bias{i}")) for i in range(head.num_layers)]
    else:
        raise ValueError(f"model.head must be a linear, text, label map or prototype head, got {type(head).__name__}")
    arrays = {"class_embeddings.npy": rows}
    for i, (weight, bias) in enumerate(layers):
        arrays[f"projection{i}_weight.npy"] = weight
        arrays[f"projection{i}_bias.npy"] = weight.new_zeros(len(weight)) if bias is None else bias
    return {"kind": "cosine", "scale": scale, "layers": len(layers)}, arrays


def _class_names(model: PromptedViT) -> list[str] | None:
    if model.num_classes is None:
        return None
    names = list(model.class_names) if model.class_names is not None else [str(i) for i in range(model.num_classes)]
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"model.class_names must be text that UTF-8 can encode, got {name!r}")
    return names


def _npy(values: Tensor) -> bytes:
    """Return a .npy file; uint8 and float16 keep their dtype, other numbers become float32."""
    kept = values.dtype in (torch.uint8, torch.float16)
    stream = io.BytesIO()
    array = (values if kept else values.float()).detach().cpu().numpy()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def _pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(rearrange(picture, "c h w -> h w c").contiguous().cpu().numpy())


def _png(picture: Tensor) -> bytes:
    stream = io.BytesIO()
    _pil(picture).save(stream, "PNG")
    return stream.getvalue()
