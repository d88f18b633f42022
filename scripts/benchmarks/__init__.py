"""Benchmarks and long checks: `python -m scripts.benchmarks.NAME` from the repository's root."""
