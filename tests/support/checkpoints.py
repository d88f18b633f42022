"""Random-weights Step-3.5 checkpoints: the published field layout and weight names on a shape that runs on a CPU.

`make_checkpoint(directory, shape, seed)` writes config.json, safetensors and a tokenizer. The weights are scaled so
that a wrong window, clamp, theta, gate or router bias moves the logits visibly, and nothing here imports the package
under test.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NANO_DIR = Path(__file__).parents[2] / "sglang_step35" / "nano"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECIAL_TOKENS = ("<bos>", "<eos>", "<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class CheckpointShape:
    """Sizes of a checkpoint; the defaults are the smallest with every feature of the published one."""

    num_layers: int = 9  # backbone: full attention at 0, 4, 8, ..., sliding elsewhere
    num_mtp: int = 3  # MTP layers behind the backbone, sliding, dense
    vocab_size: int = 512
    hidden_size: int = 64
    heads: int = 4  # query heads of full layers
    sliding_heads: int = 6
    kv_groups: int = 2
    sliding_kv_groups: int = 2
    head_dim: int = 16
    window: int = 8  # keys, the query's own among them
    dense_layers: int = 3  # leading layers without experts
    dense_size: int = 96
    experts: int = 8
    top_k: int = 3
    expert_size: int = 32
    shared_size: int = 32
    scaling_factor: float = 3.0
    limits: bool = True  # clamps on the last layers, low enough to act
    max_position: int = 4096
    original_position: int = 64  # of the llama3 scaling; low, so that short prompts feel it
    eos: tuple[int, ...] = (1, 2)
    residual: float = 1.0  # what a layer adds, relative; the default is chaotic, 0.3 suffers less from bfloat16
    echo: float = 0.0  # above 0: see `_echo`; 1.5 gives drafts that are accepted in part
    embedding_copies: bool = False  # each MTP layer carries the embedding too
    shared_head: str = "transformer.shared_head"  # or "shared_head"
    shards: int = 1
    index: bool = True  # model.safetensors.index.json, with more than one shard
    dtype: str = "float32"

    @property
    def layer_types(self) -> list[str]:
        """Backbone and MTP layers."""
        backbone = [FULL if i % 4 == 0 else SLIDING for i in range(self.num_layers)]
        return backbone + [SLIDING] * self.num_mtp


DEEP = CheckpointShape(num_layers=45, hidden_size=32, heads=2, sliding_heads=3, kv_groups=1, sliding_kv_groups=1)


def make_checkpoint(directory: str | Path, shape: CheckpointShape = CheckpointShape(), seed: int = 0) -> Path:
    """Write a checkpoint into `directory`, created if needed, and return it. Same shape and seed, same bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_fields(shape), indent=1))
    dtype = getattr(torch, shape.dtype)
    weights = {
        # StepFun keeps the router's bias in float32 whatever the dtype of the rest.
        name: (weight if name.endswith("router_bias") else weight.to(dtype)).contiguous()
        for name, weight in _weights(shape, torch.Generator().manual_seed(seed))
    }
    _save(directory, weights, shape)
    _write_tokenizer(directory, shape.vocab_size)
    return directory


def config_fields(shape: CheckpointShape) -> dict[str, Any]:
    """config.json as StepFun lays it out: per-layer lists over backbone and MTP layers, no pad_token_id."""
    types, count = shape.layer_types, shape.num_layers + shape.num_mtp
    last = shape.num_layers - 1
    limits = {last - 1: 0.7, last: 0.7} if shape.limits else {}
    # Unlike the published file, the last MTP layer is clamped too: it shows whether each has its own entry.
    shared_limits = {0: 1.1, last: 0.9, count - 1: 0.8} if shape.limits else {}
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": shape.original_position,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": [FULL],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.dense_size,
        "num_hidden_layers": shape.num_layers,
        "max_seq_len": shape.max_position,
        "max_position_embeddings": shape.max_position,
        "vocab_size": shape.vocab_size,
        "torch_dtype": shape.dtype,
        "use_qk_norm": True,
        "moe_layers_enum": ",".join(str(i) for i in range(shape.dense_layers, shape.num_layers)),
        "num_attention_heads": shape.heads,
        "num_attention_groups": shape.kv_groups,
        "head_dim": shape.head_dim,
        "use_moe": True,
        "moe_num_experts": shape.experts,
        "moe_top_k": shape.top_k,
        "moe_intermediate_size": shape.expert_size,
        "share_expert_dim": shape.shared_size,
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "norm_expert_weight": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": shape.scaling_factor,
        "att_impl_type": "GQA",
        "tie_word_embeddings": False,
        "rope_theta": [5000000.0 if kind == FULL else 10000.0 for kind in types],
        "use_head_wise_attn_gate": True,
        "sliding_window": shape.window,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "sink": False,
        "layer_types": types,
        "use_rope_layers": [],
        "num_nextn_predict_layers": shape.num_mtp,
        "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in types],
        "eos_token_id": list(shape.eos),
        "bos_token_id": 0,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": shape.sliding_heads,
            "num_attention_groups": shape.sliding_kv_groups,
            "head_dim": shape.head_dim,
            "true_head_dim": shape.head_dim,
        },
        "swiglu_limits": [limits.get(i, 0.0) for i in range(count)],
        "swiglu_limits_shared": [shared_limits.get(i, 0.0) for i in range(count)],
        "zero_centered": True,
    }


def _weights(shape: CheckpointShape, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by their checkpoint name, in float32."""

    def normal(*size: int, std: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * std

    hidden, vocab = shape.hidden_size, shape.vocab_size
    embed = normal(vocab, hidden, std=shape.echo or 1.0)
    head = _echo(embed, generator) if shape.echo else normal(vocab, hidden, std=3 / math.sqrt(hidden))
    yield "model.embed_tokens.weight", embed
    yield "model.norm.weight", normal(hidden, std=0.1)
    yield "lm_head.weight", head
    for i, kind in enumerate(shape.layer_types):
        prefix, is_mtp = f"model.layers.{i}.", i >= shape.num_layers
        sparse = shape.dense_layers <= i < shape.num_layers
        yield from ((prefix + name, weight) for name, weight in _layer_weights(shape, kind, sparse, normal))
        if not is_mtp:
            continue
        projection = normal(hidden, 2 * hidden, std=1 / math.sqrt(2 * hidden))
        if shape.echo:
            projection[:, :hidden] = torch.eye(hidden) * shape.echo
        yield f"{prefix}eh_proj.weight", projection
        yield f"{prefix}enorm.weight", normal(hidden, std=0.1)
        yield f"{prefix}hnorm.weight", normal(hidden, std=0.1)
        yield f"{prefix}{shape.shared_head}.norm.weight", normal(hidden, std=0.1)
        # Own head noise, so that using lm_head instead shows.
        yield f"{prefix}{shape.shared_head}.output.weight", head + normal(vocab, hidden, std=0.3 / math.sqrt(hidden))
        if shape.embedding_copies:
            yield f"{prefix}embed_tokens.weight", embed.clone()  # safetensors refuses shared memory


def _echo(embed: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A head that reads token x as a vote for a fixed successor of x.

    The backbone then mostly says successor(x_t), and an MTP layer, which sees the embedding of its newest token, mostly
    agrees; the layers' random outputs decide how often not. embed: [V, H] -> head [V, H].
    """
    successor = torch.randperm(embed.shape[0], generator=generator)
    head = torch.empty_like(embed)
    head[successor] = embed / embed.std() * (3 / math.sqrt(embed.shape[1]))
    return head


def _layer_weights(shape: CheckpointShape, kind: str, sparse: bool, normal) -> Iterator[tuple[str, torch.Tensor]]:
    """One decoder layer, names without `model.layers.{i}.`; linear weights are [out, in]."""
    hidden, dim = shape.hidden_size, shape.head_dim
    heads = shape.heads if kind == FULL else shape.sliding_heads
    groups = shape.kv_groups if kind == FULL else shape.sliding_kv_groups

    def linear(out: int, into: int, gain: float = 1.0) -> torch.Tensor:
        return normal(out, into, std=gain / math.sqrt(into))

    yield "input_layernorm.weight", normal(hidden, std=0.1)
    yield "post_attention_layernorm.weight", normal(hidden, std=0.1)
    yield "self_attn.q_proj.weight", linear(heads * dim, hidden)
    yield "self_attn.k_proj.weight", linear(groups * dim, hidden)
    yield "self_attn.v_proj.weight", linear(groups * dim, hidden)
    yield "self_attn.o_proj.weight", linear(hidden, heads * dim, gain=shape.residual)
    yield "self_attn.g_proj.weight", linear(heads, hidden, gain=2.0)
    # Scales well above 1 make attention pick single keys, so that one key too many or too few shows.
    yield "self_attn.q_norm.weight", 0.8 + normal(dim, std=0.1)
    yield "self_attn.k_norm.weight", 0.8 + normal(dim, std=0.1)
    if not sparse:
        yield from _swiglu_weights("mlp.", shape, shape.dense_size, linear)
        return
    yield "moe.gate.weight", linear(shape.experts, hidden, gain=2.0)
    yield "moe.router_bias", normal(shape.experts, std=0.3)
    experts = [dict(_swiglu_weights("", shape, shape.expert_size, linear)) for _ in range(shape.experts)]
    for name in experts[0]:
        yield f"moe.{name}", torch.stack([expert[name] for expert in experts])
    yield from _swiglu_weights("share_expert.", shape, shape.shared_size, linear)


def _swiglu_weights(prefix: str, shape: CheckpointShape, width: int, linear) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate and up [width, hidden], down [hidden, width]."""
    yield f"{prefix}gate_proj.weight", linear(width, shape.hidden_size)
    yield f"{prefix}up_proj.weight", linear(width, shape.hidden_size)
    yield f"{prefix}down_proj.weight", linear(shape.hidden_size, width, gain=shape.residual)


def _save(directory: Path, weights: dict[str, torch.Tensor], shape: CheckpointShape) -> None:
    """Write the safetensors, dealt out round-robin so that a layer's tensors lie in different files."""
    if shape.shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shape.shards):
        file = f"model-{shard + 1:05d}-of-{shape.shards:05d}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard :: shape.shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shape.index:
        total = sum(weight.numel() * weight.element_size() for weight in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The nano checkpoint's tokenizer where it fits, else one token per byte; none for a still smaller vocabulary."""
    source = NANO_DIR / "tokenizer.json"
    if source.is_file() and _largest_id(json.loads(source.read_text())) < vocab_size:
        for name in TOKENIZER_FILES:
            if (NANO_DIR / name).is_file():
                shutil.copyfile(NANO_DIR / name, directory / name)
    elif vocab_size >= 256 + len(SPECIAL_TOKENS):
        _byte_tokenizer(directory)


def _largest_id(tokenizer: dict[str, Any]) -> int:
    ids = list(tokenizer["model"]["vocab"].values()) + [token["id"] for token in tokenizer.get("added_tokens", ())]
    return max(ids)


def _byte_tokenizer(directory: Path) -> None:
    """Special tokens at 0, 1, ..., then the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[1]
    )
    wrapped.save_pretrained(directory)
