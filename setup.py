"""Compiles the native libraries while the package is installed, where there is a compiler.

Where there is none the installation succeeds without them, and each is compiled on first use. All else about the
distribution is in pyproject.toml.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "kernels"))

from moe_kernels.native.build import NativeBuildError, Unit, install, installed_name  # noqa: E402
from moe_kernels.native.units import cpu_kernels, is_supported  # noqa: E402

# Dotted name -> units; a library lies beside its sources.
LIBRARIES = {
    "moe_runtime.parallel.native.host_link": [Unit(ROOT / "moe_runtime/parallel/native/host_link.c")],
}
if is_supported():
    LIBRARIES["moe_kernels.native.cpu_kernels"] = cpu_kernels()


class BuildLibraries(build_ext):
    """Calls the compiler as first use would, under the name that first use looks for."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        units = next(units for known, units in LIBRARIES.items() if known.split(".")[-1] == name)
        return os.path.join(*package, installed_name(name, units))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            install(LIBRARIES[ext.name], target)
        except NativeBuildError as error:
            raise CompileError(f"{error}; it will be compiled on first use") from error


# Optional: a failure is a warning.
EXTENSIONS = [Extension(name, [], optional=True) for name in LIBRARIES]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildLibraries})
