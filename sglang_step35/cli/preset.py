"""Print the path of a preset, for `sglang serve --config "$(...)"`; without a name, list them."""

import argparse
import sys

from sglang_step35.assets import UnknownPreset, preset, presets


def main(argv: list[str]) -> int:
    """0, or 2 for a name that is none."""
    parser = argparse.ArgumentParser(prog="python -m sglang_step35 preset", description=__doc__)
    parser.add_argument("name", nargs="?")
    name = parser.parse_args(argv).name
    try:
        print(preset(name) if name is not None else "\n".join(presets()))
    except UnknownPreset as error:
        print(f"preset: error: {error}", file=sys.stderr)
        return 2
    return 0
