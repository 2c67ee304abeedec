"""`compose.yaml` as the tool that reads it understands it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

# The older docker-compose writes YAML only, and is a program of Debian's Python that brings this.
_YAML_TO_JSON = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)"
_DEBIANS_PYTHON = "/usr/bin/python3"


def command() -> list[str]:
    """The compose that is installed; empty when none is."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and _run(*words, "version").returncode == 0:
            return words
    return []


def _run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], input=stdin, capture_output=True, text=True
    )


class Compose:
    """A compose file, with everything that compose fills in."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises AssertionError: compose refuses the file."""
        read = _run(*command(), "-f", path, "config")
        assert read.returncode == 0, read.stderr
        parsed = _run(_DEBIANS_PYTHON, "-c", _YAML_TO_JSON, stdin=read.stdout)
        if parsed.returncode:  # the newer docker compose writes JSON itself
            parsed = _run(*command(), "-f", path, "config", "--format", "json")
        assert parsed.returncode == 0, parsed.stderr
        return cls(json.loads(parsed.stdout))

    @property
    def services(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.config["services"]
        return found

    def service(self, name: str) -> dict[str, Any]:
        return self.services[name]
