"""Domain discovery: do a generator's outputs name the data set that an image comes from (PGN, Fig. 5)?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprompt.analysis.features import collect
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.extras import needed

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

USED = 0.9
"""Share of a domain's weight that its "used" tokens carry."""
FOLDS = 5


@dataclass(frozen=True)
class ReadOut:
    """How well vectors name the domain.

    Attributes:
        nearest: accuracy of the nearest other image (1-NN, leave one out, Euclidean).
        linear: accuracy of logistic regression on standardised vectors, by cross-validation with five folds.
        chance: share of the largest domain.
    """

    nearest: float
    linear: float
    chance: float


@dataclass(frozen=True)
class Discovery:
    """The result of `discover_domains` over N images of several domains.

    Attributes:
        domains: their names.
        labels: (N,) the domain of each image.
        embedding: (N, 2), t-SNE of the generator's outputs.
        read_out: "mixture" (the weights of the library's tokens, if there is a library, else "generator") and
            "backbone" (the images' own frozen features) -> how well they name the domain.
        mean_weights: domain -> (M,) mean weight of each token; {} without a library.
        tokens_used: domain -> number of tokens that carry 90 % of its weight; {} without a library.
        overlap: (domains, domains), 1 − Jensen–Shannon distance of the mean weights (base 2): 1 is the same tokens, 0
            no token in common; None without a library.
    """

    domains: list[str]
    labels: np.ndarray
    embedding: np.ndarray
    read_out: dict[str, ReadOut]
    mean_weights: dict[str, np.ndarray]
    tokens_used: dict[str, int]
    overlap: np.ndarray | None


def discover_domains(
    model: PromptedViT,
    data: Mapping[str, Any],
    *,
    max_images: int = 500,
    perplexity: float = 30.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Discovery:
    """Show whether a generator tells domains apart that nobody named to it (PGN, Fig. 5).

    A domain is easy to tell from most features, so compare the read-out of the mixture with that of the backbone's own
    features.

    Args:
        model: a model whose prompts depend on the image.
        data: domain -> images, as in `fastprompt.evaluate`; at least two domains.
        max_images: maximum number of images of each domain, drawn with `seed`.
        perplexity: of t-SNE; at most a third of the images is used.

    Raises:
        TypeError, ValueError: an argument is wrong, or a domain has fewer than five images.
        ImportError: scikit-learn is not installed; it comes with the extra `report`.
    """
    with needed("report", "domain discovery"):
        from sklearn.manifold import TSNE

    from fastprompt.analysis.library import has_library

    if not isinstance(data, Mapping):
        raise ArgumentTypeError("data", f"must be domain -> images, got {type(data).__name__}")
    if len(data) < 2:
        raise ArgumentError("data", f"must have at least two domains, got {list(data)}")
    source = "mixture" if has_library(model) else "generator"
    random = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {source: [], "backbone": []}
    labels: list[int] = []
    weights: dict[str, np.ndarray] = {}
    for number, (name, images) in enumerate(data.items()):
        subset = _some(images, max_images, random)
        if len(subset) < FOLDS:
            raise ArgumentError(
                "data", f"must have at least {FOLDS} images of each domain, got {len(subset)} of {name}"
            )
        for each, found in parts.items():
            found.append(collect(model, subset, each, batch_size)[0].numpy())
        labels += [number] * len(subset)
        if source == "mixture":
            weights[name] = _mean_weights(model, parts[source][-1])
    vectors = {each: np.concatenate(found) for each, found in parts.items()}
    domains = np.array(labels)
    t_sne = TSNE(2, perplexity=min(perplexity, (len(domains) - 1) / 3), init="pca", random_state=seed)
    return Discovery(
        list(data),
        domains,
        t_sne.fit_transform(vectors[source]),
        {each: read_out(found, domains, seed) for each, found in vectors.items()},
        weights,
        {name: tokens_used(each) for name, each in weights.items()},
        _overlap(list(weights.values())) if weights else None,
    )


def read_out(vectors: np.ndarray, domains: np.ndarray, seed: int = 0) -> ReadOut:
    """Measure how well vectors (N, D) name the domains (N,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import NearestNeighbors
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _, neighbours = NearestNeighbors(n_neighbors=2).fit(vectors).kneighbors(vectors)
    own = neighbours[:, 0] == np.arange(len(vectors))  # equal images may come in either order
    nearest = np.where(own, neighbours[:, 1], neighbours[:, 0])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return ReadOut(
        float((domains[nearest] == domains).mean()),
        float(cross_val_score(linear, vectors, domains, cv=folds).mean()),
        float(np.bincount(domains).max() / len(domains)),
    )


def tokens_used(weights: np.ndarray, share: float = USED) -> int:
    """Return the smallest number of tokens that carry `share` of the weight (M,)."""
    ordered = np.sort(weights / weights.sum())[::-1]
    return int(np.searchsorted(np.cumsum(ordered), share - 1e-12) + 1)


def nearest_domain(model: PromptedViT, images: Any, discovery: Discovery, batch_size: int = 64) -> dict[str, float]:
    """Return which known domain's tokens a new set of images takes: domain -> overlap of mean weights, most first.

    Raises:
        ValueError: the discovery was made without a token library.
    """
    if not discovery.mean_weights:
        raise ArgumentError("discovery", "must be of a model with a token library")
    own = _mean_weights(model, collect(model, images, "mixture", batch_size)[0].numpy())
    found = {name: float(_overlap([own, weights])[0, 1]) for name, weights in discovery.mean_weights.items()}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _mean_weights(model: PromptedViT, mixtures: np.ndarray) -> np.ndarray:
    """Return the mean weight (M,) of each token, of mixtures (N, K · M)."""
    prompts: Any = model.config
    weights = mixtures.reshape(len(mixtures), prompts.num_prompts, -1)
    weights = weights / weights.sum(-1, keepdims=True)  # sigmoid mixtures
    return weights.mean((0, 1))


def _overlap(weights: list[np.ndarray]) -> np.ndarray:
    from scipy.spatial.distance import jensenshannon

    return np.array([[1 - float(np.nan_to_num(jensenshannon(a, b, base=2))) for b in weights] for a in weights])


def _some(images: Any, count: int, random: np.random.Generator) -> Any:
    from torch.utils.data import Subset

    if len(images) <= count:
        return images
    return Subset(images, sorted(random.choice(len(images), count, replace=False).tolist()))
