"""Fixtures shared by all tests: real servers, and skipping of GPU tests where there is no GPU."""

from collections.abc import Callable, Iterator

import pytest

from sglang_step35.bench.servers import ALIVE, Server, ServerPool
from tests.support import warm

_pool = pytest.StashKey[ServerPool]()


@pytest.fixture(scope="session")
def serve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`serve(*arguments)`: a healthy server with these `sglang serve` arguments, shared between tests."""
    alive = 1 if hasattr(request.config, "workerinput") else ALIVE  # a server in each of two pytest processes
    folder = tmp_path_factory.mktemp("servers")
    pool = request.config.stash[_pool] = ServerPool(folder, alive, start=warm.start_server)
    yield pool.get
    pool.stop_all()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the files, those that need servers come first: the short ones fill what is left."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("server")}
        items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _gpu_only(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A failed test that used servers shows the ends of their logs."""
    report = yield
    pool = item.config.stash.get(_pool, None)
    if report.failed and pool and "serve" in getattr(item, "fixturenames", ()):
        for server in pool.running.values():
            report.sections.append((f"server log {' '.join(server.args)}", server.tail()))
    return report
