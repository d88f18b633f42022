"""The address a server is to listen on, tried before anything is loaded."""

import socket


def refuse_taken_port(server_args) -> None:
    """Before SGLang's `run_server`. Raises SystemExit, with what to do, where nobody can listen on host and port."""
    if server_args.enable_http_worker_reuseport:  # shares its port on purpose
        return
    host, port = server_args.host, server_args.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn: closed connections do not count
            probe.bind(address)
    except OSError as error:
        raise SystemExit(
            f"cannot listen on {host}:{port}: {error.strerror}. End the process that listens there (`ss -ltnp` names "
            "it), or choose another --port, or a --host of this machine"
        ) from None
