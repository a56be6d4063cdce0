"""Test runs, adapters, engines and a host under kills, full disks, flipped bits and hostile clients.

    python bench/torture.py [--kills 50] [--flips 800] [--hostile 500] [--out results/torture.md]

Nothing may be lost, half written or wrong: a killed run must end in the same bits as an undisturbed one, a flipped bit
must be refused or change nothing, and every answer of the host must be right. `make torture` writes results/torture.md.
It needs Linux and runs on one thread; the killed processes are forks of this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpuinfo
import crashes
import load_serve
import numpy as np
import timm
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

import fastprompt as fp
from fastprompt.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from fastprompt.files import atomic_write
from fastprompt.locks import DirectoryInUse
from fastprompt.runs.execute import execute
from fastprompt.runs.settings import RunSettings
from fastprompt.serve.tenants import HostSettings
from fastprompt.train.callbacks import Step
from fastprompt.train.checkpoint import load_state

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
EPOCHS = 2
TIMES = {"seconds", "images_per_second", "peak_memory_mib", "train_seconds", "environment", "stamp"}
"""What two runs of the same bits may differ in."""
HANGING = 99
PATIENCE = 30.0
"""Seconds after which a process that lost another one must have ended."""
REFUSED = 3
"""Exit code of a writer that found the directory in use."""


@dataclass
class Flags:
    """Torture test of what fastprompt writes and serves."""

    seed: int = 0
    kills: int = 50
    """Runs are killed at a random moment so often."""
    within: int = 50
    """Runs are killed within an epoch so often."""
    workers: int = 50
    """Runs with two loading processes, and runs on WebDataset shards, are killed at a random moment so often each."""
    ranks: int = 50
    """Runs in two processes lose one or both at a random moment so often."""
    every: int = 1
    """Of a run's operations on files, kill and fill the disk at each, or at every second, third ..."""
    writers: int = 6
    """Processes that run in one directory at once."""
    flips: int = 800
    """Bits that are flipped in each of weights, configuration and state."""
    hostile: int = 500
    """Hostile requests, at least."""
    idle: int = 40
    """Connections beside them that say nothing, or half of a request."""
    turns: int = 500
    """Calls of each thread of an engine whose states are swapped; 0 leaves this part out."""
    out: Path = ROOT / "results" / "torture.md"


@dataclass
class Found:
    """The result of one part.

    Attributes:
        tried: what was done, as text. outcomes: how often each outcome occurred. wrong: what should not have happened.
    """

    part: str
    tried: str
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Place:
    """A folder with a tiny backbone, images of two classes, and an undisturbed run.

    Args:
        shards: read the images from WebDataset shards. ranks: number of processes of each run. fields: of the recipe.
    """

    def __init__(self, root: Path, seed: int = 0, shards: bool = False, ranks: int = 1, **fields: Any) -> None:
        self.root, self.vit, self.log, self.ranks = root, root / "vit", root / "log.txt", ranks
        root.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES)
        self.vit.mkdir()
        save_file(module.state_dict(), self.vit / "model.safetensors")
        pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0}
        described = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "pretrained_cfg": pretrained}
        (self.vit / "config.json").write_text(json.dumps({**described, "num_classes": 0}))
        levels = np.random.default_rng(seed)
        for split, count in (("train", 12), ("val", 4), ("test", 4)):
            for label, name in enumerate(("cat", "dog")):
                (root / "images" / split / name).mkdir(parents=True)
                for i in range(count):
                    pixels = levels.integers(0, 160, (32, 32, 3)) + 60 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / name / f"{i}.png")
        if shards:
            write_shards(root / "images", root / "shards")
        recipe = {"epochs": EPOCHS, "dtype": "float32", "batch_size": 8, "checkpoint_every": "1 steps", **fields}
        self.settings = RunSettings(
            "vpt-deep",
            f"wds:{root / 'shards'}" if shards else str(root / "images"),
            f"local-dir:{self.vit}",
            options={"num_prompts": 2},
            recipe=recipe,
        )
        first = "undisturbed" if ranks == 1 else "alone"
        self.run(first)  # in this process: forks inherit its measurements and thus its choices
        if ranks == 1:
            self.expected = contents(root / first)
            return
        if (ended := self.job("undisturbed")) != [0] * ranks:
            raise RuntimeError(f"exit codes {ended}: {self.log.read_text()}")
        self.expected = contents(root / "undisturbed")

    def run(self, name: str, *callbacks: fp.Callback) -> None:
        """Train, evaluate and test in a directory, or resume there."""
        execute(self.settings, self.root / name, test=True, progress=False, device="cpu", callbacks=callbacks)

    def job(self, name: str, kill: Callable[[list[crashes.Child]], bool] | None = None) -> list[int]:
        """Run in `ranks` processes, as torchrun starts them; return their exit codes.

        `kill` is called with the processes once they run. If it kills some, the others get SIGTERM, as from torchrun,
        and `PATIENCE` seconds; the code of one that still runs then is `HANGING`.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def work(rank: int) -> None:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(self.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.run(name)

        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(crashes.Child(functools.partial(work, rank), self.log))
                for rank in range(self.ranks)
            ]
            if kill is not None and kill(running):
                for process in running:
                    process.kill(signal.SIGTERM)
            until = time.monotonic() + PATIENCE
            return [process.wait_until(until, HANGING) for process in running]

    def write(self, name: str) -> None:
        """Call `run`; exit with `REFUSED` if another process writes there."""
        try:
            self.run(name)
        except DirectoryInUse:
            os._exit(REFUSED)

    def finish(self, name: str, found: Found, what: str) -> None:
        """Finish the run in an undisturbed process, compare everything that it wrote, and remove it."""
        status = [crashes.in_a_child(lambda: self.run(name), self.log)] if self.ranks == 1 else self.job(name)
        if any(status):
            found.wrong.append(f"{what}: it does not go on, exit codes {status}: {self.log.read_text()[-500:]}")
            return
        different = [f"{what}: {text}" for text in differences(contents(self.root / name), self.expected)]
        found.wrong += different
        found.outcomes["other bits, or files that are not whole" if different else "the same bits in the end"] += 1
        if not different:
            shutil.rmtree(self.root / name)


def contents(directory: Path) -> dict[str, Any]:
    """Return everything that a finished run wrote, except times."""
    tensors, values = load_state(directory / "last.safetensors")
    config, weights = read_adapter(directory / "best")
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    state = {key: values[key] for key in ("identity", "optimizer", "rng", "choices")}
    return {
        "tensors of the state": tensors,
        "values of the state": state,
        "best/": weights,
        "its configuration": config,
        "log": [without_times(row) for row in rows if row["event"] != "resume"],
        "log of the state": [without_times(row) for row in values["progress"]["events"] if row["event"] != "resume"],
        "results.json": without_times(json.loads((directory / "results.json").read_text())),
        "run.json": (directory / "run.json").read_text(),
        "recipe.json": (directory / "recipe.json").read_text(),
        "temporary files": sorted(str(path) for path in directory.rglob("*.tmp")),
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def same(a: Any, b: Any) -> bool:
    """Return whether two values are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the parts in which two `contents` differ."""
    return [f"{name} differs" for name in expected if not same(found[name], expected[name])]


def write_shards(images: Path, folder: Path) -> None:
    """Write a folder of images as WebDataset shards, two for each split."""
    folder.mkdir()
    for split in sorted(images.iterdir()):
        files = sorted(split.glob("*/*.png"))
        for part in range(2):
            with tarfile.open(folder / f"{split.name}-{part}.tar", "w") as archive:
                for number, path in enumerate(files[part::2]):
                    name = f"{number:04d}"
                    archive.add(path, f"{name}.png")
                    label = str(sorted(p.name for p in split.iterdir()).index(path.parent.name)).encode()
                    member = tarfile.TarInfo(f"{name}.cls")
                    member.size = len(label)
                    archive.addfile(member, io.BytesIO(label))


def random_kills(place: Place, count: int, seed: int, part: str = "Runs killed at random") -> Found:
    """Kill a run and its continuations at random moments, `count` times in all."""
    found, chance = Found(part, "SIGKILL"), random.Random(seed)
    began = time.perf_counter()
    if crashes.in_a_child(lambda: place.run("timed"), place.log) != 0:
        raise RuntimeError(place.log.read_text())
    whole, runs = time.perf_counter() - began, 0
    while found.outcomes["kills"] < count and not found.wrong:
        name, ended = f"killed {runs}", False
        for _ in range(chance.randint(1, 3)):
            ended = ended or crashes.killed_after(chance.uniform(0, whole), lambda to=name: place.run(to)) == 0
            found.outcomes["kills"] += not ended
        place.finish(name, found, name)
        runs += 1
    found.tried = f"{found.outcomes['kills']} × SIGKILL in {runs} runs of {EPOCHS} epochs, each then finished"
    return found


def lost_ranks(place: Place, count: int, seed: int) -> Found:
    """Kill one process of a run or all of them at random moments, `count` times; those that are left must end, too."""
    found, chance = Found("Processes of a run in two processes killed", ""), random.Random(seed)
    began = time.perf_counter()
    place.job("timed")
    whole, runs = time.perf_counter() - began, 0
    while found.outcomes["kills"] < count and not found.wrong:
        name = f"lost {runs}"
        for _ in range(chance.randint(1, 3)):
            losing = chance.choice([[0], [1], [0, 1]])

            def kill(running: list[crashes.Child], losing: list[int] = losing) -> bool:
                time.sleep(chance.uniform(0, whole))
                for rank in losing:
                    running[rank].kill()
                return any(running[rank].wait() == -signal.SIGKILL for rank in losing)

            ended = place.job(name, kill)
            killed = [ended[rank] == -signal.SIGKILL for rank in losing]
            found.outcomes["kills"] += any(killed)
            left = [code for rank, code in enumerate(ended) if rank not in losing and any(killed)]
            if HANGING in ended:
                found.wrong.append(f"{name}: exit codes {ended} {PATIENCE} s after the kill")
            found.outcomes["the other process ended, too"] += len(left) - left.count(HANGING)
        place.finish(name, found, name)
        runs += 1
    found.tried = f"{found.outcomes['kills']} × SIGKILL to one or both processes in {runs} runs, each then finished"
    return found


class KillWithin(fp.Callback):
    """SIGKILL so many seconds after the step of that number, counted over the run."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_step(self, step: Step) -> None:
        if (step.epoch - 1) * step.steps + step.step == self.step:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def kills_within_epochs(place: Place, count: int, seed: int) -> Found:
    """SIGKILL within an epoch: at a random moment after a random step, whose state may be half written then."""
    found = Found("Runs killed within an epoch", f"{count} × SIGKILL, each run then finished")
    chance = random.Random(seed)
    for number in range(count):
        name, killer = f"within {number}", KillWithin(chance.randint(1, 5), chance.uniform(0, 0.02))
        ended = crashes.in_a_child(lambda to=name, by=killer: place.run(to, by), place.log)
        found.outcomes["kills"] += ended == -signal.SIGKILL
        if ended != -signal.SIGKILL:
            found.wrong.append(f"{name}: not killed, exit code {ended}: {place.log.read_text()[-500:]}")
        place.finish(name, found, name)
    return found


def every_operation(place: Place, every: int) -> Found:
    """Kill one run before its first file operation, another before its second, and so on to the last."""
    found, number = Found("Every operation on files killed", ""), 1
    while True:
        name = f"killed at {number}"
        ended = crashes.killed_at(number, place.root / name, lambda to=name: place.run(to), place.log)
        if ended == 1:
            found.wrong.append(f"{name}: {place.log.read_text()[-500:]}")
        place.finish(name, found, name)
        if ended != -9 or found.wrong:
            break
        number += every
    found.tried = f"{number - 1} operations on files of a run (training, adapter, results), in steps of {every}"
    return found


def full_disk(place: Place, every: int) -> Found:
    """Fill the disk from a run's first write, from its second, and so on; each must end in an error that says so."""
    found, number = Found("Full disk", ""), 1
    while True:
        name = f"full at {number}"
        ended = crashes.full_from(number, place.root / name, lambda to=name: place.run(to), place.log)
        if ended not in (0, 1) or (ended == 1 and "No space left on device" not in place.log.read_text()):
            found.wrong.append(f"{name}: exit code {ended}: {place.log.read_text()[-500:]}")
        place.finish(name, found, name)
        if ended == 0 or found.wrong:
            break
        found.outcomes["an error that names the full disk"] += 1
        number += every
    found.tried = f"full from each of {number - 1} writes on, in steps of {every}, then space again"
    return found


def many_writers(place: Place, writers: int, seed: int) -> Found:
    """Start several processes in one directory: one writes, the others are refused; some writers are killed."""
    found = Found("Several writers in one directory", f"{writers} processes at once, 3 times")
    chance = random.Random(seed)
    for turn in range(3):
        name = f"shared {turn}"
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(crashes.Child(lambda to=name: place.write(to))) for _ in range(writers)]
            if turn:
                time.sleep(chance.uniform(0.1, 0.5))
                for process in chance.sample(running, writers // 2):
                    process.kill()
            ended = Counter(process.wait() for process in running)
        found.outcomes["finished, or found it finished"] += ended.pop(0, 0)
        found.outcomes["refused: the directory is in use"] += ended.pop(REFUSED, 0)
        found.outcomes["killed"] += ended.pop(-9, 0)
        if ended:
            found.wrong.append(f"{name}: exit codes {dict(ended)}")
        place.finish(name, found, name)
    return found


def flipped_bits(place: Place, count: int, seed: int) -> list[Found]:
    """Flip single bits of an adapter's two files and of a run's state: each is refused by name or changes nothing."""
    adapter, state = place.root / "flipped", place.root / "last.safetensors"
    shutil.copytree(place.root / "undisturbed" / "best", adapter)
    shutil.copy(place.root / "undisturbed" / "last.safetensors", state)
    readers: dict[Path, tuple[str, Callable[[], Any]]] = {
        adapter / WEIGHTS_FILE: ("weights", lambda: read_adapter(adapter)),
        adapter / CONFIG_FILE: ("configuration", lambda: read_adapter(adapter)),
        state: ("state of a run", lambda: load_state(state)),
    }
    parts = []
    for path, (title, read) in readers.items():
        content, expected, found = path.read_bytes(), read(), Found(f"Flipped bits: {title}", f"{count} bits, one each")
        for place_of_bit in random.Random(seed).sample(range(8 * len(content)), min(count, 8 * len(content))):
            flipped = bytearray(content)
            flipped[place_of_bit // 8] ^= 1 << place_of_bit % 8
            path.write_bytes(flipped)
            try:
                got = read()
            except ValueError as error:
                named = str(path) in str(error)
                found.outcomes["refused by name"] += named
                if not named:
                    found.wrong.append(f"bit {place_of_bit}: the file is not named: {error}")
                continue
            unchanged = all(same(a, b) for a, b in zip(got, expected, strict=True))
            found.outcomes["read as it was"] += unchanged
            if not unchanged:
                found.wrong.append(f"bit {place_of_bit} changes what is read")
        path.write_bytes(content)
        parts.append(found)
    return parts


def hostile_clients(place: Place, hostile: int, idle: int, seconds: float = 5.0) -> Found:
    """Send hostile requests and open slow and idle connections beside valid clients whose answers are all checked."""
    name, shown = f"local-dir:{place.vit}", load_serve.pictures(32)[:8]
    flags = load_serve.Flags(name, 32, batch_size=8, seconds=seconds)
    adapters = load_serve.make_adapters(place.root, fp.load_backbone(name), shown)
    check = load_serve.Check(HostSettings(name, 32, False, adapters, "float32", 8, 1), shown)
    files, outcomes = [load_serve.png(picture) for picture in shown], Counter[str]()
    found, answers = Found("Hostile clients of a host", ""), 0
    with load_serve.host(flags, adapters, 8) as url:
        while sum(outcomes.values()) < hostile:
            seen = asyncio.run(_beside_idle(url, idle, load_serve.load_round(url, flags, files, check, 4, 8)))
            outcomes += Counter(outcome for of_kind in seen.refused.values() for outcome in of_kind)
            answers += len(seen.latencies)
            found.wrong += [f"a valid client's request failed: {text}" for text in seen.failed]
            found.wrong += ["a valid client got a wrong answer"] * seen.wrong
    found.tried = (
        f"{sum(outcomes.values())} hostile requests, {idle} idle connections, {answers} requests of valid clients"
    )
    found.outcomes["right answers"] = answers
    for outcome, times in sorted(outcomes.items()):
        found.outcomes[f"hostile: {outcome}"] = times
        if not outcome.startswith(("4", "closed")):
            found.wrong.append(f"{times} hostile requests were answered {outcome}")
    return found


async def _beside_idle(url: str, count: int, load: Any) -> load_serve.Round:
    """`load` while connections are open that say nothing, or half of a request line, and are opened again if closed."""
    port = int(url.rpartition(":")[2])

    async def stay(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /v1/emb" if number % 2 else b"")
                await reader.read()
                writer.close()
            await asyncio.sleep(0.1)

    staying = [asyncio.ensure_future(stay(number)) for number in range(count)]
    try:
        return await load
    finally:
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, return_exceptions=True)


def swapped_states(turns: int) -> Found:
    """Run the engine's tests in which threads swap states while others call it, with more turns."""
    found = Found("An engine whose states are swapped", f"{turns} turns of each thread, three methods and a mixture")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/engine/test_engine.py",
            "-k",
            "hammered",
        ],
        cwd=ROOT,
        env={**os.environ, "FASTPROMPT_HAMMER_TURNS": str(turns), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", ran.stdout)
    found.outcomes["tests in which every answer was of one state"] = int(passed[1]) if passed else 0
    if ran.returncode != 0:
        found.wrong.append(ran.stdout[-2000:])
    return found


def report(parts: list[Found], flags: Flags) -> str:
    """Return the table, and what went wrong, as Markdown."""
    info = cpuinfo.get_cpu_info()
    lines = [
        "# fastprompt under torture",
        "",
        f"`make torture` on {info.get('brand_raw', 'an unknown processor')}, {os.cpu_count()} cores, Linux "
        f"{platform.release()}, Python {platform.python_version()}, torch {torch.__version__}, timm "
        f"{timm.__version__}, fastprompt {fp.__version__}; seed {flags.seed}. A tiny ViT, VPT-deep in float32, one "
        "thread.",
        "",
        "| part | tried | outcomes | wrong |",
        "|---|---|---|---:|",
        *(
            f"| {found.part} | {found.tried} | "
            f"{', '.join(f'{name}: {times}' for name, times in found.outcomes.items() if times)} | "
            f"{len(found.wrong)} |"
            for found in parts
        ),
        "",
        "A run counts as the same if state, random numbers, best adapter, results and every row of the log equal "
        "those of an undisturbed run, tensors bit for bit, and no temporary file is left. Valid clients' "
        "answers are compared with the engine's for that picture and tenant alone.",
    ]
    lines += ["", *(f"* {found.part}: {text}" for found in parts for text in found.wrong)]
    return "\n".join(lines).rstrip() + "\n"


def tortured(flags: Flags, root: Path) -> Iterator[Found]:
    """Yield the result of each part when it ends."""
    place = Place(root)
    for act in (
        functools.partial(random_kills, place, flags.kills, flags.seed),
        functools.partial(kills_within_epochs, place, flags.within, flags.seed),
        lambda: random_kills(
            Place(root / "workers", num_workers=2), flags.workers, flags.seed, "Runs with two loading processes killed"
        ),
        lambda: random_kills(Place(root / "shards", shards=True), flags.workers, flags.seed, "Runs on shards killed"),
        lambda: lost_ranks(Place(root / "ranks", ranks=2), flags.ranks, flags.seed),
        functools.partial(every_operation, place, flags.every),
        functools.partial(full_disk, place, flags.every),
        functools.partial(many_writers, place, flags.writers, flags.seed),
        functools.partial(flipped_bits, place, flags.flips, flags.seed),
        functools.partial(hostile_clients, place, flags.hostile, flags.idle),
        *([functools.partial(swapped_states, flags.turns)] if flags.turns else []),
    ):
        found = act()
        yield from found if isinstance(found, list) else [found]


def main() -> None:
    flags, parts = tyro.cli(Flags, description=__doc__), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTPROMPT_CACHE"] = str(Path(folder) / "cache")
        for found in tortured(flags, Path(folder)):
            parts.append(found)
            print(f"{found.part}: {found.tried}: {dict(found.outcomes)}, {len(found.wrong)} wrong", flush=True)
    text = report(parts, flags)
    print(text)
    atomic_write(flags.out, text)
    if any(found.wrong for found in parts):
        sys.exit("something was lost or wrong; see above")


if __name__ == "__main__":
    main()
