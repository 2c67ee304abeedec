"""The image, run as `deploy/kubernetes/streamer.yaml` says: `tools/image.sh test` (root).

Capabilities, seccomp, mounts, user, arguments and probes are read from the manifest, so that they
cannot differ from what is shipped. Of the runtime's default profile podman's is taken, with what
that of containerd has had since 1.7: bpf() for CAP_BPF, and perf_event_open() for CAP_PERFMON.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import manifests
from tests.image.check import BITS, IMAGE, PODMAN, Container, podman, seccomp

pytestmark = pytest.mark.kernel

NODE = "node-7"


def security(context: dict[str, Any], directory: Path) -> Iterator[str]:
    capabilities = context["capabilities"]
    yield from (word for name in capabilities["drop"] for word in ("--cap-drop", name))
    yield from (word for name in capabilities["add"] for word in ("--cap-add", name))
    if context["privileged"]:
        yield "--privileged"
    if not context["allowPrivilegeEscalation"]:
        yield from ("--security-opt", "no-new-privileges")
    if context["readOnlyRootFilesystem"]:
        yield from ("--read-only", "--read-only-tmpfs=false")
    yield from ("--user", f"{context['runAsUser']}:{context['runAsGroup']}")
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    yield from ("--security-opt", f"seccomp={seccomp(capabilities['add'], directory)}")


def volumes(directory: Path) -> Iterator[str]:
    """Those of the host are the host's, but for the state, which is a directory of the test's."""
    sources: dict[str, Path] = {}
    for volume in manifests.pod()["volumes"]:
        source = directory / volume["name"]
        if "configMap" in volume:
            source.mkdir()
            for name, text in manifests.the("ConfigMap")["data"].items():
                (source / name).write_text(text)
        elif volume["hostPath"]["type"] == "DirectoryOrCreate":
            source.mkdir()
        else:
            source = Path(volume["hostPath"]["path"])
        sources[volume["name"]] = source
    for mount in manifests.container()["volumeMounts"]:
        mode = ":ro" if mount.get("readOnly") else ""
        yield from ("--volume", f"{sources[mount['name']]}:{mount['mountPath']}{mode}")


def arguments() -> list[str]:
    """Those of the container, with the name of the node in the place of its variable."""
    (variable,) = manifests.container()["env"]
    assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    words = manifests.container()["args"]
    return [word.replace(f"$({variable['name']})", NODE) for word in words]


class Pod(Container):
    """The agent as a container of the pod that the DaemonSet makes on a node."""

    def __init__(self, directory: Path) -> None:
        self.output, self.stderr = directory / "events", directory / "stderr"
        self.name = f"streamer-test-{time.monotonic_ns()}"
        assert not manifests.pod()["hostPID"]
        options = [*security(manifests.container()["securityContext"], directory)]
        options += [*volumes(directory)]
        command = [*PODMAN, "run", "--name", self.name, "--ulimit", "host", "--network", "none"]
        words = [str(word) for word in (*command, *options, IMAGE, *arguments())]
        with self.output.open("wb") as output, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(words, stdout=output, stderr=stderr)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    try:
        pod.wait_for(lambda: pod.of("stream.manifest"))
        yield pod
    finally:
        pod.remove()


def status_of(pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t") for line in lines if ":\t" in line)


def test_it_observes_the_host_with_exactly_these_capabilities(agent: Pod) -> None:
    (manifest,) = agent.of("stream.manifest")
    assert manifest.host == NODE
    (helper,) = (
        Path(f"/proc/{manifest.agent_pid}/task/{manifest.agent_pid}/children").read_text().split()
    )
    worker, kept = status_of(manifest.agent_pid), status_of(helper)
    added = manifests.container()["securityContext"]["capabilities"]["add"]
    given = sum(1 << BITS[name] for name in added)
    assert int(worker["CapBnd"], 16) == int(kept["CapBnd"], 16) == given
    assert int(worker["CapPrm"], 16) == 0
    assert int(kept["CapPrm"], 16) & ~given == 0
    missing = {kind for kind, one in manifest.coverage.items() if one.status == "missing"}
    assert not missing, manifest.coverage
    marker = f"marker-{time.monotonic_ns()}"
    count = 20
    pids = []
    for _ in range(count):
        with subprocess.Popen(["/bin/echo", marker], stdout=subprocess.DEVNULL) as echo:
            pids.append(echo.pid)

    def marked() -> list[Any]:
        return [one for one in agent.of("process.exec") if one.argv == ["/bin/echo", marker]]

    agent.wait_for(lambda: len(marked()) >= count)
    assert [one.pid for one in marked()] == pids  # the host's, although it is shown no others
    assert {one.exe_mntns_initial for one in marked()} == {True}


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_probes(agent: Pod, probe: str) -> None:
    command = manifests.container()[probe]["exec"]["command"]
    assert podman("exec", agent.name, *command, check=False).returncode == 0
    shell, *words = command
    alone = ("run", "--rm", "--ulimit", "host", "--network", "none", "--entrypoint", shell, IMAGE)
    assert podman(*alone, *words, check=False).returncode == 1  # where there is no helper


def test_a_stop_is_orderly(agent: Pod) -> None:
    """And leaves its note for the next pod on the node."""
    grace = manifests.pod()["terminationGracePeriodSeconds"]
    podman("stop", "--time", grace, agent.name)
    assert agent.process.wait(grace) == 0
    assert " delivered, 0 dropped; " in agent.stderr.read_text().splitlines()[-1]
    assert (agent.output.parent / "state" / "run.json").stat().st_size
