"""The effective rank of a matrix."""

from __future__ import annotations

from typing import Any

from fastprompt.arguments import ArgumentError


def effective_rank(matrix: Any) -> float:
    """Return the effective rank of a matrix: exp of the entropy of its singular values' shares (Roy and Vetterli 2007).

    Raises:
        ValueError: it is no matrix, or all of its numbers are 0.
    """
    import torch

    values = torch.as_tensor(matrix).detach().double().cpu()
    if values.ndim != 2 or not bool((values != 0).any()):
        raise ArgumentError("matrix", f"must have two axes and a number other than 0, got shape {tuple(values.shape)}")
    singular = torch.linalg.svdvals(values)
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())
