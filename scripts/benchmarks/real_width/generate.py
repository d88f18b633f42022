"""transformers' own `generate` on the checkpoint: prefill and decode rates of one request, in bfloat16.

    python -m scripts.benchmarks.real_width.generate FOLDER START LENGTH TOKENS

Prints JSON. Takes 8 GB while it loads. transformers has the text model of Step-3.7 inside a model for images only, so
the head is added here.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel

from scripts.benchmarks.real_width import drafted
from tests.support.reference import load_reference


class TextLM(Step3p7PreTrainedModel, GenerationMixin):
    """The text model and its head."""

    def __init__(self, backbone: torch.nn.Module, head: torch.Tensor):
        super().__init__(backbone.config)
        self.backbone = backbone
        self.head = torch.nn.Parameter(head, requires_grad=False)

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, **_unused):
        out = self.backbone(
            input_ids=input_ids, past_key_values=past_key_values, attention_mask=attention_mask,
            position_ids=position_ids, use_cache=True,
        )  # fmt: skip
        logits = torch.nn.functional.linear(out.last_hidden_state[:, -1:], self.head)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)


def main(folder: str, start: str, length: str, tokens: str) -> None:
    reference = load_reference(Path(folder))
    size = reference.fields["vocab_size"]
    model = TextLM(reference.backbone.bfloat16(), reference.weights["lm_head.weight"].bfloat16())
    model.backbone.config._attn_implementation = "sdpa"
    del reference
    ids = torch.tensor([drafted.text(size, int(start), int(length))])
    with torch.inference_mode():
        model.generate(ids[:, :64], max_new_tokens=4, do_sample=False, pad_token_id=0)  # first passes are slow
    seconds, found = {}, ids
    for count in (1, 1 + int(tokens)):
        started = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds[count] = time.perf_counter() - started
    first, whole = seconds[1], seconds[1 + int(tokens)]
    right = found[0, ids.shape[1] :].tolist() == drafted.text(size, int(start) + int(length), 1 + int(tokens))
    print(json.dumps({"prefill": int(length) / first, "decode": int(tokens) / (whole - first), "right": right}))


if __name__ == "__main__":
    main(*sys.argv[1:])
