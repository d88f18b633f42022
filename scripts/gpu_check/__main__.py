"""Everything that only a machine with a GPU can show, in steps of at most eight minutes.

    scripts/gpu_check.sh                 # this list
    scripts/gpu_check.sh setup tests     # one step or several
    scripts/gpu_check.sh all             # every step in order, each with a limit of 480 s

Steps leave OUT/STEP.json for each other and for `report`; a failed one can be run again by itself.
"""

import signal
import sys
import time

from scripts.gpu_check.options import Refused, Setting, check_device, parser

STEPS = {
    "setup": "install (scripts/setup.sh), doctor, the GPU's name, driver and memory",
    "tests": "tests marked gpu that start no server",
    "tests-flashinfer": "tests marked gpu with servers on FlashInfer attention",
    "tests-fa3": "the same on FlashAttention 3",
    "tests-triton": "the same on Triton attention",
    "tests-server": "all other tests marked gpu with servers",
    "checkpoint": "write a truncated checkpoint of the published widths, as many layers as fit",
    "bench-off": "accept length and tokens per second: this package without speculation",
    "bench-mtp": "the same with three MTP layers",
    "bench-adaptive": "the same with adaptive draft depth",
    "bench-flashinfer": "the same with fixed depth on FlashInfer attention, where SGLang picks another by itself",
    "bench-stock": "the same with SGLang alone, where it starts",
    "accept": "greedy output and accepted drafts against offline loops",
    "profile": "time of a round: verify, MTP layers, gaps",
    "profile-adaptive": "the same by the tokens a round verifies, with adaptive draft depth",
    "memory": "what a server takes against the planner",
    "report": "one table, one JSON line, one picture of all steps that ran",
}


def listing() -> str:
    return f"{__doc__}\n" + "\n".join(f"  {name:18}{about}" for name, about in STEPS.items())


def run_step(name: str, setting: Setting) -> dict:
    """What a step found; imports come with the step, so that the list needs no .venv."""
    if name == "setup":
        from scripts.gpu_check import machine

        return machine.run(setting)
    if name.startswith("tests"):
        from scripts.gpu_check import suite

        return suite.run(setting, name)
    if name.startswith("bench-"):
        from scripts.gpu_check import bench

        return bench.run(setting, name.removeprefix("bench-"))
    if name == "profile-adaptive":
        from scripts.gpu_check import profile

        return profile.run_adaptive(setting)
    from importlib import import_module

    module = "truncated" if name == "checkpoint" else name
    return import_module(f"scripts.gpu_check.{module}").run(setting)


def failed(found: dict) -> bool:
    """Tests that failed, ids or drafts that are wrong. A stock server that does not start is a result."""
    refused = found.get("kind", "stock") != "stock" and "no_start" in found
    return bool(found.get("exit")) or not found.get("right", True) or refused


def main(argv: list[str]) -> int:
    """Runs one step. 0, 1 when it found something wrong, 2 when it cannot run here."""
    options = parser(listing()).parse_args(argv)
    if options.names:
        print("\n".join(STEPS))
        return 0
    if options.step is None:
        print(listing())
        return 0
    if options.step not in STEPS:
        print(f"gpu_check: {options.step}: no such step; known: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the time limit: servers are stopped on the way out
    import torch

    setting = Setting(options.out, options.device, options.tiny, options.moe_layers)
    start = time.monotonic()
    try:
        check_device(setting, torch.cuda.is_available())
        found = run_step(options.step, setting)
    except Refused as error:
        print(f"gpu_check: {options.step}: {error}", file=sys.stderr)
        return 2
    setting.save("machine" if options.step == "setup" else options.step, found)
    print(f"gpu_check: {options.step}: {time.monotonic() - start:.0f} s")
    return int(failed(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
