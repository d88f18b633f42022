"""Names of pages in storage that look as far ahead as the radix tree's keys.

SGLang names a page by a hash over the tokens of all pages up to its end, and under EAGLE by one token more. The KV of
S MTP layers depends on S tokens more (`speculative/prefix_key.py`).
"""

import hashlib
from array import array
from collections.abc import Callable


def page_hashes(
    stock: Callable, token_ids, prior_hash: str | None = None, page_size: int | None = None
) -> str | list[str]:
    """Around `get_hash_str`: one chained hash (hex) for each page of a key that looks ahead more than one token.

    token_ids: a radix key of N units, i.e. N + S tokens, or anything else, which is SGLang's. Without page_size the
    whole key is one page. SHA-256 as there; computed here, because theirs knows units of one and two tokens.
    """
    lookahead = getattr(token_ids, "lookahead", 0)
    if lookahead <= 1:
        return stock(token_ids, prior_hash, page_size)
    tokens = array("q", token_ids.raw_token_ids())
    units = len(token_ids)
    digest = bytes.fromhex(prior_hash or "")
    hashes = []
    for start in range(0, units, page_size or max(units, 1)):
        end = min(units, start + page_size) if page_size else units
        page = tokens[start : end + lookahead].tobytes()
        digest = hashlib.sha256(b"step35-lookahead-%d\0" % lookahead + digest + page).digest()
        hashes.append(digest.hex())
    return hashes if page_size else digest.hex()
