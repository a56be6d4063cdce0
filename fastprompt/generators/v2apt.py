"""V²APT: visual variational autoencoder prompt tuning (Xiao et al., arXiv 2503.17650)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.registry import Published, register_method
from fastprompt.generators.vpt import VPT_RECIPE, VPT_SEARCH, StaticPrompts
from fastprompt.kernels.vae_prompts import Decoder, vae_prompts
from fastprompt.kernels.vae_prompts.reference import gaussian, kl_per_unit, philox_normal

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


ACTIVE_UNIT_NATS = 0.01
NOISE_CALLS = 2 + 1 + 3 * 3 + 10 * 30 + 1 + 13  # seed, counters, ten rounds of Philox, Box-Muller


@dataclasses.dataclass(frozen=True)
class V2APTConfig(PromptConfig):
    """Options of `V2APT`. All of them are choices of this library, explained there.

    Attributes:
        num_prompts: P per block, domain and instance prompts together.
        num_instance: m, the number of prompts from the VAE; the other P − m are learned domain prompts of the block.
        latent: Z, size of the Gaussian latent. hidden: h, width of encoder and decoder.
        beta: weight of the KL term (nats per image) in the loss.
        share: "all" uses one decoder and the same instance prompts in every block, "per_layer" a decoder per block.
        inference_samples: K, the number of draws over which class probabilities are averaged at inference; 0 uses the
            latent's mean.
        first_block: index of the first block with prompts; the blocks before it run without them.
    """

    kind: ClassVar[str] = "v2apt"
    num_prompts: int = 10
    num_instance: int = 5
    latent: int = 64
    hidden: int = 64
    beta: float = 1e-3
    share: str = "all"
    inference_samples: int = 0
    first_block: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_instance", "latent", "hidden"):
            self.require(name, int, 1)
        if self.num_instance > self.num_prompts:
            raise ValueError(
                f"V2APTConfig.num_instance must be at most num_prompts ({self.num_prompts}), got {self.num_instance}"
            )
        self.require("beta", (float, int), 0, 1e6)
        self.require_choice("share", ("all", "per_layer"))
        self.require("inference_samples", int, 0)
        self.require("first_block", int, 0)


class PromptDecoder(nn.Module):
    """z (Z) → m · D: Linear, GELU, Linear. The last Linear starts at zero, so instance prompts start at zero."""

    def __init__(self, latent: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(latent, hidden)
        self.fc2 = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def tensors(self) -> Decoder:
        return Decoder(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class StagedDecoder(nn.Module):
    """`PromptDecoder` for blocks of several widths: one hidden layer and an output layer per stage."""

    def __init__(self, latent: int, hidden: int, outputs: list[int]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(latent, hidden)
        self.fc2 = nn.ModuleList(nn.Linear(hidden, size) for size in outputs)
        for layer in self.fc2:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def tensors(self, stage: int) -> Decoder:
        fc2: nn.Linear = self.fc2[stage]  # type: ignore[assignment]
        return Decoder(self.fc1.weight, self.fc1.bias, fc2.weight, fc2.bias)


class Latent(NamedTuple):
    """Computed once per forward pass: prompts (blocks, B, P, D) of each stage, KL (B,), KL of each unit (B, Z)."""

    prompts: list[Tensor]
    kl: Tensor
    kl_units: Tensor


def _cost(s: Sizes, config: V2APTConfig, t: Tally) -> PromptCost:
    """Encoder, noise and decoders in float32; the prompts (L, B, P, D) of all layers in the backbone's dtype."""
    if config.inference_samples:
        raise ValueError("the cost of V2APTConfig.inference_samples has no formula")
    b, d, z, h, m = s.batch, s.width, config.latent, config.hidden, config.num_instance
    layers = range(config.first_block, s.depth)
    decoders = 1 if config.share == "all" else len(layers)
    t.call(s.norm_pre + s.cast + 2)  # norm and mean over patches
    t.call(2, 3, 2 * 4 * b * d)  # the norm's affine
    t.product(2 * b * d * h, 2, backward=3)
    t.call(1, 1, 2 * 4 * b * h)  # the GELU saves its input, the next Linear its output
    t.product(2 * b * h * 2 * z, 2, backward=3)
    t.call(2 * 2 + 2 * 7, 0, 4 * b * 2 * z)  # clamped statistics and KL, for the loss and for the prompts
    t.call(0, 5 + 1)  # the clamp, and the split into mean and log variance
    if s.training:
        t.call(NOISE_CALLS + 4, 3, 2 * 4 * b * z + 16 * math.ceil(b * z / 4))  # σ, z and the noise
    for _ in range(decoders):
        t.product(2 * b * z * h, 2, backward=3)
        t.call(1, 1, 2 * 4 * b * h)
        t.product(2 * b * h * m * d, 2, backward=3)
    t.call(2 * s.cast, 2 * s.cast)  # domain and instance prompts
    wide = s.tokens(len(layers) * b * config.num_prompts)
    t.call(2, (b > 1) + (decoders < len(layers)) + decoders - 1, wide * (s.graph != "papers"))
    kept = 2 * 4 * b * z + 4 * b + 16  # including the KL and the seed

    def make(t: Tally, i: int) -> None:
        t.call(0, 1 + (i > layers[0]))

    return PromptCost(config.num_prompts, layers, make=make, cast=False, kept=kept)


@register_method(
    "v2apt",
    title="V²APT",
    paper="Xiao et al., 2025, arXiv 2503.17650",
    recipe={"lr": 5e-3, "kl_warmup_epochs": 2.0},
    lrs=(0.005, 0.01),
    published={
        "v2apt-paper": Published(
            "none; VPT's, with the KL term warmed up over the same epochs",
            {**VPT_RECIPE, "lr": 1.0, "weight_decay": 1e-3, "kl_warmup_epochs": 10},
            **VPT_SEARCH,
        )
    },
    cost=_cost,
)
class V2APT(PromptGenerator):
    """V²APT: every block reads [CLS, domain prompts, instance prompts, patches] with P prompts, like VPT-deep.

    From the paper (abstract, Fig. 1): a VAE on the image's embeddings gives instance prompts. They join learned domain
    prompts in every block, with VPT's token count. The loss is CE + β KL(N(μ, σ²) ‖ N(0, I)).

    The authors published neither code nor sizes. Our choices: the encoder reads the patch embeddings E with position
    embedding (after CLIP's pre-norm), without the class token: stats = W_s GELU(W_e mean(LN(E)) + b_e) + b_s and
    (μ, log σ²) = stats, with log σ² clamped. z = μ + σ ε in training, z = μ at inference (or `inference_samples`
    draws). P_inst = W₂ GELU(W₁ z + b₁) + b₂. There is no reconstruction loss. Domain prompts are initialised like
    VPT's. The KL is summed over the latent and averaged over the batch. On a Swin transformer, the encoder reads the
    patch embeddings of the first stage, and prompts have the width of their block's stage. With share="all", the
    decoder then has one hidden layer W₁ and an output layer W₂ per stage, so that the blocks of a stage share their
    instance prompts. With `first_block` k, the encoder still reads the patch embeddings, and blocks before k have no
    prompts.

    `generator(embeddings, layer)` (B, N, D) → (B, P, D), in the embeddings' dtype.
    """

    known_at = "embeddings"
    config_class = V2APTConfig
    takes_stages = True
    config: V2APTConfig

    def __init__(
        self,
        config: V2APTConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        num_instance: int = UNSET,
        latent: int = UNSET,
        hidden: int = UNSET,
        beta: float = UNSET,
        share: str = UNSET,
        inference_samples: int = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(
            config,
            geometry,
            num_prompts=num_prompts,
            num_instance=num_instance,
            latent=latent,
            hidden=hidden,
            beta=beta,
            share=share,
            inference_samples=inference_samples,
            first_block=first_block,
            **sizes,
        )
        cfg, g = self.config, self.geometry
        self.num_prompts, self.layers = cfg.num_prompts, tuple(range(cfg.first_block, g.depth))
        self.domain = StaticPrompts(self.layers, cfg.num_prompts - cfg.num_instance, g, None)
        self.norm = nn.LayerNorm(g.width)
        self.encoder = nn.Linear(g.width, cfg.hidden)
        self.to_stats = nn.Linear(cfg.hidden, 2 * cfg.latent)
        outputs = [cfg.num_instance * width for width, _ in self.domain.stages]
        decoders: list[nn.Module]
        if cfg.share == "per_layer":
            decoders = [
                PromptDecoder(cfg.latent, cfg.hidden, cfg.num_instance * width) for width in g.widths[cfg.first_block :]
            ]
        elif len(outputs) == 1:
            decoders = [PromptDecoder(cfg.latent, cfg.hidden, outputs[0])]
        else:
            decoders = [StagedDecoder(cfg.latent, cfg.hidden, outputs)]
        self.decoders = nn.ModuleList(decoders)

    def decoders_of(self, stage: int) -> list[Decoder]:
        """Return the decoder that all blocks of a stage share, or one for each of its blocks."""
        if self.config.share == "all":
            decoder: Any = self.decoders[0]
            return [decoder.tensors(stage) if isinstance(decoder, StagedDecoder) else decoder.tensors()]
        first = sum(blocks for _, blocks in self.domain.stages[:stage])
        own: Any = self.decoders[first : first + self.domain.stages[stage][1]]
        return [decoder.tensors() for decoder in own]

    def stats(self, embeddings: Tensor) -> Tensor:
        """Map patch embeddings (B, N, D) to (B, 2Z) = [μ, log σ²], not yet clamped."""
        self.check_input(embeddings, "embeddings")
        norm = self.norm
        x = F.layer_norm(embeddings.to(norm.weight.dtype), norm.normalized_shape, eps=norm.eps).mean(dim=1)  # (B, D)
        x = x * norm.weight + norm.bias  # after the mean, so that the backward needs (B, D) instead of the embeddings
        return self.to_stats(F.gelu(self.encoder(x)))

    def draw(self, batch: int) -> Draws:
        """Draw "noise": (2,) int64, seed and offset of the latent's noise; {} in eval mode, where z is the mean."""
        if not self.training:
            return {}
        noise = torch.randint(2**62, (2,), device=self.norm.weight.device)
        noise[1].fill_(0)  # item assignment would copy from the host, which a CUDA graph cannot capture
        return {"noise": noise}

    def inference_draws(self) -> list[Draws]:
        """Return the draws of the K inference samples, one per forward; [{}] (the mean) if `inference_samples` is 0.

        "epsilon" (Z,) is fixed and the same for every image, so that a prediction does not depend on the batch.
        """
        cfg, like = self.config, self.norm.weight
        if cfg.inference_samples == 0:
            return [{}]
        seed = torch.zeros(2, dtype=torch.int64, device=like.device)
        noise = philox_normal(seed, cfg.inference_samples * cfg.latent, torch.float64)
        return [{"epsilon": row} for row in noise.to(like.dtype).view(cfg.inference_samples, cfg.latent)]

    def context(self, x: Tensor | None, draws: Draws | None = None) -> Latent:
        assert x is not None
        draws, stats = draws or {}, self.stats(x)
        mu, logvar = gaussian(stats)
        kl_units = kl_per_unit(mu, logvar)
        if "epsilon" in draws:
            stats = torch.cat([mu + torch.exp(0.5 * logvar) * draws["epsilon"], logvar], dim=-1)
        prompts, kl = [], kl_units.sum(dim=-1)
        for stage in range(len(self.domain.stages)):
            domain = self.domain.of_stage(stage).to(x.dtype)
            of_stage, drawn_kl = vae_prompts(stats, self.decoders_of(stage), domain, draws.get("noise"))
            prompts.append(of_stage)
            kl = kl if "epsilon" in draws else drawn_kl
        return Latent(prompts, kl, kl_units.detach())

    def prompts(self, layer: int, context: Latent, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        stage, index = self.domain.place(layer)
        return context.prompts[stage][index]

    def aux(self, context: Latent) -> dict[str, Tensor]:
        """Return "kl", (B,) in nats, and "kl_units", (B, Z), which shows posterior collapse."""
        return {"kl": context.kl, "kl_units": context.kl_units}


def active_units(kl_units: Tensor) -> int:
    """Count latent units with a mean KL over the images (B, Z) above 0.01 nats (Burda et al., ICLR 2016)."""
    return int((kl_units.mean(dim=0) > ACTIVE_UNIT_NATS).sum())
