"""The DaemonSet of `deploy/kubernetes`: what Kubernetes takes, and what it gives the agent.

That it works is in `tests/image`, which runs the image with what is written here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest

from streamer.config.loading import load
from tests import manifests

OLDEST, NEWEST = "1.25", "1.37"
KINDS = [document["kind"] for document in manifests.documents()]
HOST_PATHS = {
    "/var/lib/streamer": ("/var/lib/streamer", False),
    "/sys/kernel/tracing": ("/sys/kernel/tracing", True),
    "/sys/fs/cgroup": ("/host/cgroup", True),
}
"""Of the host: where it is in the container, and whether it is read-only there."""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", KINDS)
def test_every_object_is_of_the_schema(kind: str, version: str) -> None:
    """Strictly: nothing that Kubernetes does not know."""
    kubernetes_validate.validate(manifests.the(kind), version, strict=True)


def test_a_word_that_is_misspelt_is_refused() -> None:
    wrong = copy.deepcopy(manifests.the("DaemonSet"))
    (one,) = wrong["spec"]["template"]["spec"]["containers"]
    one["securityContext"]["capabilites"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="capabilites"):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_exactly_these_rights() -> None:
    context = manifests.container()["securityContext"]
    assert context == {
        "runAsUser": 0,
        "runAsGroup": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["BPF", "PERFMON", "NET_ADMIN"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod = manifests.pod()
    assert (pod["hostPID"], pod["hostNetwork"]) == (False, False)
    assert pod["automountServiceAccountToken"] is False


def test_what_is_mounted_of_the_host() -> None:
    places = {one["name"]: one for one in manifests.container()["volumeMounts"]}
    found = {
        volume["hostPath"]["path"]: (
            places[volume["name"]]["mountPath"],
            places[volume["name"]].get("readOnly", False),
        )
        for volume in manifests.pod()["volumes"]
        if "hostPath" in volume
    }
    assert found == HOST_PATHS
    assert places.keys() == {volume["name"] for volume in manifests.pod()["volumes"]}


def test_it_runs_on_every_node_and_is_among_the_last_to_be_ended() -> None:
    pod: dict[str, Any] = manifests.pod()
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    assert manifests.container()["resources"]["limits"] == {"memory": "512Mi"}


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (tmp_path / "streamer.toml").write_text(manifests.the("ConfigMap")["data"]["streamer.toml"])
    settings = load(tmp_path / "streamer.toml")
    assert settings.state_file.startswith("/var/lib/streamer/")
    grace = manifests.pod()["terminationGracePeriodSeconds"]
    assert grace >= settings.grace_seconds + 10
