"""`python -m sglang_step35 doctor [CHECKPOINT]`: is the plug-in in place, what would run here, what is a checkpoint."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_step35 import SGLANG_VERSION, __version__, plugin, upstream
from sglang_step35.names import ATTENTION_BACKEND

if TYPE_CHECKING:
    from sglang_step35.cli.readme_command import Device

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
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint's folder or a GGUF file to look at as well")
    path = parser.parse_args(argv).checkpoint
    checks = CHECKS if path is None else (*CHECKS, lambda: check_checkpoint(path))
    findings = [finding for check in checks for finding in _findings(check)]
    for finding in findings:
        mark = "WRONG" if finding.mend else "ok"
        print(f"{mark:5}  {finding.topic:10}  {finding.text}")
        if finding.mend:
            print(f"{'':5}  {'':10}  -> {finding.mend}")
    return 1 if any(finding.mend for finding in findings) else 0


def _findings(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds, also where a package it needs is absent or broken."""
    try:
        return check()
    except ImportError as error:
        mend = f"pip install sglang=={SGLANG_VERSION} sglang-step35"
        return [Finding("import", f"{type(error).__name__}: {error}", mend)]


def check_versions() -> list[Finding]:
    """Installed packages; SGLang must be the pinned one."""
    found = []
    for name in ("sglang", "torch", "transformers", "flashinfer-python"):
        pinned = f"{name}=={SGLANG_VERSION}" if name == "sglang" else name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("versions", f"{name} is missing", f"pip install {pinned}"))
            continue
        wrong = name == "sglang" and version != SGLANG_VERSION
        found.append(Finding("versions", f"{name} {version}", f"pip install {pinned}" if wrong else None))
    return [Finding("versions", f"sglang-step35 {__version__}"), *found]


def check_entry_points() -> list[Finding]:
    """Whether SGLang will find us, and whether an environment variable keeps it from it."""
    found = []
    for group in GROUPS:
        entries = importlib.metadata.entry_points(group=group)
        names = [entry.name for entry in entries]
        ours = [entry for entry in entries if entry.name == "step35"]
        foreign = [entry.value for entry in ours if not entry.value.startswith("sglang_step35.")]
        mend = None if ours else "reinstall sglang-step35 (pip install .)"
        if foreign:
            mend = f"uninstall the package that names {foreign[0]} step35"
        found.append(Finding("plug-in", f"{group}: {', '.join(names) or 'none'}", mend))
    return [*found, *_check_choices()]


def _check_choices() -> list[Finding]:
    """SGLang's own variables that choose among plug-ins."""
    found = []
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "step35" not in [name.strip() for name in allowed.split(",")]:
        text = f"SGLANG_PLUGINS={allowed} leaves step35 out"
        found.append(Finding("plug-in", text, "unset SGLANG_PLUGINS or add step35 to it"))
    platforms = [entry.name for entry in importlib.metadata.entry_points(group=GROUPS[1])]
    chosen = os.environ.get("SGLANG_PLATFORM")
    if chosen and chosen not in platforms:
        text = f"SGLANG_PLATFORM={chosen} names no installed platform"
        found.append(Finding("plug-in", text, "unset SGLANG_PLATFORM, or set it to step35"))
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
        mend = f"mend what stands above, else reinstall sglang=={SGLANG_VERSION} and sglang-step35"
        return [Finding("register", str(error), mend)]
    return [Finding("register", "model, config, hooks and caches registered")]


def check_machine() -> list[Finding]:
    """Platform, devices, and what the README's serving command would do here."""
    import psutil

    from sglang_step35.cli.readme_command import outcome

    memory = psutil.virtual_memory().total / 2**30
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB memory"
    found = [Finding("machine", machine)]
    if plugin.activate_platform() is not None:
        devices: tuple[Device, ...] = ()
        text = f"portable CPU platform ({ATTENTION_BACKEND} attention, no GPU needed)"
    else:
        devices = cuda_devices()
        text = "SGLang's own platform with our model and MTP worker"
    for device in devices:
        version = ".".join(map(str, device.capability))
        found.append(Finding("device", f"{device.name}, {device.memory} MiB, SM {version}"))
    found.append(Finding("platform", text))
    return [*found, *(Finding("serve", line) for line in outcome(devices, memory))]


def check_threads() -> list[Finding]:
    """Cores and NUMA nodes, where the portable platform would run."""
    if plugin.activate_platform() is None:
        return []
    from sglang_step35.cli.threads import advice
    from sglang_step35.platform import cores

    usable = cores.cores_in_order()
    facts = advice(
        len(usable), cores.physical_cores(usable), cores.numa_nodes(usable), os.environ.get("OMP_NUM_THREADS")
    )
    return [Finding("threads", text, mend) for text, mend in facts]


def check_kernels() -> list[Finding]:
    """What multiplies by packed and large weights on the portable platform; a GPU has SGLang's own kernels."""
    if plugin.activate_platform() is None:
        return []
    from sglang_step35.packed import ik_check, ik_rows

    reason = ik_check.why_not()
    if reason is None:
        own = " and ".join(ik_rows.units())
        text = f"ggml's, from {ik_check.PACKAGE} {ik_check.VERSION}; the self-test passed"
        return [Finding("kernels", f"{text}; ours for {own}" if own else text)]
    return [Finding("kernels", f"plain torch, slow with large and with quantised weights: {reason}")]


def check_checkpoint(path: str) -> list[Finding]:
    """Format, MTP layers, and whether it fits this machine."""
    import psutil

    from sglang_step35.cli import checkpoint_facts

    devices = cuda_devices() if plugin.activate_platform() is None else ()
    facts = checkpoint_facts.look(path, devices, psutil.virtual_memory().total / 2**30)
    return [Finding("checkpoint", text, mend) for text, mend in facts]


def cuda_devices() -> "tuple[Device, ...]":
    """The CUDA devices torch sees."""
    import torch

    from sglang_step35.cli.readme_command import Device

    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(Device(facts.name, facts.total_memory >> 20, (facts.major, facts.minor)))
    return tuple(found)


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_versions,
    check_entry_points,
    check_upstream,
    check_registration,
    check_machine,
    check_threads,
    check_kernels,
)
