"""Full and sliding-window attention in plain torch for SGLang's paged KV pools."""
