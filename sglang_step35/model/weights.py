"""Loading a checkpoint: every tensor the model needs exactly once, anything else is an error.

SGLang's own loader for this model skips names it does not know and copies shapes that happen to
broadcast; a wrong or incomplete checkpoint then serves garbage. Here such a checkpoint stops the
server with a message that names the tensor, its file and the remedy.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sglang_step35 import huge_pages
from sglang_step35.checkpoint.base import CheckpointFiles
from sglang_step35.checkpoint.formats import open_files
from sglang_step35.checkpoint.names import (
    LAYER,
    MODEL,
    MTP_LAYER,
    VISION_PREFIXES,
    model_shapes,
    text_name,
)
from sglang_step35.model.graphed_layers import GraphedLayers
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.rotary import QKNormRope
from sglang_step35.model.weight_loader import OUTSIDE, Loader, Owner, WeightError
from sglang_step35.names import STEP37_MODEL_TYPE
from sglang_step35.packed.parameter import PackedParameter


def load_backbone(model: nn.Module, weights: Iterable[tuple[str, Tensor]], complete: bool) -> None:
    """Fill a Step3p5ForCausalLM with the layers of its pipeline rank; MTP layers are passed over.

    complete: whether every parameter must be filled. Raises WeightError.
    """
    owners = {
        layer.index: Owner.of(f"model.layers.{layer.index}.", LAYER, model.spec, layer)
        for layer in model.spec.layers[model.start_layer : model.end_layer]
    }
    outside = {entry.source: entry for entry in MODEL}
    owners[OUTSIDE] = Owner("", outside, model_shapes(model.spec))
    _load(model, owners, weights, complete)


def load_mtp(model: nn.Module, weights: Iterable[tuple[str, Tensor]], complete: bool) -> dict[tuple[int, str], Tensor]:
    """Fill a Step3p5MTP; the backbone and surplus MTP layers are passed over.

    Returns the layers' own copies of embedding and head, as they lie in the checkpoint (on the CPU, normally still
    unread): (depth, "embedding" | "head") -> [V, H]. Raises WeightError.
    """
    owners = {
        layer.index: Owner.of(f"layers.{depth}.", MTP_LAYER, model.spec, layer)
        for depth, layer in enumerate(model.spec.mtp_layers)
    }
    first = len(model.spec.layers)
    absent = (
        f"has no MTP layers (model.layers.{first} and on), though config.json names {len(owners)}; quantisers often "
        f"drop them. Remove --speculative-algorithm to serve without drafts, or use a checkpoint that kept them."
    )
    copies = _load(model, owners, weights, complete, absent)
    return {(layer - first, kind): tensor for (layer, kind), tensor in copies.items()}


def refresh(model: nn.Module) -> None:
    """Recompute what modules derive from their weights, and prepare packed ones for the kernels."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.refresh_gemma_weight()
        elif isinstance(module, QKNormRope | GraphedLayers):
            module.refresh()
    for parameter in model.parameters():
        if isinstance(parameter, PackedParameter):
            parameter.prepare()


def _load(model: nn.Module, owners: Mapping, weights, complete: bool, absent: str | None = None) -> dict:
    """absent: what a checkpoint without a single tensor for this model means."""
    loader = Loader(model, owners, open_files(getattr(model.config, "_name_or_path", None)))
    weights = _guarded(weights, loader.files)
    for parameter in model.parameters() if complete else ():  # updates find them in their place
        huge_pages.use(parameter)
    if model.config.model_type == STEP37_MODEL_TYPE:
        weights = ((text_name(name), tensor) for name, tensor in weights if not name.startswith(VISION_PREFIXES))
    with torch.no_grad():
        for name, tensor in weights:
            loader.take(name, tensor)
    if complete and absent and not loader.filled:
        raise WeightError(f"{loader.files} {absent}")
    if complete:
        loader.check_complete()
    refresh(model)
    return loader.copies


def _guarded(weights: Iterable[tuple[str, Tensor]], files: CheckpointFiles) -> Iterator:
    """The same tensors; a reader's error becomes a WeightError where a file is to blame."""
    iterator = iter(weights)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            damaged = files.damaged()
            if not damaged:
                raise
            raise WeightError(f"{'; '.join(damaged)}. Download or copy the checkpoint again.") from error
        yield item
