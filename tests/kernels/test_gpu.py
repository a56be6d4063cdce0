"""`make gpu-here` without a GPU: every stage in Triton's interpreter, and what becomes of stages that fail or hang."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import OPS, ROOT, __main__ as driver, models, table
from gpu.__main__ import FIRST, LONG, Stage
from gpu.worker import STAGES

from fastprompt.train.callbacks import Step

pytest.importorskip("triton", reason="Triton has no build for this platform")

METHODS = {"VPT-deep 10", "VAPT 50", "V²APT 50", "PGN 16"}
THERE = (
    "torch triton numpy timm torchvision transformers onnx onnxruntime safetensors scipy scikit-learn matplotlib tqdm "
    "filelock einops pytest pytest-benchmark pytest-xdist hypothesis"
).split()
"""The packages that a machine with a GPU can be expected to have; what they need is there as well."""
BLOCK = """
import sys
from importlib.machinery import PathFinder

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in {blocked!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Only
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
"""


def others() -> set[str]:
    """Modules of the installed packages that are neither in `THERE` nor needed by one that is."""
    there, new = set[str](), list(THERE)
    while new:
        name = re.sub(r"[-_.]+", "-", new.pop()).lower()
        if name in there:
            continue
        there.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        new += [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    return {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", package).lower() in {*there, "fastprompt"} for package in packages)
    }


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "bench"), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], set[str]]:
    """A dry run from a plain tree, with all packages hidden that no one promised; its files, report, hidden modules."""
    folder, hidden = tmp_path_factory.mktemp("gpu"), others()
    (folder / "sitecustomize.py").write_text(BLOCK.format(blocked=hidden))
    path = f"{folder}{os.pathsep}{ROOT / 'bench'}"
    ran = run("-P", "-m", "gpu", "--dry-run", "--out", str(folder / "gpu"), PYTHONPATH=path)
    report = json.loads((folder / "gpu.json").read_text())
    assert ran.returncode == 0, (folder / "gpu.md").read_text()
    return folder, report, hidden


def test_it_imports_what_the_machine_promises_and_nothing_else(dry: tuple[Path, dict[str, Any], set[str]]) -> None:
    folder, report, hidden = dry
    assert {"tyro", "platformdirs"} <= hidden
    assert report["failures"] == 0
    path = f"{folder}{os.pathsep}{ROOT}"
    ran = run("-P", "-c", "import fastprompt; print(fastprompt.__file__); import platformdirs", PYTHONPATH=path)
    assert ran.stdout == f"{ROOT / 'fastprompt' / '__init__.py'}\n"
    assert "No module named 'platformdirs'" in ran.stderr


def test_every_stage_of_the_first_call_has_rows(dry: tuple[Path, dict[str, Any], set[str]]) -> None:
    _, report, _ = dry
    rows = {stage: record["rows"] for stage, record in report["stages"].items()}
    assert list(rows) == [stage.name for stage in FIRST]
    assert {row["op"] for row in rows["compile"]} == set(OPS)
    parity = [row for row in rows["parity"] if "dtype" in row and "of budget" in row]
    assert {row["op"] for row in parity} == {*OPS, "whole model"}
    assert {(row["op"], row["dtype"]) for row in parity if row["op"] in OPS} == {
        (op, dtype) for op in OPS for dtype in ("float32", "float16")
    }
    assert all(row["of budget"] <= 1 for row in parity)
    hows = {row.get("how") for row in rows["parity"]}
    assert {"replayed", "two streams", "two threads"} <= hows
    assert {(row["op"], row["job"]) for row in rows["ops"] if row["way"] == "Triton"} >= {
        (op, job) for op in OPS for job in ("forward", "forward and backward")
    }
    assert {row["way"] for row in rows["ops"]} == {"Triton", "eager", "compiled"}
    for stage, ways in {
        "end to end": {"ours, eager", "ours, graph", "papers', eager", "papers', max-autotune"},
        "training": {"ours, eager", "ours, graph", "papers', eager", "papers', max-autotune"},
        "mixed batches": {"mixed batch", "one adapter", "batch 1, eager", "batch 1, graph"},
    }.items():
        assert ways <= {row["way"] for row in rows[stage]}
        assert all(row["µs"]["low"] <= row["µs"]["median"] <= row["µs"]["high"] for row in rows[stage])
        assert all(row["% of the limit"] > 0 for row in rows[stage])
    assert {row["method"] for row in rows["end to end"]} == METHODS
    assert {row["method"] for row in rows["training"]} == METHODS
    device_tests, fitted = rows["graphs"]
    assert all("not run" in row for row in [device_tests, *rows["counters"]])
    assert fitted["found"] == "6 steps"


def test_a_step_that_waits_within_an_epoch_is_an_error_from_its_first_to_its_last() -> None:
    asked: list[str] = []
    watch, zero = models.Unwaiting(asked.append), torch.zeros(())
    for number in (1, 2, 3, 4):
        assert asked == ["error"] * (number > 1)
        watch.on_step(Step(1, number, 4, 1e-3, zero, zero))
    assert (asked, watch.steps) == (["error", "default"], 2)


def test_every_stage_is_known_to_the_worker_and_a_call_takes_nine_minutes() -> None:
    assert {stage.name for stage in (*FIRST, *LONG)} == set(STAGES)
    for call in (FIRST, LONG):
        assert sum(stage.seconds for stage in call) <= 520


def test_the_page_gets_the_tables_of_a_real_run_alone(
    dry: tuple[Path, dict[str, Any], set[str]], tmp_path: Path
) -> None:
    folder, report, _ = dry
    page, original = tmp_path / "results.md", (ROOT / "docs" / "results.md").read_text()
    page.write_text(original)
    with pytest.raises(SystemExit, match="dry run"):
        table.main(str(folder / "gpu.json"), str(page))
    assert page.read_text() == original
    real = tmp_path / "gpu.json"
    real.write_text(json.dumps(report | {"dry_run": False}))
    for _ in range(2):  # a second time replaces what the first one wrote
        table.main(str(real), str(page))
    text = page.read_text()
    assert text.count("### End to end") == 1
    for op in OPS:
        assert f"| {op} | tiny | 32 | forward and backward |" in text
    before, after = original.split(table.BEGIN)[0], original.split(table.END)[1]
    assert text.startswith(before)
    assert text.endswith(after)


WORKER = """
import json, os, sys, time
stage, rows = sys.argv[-1], open(sys.argv[sys.argv.index("--rows") + 1], "a")
def write(**row):
    print(json.dumps(dict(stage=stage, **row)), file=rows, flush=True)
write(what=stage, found=1.5)
if stage == "fails":
    write(what="that", failed="Traceback\\nValueError: too small")
    write(what="this", **{"not run": "no time was left"})
if stage == "hangs":
    os.fork() or time.sleep(600)
    rows.write('{"stage": "hangs", "wh')
    rows.flush()
    time.sleep(600)
if stage == "dies":
    print("Segmentation fault, or so")
    os._exit(11)
"""


def test_stages_that_fail_die_and_hang_cost_their_own_rows_alone(tmp_path: Path) -> None:
    """What was written before is kept, the next stage begins, and each counts as a failure."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    stages = [Stage(name, 1.0) for name in ("fails", "dies", "hangs", "works")]
    began = time.monotonic()
    failures = driver.run(stages, tmp_path / "gpu", worker=[sys.executable, "-S", str(script)])
    assert time.monotonic() - began < 10
    assert failures == 3
    report = json.loads((tmp_path / "gpu.json").read_text())
    records = report["stages"]
    assert [records[stage.name]["ended"] for stage in stages] == [
        "",
        "its process ended with status 11",
        "it was stopped",
        "",
    ]
    assert [len(records[stage.name]["rows"]) for stage in stages] == [3, 1, 1, 1]
    assert records["hangs"]["seconds"] <= 4.5
    text = (tmp_path / "gpu.md").read_text()
    for said in ("ValueError: too small", "Segmentation fault, or so", "no time was left", "It was stopped"):
        assert said in text


def test_a_report_is_written_before_the_next_stage_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    begin = driver._run

    def looked(group: Any, ends: float, command: Any) -> Any:
        if group[0].name == "second":
            assert list(json.loads((tmp_path / "gpu.json").read_text())["stages"]) == ["first"]
            assert "## First" in (tmp_path / "gpu.md").read_text()
        return begin(group, ends, command)

    monkeypatch.setattr(driver, "_run", looked)
    stages = [Stage("first", 9), Stage("second", 9)]
    assert driver.run(stages, tmp_path / "gpu", worker=[sys.executable, "-S", str(script)]) == 0


BROKEN = """
import os, sys, tempfile
import mutate
from gpu import ops
from gpu.device import place
from gpu.worker import rows_of
from spec import load_spec

def failed(old, new):
    broken = source.replace(old, new)
    assert broken != source
    with tempfile.TemporaryDirectory() as folder:
        mutate.module_from(broken, spec.MODULE, folder)
        jobs = (job for job in ops.parity(place(True, float("inf"))) if job.labels["op"] == "prefix_attention")
        return [[line.split(":")[0] for line in row["failed"].splitlines() if "budget" in line]
                for row in rows_of(jobs, float("inf"))]

spec = load_spec("prefix_attention")
source = mutate.source_of(spec)
for change in (("stride_or, acc * scale, D", "stride_or, acc, D"), ("acc / total[:, None]", "acc + 1e-3")):
    if os.fork():  # each registers the op's operators
        assert os.wait()[1] == 0
    else:
        print(failed(*change), flush=True)
        os._exit(0)
"""


def test_a_wrong_kernel_is_a_failure_in_every_dtype() -> None:
    ran = run("-c", BROKEN, PYTHONPATH=os.pathsep.join(driver.PATHS))
    assert ran.returncode == 0, ran.stderr[-4000:]
    gradient, output = map(ast.literal_eval, ran.stdout.splitlines())
    assert gradient == [["d q"], ["d q"]]
    assert len(output) == 2
    assert all("output 0" in tensors for tensors in output)


@pytest.mark.parametrize(
    ("tool", "script", "expected"),
    [
        ("compute-sanitizer", "exit 0", {"found": "nothing"}),
        ("compute-sanitizer", "echo Race reported; exit 7", {"failed": "Race reported"}),
        ("compute-sanitizer", "echo Error: Device not supported; exit 1", {"not run": "Error: Device not supported"}),
        ("compute-sanitizer", "", {"not run": "compute-sanitizer is not installed"}),
        ("ncu", "cat {table}", {"time": "12.5 us", "% of DRAM's peak": "70.1"}),
        ("ncu", "echo ==ERROR== LibraryNotLoaded; exit 1", {"not run": "==ERROR== LibraryNotLoaded"}),
        ("ncu", "echo something else; exit 1", {"failed": "something else"}),
        ("ncu", "", {"not run": "ncu is not installed"}),
    ],
)
def test_what_a_tool_finds_and_what_keeps_it_from_looking(
    tool: str, script: str, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import profilers
    from gpu.device import place
    from gpu.worker import rows_of

    counters = tmp_path / "counters.csv"
    counters.write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","k","gpu__time_duration.sum","us","99"\n"1","k","gpu__time_duration.sum","us","12.5"\n'
        '"1","k","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","70.1"\n'
    )
    if script:
        (tmp_path / tool).write_text("#!/bin/sh\n" + script.format(table=counters) + "\n")
        (tmp_path / tool).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stage = profilers.sanitizer if tool == "compute-sanitizer" else profilers.counters
    rows = list(rows_of(stage(place(dry=True, until=time.time() + 60)), time.time() + 60))
    for row in rows:
        for key, value in expected.items():
            assert value in row[key]


def test_a_job_without_time_left_is_not_run() -> None:
    from gpu.jobs import Job
    from gpu.worker import rows_of

    jobs = [Job({"job": "long"}, lambda: {"found": 1}, seconds=60.0), Job({"job": "short"}, lambda: {"found": 2})]
    rows = list(rows_of(iter(jobs), time.time() + 30))
    assert rows == [{"job": "long", "not run": "no time was left"}, {"job": "short", "found": 2}]


@pytest.mark.parametrize(
    ("options", "interpret", "message"),
    [((), "1", "TRITON_INTERPRET=1 is set"), (("--dry-run",), "0", "set TRITON_INTERPRET=1")],
)
def test_an_interpreter_where_none_is_wanted_is_refused(options: tuple[str, ...], interpret: str, message: str) -> None:
    ran = run("-S", "-m", "gpu", *options, TRITON_INTERPRET=interpret)
    assert ran.returncode == 2
    assert message in ran.stderr


def test_without_a_device_the_stage_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu.worker import jobs_of, rows_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = rows_of(jobs_of("counters", dry=False, until=float("inf")), float("inf"))
    assert "torch sees no CUDA or ROCm device" in row["failed"]


def test_a_floor_is_the_longer_of_products_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu import floors
    from timm.models.vision_transformer import VisionTransformer

    import fastprompt as fp

    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    model = fp.PromptedViT(fp.FrozenViT(vit).to(torch.bfloat16), fp.VPTConfig(num_prompts=2), num_classes=3)
    one, many, step = (floors.floor(model, *of) for of in ((1, False), (8, False), (8, True)))
    assert many.flops == 8 * one.flops < step.flops
    images = 3 * 16 * 16 * 4
    assert many.nbytes - one.nbytes == 7 * images
    assert step.nbytes > 2 * floors.resident(model) + 8 * images
    assert one.seconds(copied=one.nbytes, multiplied=1e30) == 1
    assert one.seconds(copied=1e30, multiplied=one.flops / 2) == 2
