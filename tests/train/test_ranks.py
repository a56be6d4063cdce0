"""Two processes on gloo: the losses and weights of one, whole validation sets, one set of files, lost processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torture
from torch import nn

from fastprompt.train.batches import Batches
from fastprompt.train.checkpoint import load_state
from fastprompt.train.ranks import (
    RankLost,
    Ranks,
    SyncedBatchNorm2d,
    check_shares,
    find_ranks,
    synced_batch_norms,
)
from fastprompt.vit import linear

SCRIPT = """
import json, os, signal, sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
import fastprompt as fp
from fastprompt.train.ranks import SyncedBatchNorm2d, find_ranks
from fastprompt.vit import linear

torch.set_num_threads(1)
linear.faster_product = lambda: "MKL" if os.environ.get("RANK") == "1" else "oneDNN"  # each process measures itself
out, kill = sys.argv[1], int(sys.argv[2])
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
COLOURS = torch.tensor([[200, 50, 50], [50, 200, 50], [50, 50, 200], [128, 128, 128]])

def colours(count, seed=0):
    labels = torch.arange(count) % 4
    noise = torch.randint(-40, 40, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    return (COLOURS[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels

def make(config, classes=4):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    torch.manual_seed(rank)  # the first process's initial weights count
    return fp.PromptedViT(fp.FrozenViT(vit), config, num_classes=classes)

products, decide = set(), linear.onednn_is_faster

def watched():
    chosen = decide()
    if torch.is_grad_enabled():
        products.add(chosen)
    return chosen

linear.onednn_is_faster = watched

class Kill(fp.Callback):
    def on_step(self, step):
        if kill and (step.epoch, step.step) == (2, 2):
            open(out + "/killed", "w").close()
            os.kill(os.getpid() if kill == 1 else json.load(open(out + "/pids"))[1], signal.SIGKILL)

recipe = fp.Recipe(epochs=2, batch_size=16, lr=0.1, optimizer="sgd", warmup_epochs=1, dtype="float32").replace(
    label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0, 0.5), clip_grad=1.0, checkpoint_every="1 steps",
    deterministic=True)
found = {}
if kill:
    torch.distributed.init_process_group("gloo")
    pids = [None] * size
    torch.distributed.all_gather_object(pids, os.getpid())
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        json.dump(pids, open(out + "/pids", "w"))
methods = {
    "vpt": (fp.VPTConfig(num_prompts=2), {"accumulate": 2}),
    "pgn": (fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8)), {}),
    "rows": (fp.VPTConfig(num_prompts=2), {"loss": "bce", "label_smoothing": 0.0, "class_weights": "none",
                                            "deterministic": False}),
}
for name, (config, fields) in methods.items():
    if kill and name != "vpt":
        continue
    train, val = colours(51), colours(21, seed=1)  # 16 + 16 + 16 + 3, of which the second process has 2
    if name == "rows":
        train, val = (train[0], nn.functional.one_hot(train[1], 4)), (val[0], nn.functional.one_hot(val[1], 4))
    model = make(config)
    products.clear()
    fields = {"recipe": recipe.replace(**fields), "out_dir": f"{out}/{name}", "progress": False}
    result = fp.fit(model, train, val, **fields, callbacks=[Kill()])
    times = ("event", "seconds", "images_per_second")
    rows = [{k: v for k, v in row.items() if k not in times} for row in result.history]
    found[name] = {"history": rows, "files": result.out_dir is not None, "oneDNN": [*products]}
    tensors = {key: tensor.double() for key, tensor in model.adapter_state_dict().items()}
    found[name]["sums"] = {key: [float(tensor.sum()), float(tensor.norm())] for key, tensor in tensors.items()}
    assert not any(isinstance(module, SyncedBatchNorm2d) for module in model.modules())
json.dump(found, open(f"{out}/found-{size}-{rank}.json", "w"))
torch.distributed.is_initialized() and torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads can abort an interpreter that ends at the same time
"""


def launch(script: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in so many processes, by torchrun if there are several."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(torchrun if processes > 1 else [sys.executable]), str(script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "job.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def runs(script: Path) -> dict[str, Any]:
    """What the job found in one process, and in the two of a job."""
    found: dict[str, Any] = {"root": script.parent}
    for processes in (1, 2):
        out = script.parent / f"of {processes}"
        out.mkdir()
        ran = launch(script, processes, str(out), "0")
        assert ran.returncode == 0, ran.stderr[-3000:]
        for rank in range(processes):
            found[f"{processes}-{rank}"] = json.loads((out / f"found-{processes}-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("name", ["vpt", "pgn", "rows"])
def test_two_processes_train_as_one_does(name: str, runs: dict[str, Any]) -> None:
    one, two = runs["1-0"][name], runs["2-0"][name]
    for a, b in zip(one["history"], two["history"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    for key, sums in one["sums"].items():
        assert two["sums"][key] == pytest.approx(sums, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", ["vpt", "pgn", "rows"])
def test_all_processes_have_the_result_and_the_first_one_the_files(name: str, runs: dict[str, Any]) -> None:
    first, second = runs["2-0"][name], runs["2-1"][name]
    assert (first["history"], first["sums"]) == (second["history"], second["sums"])
    assert (first["files"], second["files"]) == (True, False)


def test_processes_compute_with_what_the_first_one_chose(runs: dict[str, Any]) -> None:
    assert runs["2-0"]["rows"]["oneDNN"] == runs["2-1"]["rows"]["oneDNN"] == [True]
    choices = load_state(runs["root"] / "of 2" / "rows" / "last.safetensors")[1]["choices"]
    assert choices == {linear.PRODUCTS: "oneDNN"}  # nothing that one process alone has timed


def test_a_lost_process_ends_the_job_which_resumes_in_another_number_of_them(
    script: Path, runs: dict[str, Any], tmp_path: Path
) -> None:
    ran = launch(script, 2, str(tmp_path), "2")
    assert ran.returncode != 0
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 30
    assert "exitcode  : -9" in ran.stderr
    state = load_state(tmp_path / "vpt" / "last.safetensors")[1]
    assert (state["progress"]["epoch"], state["epoch"]["steps"]) in [(1, 1), (1, 2)]
    ran = launch(script, 1, str(tmp_path), "0")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "found-1-0.json").read_text())["vpt"]
    for a, b in zip(runs["1-0"]["vpt"]["history"], found["history"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)


@pytest.mark.long
def test_the_command_line_trains_in_two_processes(tmp_path: Path) -> None:
    place = torture.Place(tmp_path)
    settings = place.settings
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastprompt"]
    command += [
        "adapt",
        "--method",
        settings.method,
        "--data",
        settings.data,
        "--backbone",
        settings.backbone,
        "--test",
    ]
    command += ["--num-prompts", "2", "--out", str(tmp_path / "of 2"), "--device", "cpu", "--threads", "1", "--recipe"]
    command += [f"{name}={value}" for name, value in settings.recipe.items()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("results: ") == 1
    results = json.loads((tmp_path / "of 2" / "results.json").read_text())
    alone = json.loads((tmp_path / "undisturbed" / "results.json").read_text())
    assert results["test"]["num_images"] == alone["test"]["num_images"]
    for a, b in zip(alone["history"], results["history"], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-4)


def test_what_a_lost_process_does_to_the_others_is_said() -> None:
    with pytest.raises(
        RankLost, match=r"process 0 of 2 lost another one.* run the same command again .*\(closed by peer\)"
    ):
        with Ranks(0, 2).lost_ranks_named():
            raise RuntimeError("closed by peer\nstack")


def test_batches_are_shared_without_a_gap_or_a_double() -> None:
    data = (torch.zeros(21, 3, 2, 2), torch.arange(21))
    for workers in (0, 1):
        source = data if not workers else torch.utils.data.TensorDataset(*data)
        parts = [
            Batches(source, 8, name="val", num_classes=21, seed=0, num_workers=workers, ranks=Ranks(rank, 3))
            for rank in range(3)
        ]
        whole = [labels.tolist() for _, labels in Batches(data, 8, name="val", num_classes=21, seed=0).epoch(1)]
        shared = [[labels.tolist() for _, labels in part.epoch(1)] for part in parts]
        assert [list(chain(*each)) for each in zip(*shared, strict=True)] == whole
        assert {len(part) for part in parts} == {3}
    last = [list(Batches(data, 10, name="val", num_classes=21, ranks=Ranks(rank, 3)).epoch())[-1] for rank in range(3)]
    assert [len(labels) for _, labels in last] == [0, 0, 1]
    assert last[0][0].shape == (0, 3, 2, 2)
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 4)
    with pytest.raises(ValueError, match="val must be a Dataset or a pair of tensors with several processes"):
        Batches(loader, 4, name="val", num_classes=21, ranks=Ranks(0, 2))


def test_processes_draw_differently_and_repeat_themselves() -> None:
    draws = {}
    for rank in (0, 1):
        for step in (0, 1):
            Ranks(rank, 2).seed(3, step)
            draws[rank, step] = torch.rand(()).item()
    assert len(set(draws.values())) == 4
    Ranks(1, 2).seed(3, 1)
    assert torch.rand(()).item() == draws[1, 1]
    torch.manual_seed(0)
    Ranks().seed(3, 1)
    alone = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(torch.rand(()), alone)


def test_batch_norm_needs_images_in_every_process() -> None:
    model = nn.BatchNorm2d(3)
    check_shares(model, Ranks(), 1, 10)
    check_shares(model, Ranks(0, 4), 8, 16)
    check_shares(model, Ranks(0, 4), 8, 17)  # a single image joins the batch before
    check_shares(nn.Linear(2, 2), Ranks(0, 4), 8, 18)
    with pytest.raises(ValueError, match="batch_size must leave a last batch of at least 4 images"):
        check_shares(model, Ranks(0, 4), 8, 18)
    with pytest.raises(ValueError, match="batch_size must be images for each of 4 processes, got 2"):
        check_shares(model, Ranks(0, 4), 2, 16)
    with synced_batch_norms(model, Ranks(0, 2)):
        assert type(model) is SyncedBatchNorm2d
    assert type(model) is nn.BatchNorm2d
    assert find_ranks(torch.device("cpu")).size == 1
