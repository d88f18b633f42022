"""A library of its own for a test, with a record of the steps that our kernels compute in it."""

from collections.abc import Iterator

from sglang_step35.packed import amx_rows, ik_library


def recorded(monkeypatch, module, name: str) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the steps that `module.name` makes. Every graph is new; ggml has 64 arenas at most, this one ends.

    AMX, which takes many rows from the other kernels, is left out where they are what is recorded.
    """
    if module is not amx_rows:
        monkeypatch.setattr(amx_rows, "supported", lambda: False)
    library = ik_library.Library(ik_library.library_path())
    monkeypatch.setattr(ik_library, "library", lambda: library)
    found, step = [], getattr(module, name)
    seen = lambda own, shape, *rest, **limit: found.append(shape) or step(own, shape, *rest, **limit)
    monkeypatch.setattr(module, name, seen)
    yield found
    if library.arena:
        library.ggml_free(library.arena)
