"""Plug-ins for tests: files of their own beside the package, which a server loads from its PYTHONPATH."""

from pathlib import Path

SUPPORT = Path(__file__).parent


def install_plugin(name: str, directory: Path) -> str:
    """The PYTHONPATH with which SGLang loads tests/support/`name`.py from `directory` and calls its `register`."""
    info = directory / f"step35_{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: step35-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    (directory / f"{name}.py").write_text((SUPPORT / f"{name}.py").read_text())
    return f"{directory}:{SUPPORT.parents[1]}"
