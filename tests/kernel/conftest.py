"""What the tests on the running kernel share: a scope, and the program that they execute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from streamer.kernel import loader
from tests.bpf_variant import Change, Variant
from tests.conftest import Require
from tests.kernel.agent import ROOT
from tests.kernel.scope import Scope, cgroup_mount
from tests.kernel.system import kernel_knows, preempts_tracepoints

SOURCE = Path(__file__).parent / "subject.c"
BUILT = ROOT / "build" / "tests" / "subject"


@pytest.fixture(scope="session")
def cgroups() -> Path:
    """Where the cgroups are, for tests that make scopes of their own."""
    mount = cgroup_mount()
    if mount is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    return mount


@pytest.fixture
def scope(cgroups: Path) -> Iterator[Scope]:
    """A cgroup of this test."""
    with Scope(cgroups) as made:
        yield made


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter; those of pytest are root's alone."""
    with tempfile.TemporaryDirectory(prefix="streamer-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name).resolve()


@pytest.fixture(scope="session")
def subject(open_directory: Path) -> Path:
    """The compiled `subject.c`: linked statically, so that it runs in a chroot too."""
    if not BUILT.exists() or BUILT.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        own = BUILT.with_suffix(f".{os.getpid()}")  # another process of the tests may do the same
        command = ["cc", "-O1", "-static", "-pthread", "-Wall", "-Werror", "-o", str(own)]
        subprocess.run([*command, str(SOURCE)], check=True)
        own.replace(BUILT)
    return Path(shutil.copy(BUILT, open_directory))


@pytest.fixture
def variant(tmp_path: Path) -> Callable[[Mapping[str, Change]], Variant]:
    """Makes kernel programs that differ from ours: file in bpf/, and what to change there."""
    return lambda changes: Variant(tmp_path / "variant", changes)


COPY = """
import os
import sys
sys.path[:0] = {paths!r}
from streamer.cli import main
def late(event, arguments):
    if event == "import" and os.getuid():
        print("late import of", arguments[0], file=sys.stderr)
sys.addaudithook(late)
sys.exit(main())
"""


@pytest.fixture(scope="session")
def private_copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What Python is to run for an agent whose code nobody but root can read.

    What it imports after it has become another user, it complains about.
    """
    private = tmp_path_factory.mktemp("private")
    private.chmod(0o700)
    return copied(private)


@pytest.fixture(scope="session")
def public_copy(open_directory: Path) -> tuple[str, ...]:
    """The same, of code that everybody can read, wherever the checkout is."""
    public = open_directory / "code"
    public.mkdir()
    return copied(public)


def copied(directory: Path) -> tuple[str, ...]:
    shutil.copytree(ROOT / "streamer", directory / "streamer")
    (packages,) = (path for path in sys.path if path.endswith("site-packages"))
    tools = shutil.ignore_patterns("mypy*", "*pytest*", "hypothesis*", "pip*", "setuptools*")
    shutil.copytree(packages, directory / "packages", ignore=tools)
    return "-I", "-S", "-c", COPY.format(paths=[str(directory), str(directory / "packages")])


@pytest.fixture
def as_if_preempted(monkeypatch: pytest.MonkeyPatch, require_kernel: Require) -> None:
    """What is used on 7.0 is used here, too, where the kernel has all that it takes."""
    there = kernel_knows("btf_trace_sched_prepare_exec") and kernel_knows("bpf_task_from_pid")
    tells = preempts_tracepoints() or not kernel_knows("srcu_free_old_probes")
    require_kernel(there and tells, "this kernel has raw tracepoints alone for it")
    monkeypatch.setattr(loader, "variables_of", set)
