"""Parts of scripts/benchmarks/context: measuring servers, timing sliding layers alone, table and plot."""
