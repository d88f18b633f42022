"""sglang-router as a process with the preset `configs/router.yml`, and the requests that change its replicas."""

import argparse
import sys
import time
from pathlib import Path

import requests
import yaml

from sglang_step35.assets import CONFIGS
from sglang_step35.bench import servers

PRESET = CONFIGS / "router.yml"
CHANGE_SECONDS = 120  # for the router to see a replica come or go


class Router:
    """A running router; `url` answers as each replica would, on this machine."""

    def __init__(self, port: int, replicas: list[str], log: Path, **flags):
        """Start it in front of these URLs, which it uses once they are healthy; flags win over the preset's."""
        self.url = f"http://127.0.0.1:{port}"
        options = yaml.safe_load(PRESET.read_text()) | {name.replace("_", "-"): flags[name] for name in flags}
        command = [sys.executable, "-m", __name__, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(servers.free_port()), "--prometheus-host", "127.0.0.1"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self.process = servers.start([*command, "--worker-urls", *replicas], None, log)

    def healthy(self) -> dict[str, str]:
        """URL -> the router's id of each replica that gets requests."""
        answer = requests.get(f"{self.url}/workers", timeout=10)
        answer.raise_for_status()
        return {entry["url"]: entry["id"] for entry in answer.json()["workers"] if entry["is_healthy"]}

    def add(self, url: str) -> None:
        requests.post(f"{self.url}/workers", json={"url": url}, timeout=10).raise_for_status()
        self.wait_for([url])

    def remove(self, url: str) -> None:
        """No new requests for this replica; running ones go on."""
        answer = requests.get(f"{self.url}/workers", timeout=10).json()
        for entry in answer["workers"]:
            if entry["url"] == url:
                requests.delete(f"{self.url}/workers/{entry['id']}", timeout=10).raise_for_status()
        self._wait(lambda: url not in self.healthy(), f"{url} is still in use")

    def wait_for(self, urls: list[str]) -> None:
        self._wait(lambda: set(urls) <= set(self.healthy()), f"{', '.join(urls)} not in use")

    def _wait(self, done, problem: str) -> None:
        """Raises RuntimeError when the router ended or does not follow in time."""
        deadline = time.monotonic() + CHANGE_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if done():
                    return
            except requests.RequestException:
                pass  # not up yet
            time.sleep(0.1)
        raise RuntimeError(f"router at {self.url}: {problem}")


def main() -> None:
    """What `sglang_router.launch_router` does, without SGLang, which that imports for tracing."""
    from sglang_router.router import Router as RustRouter
    from sglang_router.router_args import RouterArgs

    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    RustRouter.from_args(RouterArgs.from_cli_args(parser.parse_args())).start()


if __name__ == "__main__":
    main()
