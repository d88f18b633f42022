"""Load generator and report behind scripts/bench_serving.py: workloads -> load -> stats -> plots, report."""
