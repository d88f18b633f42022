"""A CPU server at real widths, against llama.cpp and transformers, and a file of the published widths, opened."""
