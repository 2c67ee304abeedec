"""Set-up and packaging: the pins, the build, the wheel, the containers, and `conftest.py`."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import uvloop
from packaging.requirements import Requirement

import streamer
from streamer.config.loading import load
from streamer.config.settings import KafkaSink, MqttSink
from tests import compose, manifests
from tests.compose import Compose
from tests.vm import suite

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What a checkout holds besides its sources.
MADE = ("__pycache__", "*.so", "*.o", "*.egg-info", "build", "dist", ".?*")
OBJECTS = {
    f"streamer/bpf/{place}{source.stem}.o"
    for source in (ROOT / "bpf").glob("*.bpf.c")
    if not source.name.startswith(("bench", "test"))
    for place in ("", "nobtf/")
}

Require = Callable[[object, str], None]


def run(
    *command: object, cwd: Path = ROOT, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command without a terminal, its environment changed by `environ`."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | (environ or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def bpf_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bpf_build", ROOT / "bpf" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout: the sources, and nothing that was built."""
    copy = tmp_path_factory.mktemp("clean") / "streamer-checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*MADE))
    return copy


class Compiled(NamedTuple):
    """A checkout whose kernel programs were compiled, and what was printed meanwhile."""

    path: Path
    said: str


@pytest.fixture(scope="module")
def compiled(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    copy = tmp_path_factory.mktemp("compiled") / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*MADE))
    built = run(sys.executable, "bpf/build.py", cwd=copy)
    assert built.returncode == 0, built.stderr
    return Compiled(copy, built.stdout)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", directory]
    built = run(*command, checkout)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = directory.glob("*.whl")
    return path


# ---------------------------------------------------------------- pins


def pins(name: str) -> dict[str, str]:
    """The pinned version of each distribution in a requirements file."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+) \\$", (ROOT / name).read_text(), re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize(
    ("name", "requirements"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("requirements-build.txt", PROJECT["build-system"]["requires"]),
    ],
)
def test_every_requirement_is_pinned_within_its_range(
    name: str, requirements: Iterable[str]
) -> None:
    pinned = pins(name)
    for requirement in map(Requirement, requirements):
        assert pinned[requirement.name] in requirement.specifier


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_requirements_have_hashes_and_no_addresses(path: Path) -> None:
    text = path.read_text()
    logical_lines = text.replace("\\\n", " ").splitlines()
    requirements = [line for line in logical_lines if line and not line.lstrip().startswith("#")]
    assert requirements
    assert all(re.match(r"[a-z0-9-]+==\S+ +--hash=sha256:", line) for line in requirements)
    assert "://" not in text


def test_shared_pins_agree() -> None:
    runtime, dev = pins("requirements.txt"), pins("requirements-dev.txt")
    shared = runtime.keys() & dev.keys()
    assert {name: runtime[name] for name in shared} == {name: dev[name] for name in shared}


def test_the_installed_version_is_that_of_the_source() -> None:
    assert version("streamer") == streamer.__version__


# ---------------------------------------------------------------- the kernel programs' build


def test_compiler_flags_name_the_architecture() -> None:
    flags = bpf_build().compiler_flags
    assert "-D__TARGET_ARCH_x86" in flags("x86_64")
    assert "-D__TARGET_ARCH_arm64" in flags("aarch64")


def test_an_unknown_architecture_is_refused() -> None:
    module = bpf_build()
    with pytest.raises(module.BuildError, match="made for x86_64 and aarch64, and this is riscv64"):
        module.compiler_flags("riscv64")


def test_an_object_is_stale_when_absent_or_older_than_an_input(tmp_path: Path) -> None:
    is_stale = bpf_build().is_stale
    built, old, new = (tmp_path / name for name in ("built.o", "old.h", "new.h"))
    for path, seconds in ((old, 100), (built, 200), (new, 300)):
        path.touch()
        os.utime(path, (seconds, seconds))
    assert not is_stale(built, [old])
    assert is_stale(built, [old, new])
    assert is_stale(tmp_path / "absent.o", [old])


def test_every_program_is_compiled_and_those_for_tests_only_when_asked() -> None:
    module = bpf_build()
    core, file, bench, test = [
        module.SOURCES / f"{name}.bpf.c" for name in ("core", "file", "bench", "test_load")
    ]
    packaged = {
        module.PACKAGED / "core.bpf.o": core,
        module.PACKAGED / "nobtf" / "core.bpf.o": core,
        module.PACKAGED / "file.bpf.o": file,
        module.PACKAGED / "nobtf" / "file.bpf.o": file,
    }
    assert module.outputs([core, file, bench, test], False) == packaged
    assert module.outputs([core, file, bench, test], True) == packaged | {
        module.UNPACKAGED / "bench.bpf.o": bench,
        module.UNPACKAGED / "test_load.bpf.o": test,
    }


def test_clang_is_asked_for_only_when_something_is_to_be_compiled(
    checkout: Path, compiled: Compiled, tmp_path: Path
) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*MADE))
    build = (sys.executable, "bpf/build.py")
    no_clang = {"CLANG": "no-clang-here"}

    refused = run(*build, cwd=copy, environ=no_clang)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "no-clang-here is not installed" in refused.stderr
    assert "apt-get install clang" in refused.stderr

    assert set(compiled.said.splitlines()) == {f"compiled {path}" for path in OBJECTS}
    again = run(*build, cwd=compiled.path, environ=no_clang)
    assert (again.returncode, again.stdout) == (0, "")


def test_a_wheel_without_clang_is_refused_in_one_line(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*MADE))
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, copy)
    refused = run(*command, environ={"CLANG": "no-clang-here"})
    assert refused.returncode != 0
    assert "streamer: no-clang-here is not installed" in refused.stdout + refused.stderr
    assert not list(tmp_path.glob("*.whl"))


# ---------------------------------------------------------------- the wheel


def test_the_wheel_carries_programs_and_module_and_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if name.startswith("streamer/")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = {f"streamer/{m}{suffix}" for m in ("ring/_records", "sinks/kafka/_record_batch")}
    assert {*OBJECTS, "streamer/py.typed"} | modules <= package
    assert {name for name in package if name.startswith("streamer/bpf/")} == OBJECTS
    assert {"streamer/ring/_records.pyi", "streamer/sinks/kafka/_record_batch.pyi"} <= package
    assert not {name for name in names if name.endswith((".c", ".h", ".pyc"))}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"streamer"}


def test_the_wheel_is_for_this_python_and_machine(wheel: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"streamer-{streamer.__version__}-{python}-{python}-{platform}.whl"


def test_the_wheel_names_its_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"streamer-{streamer.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
        gpl = archive.read(f"{info}/licenses/LICENSES/GPL-2.0-only.txt")
    assert b"GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991" in gpl
    assert "License-Expression: Apache-2.0 AND (GPL-2.0-only OR Apache-2.0)\n" in metadata


def test_the_programs_do_not_say_where_they_were_built(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in OBJECTS:
            assert os.fsencode(checkout) not in archive.read(name)


def test_kernel_sources_are_dual_licensed() -> None:
    sources = [path for path in (ROOT / "bpf").rglob("*") if path.suffix in {".c", ".h"}]
    assert sources
    for path in sources:
        first = path.read_text().splitlines()[0]
        assert "SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0" in first, path


def test_the_installed_wheel_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", installed).returncode == 0
    python = installed / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    added = run(*pip, "install", "--no-index", "--no-deps", wheel)
    assert added.returncode == 0, added.stderr
    (packages,) = installed.glob("lib/python*/site-packages")
    # The dependencies, as this environment has them; the editable streamer is not among them.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    command = installed / "bin" / "streamer"
    alone = {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": ""}
    said = run(command, "--version", cwd=tmp_path, environ=alone)
    assert (said.returncode, said.stderr) == (0, "")
    assert streamer.__version__ in said.stdout
    listed = run(command, "events", cwd=tmp_path, environ=alone)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "process.exec" in listed.stdout
    script = "import streamer.ring.records as r; print(r.COMPILED, r.__file__)"
    located = run(python, "-c", script, cwd=tmp_path, environ=alone)
    assert located.stdout.startswith(f"True {installed}"), located.stderr


def test_without_a_c_compiler_the_wheel_has_the_slower_reader(
    compiled: Compiled, tmp_path: Path
) -> None:
    copy, unpacked = tmp_path / "checkout", tmp_path / "unpacked"
    shutil.copytree(compiled.path, copy)  # with its programs: it is the C modules that matter
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, copy)
    built = run(*command, environ={"CC": "false"})
    assert built.returncode == 0, built.stderr
    for module in ("streamer.ring._records", "streamer.sinks.kafka._record_batch"):
        assert f"without {module} streamer is slower" in built.stdout + built.stderr
    (path,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(path).extractall(unpacked)
    script = "import streamer.ring.records as r; print(r.COMPILED, r.__file__)"
    found = run(sys.executable, "-c", script, cwd=unpacked, environ={"PYTHONPATH": str(unpacked)})
    assert found.stdout.startswith(f"False {unpacked}"), found.stderr


# ---------------------------------------------------------------- set-up


def test_a_second_setup_does_nothing(require: Require) -> None:
    require((ROOT / ".venv/stamps/streamer").exists(), "this checkout is not set up: run make test")
    again = run("tools/setup.sh", "run")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_setup_as_a_user_names_the_missing_packages() -> None:
    # Not in tmp_path, where only its owner may look: root becomes nobody for this.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copytree(ROOT / "tools", directory / "tools")
        # A path with what setup.sh works with, and without what it looks for.
        (directory / "path").mkdir()
        for tool in ("apt-get", "bash", "dirname", "env", "flock", "grep", "id", "mkdir", "tail"):
            found = shutil.which(tool)
            assert found is not None
            (directory / "path" / tool).symlink_to(found)
        become_nobody: tuple[str, ...] = ()
        if os.geteuid() == 0:
            become_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
            os.chown(directory, 65534, 65534)
        command = (*become_nobody, "env", f"PATH={directory}/path", "tools/setup.sh", "run")
        refused = run(*command, cwd=directory)
    assert refused.returncode == 1
    assert refused.stderr.startswith("setup: packages are missing; as root: apt-get install -y ")
    assert " clang llvm gcc" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_setup_refuses_a_mode_that_it_does_not_know() -> None:
    refused = run("tools/setup.sh", "everything")
    assert (refused.returncode, refused.stderr) == (2, "usage: tools/setup.sh run|dev|test|bench\n")


def test_make_lists_its_targets() -> None:
    listed = run("make").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert [line.split()[1] for line in listed.splitlines()] == phony[1].split()


# ---------------------------------------------------------------- containers


@pytest.fixture(scope="module")
def composed() -> Compose:
    """`compose.yaml` as compose understands it."""
    if not compose.command():
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    return Compose.read(ROOT / "compose.yaml")


def test_every_service_says_whether_it_is_well(composed: Compose) -> None:
    assert composed.services.keys() == {"kafka", "mosquitto", "streamer"}
    for name, service in composed.services.items():
        kind, *words = service["healthcheck"]["test"]
        assert kind in ("CMD", "CMD-SHELL"), name
        assert words, name


def test_the_agent_waits_for_brokers_that_are_well(composed: Compose) -> None:
    conditions = composed.service("streamer")["depends_on"]
    assert {name: one["condition"] for name, one in conditions.items()} == {
        "kafka": "service_healthy",
        "mosquitto": "service_healthy",
    }


def test_the_agent_has_the_rights_of_the_daemonset_and_no_others(composed: Compose) -> None:
    service = composed.service("streamer")
    pod, container = manifests.pod(), manifests.container()
    context = container["securityContext"]
    assert service.get("privileged", False) is context["privileged"] is False
    assert service["cap_drop"] == context["capabilities"]["drop"] == ["ALL"]
    assert sorted(service["cap_add"]) == sorted(context["capabilities"]["add"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert service["read_only"] is context["readOnlyRootFilesystem"] is True
    assert service["user"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert (pod["hostPID"], pod["hostNetwork"]) == (False, False)
    shared = ("pid", "ipc", "uts", "network_mode", "userns_mode", "cgroup", "devices")
    assert service.keys().isdisjoint(shared)
    limit = container["resources"]["limits"]["memory"]
    assert bytes_of(str(service["mem_limit"])) == bytes_of(limit) == 512 << 20


def bytes_of(size: str) -> int:
    """Of `512m`, of `512Mi`, or of a number, which the newer compose makes of it."""
    number, unit = re.fullmatch(r"(\d+)(m|Mi|)", size).groups()  # type: ignore[union-attr]
    return int(number) << (20 if unit else 0)


def test_the_agent_has_the_mounts_of_the_daemonset_and_no_others(composed: Compose) -> None:
    """By where they are in the container: the source, if it is the host's, and whether it is to
    be read only. State and configuration are compose's own.
    """
    volumes = {volume["name"]: volume for volume in manifests.pod()["volumes"]}
    theirs = {
        mount["mountPath"]: (
            volumes[mount["name"]].get("hostPath", {}).get("path"),
            mount.get("readOnly", False),
        )
        for mount in manifests.container()["volumeMounts"]
    }
    ours = {}
    for volume in composed.service("streamer")["volumes"]:
        if isinstance(volume, str):
            source, target, mode = volume.split(":")
            ours[target] = source, mode == "ro"
        else:
            ours[volume["target"]] = volume["source"], volume.get("read_only", False)
    assert ours.pop("/etc/streamer/streamer.toml")[1] is theirs.pop("/etc/streamer")[1] is True
    assert ours.pop("/var/lib/streamer") == ("streamer-state", False)
    assert theirs.pop("/var/lib/streamer") == ("/var/lib/streamer", False)
    # In memory: where `streamer status` asks.
    assert theirs.pop("/run/streamer") == (None, False)
    assert composed.service("streamer")["tmpfs"] == ["/run/streamer:mode=0755,size=1m"]
    assert ours == theirs


def test_the_ports_of_the_brokers_are_of_this_host_alone(composed: Compose) -> None:
    """They ask for no password."""
    published = [
        port if isinstance(port, str) else f"{port['host_ip']}:{port['published']}"
        for service in composed.services.values()
        for port in service.get("ports", ())
    ]
    assert {port.partition("/")[0].rsplit(":", 1)[0] for port in published} <= {
        "127.0.0.1",
        "127.0.0.1:19092",
        "127.0.0.1:18883",
    }
    assert len(published) == 2


def test_the_agent_gets_more_time_to_end_than_it_takes(composed: Compose) -> None:
    """Else the engine kills it while it delivers."""
    grace = load(ROOT / "compose" / "streamer.toml").grace_seconds
    assert seconds_of(composed.service("streamer")["stop_grace_period"]) > grace


def seconds_of(duration: str) -> float:
    """`1m20s` as compose writes it."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([hms])", duration))


def test_the_settings_name_the_brokers_as_the_services_are_called(composed: Compose) -> None:
    kafka, mqtt = load(ROOT / "compose" / "streamer.toml").sinks
    assert isinstance(kafka, KafkaSink)
    assert isinstance(mqtt, MqttSink)
    environment = composed.service("kafka")["environment"]
    advertised = environment["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert {f"INSIDE://{address}" for address in kafka.bootstrap} <= set(advertised)
    assert mqtt.host in composed.services


def test_compose_runs_the_kafka_of_the_tests(composed: Compose) -> None:
    pom = ElementTree.parse(ROOT / "tools" / "kafka-pom.xml").getroot()
    space = pom.tag.removesuffix("project")
    (tested,) = [
        one.findtext(f"{space}version")
        for one in pom.iter(f"{space}dependency")
        if one.findtext(f"{space}artifactId") == "kafka_2.13"
    ]
    assert composed.service("kafka")["image"] == f"apache/kafka:{tested}"


def test_the_files_that_compose_mounts_are_there(composed: Compose) -> None:
    volumes = [v for service in composed.services.values() for v in service.get("volumes", ())]
    sources = [v.partition(":")[0] if isinstance(v, str) else v["source"] for v in volumes]
    ours = [Path(source) for source in sources if source.startswith(str(ROOT))]
    assert {path.name for path in ours} == {"mosquitto.conf", "streamer.toml"}
    assert all(path.is_file() for path in ours)


def test_the_image_is_built_with_what_setup_installs() -> None:
    needed = re.findall(r"^    need (\S+)", (ROOT / "tools" / "setup.sh").read_text(), re.MULTILINE)
    dockerfile = (ROOT / "Dockerfile").read_text()
    installed = re.findall(r"--no-install-recommends((?:[\s\\]+[a-z0-9-]+)+)", dockerfile)
    build, runtime = (set(packages.replace("\\", " ").split()) for packages in installed)
    assert build < set(needed)
    assert runtime == {"libbpf1", "python3"}


# ---------------------------------------------------------------- conftest.py


async def test_asynchronous_tests_run_on_uvloop() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


NEEDS_KAFKA = """
import pytest

@pytest.mark.kafka
def test_that_needs_kafka():
    raise AssertionError("was run")

def test_that_needs_the_moon(require):
    require(True, "not said")
    require(False, "the moon is down")
"""

NEEDS_ANOTHER_KERNEL = """
def test_that_needs_another_kernel(require_kernel):
    require_kernel(True, "not said")
    require_kernel(False, "no kernel has that")

def test_that_fails():
    raise AssertionError("on every kernel")
"""


@pytest.mark.parametrize(
    ("ci", "code", "outcome"), [("", 0, "2 skipped"), ("true", 1, "1 failed, 1 error")]
)
def test_what_was_not_run_is_listed_and_a_failure_in_ci(
    tmp_path: Path, ci: str, code: int, outcome: str
) -> None:
    ran = run_example(tmp_path, NEEDS_KAFKA, {"CI": ci})
    assert ran.returncode == code, ran.stdout
    assert f"no Kafka in {tmp_path}/kafka: run tools/brokers.sh setup" in ran.stdout
    assert "the moon is down" in ran.stdout
    assert outcome in ran.stdout.splitlines()[-1]


def test_what_the_kernel_lacks_is_listed_and_no_failure(tmp_path: Path) -> None:
    """Another kernel has to have it: what `tests/vm/suite.py` looks for is in the results."""
    results = tmp_path / "results"
    environ = {"CI": "true", "STREAMER_TEST_RESULTS": str(results)}
    ran = run_example(tmp_path, NEEDS_ANOTHER_KERNEL, environ)
    assert "no kernel has that" in ran.stdout
    assert "1 failed, 1 skipped" in ran.stdout.splitlines()[-1]
    found, collected, end = suite.read(results)
    assert (collected, end) == (2, results.stat().st_size)
    assert [(one.outcome, one.by_kernel) for one in found] == [("skipped", True), ("failed", False)]
    assert found[0].reason == "no kernel has that"
    assert "on every kernel" in found[1].reason
    assert suite.run_nowhere(found) == [found[0].test]


def run_example(
    directory: Path, tests: str, environ: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    (directory / "test_example.py").write_text(tests)
    pytest_here = (sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml")
    options = ("--rootdir", directory, "-p", "tests.conftest", "-p", "no:cacheprovider")
    environ = environ | {"STREAMER_CACHE": str(directory), "PYTHONPATH": str(ROOT)}
    environ["PYTEST_XDIST_WORKER"] = ""  # it is no part of the run that this is in
    return run(*pytest_here, *options, "test_example.py", cwd=directory, environ=environ)
