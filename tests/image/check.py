"""The image, run as `compose.yaml` says: `tools/image.sh test`, which builds it first (root).

Not among the tests that are run by default: it takes podman, debootstrap and minutes. The agent's
service is taken from `compose.yaml` as compose understands it, so what is tried is what is shipped,
apart from where the events go: to standard output, because the brokers' images are a registry's.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.compose import Compose
from tests.kernel.agent import DECODERS, kind_of

ROOT = Path(__file__).resolve().parents[2]
PODMAN = (ROOT / "tools" / "image.sh", "podman")
IMAGE = "localhost/streamer"
SECONDS = 60
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
BY_CAPABILITY = {"BPF": "bpf", "PERFMON": "perf_event_open"}
BITS = {"BPF": 39, "PERFMON": 38, "NET_ADMIN": 12}

pytestmark = pytest.mark.kernel


def podman(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (*PODMAN, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, done.stderr
    return done


def service_options(directory: Path) -> Iterator[str]:
    """What podman is to be told to run the agent as its service in `compose.yaml`."""
    service = Compose.read(ROOT / "compose.yaml").service("streamer")
    assert not service["privileged"]
    yield from ("--hostname", service["hostname"], "--user", service["user"])
    yield from (word for name in service["cap_drop"] for word in ("--cap-drop", name))
    yield from (word for name in service["cap_add"] for word in ("--cap-add", name))
    yield from (word for option in service["security_opt"] for word in ("--security-opt", option))
    yield from ("--security-opt", f"seccomp={seccomp(service['cap_add'], directory)}")
    yield from ("--memory", str(service["mem_limit"]))
    if service["read_only"]:
        yield from ("--read-only", "--read-only-tmpfs=false")
    for volume in service["volumes"]:
        yield from ("--volume", _volume(volume, directory))
    yield from (word for place in service["tmpfs"] for word in ("--tmpfs", place))


def _volume(volume: str | dict[str, Any], directory: Path) -> str:
    """A named volume is a directory of the test's."""
    if isinstance(volume, str):
        source, target, mode = volume.split(":")
    else:
        source, target = volume["source"], volume["target"]
        mode = "ro" if volume.get("read_only") else "rw"
    if not source.startswith("/"):
        (directory / source).mkdir()
        source = str(directory / source)
    return f"{source}:{target}:{mode}"


def seccomp(added: Sequence[str], directory: Path) -> Path:
    """The default profile as a runtime makes it for these capabilities: podman's, with what those
    of containerd and Docker have had for long.
    """
    found = json.loads(DEFAULT_PROFILE.read_text())
    allowed = [call for name, call in BY_CAPABILITY.items() if name in added]
    rules = []
    for rule in found["syscalls"]:
        names = [name for name in rule["names"] if name not in allowed]
        if names:
            rules.append(rule | {"names": names})
    rules.append({"names": allowed, "action": "SCMP_ACT_ALLOW", "args": []})
    place = directory / "seccomp.json"
    place.write_text(json.dumps(found | {"syscalls": rules}))
    return place


class Container:
    """The agent in a container, which writes to its standard output."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.output, self.stderr = directory / "events", directory / "stderr"
        self.name = f"streamer-test-{time.monotonic_ns()}"
        command = [*PODMAN, "run", "--name", self.name, "--ulimit", "host", "--network", "none"]
        command += [*service_options(directory), IMAGE, "run", *arguments]
        words = [str(word) for word in command]
        with self.output.open("wb") as output, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(words, stdout=output, stderr=stderr)

    def events(self) -> list[Any]:
        complete, _, _ = self.output.read_bytes().rpartition(b"\n")
        return [DECODERS[json.loads(line)["event"]].decode(line) for line in complete.splitlines()]

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events() if kind_of(event) == kind]

    def wait_for(self, found: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not found():
            assert self.process.poll() is None, self.stderr.read_text()
            assert time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.05)

    def stop(self) -> int:
        podman("stop", "--time", 20, self.name)
        return self.process.wait(SECONDS)

    def remove(self) -> None:
        podman("rm", "--force", self.name, check=False)
        self.process.wait(SECONDS)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Container]:
    container = Container(tmp_path, "--events", "process.*")
    try:
        container.wait_for(lambda: container.of("stream.manifest"))
        yield container
    finally:
        container.remove()


def test_the_image_has_the_compiled_modules_and_no_compiler() -> None:
    inside = "import streamer.ring.records as r, shutil as s; print(r.COMPILED, s.which('cc'))"
    ran = podman("run", "--rm", "--ulimit", "host", "--network", "none", "--entrypoint",
                 "/opt/streamer/bin/python", IMAGE, "-c", inside)  # fmt: skip
    assert ran.stdout.split() == ["True", "None"]


def test_events_of_the_host_and_of_another_container(agent: Container) -> None:
    """With the pids that the host has for them, and whose each is."""
    marker = f"marker-{time.monotonic_ns()}"
    on_host = subprocess.Popen(["/bin/echo", f"host-{marker}"], stdout=subprocess.DEVNULL)
    on_host.wait()
    podman("run", "--rm", "--ulimit", "host", "--network", "none", "--entrypoint", "/bin/echo",
           IMAGE, f"container-{marker}")  # fmt: skip

    def marked(where: str) -> list[Any]:
        return [e for e in agent.of("process.exec") if e.argv[-1:] == [f"{where}-{marker}"]]

    agent.wait_for(lambda: marked("container") and marked("host"))
    # Of the container the second is its own; before it the tools that start it have the words too.
    host = next(e for e in marked("host") if e.exe.endswith("/echo"))
    other = next(e for e in marked("container") if e.exe.endswith("/echo"))
    assert (host.pid, host.ns_pid) == (on_host.pid, on_host.pid)
    assert host.exe_mntns_initial
    assert (other.ns_pid, other.argv[0]) == (1, "/bin/echo")
    assert other.pidns != host.pidns
    assert other.pid > 1
    assert not other.exe_mntns_initial
    (exited,) = [e for e in agent.of("process.exit") if e.pid == host.pid]
    assert exited.start_boot_ns == host.start_boot_ns


def test_the_agent_in_it_has_dropped_its_privileges(agent: Container) -> None:
    (manifest,) = agent.of("stream.manifest")
    status = Path(f"/proc/{manifest.agent_pid}/status").read_text()
    values = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert int(values["CapEff"], 16) == int(values["CapPrm"], 16) == 0
    assert int(values["CapBnd"], 16) == sum(1 << bit for bit in BITS.values())
    assert values["Seccomp"] == "2"


def test_a_stop_drains_and_says_what_became_of_all(agent: Container) -> None:
    marker = f"marker-{time.monotonic_ns()}"
    subprocess.run(["/bin/echo", marker], stdout=subprocess.DEVNULL, check=True)
    assert agent.stop() == 0
    assert [e for e in agent.of("process.exec") if e.argv[-1:] == [marker]]
    last = agent.events()[-1]
    assert kind_of(last) == "stream.heartbeat"
    for kind, counts in last.counts.items():
        assert counts.produced == counts.read + counts.filtered + counts.shed + counts.lost, kind
    assert " delivered, 0 dropped; " in agent.stderr.read_text().splitlines()[-1]


def test_the_health_check_passes_beside_the_running_agent(agent: Container) -> None:
    """As compose has the engine run it, in the agent's container."""
    kind, *words = Compose.read(ROOT / "compose.yaml").service("streamer")["healthcheck"]["test"]
    command = words if kind == "CMD" else ["/bin/sh", "-c", words[0].replace("$$", "$")]
    ran = podman("exec", agent.name, *command)
    assert json.loads(ran.stdout)["phase"] == "streaming"
