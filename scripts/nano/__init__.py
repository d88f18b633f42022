"""Training of the nano checkpoint: a tiny but real Step-3.5 model with three trained MTP layers."""
