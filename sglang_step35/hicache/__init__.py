"""SGLang's hierarchical cache (`--enable-hierarchical-cache`) with MTP: KV in host memory, KV in files."""
