"""Serve StepFun's Step-3.5-Flash on SGLang: model, MTP worker, portable CPU platform."""

__version__ = "0.2.0"

SGLANG_VERSION = "0.5.23"
