"""Registration: complete, idempotent, and loud when something is not as expected."""

import importlib.metadata
import types

import pytest
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend
from sglang.srt.parser.reasoning_parser import ReasoningParser
from transformers import AutoTokenizer

from sglang_step35 import hook_functions, hooks, plugin, upstream
from sglang_step35.assets import NANO


def test_entry_points_name_this_package():
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        found = [e for e in importlib.metadata.entry_points(group=group) if e.name == "step35"]
        assert [e.value.split(":")[0] for e in found] == ["sglang_step35.plugin"]


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(plugin, "_registered", False)


def test_wrong_sglang_version_stops_the_process(fresh, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.24")
    with pytest.raises(SystemExit, match=r"0\.5\.23, found 0\.5\.24: install sglang==0\.5\.23"):
        plugin.register()


def test_missing_hooked_name_stops_the_process(fresh, monkeypatch):
    gone = upstream.Upstream("sglang.srt.model_loader.utils.no_such_function", (), hooked=True)
    monkeypatch.setattr(upstream, "TABLE", (*upstream.TABLE, gone))
    with pytest.raises(SystemExit, match="no_such_function"):
        plugin.register()


def test_changed_signature_stops_the_process(fresh, monkeypatch):
    path = "sglang.srt.model_loader.utils.get_model_architecture"
    changed = upstream.Upstream(path, ("model_config", "extra"), hooked=True)
    monkeypatch.setattr(upstream, "TABLE", (changed,))
    with pytest.raises(SystemExit, match="get_model_architecture takes .'model_config',."):
        plugin.register()


def test_a_hook_that_did_not_take_effect_stops_the_process(fresh, monkeypatch):
    hook = hooks.Hook("sglang.srt.model_loader.utils.no_such", "after", lambda result: None, why="", until="")
    monkeypatch.setattr(hooks, "all_hooks", lambda: [hook])
    with pytest.raises(SystemExit, match="no_such"):
        plugin.register()


def test_foreign_external_model_package_stops_the_process(fresh, monkeypatch):
    import sys

    from sglang.srt.environ import envs

    monkeypatch.delitem(sys.modules, "sglang.srt.models.registry", raising=False)
    with envs.SGLANG_EXTERNAL_MODEL_PACKAGE.override("someone.else"):
        with pytest.raises(SystemExit, match="someone.else"):
            plugin.register()


def test_stock_model_class_is_refused():
    stock = type("Step3p5ForCausalLM", (), {"__module__": "sglang.srt.models.step3p5"})
    with pytest.raises(RuntimeError, match="sglang.srt.models.step3p5"):
        hook_functions.require_our_model((stock, "Step3p5ForCausalLM"), None)
    ours = type("Step3p5ForCausalLM", (), {"__module__": "sglang_step35.model.causal_lm"})
    assert hook_functions.require_our_model((ours, "Step3p5ForCausalLM"), None) is None
    assert hook_functions.require_our_model((stock, "LlamaForCausalLM"), None) is None


def test_registration_is_idempotent():
    plugin.register()
    plugin.register()


def test_mtp_layers_become_the_draft_models_layers():
    config = types.SimpleNamespace(
        num_hidden_layers=4,
        num_nextn_predict_layers=2,
        layer_types=["full_attention"] + ["sliding_attention"] * 5,
    )
    assert hook_functions.mtp_layer_ids(([0], []), ["Step3p5MTP"], config) == ([0, 1], [])
    assert hook_functions.mtp_layer_ids(([0], []), ["LlamaForCausalLM"], config) is None


def test_llguidance_compiles_grammars_behind_reasoning():
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    inner = GuidanceBackend(tokenizer, n_vocab=len(tokenizer), eos_token_ids=[tokenizer.eos_token_id])
    backend = ReasonerGrammarBackend(inner, ReasoningParser("step3p5"), tokenizer)
    with pytest.raises(AttributeError):
        backend._init_value_dispatch(("regex", "[a-z]"), True)
    hook_functions.complete_grammar_backend(backend)
    hook_functions.complete_grammar_backend(None)
    grammar = backend._init_value_dispatch(("regex", "[a-z]"), True)
    assert grammar.grammar is not None and grammar.copy().allocate_vocab_mask(len(tokenizer), 2, "cpu").shape[0] == 2


def test_platform_stays_away_from_accelerators(monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert plugin.activate_platform() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert plugin.activate_platform() == plugin.PLATFORM_CLASS
