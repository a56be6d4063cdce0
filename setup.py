"""Build entry point; the metadata is in pyproject.toml.

The ops live in the top-level folder `kernels/` and are packaged as `fastprompt.kernels` through the symlink
`fastprompt/kernels`. Where a checkout turned that link into a text file (git on Windows without symlinks),
setuptools would build a wheel without a single op, so the build stops here instead.

The C++ of `csrc/` becomes `fastprompt/kernels/_native.abi3.so`, over torch's stable ABI: one build for every torch from
2.10 and every Python from 3.10. It needs torch's headers, so it is built where torch is installed already (`pip install
--no-build-isolation`); without them, or without a compiler, the install succeeds and the ops run in PyTorch.
FASTPROMPT_REQUIRE_NATIVE=1 makes a build without it fail.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REQUIRED = os.environ.get("FASTPROMPT_REQUIRE_NATIVE", "0") not in ("", "0")
COMMON = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-g0",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AVX512_BF16 = [*AVX512_VNNI, "-mavx512bf16"]
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_vnni": AVX512_VNNI,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
"""The instruction sets beside the portable one, and what makes the compiler use them in a file of their own."""


class BuildNative(build_ext):
    """Compiles each instruction set's file with its own flags."""

    def build_extension(self, ext: Any) -> None:
        for name, flags in ext.instruction_sets.items():
            ext.extra_objects += self.compiler.compile(
                [f"csrc/{name}.cpp"],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                macros=ext.define_macros,
                extra_postargs=[*COMMON, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


class TaggedWheel(bdist_wheel):
    """A wheel for any platform where the extension is missing from it."""

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if list(Path(self.bdist_dir).rglob("_native.*")) else ("py3", "none", "any")


def native() -> list[Extension]:
    """The extension; none where torch cannot be found."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        if REQUIRED:
            raise
        return []
    x86 = platform.machine() in ("x86_64", "AMD64")
    extension = Extension(
        "fastprompt.kernels._native",
        ["csrc/ops.cpp"],
        depends=[*map(str, sorted(Path("csrc").glob("*"))), "setup.py"],
        include_dirs=["csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), *([("FASTPROMPT_X86", None)] if x86 else [])],
        extra_compile_args=COMMON,
        py_limited_api=True,
        optional=not REQUIRED,
    )
    extension.instruction_sets = {"portable": [], **(X86 if x86 else {})}  # type: ignore[attr-defined]
    return [extension]


if not (ROOT / "fastprompt" / "kernels" / "__init__.py").is_file():
    raise SystemExit(
        "fastprompt/kernels must be a link to the folder kernels/, but it holds no __init__.py: "
        "check out with symbolic links (git config core.symlinks true), or copy kernels/ there"
    )

EXTENSIONS = native()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": TaggedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
