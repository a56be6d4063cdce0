"""`make gpu` without a GPU: the same way in Triton's interpreter, at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
TIMES = {"triton", "eager", "compile, default", "compile, reduce-overhead", "compile, max-autotune"}
BROKEN = """
import sys, tempfile
sys.path[:0] = ["bench", "tests/kernels/gates", "."]
import gpu, mutate
from spec import load_spec
spec = load_spec("prefix_attention")
source = mutate.source_of(spec)
broken = source.replace({old!r}, {new!r})
assert broken != source
with tempfile.TemporaryDirectory() as folder:
    mutate.module_from(broken, spec.MODULE, folder)
    gpu.main("--dry-run", "--op", "prefix_attention", "--out", sys.argv[1])
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The report of a dry run, and where it is."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    ran = run("bench/gpu.py", "--dry-run", "--out", str(path))
    assert ran.returncode == 0, ran.stderr[-4000:]
    return path, json.loads(path.read_text())


def test_a_dry_run_writes_a_complete_report(report_of: tuple[Path, dict[str, Any]]) -> None:
    _, report = report_of
    assert set(report["ops"]) == set(OPS)
    assert {"device", "torch", "triton", "cuda", "rocm", "python", "sanitizer", "seconds"} <= set(report)
    for found in report["ops"].values():
        assert found["graph"]
        for by_dtype in found["parity"].values():
            assert set(by_dtype) == {"float32", "float16"}
            for rows in by_dtype.values():
                assert all(row["error"] <= row["budget"] for row in rows)
                assert {row["tensor"].split()[0] for row in rows} == {"output", "d"}
        assert set(found["microseconds"]) == {"1", "32"}
        for job in ("forward", "forward and backward"):
            assert {"triton", "eager"} <= set(found["microseconds"]["1"][0][job])
            assert TIMES <= set(found["microseconds"]["32"][0][job])
    rival = "scaled_dot_product_attention on keys and values concatenated before"
    assert report["ops"]["prefix_attention"]["microseconds"]["32"][0]["forward"][rival]["median"] > 0


def test_the_page_gets_the_table_of_a_real_run_alone(report_of: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, report = report_of
    page = tmp_path / "results.md"
    original = (ROOT / "docs" / "results.md").read_text()
    page.write_text(original)
    refused = run("bench/gpu_table.py", str(path), str(page))
    assert refused.returncode != 0
    assert "dry run" in refused.stderr
    assert page.read_text() == original
    report |= {"dry_run": False, "device": "Some GPU"}
    report["ops"]["vae_prompts"]["microseconds"]["32"][0]["forward"]["compile, max-autotune"] = None
    real = tmp_path / "gpu.json"
    real.write_text(json.dumps(report))
    for _ in range(2):  # a second time replaces what the first one wrote
        assert run("bench/gpu_table.py", str(real), str(page)).returncode == 0
    text = page.read_text()
    assert text.count("Measured by `make gpu` on Some GPU") == 1
    for op in OPS:
        assert text.count(f"| `{op}`, ") == 4  # two batches, forward and both
    assert text.count("no time left") == 1
    before, after = original.split("<!-- gpu: written by `make gpu` -->")[0], original.split("<!-- /gpu -->")[1]
    assert text.startswith(before)
    assert text.endswith(after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stride_or, acc * scale, D", "stride_or, acc, D"),
        ("acc / total[:, None]", "acc / total[:, None] + 1e-3"),
    ],
    ids=["gradient", "output"],
)
def test_a_wrong_kernel_ends_the_run_with_an_error(old: str, new: str, tmp_path: Path) -> None:
    ran = run("-c", BROKEN.format(old=old, new=new), str(tmp_path / "gpu.json"))
    assert ran.returncode != 0
    assert "prefix_attention is wrong" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_the_sanitizer_finds_ends_the_run_with_an_error(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@" >&2\necho Race reported >&2\nexit 1\n')
    tool.chmod(0o755)
    code = "import sys; sys.path.insert(0, 'bench'); import gpu; gpu.sanitized(gpu.DRY)"
    ran = run("-c", code, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert ran.returncode != 0
    assert "compute-sanitizer, memcheck:" in ran.stderr
    assert "Race reported" in ran.stderr
    assert "--launch-only --dry-run" in ran.stderr
    tool.write_text("#!/bin/sh\nexit 0\n")
    ran = run(
        "-c",
        code.replace("gpu.sanitized(gpu.DRY)", "print(gpu.sanitized(gpu.DRY))"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert ran.stdout == "compute-sanitizer: memcheck found nothing, racecheck found nothing\n"


def test_the_time_is_bounded(tmp_path: Path) -> None:
    """What is over ends with an error, and what takes long is left out before."""
    path = tmp_path / "gpu.json"
    ran = run("bench/gpu.py", "--dry-run", "--op", "vae_prompts", "--seconds", "30", "--began", "0", "--out", str(path))
    assert ran.returncode != 0
    assert "Timeout" in ran.stderr
    assert not path.exists()
    code = (
        "import sys; sys.path.insert(0, 'bench'); import gpu; gpu.OPS_UNTIL = 0\n"
        "gpu.main('--dry-run', '--op', 'library_prompts', '--seconds', '3000', '--out', sys.argv[1])"
    )
    ran = run("-c", code, str(path))
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(path.read_text())["ops"]["library_prompts"]
    assert set(found["parity"]) == {"odd sizes"}
    for job in ("forward", "forward and backward"):
        times = found["microseconds"]["32"][0][job]
        assert {name for name in times if times[name] is None} == TIMES - {"triton", "eager"}


def test_kernels_are_launched_in_processes_of_their_own() -> None:
    """As compute-sanitizer watches them, and as `warmed` compiles them beforehand, where a failure ends the run."""
    ran = run("bench/gpu.py", "--launch-only", "--dry-run", "--op", "adaptive_prompts")
    assert ran.returncode == 0, ran.stderr[-4000:]
    code = "import sys; sys.path.insert(0, 'bench'); import gpu; gpu.warmed(gpu.DRY, [{!r}])"
    assert run("-c", code.format("library_prompts")).returncode == 0
    ran = run("-c", code.format("no_op"))
    assert ran.returncode != 0
    assert "invalid choice: 'no_op'" in ran.stderr


@pytest.mark.parametrize(
    ("options", "interpret", "message"),
    [((), "0", "make gpu needs a CUDA or ROCm device"), (("--dry-run",), "0", "set TRITON_INTERPRET=1")],
)
def test_what_is_missing_is_said(options: tuple[str, ...], interpret: str, message: str) -> None:
    ran = run("bench/gpu.py", *options, TRITON_INTERPRET=interpret, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode != 0
    assert message in ran.stderr
