"""The safetensors format: which file holds a tensor and how it is stored, and which files are damaged.

Only headers are read: by weight errors, and once by a load of quantised MTP layers.
"""

import json
from pathlib import Path

from sglang_step35.checkpoint.base import CheckpointFiles, DamagedFile
from sglang_step35.checkpoint.names import text_name

INDEX = "model.safetensors.index.json"
HEADER_LENGTH_BYTES = 8  # little-endian length of the JSON header that follows


class SafetensorsFiles(CheckpointFiles):
    """The safetensors files of a checkpoint directory or of a downloaded Hugging Face model.

    source: a directory or a model id; None or an unknown one gives an empty set of files.
    """

    def __init__(self, source: str | None):
        self.folder = _folder(source)
        index = self.folder / INDEX if self.folder else None
        self.listed: dict[str, str] = {}
        if index is not None and index.is_file():
            self.listed = {text_name(name): file for name, file in json.loads(index.read_text())["weight_map"].items()}

    def __str__(self) -> str:
        return f"the checkpoint {self.folder}" if self.folder else "the checkpoint"

    def describe(self, name: str) -> str:
        """`name` and where it lies or should lie."""
        holding = self.holding(name)
        if holding:
            return f"{name} (in {' and '.join(holding)})"
        if name in self.listed:
            there = self._listed(name).is_file()
            return f"{name} (listed in {self.listed[name]}, which {'lacks it' if there else 'is missing'})"
        return name

    def holding(self, name: str) -> list[str]:
        """Names of the files that hold the tensor."""
        return [file.name for file in self.files() if name in _names(file)]

    def dtype(self, name: str) -> str | None:
        """The tensor's dtype as safetensors writes it ("BF16", "F8_E4M3"); None if not found."""
        for file in [self._listed(name)] if name in self.listed else self.files():
            if file.is_file() and name in (header := _names(file)):
                return header[name]["dtype"]
        return None

    def damaged(self) -> list[str]:
        """One sentence for each damaged or missing file."""
        listed = sorted({self._listed(name) for name in self.listed})
        found = [f"{file} is missing" for file in listed if not file.is_file()]
        for file in self.files():
            try:
                read_header(file)
            except DamagedFile as error:
                found.append(str(error))
        return found

    def _listed(self, name: str) -> Path:
        """Where the index says the tensor lies; only a folder has an index."""
        assert self.folder is not None
        return self.folder / self.listed[name]

    def files(self) -> list[Path]:
        """All of the folder, listed in an index or not."""
        return sorted(self.folder.glob("*.safetensors")) if self.folder else []


def read_header(file: Path) -> dict:
    """The header of a safetensors file: tensor name -> {dtype, shape, data_offsets}.

    Raises DamagedFile when the header cannot be read or the file's length does not fit it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        if size < HEADER_LENGTH_BYTES + length:
            raise DamagedFile(f"{file} is truncated: {size} bytes are shorter than its header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise DamagedFile(f"{file} has no readable safetensors header ({error})") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    expected = HEADER_LENGTH_BYTES + length + end
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise DamagedFile(f"{file} is {kind}: {size} bytes, its header asks for {expected}")
    return header


def _names(file: Path) -> dict:
    """The header of a whole file under the text model's names, nothing for a damaged one."""
    try:
        return {text_name(name): entry for name, entry in read_header(file).items()}
    except DamagedFile:
        return {}


def _folder(source: str | None) -> Path | None:
    """The local directory of a directory or model id."""
    if not source:
        return None
    if Path(source).is_dir():
        return Path(source)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, local_files_only=True))
    except (ImportError, OSError, ValueError):  # not in the cache, or no valid model id
        return None
