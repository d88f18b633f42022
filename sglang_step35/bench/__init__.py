"""The load generator and report behind `python -m sglang_step35 bench`: workloads -> load -> stats -> plots, report."""
