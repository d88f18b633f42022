"""Print the absolute path of the packaged nano checkpoint."""

import argparse

from sglang_step35.assets import NANO


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(prog="python -m sglang_step35 nano", description=__doc__).parse_args(argv)
    if not (NANO / "config.json").is_file():
        raise SystemExit(f"no checkpoint in {NANO}: the installation is incomplete")
    print(NANO)
