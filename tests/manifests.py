"""`deploy/kubernetes/streamer.yaml`, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).resolve().parents[1] / "deploy" / "kubernetes" / "streamer.yaml"


def documents() -> list[dict[str, Any]]:
    """Every object of it."""
    return list(yaml.safe_load_all(PATH.read_text()))


def the(kind: str) -> dict[str, Any]:
    """The only object of that kind."""
    (found,) = (one for one in documents() if one["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    """What the DaemonSet says of its pods."""
    found: dict[str, Any] = the("DaemonSet")["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    """The only container of such a pod."""
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found
