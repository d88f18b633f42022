"""Pages of KV in files (`--hicache-storage-backend file`) that say whose they are and whether they are whole."""

import contextlib
import logging
import os
from dataclasses import replace

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, PoolTransferResult
from torch import Tensor

from sglang_step35.hicache.identity import digest_of, server_identity, weight_updates

logger = logging.getLogger(__name__)

MAGIC = b"step35kv"
SEAL_BYTES = len(MAGIC) + 32  # and the digest of name and payload in hex
_OWNER_ONLY = 0o700


class SealedFiles(HiCacheFile):
    """One file a page. Kept: names by page hash and rank, writing beside and renaming, limits of the folder's size.

    A file's name ends in the server's identity instead of the model's name, so that pages of another checkpoint, dtype,
    page size or MTP depth are never found; its first bytes are a seal over name and content. A file that does not fit
    its seal is removed and counts as missing: the tokens are computed again. Once the weights of a running server are
    updated, it neither finds nor writes pages.
    """

    def __init__(self, storage_config, file_path: str = "/tmp/hicache"):
        identity = server_identity()
        super().__init__(replace(storage_config, model_name=identity), file_path)
        make_private(self.file_path)
        self._warned = False
        names = [entry.name for entry in os.scandir(self.file_path) if entry.name.endswith(".bin")]
        ours = sum(identity in name for name in names)
        logger.info("KV files in %s: %d of this server's kind", self.file_path, ours)
        if ours < len(names):
            logger.warning(
                "%d KV files in %s are of another checkpoint, dtype, page size or MTP depth and are passed over; "
                "remove them when no server uses them",
                len(names) - ours,
                self.file_path,
            )

    def set(self, key: str, value=None, target_location=None, target_sizes=None) -> bool:
        """Write a page; False where it could not be written."""
        if weight_updates():
            return False
        payload = value.contiguous().view(torch.uint8)
        return super().set(key, torch.cat([self._seal(key, payload, value.dtype), payload]))

    def exists(self, key: str) -> bool:
        return not weight_updates() and super().exists(key)

    def batch_exists_v2(self, keys, pool_transfers=None, extra_info=None) -> PoolTransferResult:
        if weight_updates():
            return PoolTransferResult(0, {}, [])
        return super().batch_exists_v2(keys, pool_transfers, extra_info)

    def get(self, key: str, target_location: Tensor, target_sizes=None) -> Tensor | None:
        """`target_location` with the page; None, and nothing in it, where there is no whole one."""
        target = target_location.view(torch.uint8)
        sealed = torch.empty(SEAL_BYTES + target.numel(), dtype=torch.uint8)
        try:
            if weight_updates() or super().get(key, sealed) is None:
                return None
        except OSError as error:  # shorter than a page, or unreadable
            self._discard(key, str(error))
            return None
        payload = sealed[SEAL_BYTES:]
        if not torch.equal(sealed[:SEAL_BYTES], self._seal(key, payload, target_location.dtype)):
            self._discard(key, "its content does not fit its seal")
            return None
        target.copy_(payload)
        return target_location

    def _seal(self, key: str, payload: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [SEAL_BYTES]"""
        name = f"{self._get_suffixed_key(key)} {dtype} ".encode()
        seal = MAGIC + digest_of([name, payload.numpy()]).encode()
        return torch.frombuffer(bytearray(seal), dtype=torch.uint8)

    def _discard(self, key: str, reason: str) -> None:
        """Remove a damaged file, else it would never be written again."""
        stem = self._get_suffixed_key(key)
        path = os.path.join(self.file_path, f"{stem}.bin")
        if not self._warned:
            self._warned = True
            logger.warning("KV file %s is damaged (%s): it and further ones are computed anew", path, reason)
        with contextlib.suppress(OSError):
            os.remove(path)
        self._evictor.abort(stem)
        if self.metadata_cache is not None:
            self.metadata_cache.remove(stem)


def make_private(folder: str) -> None:
    """Create the folder or take it from everybody but its owner: KV tells the conversations it was computed from.

    Raises ValueError where another user owns it, who could read and plant pages.
    """
    os.makedirs(folder, _OWNER_ONLY, exist_ok=True)
    if os.stat(folder).st_uid != os.geteuid():
        raise ValueError(
            f"--hicache-storage-backend file: {folder} belongs to another user, who could read conversations and "
            "change KV: name another folder in --hicache-storage-backend-extra-config "
            '\'{"file_storage_path": "/path"}\''
        )
    os.chmod(folder, _OWNER_ONLY)
