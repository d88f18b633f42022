"""Step-3.5 on SGLang's layers: `causal_lm` is the backbone, `mtp` the multi-token-prediction layers.

SGLang's model registry imports every module of this package; nothing is imported here.
"""
