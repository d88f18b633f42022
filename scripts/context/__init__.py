"""Parts of scripts/bench_context.py: measuring servers, timing sliding layers alone, table and plot."""
