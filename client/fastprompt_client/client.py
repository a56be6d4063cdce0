"""`Client`: from an image to the prompted picture, to the host's embedding of it, to the class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from fastprompt_client import pictures
from fastprompt_client.folder import Folder, FolderError, Head, read_folder
from fastprompt_client.host import Host, HostError, HostMismatch, check_key, check_timeout, printable

SURE, LIKELY = 0.5, 0.6
"""Ratio of a host's distances to a mistake's embedding and to the right one. Up to SURE, a host is refused for that
alone; up to LIKELY, the mistake is named as the likely cause of a refusal."""
NEAR = 0.6
"""Distance of normalised embeddings beyond which a mistake explains nothing."""
NOISE = 1e-3
"""Distance up to which two normalised embeddings count as equal."""
LENGTH = 0.02
"""Relative difference by which the length of an embedding may deviate."""
PICTURES_PER_CALL, BYTES_PER_CALL = 16, 4 << 20


class Prediction(NamedTuple):
    """The class of one image.

    Attributes:
        name: the most probable class. probability: its probability.
        probabilities: (C,) probabilities of all classes, in the order of `class_names`.
    """

    name: str
    probability: float
    probabilities: np.ndarray


class Verification(NamedTuple):
    """The result of verifying a host with the golden picture.

    Attributes:
        ok: whether the client accepts the host.
        cosine: cosine of the host's embedding and the one the model was trained with; NaN if the widths differ.
        likely: the mistake that the host seems to make; None if there is none, or none is clearly the nearest.
        message: the result in words.
    """

    ok: bool
    cosine: float
    likely: str | None
    message: str


class Client:
    """Classifies images with a model exported by `fastprompt export --client` and a host.

    Args:
        folder: the exported folder.
        model: name of the host's model; None picks the one listed with the backbone's fingerprint, else the only one.
        api_key: sent to the host as a bearer token.
        timeout: total seconds that `predict`, `verify` and `check` wait for a host, however slowly it answers. `embed`
            waits that long for every 16 pictures.
        threads: number of onnxruntime's threads.
        max_pixels: maximum number of pixels of an image.

    Raises:
        TypeError, ValueError: an argument does not fit.
        FileNotFoundError: the folder or a file in it is missing.
        FolderError: a file is damaged or does not fit the others.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        threads: int = 1,
        max_pixels: int = pictures.MAX_PIXELS,
    ) -> None:
        if model is not None and (not isinstance(model, str) or not model):
            raise TypeError(f"model must be a name, or None, got {model!r}")
        check_key(api_key)
        check_timeout(timeout)
        for name, count in (("threads", threads), ("max_pixels", max_pixels)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be a whole number, got {count!r}")
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.folder = read_folder(folder)
        self.class_names = self.folder.class_names
        self.model, self.api_key, self.timeout, self.max_pixels = model, api_key, timeout, max_pixels
        self._session = None if self.folder.graph is None else _session(self.folder, threads)
        height = self.folder.size[0]
        self._shrink = None
        if self.folder.placement == "replace":
            self._shrink = pictures.Shrink(
                height, height - self.folder.rows * self.folder.patch, pictures.TIE if self.folder.round_pixels else 0.0
            )
        self._verified: dict[str, str | None] = {}

    def picture(self, image: pictures.ImageLike) -> np.ndarray:
        """Return the prompted picture for the host, uint8 (H', W, 3), in exactly the size that the host takes.

        Args:
            image: a file's path or bytes, a PIL image or a uint8 array (H, W, 3). Any size is resized as in training.

        Raises:
            TypeError, ValueError: `image` is none of these, cannot be read, or is too large.
        """
        opened = pictures.open_image(image, self.max_pixels, self.folder.intensity_range)
        return self.prompt(pictures.resized(opened, self.folder.size, self.folder.resize))

    def prompt(self, pixels: np.ndarray) -> np.ndarray:
        """Return the `picture` of an image that already has the backbone's size, uint8 (H, W, 3).

        Raises:
            ValueError: `pixels` have another type or shape.
            FolderError: the folder's generator returns library weights that are not finite.
        """
        folder = self.folder
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (*folder.size, 3):
            got = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ValueError(f"pixels must be uint8 {(*folder.size, 3)}, got {got}")
        image = pixels if folder.added is None else pictures.to_uint8(pixels + folder.added)
        if self._session is None:
            return image
        if self._shrink is not None:
            image = self._shrink(image)
        try:
            [weights] = self._session.run(None, {"image": pixels[None]})  # (K, M)
        except Exception as error:  # onnxruntime's errors have no common class
            raise FolderError(f"generator.onnx cannot be run: {error}") from error
        if not np.isfinite(weights).all():
            raise FolderError("generator.onnx must return finite weights, got NaN or infinity")
        mixed = weights @ folder.library  # (K, 3p²)
        if folder.offset is not None:
            mixed = mixed + folder.offset
        return np.concatenate([image, pictures.assemble(mixed, folder.rows, folder.patch)])

    def png(self, image: pictures.ImageLike) -> bytes:
        """Return `picture` as a PNG file, as it is sent to the host."""
        return pictures.png(self.picture(image))

    def embed(self, url: str, images: Any) -> np.ndarray:
        """Let the host embed the pictures of one image or a list of images: (n, D) float32. The host is not verified.

        Raises:
            HostError: the host cannot be reached, refuses the request, or returns something else.
            TypeError, ValueError: an image cannot be used, or `url` is not an address.
        """
        host, sent = Host(url, self.api_key, self.timeout), [self.png(image) for image in _several(images)]
        if not sent:
            raise ValueError("images must hold at least one image, got none")
        return self._embedded(host, sent)

    def _embedded(self, host: Host, sent: Sequence[bytes], deadline: float | None = None) -> np.ndarray:
        model = self._verified.get(host.base, self.model)
        parts = [host.embed(part, model, deadline) for part in _calls(sent)]
        found = np.concatenate(parts) if len({part.shape[1] for part in parts}) == 1 else parts[0]
        if found.shape != (len(sent), self.folder.width):
            raise HostError(
                f"{host.base} must return embeddings of {self.folder.name}'s width {self.folder.width}, got width "
                f"{found.shape[1]}"
            )
        return found

    def classify(self, features: np.ndarray) -> list[Prediction]:
        """Map the host's features (n, D), or one (D,), to one `Prediction` each.

        Raises:
            ValueError: the model has no head, or `features` have another shape.
        """
        head, class_names = self._head()
        features = np.asarray(features, np.float32)
        features = features[None] if features.ndim == 1 else features
        if features.ndim != 2 or features.shape[1] != self.folder.width or not np.isfinite(features).all():
            raise ValueError(f"features must be finite and (n, {self.folder.width}), got {features.shape}")
        probabilities = softmax(head(features))
        best = probabilities.argmax(axis=1)
        return [Prediction(class_names[i], float(row[i]), row) for i, row in zip(best, probabilities, strict=True)]

    def _head(self) -> tuple[Head, tuple[str, ...]]:
        if self.folder.head is None or self.class_names is None:
            raise ValueError("the model in this folder has no head; use `embed` to get features")
        return self.folder.head, self.class_names

    def predict(self, url: str, image: pictures.ImageLike) -> Prediction:
        """Predict the class of one image. The first call verifies the host and refuses it if that fails.

        Errors in the image or the folder are raised before anything is sent to the host.

        Raises:
            HostMismatch: the host's embedding of the golden picture is wrong.
            HostError, TypeError, ValueError: as in `embed` and `classify`.
        """
        self._head()
        host, sent = Host(url, self.api_key, self.timeout), self.png(image)
        deadline = host.deadline()
        if host.base not in self._verified:
            found = self._check(host, deadline)
            if not found.ok:
                raise HostMismatch(found.message)
        return self.classify(self._embedded(host, [sent], deadline))[0]

    def verify(self, url: str) -> Verification:
        """Send the golden picture and check that the host's embedding is the one the model was trained with.

        Raises:
            HostMismatch: the embedding is wrong; the message says which mistake is likely.
            HostError: the host cannot be reached, refuses the request, or returns something else.
            ValueError: `url` is not an address.
        """
        found = self.check(url)
        if not found.ok:
            raise HostMismatch(found.message)
        return found

    def check(self, url: str) -> Verification:
        """Do as `verify`, but return a mismatch instead of raising it."""
        host = Host(url, self.api_key, self.timeout)
        return self._check(host, host.deadline())

    def _check(self, host: Host, deadline: float) -> Verification:
        self._verified.pop(host.base, None)
        self._check_own_picture()
        models = host.models(deadline)
        model = self.model if self.model is not None else _asked_for(models, self.folder.fingerprint)
        [embedding] = host.embed([self.folder.golden_picture], model, deadline)
        found = self.judge(embedding, host.base)
        if found.ok:
            self._verified[host.base] = model
            return found
        listed = sorted({printable(str(entry["fingerprint"])[:12]) for entry in models if entry.get("fingerprint")})
        if listed and self.folder.fingerprint[:12] not in listed:
            message = (
                f"{found.message} It lists backbones with the fingerprints {', '.join(listed)}, but the model was "
                f"trained on {self.folder.fingerprint[:12]}."
            )
            return found._replace(likely=found.likely or "another model", message=message)
        return found

    def judge(self, embedding: np.ndarray, who: str = "the host") -> Verification:
        """Judge a host by its embedding (D,) of the golden picture."""
        folder, name = self.folder, self.folder.name
        if embedding.shape != (folder.width,):
            return Verification(
                False,
                float("nan"),
                "another model",
                f"{who} is refused: its embeddings have {embedding.shape[-1]} numbers, those of {name} "
                f"have {folder.width}. Likely: another model, or a projection behind it.",
            )
        right, got = _unit(folder.golden_embedding), _unit(embedding)
        cosine = float(right @ got)
        length = float(np.linalg.norm(embedding) / np.linalg.norm(folder.golden_embedding))
        away, distances = np.linalg.norm(right - got), np.linalg.norm(_unit(folder.mistakes) - got, axis=1)
        nearest = int(distances.argmin()) if len(distances) else -1
        known = nearest >= 0 and away > NOISE and distances[nearest] <= NEAR
        part = distances[nearest] / away if known else np.inf
        measured = f"the cosine of its embedding of the golden picture and {name}'s is {cosine:.6f}"
        if part <= SURE or (cosine < folder.threshold and part <= LIKELY):
            likely, detail = folder.mistake_names[nearest], folder.mistake_details[nearest]
            return Verification(
                False,
                cosine,
                likely,
                f"{who} is refused: {measured}; that of a mistake is nearer. Likely: {likely} (nearest: {detail}).",
            )
        if cosine < folder.threshold and known:
            return Verification(
                False,
                cosine,
                None,
                f"{who} is refused: {measured}, below the threshold {folder.threshold}. Likely: unknown; none "
                "of the known mistakes is clearly nearer. The nearest is "
                f"{folder.mistake_names[nearest]} ({folder.mistake_details[nearest]}).",
            )
        if cosine < folder.threshold:
            return Verification(
                False,
                cosine,
                "another model",
                f"{who} is refused: {measured}, below the threshold {folder.threshold}. No known resizing, "
                "cropping, compression or normalisation explains it. Likely: another model, other weights, or "
                f"another layer than {name}'s {folder.readout!r}.",
            )
        if abs(length - 1) > LENGTH and not (folder.head is not None and folder.head.ignores_length):
            return Verification(
                False,
                cosine,
                "scaled embeddings",
                f"{who} is refused: {measured}, but its length is {length:.3g} times the right one. "
                "Likely: the host normalises or scales its embeddings.",
            )
        return Verification(True, cosine, None, f"{who} is right: {measured}.")

    def _check_own_picture(self) -> None:
        """Check that this machine makes the same golden picture as the exporting one, up to one level."""
        golden = np.asarray(pictures.open_image(self.folder.golden_picture)).astype(int)
        own = self.prompt(np.asarray(pictures.open_image(self.folder.golden_image))).astype(int)
        if own.shape != golden.shape or np.abs(own - golden).max() > 1:
            raise FolderError(
                "golden_picture.png is not the picture that this machine makes from golden_image.png: the "
                f"folder's files do not belong together, or onnxruntime {onnxruntime.__version__} "
                "computes something else"
            )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last axis in float64."""
    exp = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def _calls(sent: Sequence[bytes]) -> list[list[bytes]]:
    """Group pictures, in order, into requests of a number and size that a host accepts."""
    calls: list[list[bytes]] = []
    for picture in sent:
        if not calls or len(calls[-1]) == PICTURES_PER_CALL or sum(map(len, calls[-1])) + len(picture) > BYTES_PER_CALL:
            calls.append([])
        calls[-1].append(picture)
    return calls


def _several(images: Any) -> Sequence[Any]:
    return images if isinstance(images, (list, tuple)) else [images]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def _asked_for(models: list[dict[str, Any]], fingerprint: str) -> str | None:
    """Return the id of the host's backbone with that fingerprint, else of its only backbone."""
    backbones = [
        entry for entry in models if entry.get("object", "model") == "model" and isinstance(entry.get("id"), str)
    ]
    for entry in backbones:
        if entry.get("fingerprint") == fingerprint:
            return entry["id"]
    return backbones[0]["id"] if len(backbones) == 1 else None


def _session(folder: Folder, threads: int) -> onnxruntime.InferenceSession:
    assert folder.library is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(folder.graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        raise FolderError(f"generator.onnx cannot be run by onnxruntime {onnxruntime.__version__}: {error}") from error
    patches = folder.rows * folder.size[1] // folder.patch
    wanted = [
        ("image", "tensor(uint8)", (1, *folder.size, 3)),
        ("weights", "tensor(float)", (patches, len(folder.library))),
    ]
    found = [(value.name, value.type, tuple(value.shape)) for value in (*session.get_inputs(), *session.get_outputs())]
    if found != wanted:
        raise FolderError(f"generator.onnx must map {wanted[0]} to {wanted[1]}, got {found}")
    return session
