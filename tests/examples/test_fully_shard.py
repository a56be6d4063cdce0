"""Two processes that each hold a part of the blocks train the prompts that one process with the whole backbone does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fully_shard.py"


def test_sharded_training_is_training_on_the_whole_backbone(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, torch.distributed as dist; init = dist.init_process_group; "
        "dist.init_process_group = lambda backend: "
        "init(backend, init_method='file://' + sys.argv[2], rank=int(sys.argv[3]), world_size=2); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    # As torchrun does, but without a port that another test may have.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(EXAMPLE), str(tmp_path / "store"), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (said, errors), others = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors + others[1]
    found = re.search(r"loss ([\d.]+) to ([\d.]+), whole ([\d.]+); largest difference of a trained number (\S+);", said)
    assert found is not None, said
    first, last, whole, difference = map(float, found.groups())
    assert last < first
    assert last == whole
    assert difference < 1e-5
    local, total = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of ([\d,]+) numbers", said)[0])
    assert local < 0.7 * total  # the blocks, of which each process holds a half, are most of this backbone
