"""Real Prometheus servers, each a process of its own on a free port."""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import yaml

from support.servers import wait_until

SCRAPE_S = 1


class PrometheusProcess:
    """A Prometheus that scrapes servers every second. A context manager: leaving it kills the process.

    folder: where it keeps its data. urls: of what it scrapes, as the job `forwardpass`. rules: its rule files.
    """

    def __init__(self, folder: pathlib.Path, urls: list[str], rules: list[pathlib.Path]) -> None:
        if shutil.which("prometheus") is None:
            raise RuntimeError("the tests of the rules and the dashboard need one: apt-get install prometheus")
        targets = [urllib.parse.urlsplit(url).netloc for url in urls]
        configuration = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [{"job_name": "forwardpass", "static_configs": [{"targets": targets}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log)
        try:
            wait_until(self._is_ready)
        except AssertionError:
            self.kill()
            raise AssertionError((folder / "log").read_text()[-2000:]) from None

    def _is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What the expression gives now: each series with its labels. Raises AssertionError where it is none."""
        encoded = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{encoded}") as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{expression}: {error.read().decode()}") from None
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """The rules as they are evaluated, with their health and their last error."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules") as response:
            return [rule for group in json.load(response)["data"]["groups"] for rule in group["rules"]]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> PrometheusProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
