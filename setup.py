"""The one thing that pyproject.toml cannot say: the opt-in ahead-of-time build of the kernels.

    ARR_FAST_AOT_ARCHS="80;90;100" pip install --no-build-isolation .

compiles every kernel spec for these CUDA architectures (no GPU is needed) and writes a table of
registers, spills and shared memory beside the kernels. Unset, this step does nothing.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithKernels(build_py):
    """build_py, then the ahead-of-time table where ARR_FAST_AOT_ARCHS asks for it."""

    def run(self) -> None:
        super().run()
        archs = [arch for arch in os.environ.get("ARR_FAST_AOT_ARCHS", "").split(";") if arch]
        if archs and not self.editable_mode:
            # Triton is heavy, and absent from isolated builds: it is imported only in this branch.
            sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
            from arr_fast.engine.path_forest import tables_of_paths
            from arr_fast_kernels import aot

            target = Path(self.build_lib) / "arr_fast_kernels" / "aot_resources.json"
            aot.write_report(archs, target, tables_of_paths)


setup(cmdclass={"build_py": BuildWithKernels})
