"""A PromptedViT under DistributedDataParallel: every trained parameter is used, and gradients are the joint batch's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from fastprompt.generators import PromptConfig

SCRIPT = """
import json
import os
import sys

import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

import fastprompt as fp
from fastprompt.generators import config_from_dict

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for name, values in json.loads(sys.argv[3]).items():
    config = config_from_dict(values)
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


def test_two_processes_have_the_gradients_of_the_joint_batch(configs: dict[str, PromptConfig], tmp_path: Path) -> None:
    tried = {name: configs[name] for name in ("vpt-deep", "vpt-shallow", "vapt", "v2apt", "pgn", "free")}
    undropped = {"channel_dropout": 0.0, "hidden_dropout": 0.0, "prompt_dropout": 0.0}
    tried["vapt"] = dataclasses.replace(tried["vapt"], **undropped)
    methods = json.dumps({name: config.to_dict() for name, config in tried.items()})
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), methods], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        assert process.wait(timeout=120) == 0, process.stderr.read().decode()
