"""Memory planning for a Step-3.5 checkpoint: weights, KV pools, what fits, and the serving command.

Pure arithmetic on a ModelSpec: neither torch nor SGLang is imported, so it runs on a laptop. Every size is in bytes
unless its name says otherwise; GiB is 2**30 bytes, what SGLang's log calls GB.
"""

GIB = 1 << 30
MIB = 1 << 20


class PlanError(ValueError):
    """A combination of options that cannot be planned; the message names the option and the remedy."""
