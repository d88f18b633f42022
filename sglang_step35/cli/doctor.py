"""`python -m sglang_step35 doctor`: is the plug-in in place, and what would it do on this machine."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

from sglang_step35 import SGLANG_VERSION, __version__, plugin, upstream

GROUPS = ("sglang.srt.plugins", "sglang.srt.platforms")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `mend` says what to do where something is wrong."""

    topic: str
    text: str
    mend: str | None = None


def main(argv: list[str]) -> int:
    """Print the report; 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m sglang_step35 doctor", description=__doc__)
    parser.parse_args(argv)
    findings = [finding for check in CHECKS for finding in check()]
    for finding in findings:
        mark = "WRONG" if finding.mend else "ok"
        print(f"{mark:5}  {finding.topic:10}  {finding.text}")
        if finding.mend:
            print(f"{'':5}  {'':10}  -> {finding.mend}")
    return 1 if any(finding.mend for finding in findings) else 0


def check_versions() -> list[Finding]:
    """Installed packages; SGLang must be the pinned one."""
    found = []
    for name in ("sglang", "torch", "transformers", "flashinfer-python"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("versions", f"{name} is missing", f"install {name}"))
            continue
        wrong = name == "sglang" and version != SGLANG_VERSION
        mend = f"install sglang=={SGLANG_VERSION}" if wrong else None
        found.append(Finding("versions", f"{name} {version}", mend))
    return [Finding("versions", f"sglang-step35 {__version__}"), *found]


def check_entry_points() -> list[Finding]:
    """Whether SGLang will find us, and whether an environment variable keeps it from it."""
    found = []
    for group in GROUPS:
        names = [entry.name for entry in importlib.metadata.entry_points(group=group)]
        mend = None if "step35" in names else "reinstall sglang-step35 (pip install .)"
        found.append(Finding("plug-in", f"{group}: {', '.join(names) or 'none'}", mend))
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "step35" not in [name.strip() for name in allowed.split(",")]:
        text = f"SGLANG_PLUGINS={allowed} leaves step35 out"
        found.append(Finding("plug-in", text, "unset SGLANG_PLUGINS or add step35 to it"))
    return found


def check_upstream() -> list[Finding]:
    """Every upstream name of the table, with its signature."""
    try:
        upstream.check_version()
    except (upstream.UpstreamError, importlib.metadata.PackageNotFoundError):
        return []  # already reported with the versions
    wrong = []
    for entry in upstream.TABLE:
        try:
            upstream.check(entry)
        except upstream.UpstreamError as error:
            wrong.append(Finding("upstream", str(error), f"reinstall sglang=={SGLANG_VERSION}"))
    return wrong or [Finding("upstream", f"{len(upstream.TABLE)} names with their signatures")]


def check_registration() -> list[Finding]:
    """Register for real in this process."""
    try:
        plugin.register()
    except SystemExit as error:
        return [Finding("register", str(error), "see the message")]
    return [Finding("register", "model, config, hooks and caches registered")]


def check_machine() -> list[Finding]:
    """Platform, device and what the README's serving command would use here."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    cores = os.cpu_count()
    found = [Finding("machine", f"{platform.machine()}, {cores} cores, {memory:.0f} GiB memory")]
    chosen = plugin.activate_platform()
    if chosen is not None:
        text = f"portable CPU platform ({plugin.ATTENTION_BACKEND} attention, no GPU needed)"
        found.append(Finding("platform", text))
        text = "would load on the CPU: enough memory and patience for the nano checkpoint only"
        return [*found, Finding("serve", text)]
    for index in range(torch.accelerator.device_count()):
        found.append(Finding("device", torch.cuda.get_device_name(index)))
    text = "SGLang's own CUDA platform with our model and MTP worker"
    return [*found, Finding("platform", text)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_versions,
    check_entry_points,
    check_upstream,
    check_registration,
    check_machine,
)
