"""The parts of the build that pyproject.toml cannot say: C modules and the kernel programs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def _bpf_build() -> ModuleType:
    # By path: bpf/ is no package, and a build backend runs without the sources on sys.path.
    spec = importlib.util.spec_from_file_location("bpf_build", ROOT / "bpf" / "build.py")
    if spec is None or spec.loader is None:
        raise SystemExit("bpf/build.py is missing: this is no complete source tree")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Compiles the kernel programs before the package's files are collected."""

    def run(self) -> None:
        bpf = _bpf_build()
        try:
            bpf.build()
        except bpf.BuildError as error:
            raise SystemExit(f"streamer: {error}") from None
        super().run()


class BuildExt(build_ext):
    """Says what it means when a C module, which is optional, could not be compiled."""

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            if not Path(self.get_ext_fullpath(extension.name)).exists():
                self.warn(f"without {extension.name} streamer is slower: compile it with gcc")


setup(
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    ext_modules=[
        Extension(
            name,
            [name.replace(".", "/") + ".c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,  # each has a twin in Python, which is several times slower
        )
        for name in ("streamer.ring._records", "streamer.sinks.kafka._record_batch")
    ],
)
