"""A file of the published widths, opened: load time, resident memory, first tokens."""
