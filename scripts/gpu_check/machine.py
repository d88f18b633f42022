"""The machine, and whether everything is in place on it."""

import subprocess
import sys
import time

from scripts.gpu_check.options import Refused, Setting


def gpu() -> dict | None:
    """Name, driver and memory of the first CUDA device as nvidia-smi tells, None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    found = {"name": properties.name, "driver": "unknown", "memory_mib": properties.total_memory >> 20}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[0]
        name, driver, memory = (part.strip() for part in line.split(","))
        found |= {"name": name, "driver": driver, "memory_mib": int(memory)}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        pass  # torch has told name and memory
    return found | {"capability": f"{properties.major}.{properties.minor}", "count": torch.cuda.device_count()}


def run(setting: Setting) -> dict:
    """doctor's report beside the machine's data. Raises Refused where doctor finds something wrong."""
    import psutil
    import torch

    done = subprocess.run([sys.executable, "-m", "sglang_step35", "doctor"], capture_output=True, text=True)
    print(done.stdout, end="")
    found = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "gpu": gpu(),
        "cpus": psutil.cpu_count(),
        "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "doctor": done.stdout.splitlines(),
        "device": setting.device,
    }
    if done.returncode:
        raise Refused("doctor finds something wrong: mend what is marked WRONG above")
    return found
