"""The reference everything is tested against: transformers' Step-3.7 text model in float32, plain-torch MTP on top.

`load_reference(directory)` reads the same checkpoint the server does. Whole sequences, eager attention, no code of
the package under test; `plain.py` checks the backbone once more and runs the MTP layers, since transformers' own MTP
cannot build them (it forgets that sliding layers have more heads) and chains through the shared_head norm.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import plain_mtp as plain

Allowed = Callable[[Sequence[int]], Tensor]

# Checkpoint name -> transformers name, for the parts that differ.
RENAMES = {
    "moe.gate.weight": "mlp.gate.weight",
    "moe.router_bias": "mlp.gate.e_score_correction_bias",
    "moe.down_proj.weight": "mlp.experts.down_proj",
    "share_expert.": "mlp.shared_experts.",
}


def load_reference(directory: str | Path) -> "Reference":
    """Read a checkpoint directory (config.json, all *.safetensors) in float32."""
    directory = Path(directory)
    fields = json.loads((directory / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= {name: weight.float() for name, weight in load_file(file).items()}
    return Reference(fields, weights)


class Reference:
    """One checkpoint. Token ids are plain lists; T tokens, V vocabulary, H hidden; everything float32.

    A state h_t is the backbone's output for token t before the final norm. MTP row t of depth i stands at position t,
    combines embed(x[t+1+i]) with h_t (depth 0) or with row t of depth i-1, sees rows <= t and predicts x[t+2+i].
    """

    def __init__(self, fields: Mapping[str, Any], weights: Mapping[str, Tensor]):
        self.fields = fields
        self.weights = weights
        self.backbone = _transformers_model(fields, weights)
        self.num_layers = fields["num_hidden_layers"]
        self.num_mtp = fields["num_nextn_predict_layers"]

    # Backbone.

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V]; row t scores token t+1."""
        return self._forward(ids)[1]

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """[T, V], natural logarithm; row t is for token t+1."""
        return self.logits(ids).log_softmax(-1)

    def hidden_before_norm(self, ids: Sequence[int]) -> Tensor:
        """[T, H]: what MTP layer 0 takes."""
        return self._forward(ids)[0]

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], n: int, eos: Sequence[int] = ()) -> list[int]:
        """Up to n most likely tokens, with a KV cache; stops after one of `eos`, which is included."""
        tokens: list[int] = []
        step, cache = list(ids), None
        while len(tokens) < n and not (tokens and tokens[-1] in eos):
            out = self.backbone(torch.tensor([step]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            tokens.append(int((out.last_hidden_state[0, -1] @ self.weights["lm_head.weight"].T).argmax()))
            step = tokens[-1:]
        return tokens

    # MTP.

    def mtp_logits(self, ids: Sequence[int]) -> list[Tensor]:
        """Teacher-forced: for each depth i the logits [T-1-i, V] of rows 0 .. T-2-i; row t scores token t+2+i."""
        rows, result = self.hidden_before_norm(ids), []
        for depth in range(self.num_mtp):
            rows = self._mtp_rows(depth, rows[: max(0, len(ids) - 1 - depth)], ids)
            result.append(self._mtp_head(depth, rows))
        return result

    def draft(self, ids: Sequence[int], steps: int) -> list[int]:
        """Drafts d_1 .. d_steps after x_0 .. x_n, all of `ids`, the last of which the backbone has not read."""
        return self._draft(self.hidden_before_norm(ids[:-1]), ids, steps)

    def speculative_greedy(
        self, ids: Sequence[int], max_new: int, steps: int, eos: Sequence[int] = (), allowed: Allowed | None = None
    ) -> tuple[list[int], list[int]]:
        """Greedy decoding through drafts, everything recomputed each round.

        Returns the new tokens (cut to max_new, and after one of `eos`) and, for each round, how many of its `steps`
        drafts were accepted; a round yields one token more than that. The first token comes from the prompt, before
        any round. allowed: which tokens [V] may follow an output, for the drafts too.
        """

        def best(row: Tensor, tokens: Sequence[int]) -> int:
            return int((row if allowed is None else row.where(allowed(tokens[len(ids) :]), -torch.inf)).argmax())

        states, logits = self._forward(ids)
        committed, accepted = [*ids, best(logits[-1], ids)], []
        while len(committed) - len(ids) < max_new and committed[-1] not in eos:
            drafts = self._draft(states[: len(committed) - 1], committed, steps, best)
            states, logits = self._forward([*committed, *drafts])
            # The backbone's tokens, one more than drafts.
            wanted = [
                best(row, [*committed, *drafts[:count]]) for count, row in enumerate(logits[len(committed) - 1 :])
            ]
            matches = 0
            while matches < steps and drafts[matches] == wanted[matches]:
                matches += 1
            accepted.append(matches)
            committed += _cut(wanted[: matches + 1], eos)
        return _cut(committed[len(ids) :][:max_new], eos), accepted

    # Inside.

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States [T, H] and logits [T, V]."""
        states: list[Tensor] = []
        hook = self.backbone.norm.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
        try:
            out = self.backbone(torch.tensor([list(ids)]), use_cache=False)
        finally:
            hook.remove()
        return states[0], out.last_hidden_state[0] @ self.weights["lm_head.weight"].T

    def _layer(self, index: int) -> dict[str, Tensor]:
        """Weights of one layer, names without its prefix, `transformer.shared_head` and `shared_head` alike."""
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix).removeprefix("transformer."): weight
            for name, weight in self.weights.items()
            if name.startswith(prefix)
        }

    @torch.inference_mode()
    def _mtp_rows(self, depth: int, rows: Tensor, ids: Sequence[int]) -> Tensor:
        """Depth `depth` on rows [R, H] of the depth before; needs ids up to R + depth."""
        index = self.num_layers + depth
        weights = self._layer(index)
        embed = weights.get("embed_tokens.weight", self.weights["model.embed_tokens.weight"])
        newest = torch.tensor(ids[depth + 1 : depth + 1 + len(rows)], dtype=torch.long)
        return plain.mtp_layer(embed[newest], rows, weights, plain.layer_fields(self.fields, index))

    @torch.inference_mode()
    def _mtp_head(self, depth: int, rows: Tensor) -> Tensor:
        """Logits [R, V] of rows [R, H]."""
        index = self.num_layers + depth
        weights, eps = self._layer(index), plain.layer_fields(self.fields, index).eps
        normed = plain.rms_norm(rows, weights["shared_head.norm.weight"], eps)
        return normed @ weights.get("shared_head.output.weight", self.weights["lm_head.weight"]).T

    def _draft(
        self,
        states: Tensor,
        ids: Sequence[int],
        steps: int,
        best: Callable[[Tensor, Sequence[int]], int] = lambda row, tokens: int(row.argmax()),
    ) -> list[int]:
        """`draft` with the states [n, H] of x_0 .. x_{n-1} at hand; ids is x_0 .. x_n."""
        assert len(states) == len(ids) - 1 and steps <= self.num_mtp
        tokens, rows = list(ids), states
        for depth in range(steps):
            rows = self._mtp_rows(depth, rows, tokens)
            tokens.append(best(self._mtp_head(depth, rows[-1:])[0], tokens))
        return tokens[len(ids) :]


def plain_hidden(reference: Reference, ids: Sequence[int]) -> Tensor:
    """`hidden_before_norm` once more, in plain torch only."""
    x = reference.weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for index in range(reference.num_layers):
        x = plain.decoder_layer(x, reference._layer(index), plain.layer_fields(reference.fields, index))
    return x


def _cut(tokens: list[int], eos: Sequence[int]) -> list[int]:
    """Up to and including the first of `eos`."""
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0] + 1] if ends else tokens


def _transformers_model(fields: Mapping[str, Any], weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """transformers' Step-3.7 text model with this checkpoint's backbone, float32, eager attention."""
    from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

    model = Step3p7TextModel(_transformers_config(fields)).eval()
    # Strict: a weight too many or too few, or of another shape, is an error.
    model.load_state_dict(_transformers_weights(weights, fields["num_hidden_layers"]))
    return model


def _transformers_config(fields: Mapping[str, Any]) -> Any:
    """Step3p7TextConfig in its own terms; given Step-3.5's field names it would drop the sliding layers' KV groups."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    count, types = fields["num_hidden_layers"], fields["layer_types"]
    other, sparse = fields["attention_other_setting"], fields["moe_layers_enum"].split(",")
    sliding_heads = {
        "num_attention_heads": other["num_attention_heads"],
        "num_key_value_heads": other["num_attention_groups"],
    }
    config = Step3p7TextConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=count,
        num_attention_heads=fields["num_attention_heads"],
        num_key_value_heads=fields["num_attention_groups"],
        head_dim=fields["head_dim"],
        max_position_embeddings=fields["max_position_embeddings"],
        rms_norm_eps=fields.get("rms_norm_eps", 1e-5),
        n_routed_experts=fields["moe_num_experts"],
        num_experts_per_tok=fields["moe_top_k"],
        moe_intermediate_size=fields["moe_intermediate_size"],
        share_expert_dim=fields["share_expert_dim"],
        moe_router_scaling_factor=fields["moe_router_scaling_factor"],
        sliding_window=fields["sliding_window"],
        num_sliding_attention_heads=other["num_attention_heads"],
        layer_types=types[:count],
        mlp_layer_types=["sparse" if str(i) in sparse else "dense" for i in range(count)],
        swiglu_limits=(fields.get("swiglu_limits") or [])[:count] or None,
        swiglu_limits_shared=(fields.get("swiglu_limits_shared") or [])[:count] or None,
        rope_parameters={kind: _rope(fields, kind) for kind in set(types[:count])},
        per_layer_config={i: sliding_heads for i in range(count) if types[i] == "sliding_attention"},
        num_nextn_predict_layers=0,
        attn_implementation="eager",
        dtype="float32",
    )
    assert config.num_local_experts == fields["moe_num_experts"]
    return config


def _rope(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """transformers' RoPE parameters of one layer type, whose layers must agree."""
    entries = {
        (theta, factor)
        for layer_type, theta, factor in zip(
            fields["layer_types"], fields["rope_theta"], fields["partial_rotary_factors"]
        )
        if layer_type == kind
    }
    ((theta, factor),) = entries
    scaling = dict(fields["rope_scaling"]) if kind in fields["yarn_only_types"] else {"rope_type": "default"}
    return {**scaling, "rope_theta": theta, "partial_rotary_factor": factor}


def _transformers_weights(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The backbone's weights under transformers' names; gate and up of the experts become one tensor."""
    state = {
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    for index in range(count):
        prefix = f"model.layers.{index}."
        for name, weight in ((n.removeprefix(prefix), w) for n, w in weights.items() if n.startswith(prefix)):
            if name == "moe.gate_proj.weight":
                both = (weight, weights[f"{prefix}moe.up_proj.weight"])
                state[f"layers.{index}.mlp.experts.gate_up_proj"] = torch.cat(both, dim=1)
            elif name != "moe.up_proj.weight":
                for old, new in RENAMES.items():
                    name = name.replace(old, new)
                state[f"layers.{index}.{name}"] = weight
    return state
