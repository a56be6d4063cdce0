"""Fused operations, one folder each; importable as `fastprompt.kernels.<op>`."""
