"""Fixtures shared by all tests: real servers, and skipping of GPU tests where there is no GPU."""

from collections.abc import Callable, Iterator

import pytest

from sglang_step35.bench.servers import Server, ServerPool
from tests.support import warm

_pool = pytest.StashKey[ServerPool]()


@pytest.fixture(scope="session")
def serve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`serve(*arguments)`: a healthy server with these `sglang serve` arguments, shared between tests."""
    pool = request.config.stash[_pool] = ServerPool(tmp_path_factory.mktemp("servers"), start=warm.start_server)
    yield pool.get
    pool.stop_all()


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
