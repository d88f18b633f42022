"""The model without a server: SGLang's runtime for one rank, its loader, and plain attention over whole sequences.

Letters: T tokens, H hidden size, V vocabulary.
"""

from pathlib import Path

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish, publish_role, spawn_world_rank
from sglang.srt.server_args import PortArgs, ServerArgs
from torch import Tensor, nn


def start_runtime(directory: Path, port: int | None = None, place: dict | None = None, **settings) -> None:
    """SGLang's process-wide state, from the first checkpoint a process sees.

    place: tp_rank and pp_rank of this process. settings: further server arguments.
    """
    load_plugins()
    args = ServerArgs(model_path=str(directory), device="cpu", dtype="float32", skip_tokenizer_init=True, **settings)
    args.resolve_once()
    world_rank = spawn_world_rank(args, **(place or dict(tp_rank=0, pp_rank=0)))
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=world_rank))
    initialize_moe_config()
    port = port or PortArgs.init_new(args).nccl_port
    bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(args))


def ensure_runtime(directory: Path) -> None:
    """`start_runtime` unless this process has it: it can be started once."""
    if publish_role() is None:
        start_runtime(directory)


def load(directory: Path, draft: bool = False, dtype: str = "float32", **settings) -> nn.Module:
    """Build and load the backbone, or the MTP layers, with SGLang's default loader."""
    ensure_runtime(directory)
    config = ModelConfig(str(directory), is_draft_model=draft, dtype=dtype, **settings)
    return _load(LoadConfig(), config)


def load_gguf(file: Path, draft: bool = False, dtype: str = "float32") -> nn.Module:
    """`load` for a GGUF file."""
    ensure_runtime(file)
    config = ModelConfig(str(file), is_draft_model=draft, dtype=dtype, quantization="gguf")
    return _load(LoadConfig(load_format="gguf"), config)


def _load(load_config: LoadConfig, config: ModelConfig) -> nn.Module:
    loader = get_model_loader(load_config, config)
    return loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))


class WholeSequence:
    """An attention backend for one request whose tokens are all in the batch."""

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_unused) -> Tensor:
        tokens, dim = len(q), layer.head_dim
        q, k, v = (x.view(tokens, -1, dim).transpose(0, 1) for x in (q, k, v))
        groups = len(q) // len(k)
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        seen = distance >= 0
        if layer.sliding_window_size >= 0:
            seen &= distance <= layer.sliding_window_size
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * layer.scaling
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1)


class WrittenSequence(WholeSequence):
    """The same for the last row of a request whose keys and values one layer has written before."""

    def write_kv(self, k, v, layer, forward_batch) -> None:
        self.written = k, v

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_unused) -> Tensor:
        before = [x[:-1].flatten(1) for x in self.written]
        k, v = (torch.cat((old, own.view(1, -1))) for old, own in zip(before, (k, v), strict=True))
        padded = torch.cat((q.new_zeros(len(k) - 1, q.shape[1]), q))
        return super().forward(padded, k, v, layer, forward_batch)[-1:]


def batch_of(ids: list[int], capture: CaptureHiddenMode = CaptureHiddenMode.FULL) -> ForwardBatch:
    """One request, prefilled at once."""
    count = torch.tensor([len(ids)])
    tokens = torch.tensor(ids)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=tokens,
        req_pool_indices=torch.tensor([0]),
        seq_lens=count,
        out_cache_loc=torch.arange(len(ids)),
        seq_lens_sum=len(ids),
        positions=torch.arange(len(ids)),
        extend_seq_lens=count,
        extend_seq_lens_cpu=[len(ids)],
        capture_hidden_mode=capture,
    )


@torch.inference_mode()
def run(model: nn.Module, ids: list[int]):
    """SGLang's LogitsProcessorOutput of one prefill, hidden states of all tokens captured."""
    batch = batch_of(ids)
    with forward_context(ForwardContext(attn_backend=WholeSequence()), forward_batch=batch):
        return model(batch.input_ids, batch.positions, batch)


@torch.inference_mode()
def all_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits [T, V] of every position of the backbone."""
    states = run(model, ids).hidden_states
    head = model.lm_head
    return head.quant_method.apply(head, model.model.norm(states))[:, : model.spec.vocab_size]


@torch.inference_mode()
def mtp_logits(model: nn.Module, hidden: Tensor, ids: list[int]) -> list[Tensor]:
    """Teacher-forced logits of every MTP layer; layer i has len(ids) - 1 - i rows."""
    logits = []
    for depth in range(model.num_mtp_layers):
        hidden = hidden[: len(ids) - 1 - depth]
        batch = batch_of(ids[depth + 1 :])
        with forward_context(ForwardContext(attn_backend=WholeSequence()), forward_batch=batch):
            hidden = model.forward_layer(depth, batch.input_ids, batch.positions, hidden, batch)
            logits.append(model.compute_logits(depth, hidden))
    return logits


@torch.inference_mode()
def last_mtp_logits(model: nn.Module, hidden: Tensor, ids: list[int]) -> Tensor:
    """Logits [V] of MTP layer 0's last row; of the rows before, only keys and values are computed."""
    batch = batch_of(ids[1:])
    tokens, positions, hidden = batch.input_ids, batch.positions, hidden[:-1]
    with forward_context(ForwardContext(attn_backend=WrittenSequence()), forward_batch=batch):
        model.write_kv(0, tokens, positions, hidden, batch)
        batch = batch_of(ids[-1:])
        last = model.forward_layer(0, tokens[-1:], positions[-1:], hidden[-1:], batch)
        return model.compute_logits(0, last)[0]
