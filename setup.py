"""Build entry point; the metadata is in pyproject.toml.

The ops live in the top-level folder `kernels/` and are packaged as `fastprompt.kernels` through the symlink
`fastprompt/kernels`. Where a checkout turned that link into a text file (git on Windows without symlinks),
setuptools would build a wheel without a single op, so the build stops here instead.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

if not (Path(__file__).parent / "fastprompt" / "kernels" / "__init__.py").is_file():
    raise SystemExit(
        "fastprompt/kernels must be a link to the folder kernels/, but it holds no __init__.py: "
        "check out with symbolic links (git config core.symlinks true), or copy kernels/ there"
    )

setup()
