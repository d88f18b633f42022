"""Steps of scripts/gpu_check.sh: everything that only a machine with a GPU can show."""
