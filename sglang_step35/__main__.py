"""`python -m sglang_step35 COMMAND [arguments]`."""

import argparse
import importlib
import sys

# Command -> (module with main(argv), what it does). A module is imported only when its command runs.
COMMANDS = {
    "nano": ("sglang_step35.cli.nano", "print the path of the packaged nano checkpoint"),
    "doctor": ("sglang_step35.cli.doctor", "check the installation, this machine and a checkpoint"),
    "plan": ("sglang_step35.cli.plan", "memory plan and serving line for a machine, with or without GPUs"),
    "preset": ("sglang_step35.cli.preset", "print the path of a preset for sglang serve --config"),
    "bench": ("sglang_step35.cli.bench", "load test of any OpenAI-compatible endpoint, and its report"),
    "claude-code": ("sglang_step35.cli.claude_code", "settings.json block for a local server"),
}


def main(argv: list[str]) -> int | None:
    listing = "\n".join(f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sglang_step35",
        description=f"commands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the command")
    args = parser.parse_args(argv)
    module, _ = COMMANDS[args.command]
    return importlib.import_module(module).main(args.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
