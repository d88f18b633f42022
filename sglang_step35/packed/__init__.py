"""Weights that stay packed in memory: their types, one kernel interface, and SGLang's quantisation methods on top."""
