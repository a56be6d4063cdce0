"""What the gates ask for: each function lists the problems in one of their reports, none if all is well."""

from __future__ import annotations

from typing import Any

PARTS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("float32", "float16", "bfloat16")
MOST_ROWS = 4  # of a kernel's table
LEAST_MUTATIONS = 10
LEAST_PROGRAMS = 132  # at batch 32, one for each multiprocessor of an H100

Report = dict[str, Any]


def named(problem: str, row: Report, *names: str) -> str:
    """A problem with the fields of the row that it is of."""
    return f"{problem}: " + ", ".join(f"{name} {row.get(name)}" for name in names)


def of_parity(report: Report) -> list[str]:
    """Outputs and gradients that are further from float64 than PyTorch allows, in the interpreter's report."""
    rows = report["parity"]
    missing = [dtype for dtype in ("float32", "float16") if dtype not in {row["dtype"] for row in rows}]
    problems = [f"no case in {dtype}" for dtype in missing]
    if not any(str(row.get("tensor")).startswith("d ") for row in rows):
        problems.append("no gradient is compared")
    return problems + [
        named("wrong", row, "case", "dtype", "tensor", "error", "budget") for row in rows if not row["ok"]
    ]


def of_tables(report: Report) -> list[str]:
    """Rows of tile tables that no case of the interpreter's report ran, and tables that are too long."""
    ran = {(launch["kernel"], launch["row"]) for launch in report["launches"]}
    tables = report["rows"]
    problems = [
        f"row {row} of {kernel} did not run"
        for kernel, count in tables.items()
        for row in range(count)
        if (kernel, row) not in ran
    ]
    return problems + [f"{kernel} has {count} rows" for kernel, count in tables.items() if count > MOST_ROWS]


def of_checks(report: Report) -> list[str]:
    """Properties that do not hold, in the interpreter's report."""
    checks = report["checks"]
    return [f"{name}: {problem}" for name, problem in checks.items() if problem] or ([] if checks else ["no checks"])


def of_bytes(report: Report) -> list[str]:
    """Launches that touch other bytes than their formula says, and temporaries that none touches."""
    launches = [row for row in report["traffic"] if row["kernel"]]
    counted = {row["kernel"] for row in launches}
    problems = [f"no bytes of {name} were counted" for name in report["rows"] if name not in counted]
    problems += [
        named("bytes", row, "kernel", "case", "distinct", "formula")
        for row in launches
        if not 0.9 * row["formula"] <= row["distinct"] <= 1.05 * row["formula"]
    ]
    problems += [named("loaded twice", row, "kernel", "loaded_twice") for row in launches if row["loaded_twice"]]
    return problems + [named("idle bytes", row, "case", "idle") for row in report["traffic"] if row.get("idle")]


def of_interpreter(report: Report) -> list[str]:
    """All problems of a whole report of `interpret.py`."""
    return of_parity(report) + of_tables(report) + of_checks(report) + of_bytes(report)


def of_mutations(found: dict[str, str]) -> list[str]:
    """Mutations that turned nothing red, in what `mutate.py` found."""
    few = [f"{len(found)} mutations, {LEAST_MUTATIONS} are needed"] if len(found) < LEAST_MUTATIONS else []
    return few + [f"survived: {name}" for name, red in found.items() if not red]


def of_code(builds: list[Report]) -> list[str]:
    """Builds that failed, and machine code that spills, does not fit, or has the wrong instructions."""
    names = ("kernel", "row", "part", "dtype", "constants")
    problems = [named("not compiled", row, *names, "error") for row in builds if "error" in row]
    for row in builds:
        if "error" in row:
            continue
        if row["spilled"]:
            problems.append(named("spills", row, *names, "spilled", "registers"))
        if row["shared"] > row["shared_limit"]:
            problems.append(named("shared memory", row, *names, "shared", "shared_limit"))
        if row["dtype"] == "float32" and row["reduced"]:
            problems.append(named("float32 products in fewer bits", row, *names, "reduced"))
        if row["dtype"] != "float32" and row["dots"] and not row["matrix"]:
            problems.append(named("no matrix instruction", row, *names))
        if not row["wide"]:
            problems.append(named("no access of 16 bytes", row, *names))
    return problems


def of_compiler(report: Report) -> list[str]:
    """All problems of a whole report of `compile.py`."""
    built = {(row["kernel"], row["row"], row["part"], row["dtype"]) for row in report["builds"] if "error" not in row}
    needed = {tuple(row) for row in report["needed"]}
    problems = [f"not built: {row}" for row in sorted(needed - built)]
    problems += [f"built and in no table: {row}" for row in sorted(built - needed)]
    problems += [f"no build for {part}" for part in PARTS if part not in {part for _, _, part, _ in needed}]
    problems += [f"no build in {dtype}" for dtype in DTYPES if dtype not in {dtype for _, _, _, dtype in needed}]
    grids = [row for row in report["grids"] if row["batch"] == 32]
    if not grids:
        problems.append("no grid at batch 32")
    problems += [
        named("few programs", row, "case", "kernel", "row", "grid")
        for row in grids
        if row["programs"] < LEAST_PROGRAMS and not row["few"]
    ]
    return problems + of_code(report["builds"])
