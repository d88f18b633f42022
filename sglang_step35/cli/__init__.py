"""Sub-commands of `python -m sglang_step35`: one module each, with `main(argv) -> int | None`."""
