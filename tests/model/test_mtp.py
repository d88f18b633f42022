"""The MTP layers against the reference, and the tables they share with the backbone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.reference import load_reference

TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("mtp"), CheckpointShape(embedding_copies=True, shards=3))


@pytest.fixture(scope="module")
def backbone(directory):
    return model_host.load(directory)


@pytest.fixture(scope="module")
def mtp(directory, backbone):
    model = model_host.load(directory, draft=True)
    model.share_with(backbone)
    return model


@pytest.mark.parametrize("plain", [True, False])
def test_logits_of_every_layer(directory, mtp, plain):
    for layer in mtp.layers:
        layer.runs_single_rank = plain
    reference, ids = load_reference(directory), prompt(40)
    found = model_host.mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    for logits, expected in zip(found, reference.mtp_logits(ids), strict=True):
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("plain", [True, False])
def test_a_last_row_over_rows_of_which_only_keys_and_values_are_computed(directory, mtp, plain):
    for layer in mtp.layers:
        layer.runs_single_rank = plain
    reference, ids = load_reference(directory), prompt(40)
    found = model_host.last_mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    assert (found - reference.mtp_logits(ids)[0][-1]).abs().max() < TOLERANCE


def test_layers_are_layers_of_one_kv_pool(mtp):
    assert (mtp.num_mtp_layers, mtp.start_layer, mtp.end_layer) == (3, 0, 3)
    assert [layer.block.self_attn.attn.layer_id for layer in mtp.layers] == [0, 1, 2]
    assert {layer.block.self_attn.attn.sliding_window_size for layer in mtp.layers} == {7}


def test_forward_runs_the_first_layer(mtp, backbone):
    ids = prompt(12)
    hidden = model_host.run(backbone, ids).hidden_states
    expected = model_host.mtp_logits(mtp, hidden, ids)[0][-1]
    batch = model_host.batch_of(ids[1:])
    batch.spec_info = type("Spec", (), {"hidden_states": hidden[:-1]})()
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    with forward_context(ForwardContext(attn_backend=model_host.WholeSequence()), forward_batch=batch):
        out = mtp(batch.input_ids, batch.positions, batch)
    assert torch.allclose(out.next_token_logits[0], expected, atol=TOLERANCE)


# Tables.


def test_equal_embeddings_are_shared_and_other_heads_kept(mtp, backbone):
    embed, head = backbone.get_embed_and_head()
    for depth in range(3):
        assert mtp.tables.embedding(depth).weight is embed
        assert mtp.tables.head(depth).weight is not head
    assert mtp.share_with(backbone)["layer 1 head"] == "own"


def edit(directory, change) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def reported(directory) -> dict[str, str]:
    backbone, mtp = model_host.load(directory), model_host.load(directory, draft=True)
    return mtp.share_with(backbone)


def test_equal_heads_are_shared(tmp_path):
    make_checkpoint(tmp_path, CheckpointShape(shared_head="shared_head"))

    def change(weights):
        for layer in (9, 10, 11):
            weights[f"model.layers.{layer}.shared_head.output.weight"] = weights["lm_head.weight"].clone()

    edit(tmp_path, change)
    assert set(reported(tmp_path).values()) == {"backbone"}


def test_absent_heads_are_the_backbones(tmp_path):
    make_checkpoint(tmp_path, CheckpointShape())

    def change(weights):
        for layer in (9, 10, 11):
            del weights[f"model.layers.{layer}.transformer.shared_head.output.weight"]

    edit(tmp_path, change)
    assert set(reported(tmp_path).values()) == {"backbone"}


def test_layers_share_an_own_head(tmp_path):
    make_checkpoint(tmp_path, CheckpointShape())
    name = "model.layers.{}.transformer.shared_head.output.weight"

    def change(weights):
        weights[name.format(11)] = weights[name.format(9)].clone()

    edit(tmp_path, change)
    report = reported(tmp_path)
    assert (report["layer 0 head"], report["layer 2 head"]) == ("own", "layer 0's own")


def test_a_single_differing_row_is_noticed(tmp_path):
    make_checkpoint(tmp_path, CheckpointShape(embedding_copies=True))

    def change(weights):
        copy = weights["model.layers.10.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        copy[511, 63] += 1e-3

    edit(tmp_path, change)
    report = reported(tmp_path)
    assert [report[f"layer {i} embedding"] for i in range(3)] == ["backbone", "own", "backbone"]


def test_no_table_is_allocated_before_sharing(directory):
    model = model_host.load(directory, draft=True)
    names = [name for name, _ in model.named_parameters()]
    assert names and not any(name.startswith("tables.") for name in names)


def test_running_before_sharing_is_an_error(directory):
    model = model_host.load(directory, draft=True)
    with pytest.raises(RuntimeError, match="share_with"):
        model.forward_layer(0, torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 64), None)


def test_fewer_layers_than_the_checkpoint_has(tmp_path, directory):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    model = model_host.load(tmp_path, draft=True)
    assert model.num_mtp_layers == 1


def test_stock_worker_is_refused(mtp):
    with pytest.raises(ValueError, match="one draft model"):
        type(mtp)(mtp.config, draft_model_idx=0)
