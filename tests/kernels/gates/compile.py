"""Compiles an op's kernels ahead of time, no GPU needed: `python tests/kernels/gates/compile.py <op> [part ...]`.

Every row of every table × the parts it is for × float32, float16 and bfloat16, at the papers' sizes. The machine code
is read back: registers, spilled bytes, shared memory, matrix instructions, width of global accesses. Results are kept
in `.pytest_cache/kernels`, keyed by what was compiled, so that only changed kernels cost time.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from capture import Captured, capture
from spec import ROOT, load_spec
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# shared memory that one program may use, registers and shared memory of one multiprocessor, its warps' width and number
PARTS = {
    "sm_80": (166912, 65536, 167936, 32, 64),
    "sm_90": (232448, 65536, 233472, 32, 64),
    "sm_100": (232448, 65536, 233472, 32, 64),
    "sm_120": (101376, 65536, 102400, 32, 48),
    "gfx942": (65536, 131072, 65536, 64, 32),
}
JOBS: list[tuple[str, str, Captured]] = []  # (part, dtype, launch); the workers are forks and find it filled
CACHE = ROOT / ".pytest_cache" / "kernels"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.a-z]+)", re.MULTILINE)
MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCOMMA|OMMA|QMMA|v_mfma\w*|UTC\w*MMA)")
REDUCED = re.compile(r"\.TF32|xf32|UTCTF32\w*|kind::tf32", re.IGNORECASE)


def target_of(part: str) -> GPUTarget:
    return GPUTarget("cuda", int(part[3:]), 32) if part.startswith("sm_") else GPUTarget("hip", part, 64)


def inspect_cuda(binary: bytes) -> dict[str, Any]:
    """Registers, spills and instruction mix out of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)

        def tool(*command: str) -> str:
            ran = subprocess.run([str(TOOLS / command[0]), *command[1:], str(path)], capture_output=True, text=True)
            return ran.stdout

        usage, code = tool("cuobjdump", "--dump-resource-usage"), tool("nvdisasm", "-ndf", "-c")
    fields = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(OPCODE.findall(code))
    wide = sum(n for op, n in opcodes.items() if re.match(r"(LDG|LDGSTS|STG)\b.*\.128", op) or op.startswith("UTMA"))
    narrow = sum(n for op, n in opcodes.items() if re.match(r"(LDG|LDGSTS|STG)\b", op)) - wide
    narrow += sum(n for op, n in opcodes.items() if op.startswith("UTMA"))
    return {
        "registers": fields["REG"],
        "spilled": fields["STACK"] + fields["LOCAL"],
        "opcodes": opcodes,
        "wide": wide,
        "narrow": narrow,
    }


def inspect_hip(code: str) -> dict[str, Any]:
    """Registers, spills and instruction mix out of gfx9 assembly."""
    fields = {name: int(value) for name, value in re.findall(r"\.(\w+_(?:count|size)):\s+(\d+)", code)}
    opcodes = Counter(re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", code, re.MULTILINE))
    memory = {op: n for op, n in opcodes.items() if re.match(r"(global|buffer|flat)_(load|store)", op)}
    wide = sum(n for op, n in memory.items() if "dwordx4" in op)
    # scalar registers spill into lanes of vector registers, not into memory
    spilled = 4 * fields.get("vgpr_spill_count", 0) + fields.get("private_segment_fixed_size", 0)
    return {
        "registers": fields["vgpr_count"],
        "spilled": spilled,
        "opcodes": opcodes,
        "wide": wide,
        "narrow": sum(memory.values()) - wide,
    }


def occupancy(part: str, registers: int, shared: int, warps: int) -> float:
    """Warps that fit on a multiprocessor, as a share of the most it can hold."""
    _, file, memory, width, most = PARTS[part]
    granted = -(-registers // 8) * 8 * width
    programs = min(file // (granted * warps), most // warps, memory // (shared + 1024) if shared else most)
    return programs * warps / most


def build(index: int) -> dict[str, Any]:
    """Compile one of JOBS, a launch for one part, and read the code back."""
    part, dtype, launch = JOBS[index]
    options = dict(launch.options)
    reading = "".join(map(inspect.getsource, (inspect_cuda, inspect_hip, build)))
    named = repr((triton.__version__, part, launch.function.cache_key, launch.key)) + reading
    kept = CACHE / f"{hashlib.sha256(named.encode()).hexdigest()}.json"
    if kept.exists():
        return {**json.loads(kept.read_text()), "row": launch.row}
    source = ASTSource(
        launch.function,
        dict(launch.signature),
        dict(launch.constexprs),
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    row: dict[str, Any] = {
        "kernel": launch.kernel,
        "row": launch.row,
        "part": part,
        "dtype": dtype,
        "constants": {name: value for name, value in launch.constexprs if value is not None},
    }
    try:
        built = triton.compile(source, target=target_of(part), options=options)
    except Exception as problem:
        return {**row, "error": repr(problem)}
    found = inspect_cuda(built.asm["cubin"]) if part.startswith("sm_") else inspect_hip(built.asm["amdgcn"])
    opcodes = found.pop("opcodes")
    text = " ".join(opcodes) + (built.asm["ptx"] if part.startswith("sm_") else "")
    row |= {
        **found,
        "shared": built.metadata.shared,
        "shared_limit": PARTS[part][0],
        "warps": options["num_warps"],
        "dots": built.asm["ttir"].count("tt.dot"),
        "reduced": sorted(set(REDUCED.findall(text))),
        "matrix": sum(n for op, n in opcodes.items() if MATRIX.match(op)),
        "mix": dict(Counter({op.split(".")[0]: 0 for op in opcodes}) | mix(opcodes)),
        "occupancy": occupancy(part, found["registers"], built.metadata.shared, options["num_warps"]),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(row))
    temporary.replace(kept)
    return row


def mix(opcodes: Counter[str]) -> Counter[str]:
    """Instructions by name without modifiers."""
    total: Counter[str] = Counter()
    for opcode, n in opcodes.items():
        total[opcode.split(".")[0]] += n
    return total


def jobs_of(spec: ModuleType, module: ModuleType, parts: tuple[str, ...]) -> list[tuple[str, str, Captured]]:
    """Every distinct launch at the papers' sizes × part × dtype."""
    found = {}
    for part in parts:
        for case in spec.at_size(32):
            for dtype in case.compiled:
                for launch in capture(case, module, getattr(torch, dtype), part):
                    found[part, launch.key] = (part, dtype, launch)
    return list(found.values())


def reachable(table: tuple[Any, ...], i: int, part: str, dtype: str) -> bool:
    """Whether row `i` can be picked on a part for a dtype: a row may be for narrow elements, or hidden by one above."""
    bits = 8 * getattr(torch, dtype).itemsize

    def takes(row: Any) -> bool:
        return (not row.families or part.startswith(row.families)) and bits <= row.limits.get("bits", bits)

    return takes(table[i]) and not any(
        takes(above)
        and all(name == "bits" or table[i].limits.get(name, limit + 1) <= limit for name, limit in above.limits.items())
        for above in table[:i]
    )


def main(op: str, *parts: str) -> None:
    torch.set_num_threads(1)
    spec = load_spec(op)
    module = importlib.import_module(spec.MODULE)
    JOBS.extend(jobs_of(spec, module, parts or tuple(PARTS)))
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        rows = list(pool.map(build, range(len(JOBS))))
    needed = [
        [kernel, i, part, dtype]
        for kernel, table in module.TABLES.items()
        for i in range(len(table))
        for part in (parts or tuple(PARTS))
        for dtype in ("float32", "float16", "bfloat16")
        if reachable(table, i, part, dtype)
    ]
    grids = {
        (case.name, launch.kernel, batch, part): {
            "case": case.name,
            "kernel": launch.kernel,
            "row": launch.row,
            "batch": batch,
            "grid": launch.grid,
            "programs": launch.programs,
            "part": part,
            "bytes": spec.formula(launch.kernel, 2, case.sizes),
            "few": spec.FEW_PROGRAMS.get(launch.kernel, {}).get(case.name, ""),
        }
        for batch in (1, 32, 128)
        for case in spec.at_size(batch)
        for part in (parts or tuple(PARTS))
        for launch in capture(case, module, torch.bfloat16, part)
    }
    json.dump({"builds": rows, "needed": needed, "grids": list(grids.values())}, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
