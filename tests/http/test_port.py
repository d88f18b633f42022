"""port.py: an address nobody can listen on stops a start before anything is loaded."""

import socket
from types import SimpleNamespace

import pytest

from sglang_step35.http.port import refuse_taken_port


def arguments(host: str, port: int, reuse: bool = False) -> SimpleNamespace:
    return SimpleNamespace(host=host, port=port, enable_http_worker_reuseport=reuse)


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_port_is_refused_with_what_to_do(taken):
    with pytest.raises(SystemExit, match=rf"cannot listen on 127.0.0.1:{taken}: Address already in use.*--port"):
        refuse_taken_port(arguments("127.0.0.1", taken))
    refuse_taken_port(arguments("127.0.0.1", taken, reuse=True))


def test_an_address_of_another_machine_is_refused(taken):
    with pytest.raises(SystemExit, match="--host"):
        refuse_taken_port(arguments("192.0.2.1", taken))


def test_a_free_port_stays_free(taken):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for host in ("127.0.0.1", "0.0.0.0"):
        refuse_taken_port(arguments(host, port))
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
