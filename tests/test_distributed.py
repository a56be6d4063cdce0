"""A PromptedViT under DistributedDataParallel: every trained parameter is used, and gradients are the joint batch's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
import sys

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

import fastprompt as fp

METHODS = {
    "vpt": fp.VPTConfig(num_prompts=3),
    "vpt shallow": fp.VPTConfig(num_prompts=3, deep=False),
    "vapt": fp.VAPTConfig(num_prompts=3, channel_dropout=0.0, hidden_dropout=0.0),
    "v2apt": fp.V2APTConfig(num_prompts=3, num_instance=2, latent=4, hidden=4),
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 4)),
    "free": fp.FreePromptsConfig(num_prompts=3),
}
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for name, config in METHODS.items():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    model = fp.PromptedViT(fp.FrozenViT(vit).double(), config, num_classes=5).train()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    images, weights = torch.randn(4, 3, 32, 32).double(), torch.linspace(-1, 1, 5).double()
    given = {"draws": {}} if name == "v2apt" else {}  # no latent noise
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((model(images, **given) * weights).sum(-1).square().mean(), trained)
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # the second step is where an unused parameter is an error
        model.zero_grad()
        (parallel(images[2 * rank:2 * rank + 2], **given) * weights).sum(-1).square().mean().backward()
    for p, gradient in zip(trained, expected):
        assert p.grad.isfinite().all()
        if name != "pgn":  # batch norm sees its own process's images
            assert (p.grad - gradient).norm() <= 1e-10 * gradient.norm() + 1e-13, name
del parallel
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads can abort an interpreter that ends at the same time
"""


def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        assert process.wait(timeout=120) == 0, process.stderr.read().decode()
