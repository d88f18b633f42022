"""The MTP speculative worker: exact draft KV, lossless verification, adaptive depth."""
