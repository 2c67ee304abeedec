"""What the tests on the running kernel share: a scope, and the program that they execute."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.bpf_variant import Change, Variant
from tests.kernel.scope import Scope, cgroup_mount

SOURCE = Path(__file__).parent / "subject.c"


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
    program = open_directory / "subject"
    command = ["cc", "-O1", "-static", "-pthread", "-Wall", "-Werror", "-o", str(program)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return program


@pytest.fixture
def variant(tmp_path: Path) -> Callable[[Mapping[str, Change]], Variant]:
    """Makes kernel programs that differ from ours: file in bpf/, and what to change there."""
    return lambda changes: Variant(tmp_path / "variant", changes)
