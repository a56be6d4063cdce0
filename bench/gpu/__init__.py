"""What only a GPU can show: `make gpu-here PY=python3` from a plain tree, `make gpu` after an install.

`python -m gpu` (with PYTHONPATH=bench) runs stages one after the other, each in a process of its own and within its
seconds: what is left of them goes to the next. It needs the interpreter that is there, with torch, Triton and timm.

| stage | what it shows |
|---|---|
| device | what is installed, this device's copy rate and its rate of bfloat16 products |
| compile | every kernel in every dtype compiles, in parallel; later stages find it in Triton's cache |
| parity | ops against float64 in three dtypes, and the same bits again: twice, replayed, on streams, in threads |
| graphs | replays of whole models, `tests/engine/cuda_graph/test_device.py` |
| ops | times of every op and of its peers in captured graphs, as shares of the device's rates |
| end to end | inference by our graph and the papers', eager, captured and compiled |
| training | the same of training steps |
| mixed batches | images of 32 adapters in one batch, and one by one |
| counters | the hardware counters of the largest kernels, by ncu |

`--long` is a second call: `sanitizer`, every kernel under compute-sanitizer, and `autotuned`, the rest of the compiled
models. `--dry-run` takes the same way without a GPU: in Triton's interpreter, at small sizes, with a capturer and a
compiler that do nothing. Its times say nothing.

A stage yields rows. What fails is a row as well: it ends neither its stage nor the run, and is counted. After every
stage the report is written anew, as JSON and as tables. The exit status is 1 if anything failed.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
"""The ops that have Triton kernels."""
