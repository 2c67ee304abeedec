"""A real Prometheus for the tests, Debian's: a process on a loopback port of its own."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.brokers import free_port

SECONDS = 30
Sample = tuple[dict[str, str], float]


class Prometheus:
    """Scrapes one address every second, as the job `streamer`."""

    def __init__(self, directory: Path, target: str, rules: Path | None = None) -> None:
        self._directory = directory
        self._target = target
        self._rules = rules
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "prometheus.yml"
        rules = [str(self._rules)] if self._rules else []
        config.write_text(
            json.dumps(  # which is YAML
                {
                    "global": {
                        "scrape_interval": "1s",
                        "scrape_timeout": "1s",
                        "evaluation_interval": "1s",
                    },
                    "rule_files": rules,
                    "scrape_configs": [
                        {
                            "job_name": "streamer",
                            "static_configs": [{"targets": [self._target]}],
                        }
                    ],
                }
            )
        )
        command = ["prometheus", f"--config.file={config}"]
        command += [f"--storage.tsdb.path={self._directory / 'data'}"]
        command += [f"--web.listen-address=127.0.0.1:{self._port}", "--log.level=warn"]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(SECONDS)

    def _answers(self) -> bool:
        try:
            return self.query("vector(1)") == [({}, 1.0)]
        except OSError:
            return False

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """What an instant query finds: labels, without the target's own, and value. Raises OSError
        for an expression that Prometheus refuses.
        """
        asked = {"query": expression} | ({} if at is None else {"time": str(at)})
        data = self._get(f"/api/v1/query?{urllib.parse.urlencode(asked)}")
        assert data["resultType"] == "vector", expression
        return [(_own(one["metric"]), float(one["value"][1])) for one in data["result"]]

    def rules(self) -> dict[str, str]:
        """Health of every rule, by name."""
        groups = self._get("/api/v1/rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def names(self) -> list[str]:
        """Of all metrics that it has."""
        return [str(one) for one in self._get("/api/v1/label/__name__/values")]

    def last(self, name: str, seconds: int = 60) -> list[Sample]:
        """The last values of a metric that were ever scraped in the last so many seconds."""
        return self.query(f"last_over_time({name}[{seconds}s])")

    def wait_for(self, expression: str, seconds: float = SECONDS) -> list[Sample]:
        """Until the expression finds anything."""
        deadline = time.monotonic() + seconds
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.2)
        return found

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]


def _own(labels: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in labels.items() if k not in ("__name__", "instance", "job")}
