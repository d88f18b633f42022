"""The portable CPU platform: capabilities, pools and defaults for SGLang without accelerators."""
