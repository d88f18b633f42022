"""Where each tensor of a checkpoint goes, and whether all came: the checks behind `weights`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn

from sglang_step35.checkpoint.base import CheckpointFiles
from sglang_step35.checkpoint.names import (
    COPIES,
    DERIVED,
    LEAVES,
    OPTIONAL,
    PACKED,
    PACKED_TYPE,
    Rename,
    TensorName,
    parse_name,
    part_name,
    weight_shapes,
)
from sglang_step35.checkpoint.parts import BadPart, PartCollector, is_part
from sglang_step35.config import LayerSpec
from sglang_step35.model.vocab import keeps_packed
from sglang_step35.packed.parameter import PackedParameter
from sglang_step35.packed.sglang_gguf import as_sglang_takes_it
from sglang_step35.packed.tensor import PackedTensor

SHOWN = 5  # tensors named in one message
OUTSIDE = None  # the "layer" of tensors outside the layers


class WeightError(ValueError):
    """The checkpoint does not fit the model; the message names tensor, file and remedy."""


@dataclass(frozen=True)
class Owner:
    """The part of the model that one layer's tensors go to.

    prefix: of our parameters. renames: checkpoint module -> Rename. shapes: unquantised tensors by
    name inside the layer.
    """

    prefix: str
    renames: Mapping[str, Rename]
    shapes: Mapping[str, tuple[int, ...]]
    experts: int = 0

    @classmethod
    def of(cls, prefix: str, table: Iterable[Rename], spec, layer: LayerSpec) -> "Owner":
        experts = layer.moe.num_experts if layer.moe else 0
        return cls(prefix, {entry.source: entry for entry in table}, weight_shapes(spec, layer), experts)


class Loader:
    """Takes tensors one by one and remembers which parts of which parameters are filled."""

    def __init__(self, model: nn.Module, owners: Mapping[int | None, Owner], files: CheckpointFiles):
        self.parameters = dict(model.named_parameters())
        self.block = getattr(model.quant_config, "weight_block_size", None)
        self.packed = keeps_packed(model.quant_config)
        self.checks_shapes = model.quant_config is None or self.block is not None or self.packed
        self.owners = owners
        self.files = files
        self.copies: dict[tuple[int, str], Tensor] = {}
        self.filled: dict[tuple[int | None, str], set[int | None]] = defaultdict(set)
        self.needed = self._needed()
        self.collector = PartCollector(getattr(model.quant_config, "declared", None))

    def take(self, name: str, tensor: Tensor) -> None:
        """Put one checkpoint tensor where it belongs, or pass over another rank's or model's."""
        parts = parse_name(name)
        owner = self.owners.get(parts.layer)
        if owner is None or parts.leaf == "inv_freq":
            return
        if self._is_packed(parts, tensor):
            matrix = self._collect(name, parts.leaf, tensor)
            if matrix is None:
                return
            tensor, parts = matrix, replace(parts, leaf="weight")
        copy = COPIES.get(f"{parts.module}.{parts.leaf}") if parts.layer is not OUTSIDE else None
        entry = owner.renames.get(parts.module)
        key = parts.layer, _full_name(parts.layer, parts.module, parts.leaf)
        if copy is None and (key not in self.needed or not self._experts(parts, owner) <= self.needed[key]):
            if parts.layer is OUTSIDE and entry:
                return  # another pipeline rank's, or a head tied to the embedding
            raise WeightError(
                f"{self.files.describe(name)} belongs to nothing in this model: config.json and the weights do not "
                f"fit each other. A quantised checkpoint needs the quantization_config it was published with."
            )
        self._check(name, tensor, parts, owner)
        if copy is not None:
            self.copies[parts.layer, copy] = tensor if isinstance(tensor, PackedTensor) else tensor.cpu()
        elif self.packed and f"{owner.prefix}{entry.target}{PACKED}" in self.parameters:
            self._fill_packed(name, tensor, parts, entry, owner.prefix + entry.target)
        else:
            target = owner.prefix + entry.target + LEAVES.get(parts.leaf, parts.leaf)
            self._fill_plain(name, tensor, parts, entry, target)

    def _is_packed(self, parts: TensorName, tensor: Tensor | PackedTensor) -> bool:
        """Whether the tensor is part of a packed matrix, where our layer keeps it so or holds a plain one."""
        if isinstance(tensor, PackedTensor) or not is_part(parts.leaf, tensor):
            return False
        if self.packed:
            return True
        ours, plain = (_full_name(parts.layer, parts.module, leaf) for leaf in (parts.leaf, "weight"))
        return (parts.layer, ours) not in self.needed and self.needed.get((parts.layer, plain)) == {None}

    def _collect(self, name: str, leaf: str, tensor: Tensor) -> PackedTensor | None:
        """The matrix that the tensor completes, None before."""
        module = name.removesuffix(leaf).removesuffix(".")
        try:
            return self.collector.add(module, leaf, tensor)
        except BadPart as error:
            raise WeightError(f"{self.files.describe(part_name(module, error.leaf))} {error}") from error

    def check_complete(self) -> None:
        """Raise WeightError unless every part of every parameter was filled."""
        alone = [
            f"{self.files.describe(part_name(module, found))} without its {lacking}"
            for module, found, lacking in self.collector.incomplete()
        ]
        if alone:
            raise WeightError(f"{self.files} has {_some(alone)}. Download or copy the missing files again.")
        missing = []
        for key, experts in self.needed.items():
            if key[1].rpartition(".")[2] in OPTIONAL:
                continue
            lacking = experts - self.filled[key]
            if lacking == experts:
                missing.append(self.files.describe(key[1]))
            elif lacking:
                missing.append(f"{key[1]} of experts {_some(sorted(lacking))}")
        if missing:
            raise WeightError(
                f"{self.files} lacks {_some(missing)}. Download or copy the missing files again, or "
                f"correct config.json if it asks for layers this checkpoint never had."
            )

    def _needed(self) -> dict[tuple[int | None, str], set[int | None]]:
        """(layer, checkpoint name) -> experts it must cover; {None} where there are none."""
        needed = {}
        for layer, owner in self.owners.items():
            for entry in owner.renames.values():
                for leaf in self._leaves(owner.prefix + entry.target):
                    experts = set(range(owner.experts)) if entry.routed else {None}
                    needed[layer, _full_name(layer, entry.source, leaf)] = experts
        return needed

    def _leaves(self, target: str) -> list[str]:
        """Last checkpoint names of the parameters that begin with `target`."""
        back = {ours: theirs for theirs, ours in LEAVES.items()}
        if self.packed:
            back |= dict.fromkeys((PACKED, PACKED_TYPE), "weight")
        leaves = (name.removeprefix(target) for name in self.parameters if name.startswith(target))
        return [back.get(leaf, leaf) for leaf in leaves if "." not in leaf and leaf not in DERIVED]

    def _check(self, name: str, tensor: Tensor | PackedTensor, parts: TensorName, owner: Owner) -> None:
        """Raise WeightError for a second copy or a wrong shape."""
        key = parts.layer, _full_name(parts.layer, parts.module, parts.leaf)
        if self.filled[key] & self._experts(parts, owner):
            raise WeightError(
                f"{self.files.describe(name)} occurs twice: remove the file that does not belong to "
                f"the checkpoint, or restore its index"
            )
        wanted = self._shape(parts, owner) if self.checks_shapes else None
        entry = owner.renames.get(parts.module)
        if wanted is None and entry and entry.routed and parts.expert is None:
            wanted = (owner.experts, *tensor.shape[1:])
        if wanted is not None and tuple(tensor.shape) != wanted:
            found = "has" if name.endswith(parts.leaf) else "completes a matrix of"
            raise WeightError(
                f"{self.files.describe(name)} {found} shape {tuple(tensor.shape)}, config.json asks for "
                f"{wanted}: use the config.json that was published with these weights"
            )
        self.filled[key] |= self._experts(parts, owner)

    @staticmethod
    def _experts(parts: TensorName, owner: Owner) -> set[int | None]:
        entry = owner.renames.get(parts.module)
        if entry is None or not entry.routed:
            return {None}
        return set(range(owner.experts)) if parts.expert is None else {parts.expert}

    def _shape(self, parts: TensorName, owner: Owner) -> tuple[int, ...] | None:
        """The shape config.json asks for; None for tensors of quantisations other than FP8 blocks."""
        scale = parts.leaf == "weight_scale_inv"
        if scale and self.block is None:
            return None
        shape = owner.shapes.get(f"{parts.module}.{'weight' if scale else parts.leaf}")
        if shape is None:
            return None
        if parts.expert is not None:
            shape = shape[1:]
        if scale:
            rows, columns = (-(-size // block) for size, block in zip(shape[-2:], self.block, strict=True))
            shape = (*shape[:-2], rows, columns)
        return shape

    def _fill_plain(self, name: str, tensor, parts: TensorName, entry: Rename, target: str) -> None:
        """A parameter whose layer computes with it as it stands: packed rows are unpacked."""
        if isinstance(tensor, PackedTensor):
            tensor = tensor.dequantize()
        if parts.leaf == "weight" and _is_quantised(tensor) and not _is_quantised(self.parameters[target]):
            raise WeightError(
                f"{self.files.describe(name)} is {tensor.dtype}, but this layer is not quantised: "
                f"config.json lacks the checkpoint's quantization_config, or it excludes the layer"
            )
        self._fill(name, tensor, parts, entry, target)

    def _fill_packed(self, name: str, tensor, parts: TensorName, entry: Rename, target: str) -> None:
        """A layer that keeps the rows packed: ours takes them as they are, SGLang's the type before the bytes."""
        parameter = self.parameters[target + PACKED]
        if isinstance(parameter, PackedParameter):
            try:
                parameter.fill(entry.shard, tensor, parts.expert)
            except ValueError as error:
                raise WeightError(
                    f"{self.files.describe(name)} does not divide by the ranks: {error}. Use "
                    f"{'--ep-size = --tp-size, which keeps experts whole' if entry.routed else 'fewer ranks'}"
                ) from error
            return
        kind, weight = as_sglang_takes_it(tensor, torch.get_default_dtype())
        self._fill(name, kind, parts, entry, target + PACKED_TYPE)
        self._fill(name, weight, parts, entry, target + PACKED)

    def _fill(self, name: str, tensor: Tensor, parts: TensorName, entry: Rename, target: str) -> None:
        """Hand the tensor to SGLang's loader of the parameter `target`, which takes this rank's part."""
        parameter = self.parameters[target]
        load = getattr(parameter, "weight_loader", default_weight_loader)
        try:
            if entry.routed:
                stacked = enumerate(tensor) if parts.expert is None else [(parts.expert, tensor)]
                for expert, part in stacked:
                    # SGLang's loaders of experts read our parameter's name for what the tensor is.
                    load(parameter, part, target, shard_id=entry.shard, expert_id=expert)
            elif entry.shard is not None:
                load(parameter, tensor, entry.shard)
            else:
                load(parameter, tensor)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise WeightError(
                f"{self.files.describe(name)}, shape {tuple(tensor.shape)}, does not fit its "
                f"parameter of shape {tuple(parameter.shape)} on this rank ({error}): use the "
                f"config.json that was published with these weights"
            ) from error


def _full_name(layer: int | None, module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if layer is None else f"model.layers.{layer}.{module}.{leaf}"


def _is_quantised(tensor: Tensor) -> bool:
    return tensor.element_size() == 1 or tensor.dtype in (torch.int32, torch.int16)


def _some(items: list) -> str:
    """The first few of a list, and how many more there are."""
    shown = ", ".join(str(item) for item in items[:SHOWN])
    return shown if len(items) <= SHOWN else f"{shown} and {len(items) - SHOWN} more"
