"""What the planner reads from a checkpoint's headers against what the loaded model holds."""

import json
import struct

import pytest
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from sglang_step35.assets import NANO
from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.planner.hardware import host
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.stored import read
from tests.support import model_host, quantised
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.step37 import as_step37


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("stored") / "nano-Q8_0.gguf"
    write_gguf(NANO, file)
    return file


def held(*models) -> int:
    """Bytes of the models' weights; a packed parameter keeps its bytes beside itself."""
    seen = {}
    for model in models:
        for parameter in model.parameters():
            parts = getattr(parameter, "parts", {}).values()
            tensors = [tensor for part in parts for tensor in part.stored] or [parameter.data]
            seen |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}
    return sum(seen.values())


@pytest.mark.parametrize("mtp", [True, False])
def test_weights_of_a_gguf_are_what_the_model_holds(gguf_file, mtp):
    backbone = model_host.load_gguf(gguf_file)
    models = [backbone]
    if mtp:
        models.append(model_host.load_gguf(gguf_file, draft=True))
        models[1].share_with(backbone)
    spec, stored = read(str(gguf_file))
    plan = make_plan(spec, host(16), Wish(mtp=mtp), stored)
    assert plan.resident == pytest.approx(held(*models), rel=0.02)
    assert (stored.format, stored.quantization, stored.mtp) == ("GGUF", "gguf", 3)
    assert dict(stored.types).keys() == {"Q8_0", "F32"}


def test_weights_of_safetensors_are_what_the_model_holds():
    backbone = model_host.load(NANO, dtype="bfloat16")
    mtp = model_host.load(NANO, draft=True, dtype="bfloat16")
    mtp.share_with(backbone)
    spec, stored = read(str(NANO))
    assert make_plan(spec, host(16), Wish(), stored).resident == pytest.approx(held(backbone, mtp), rel=0.02)


@pytest.mark.parametrize(
    "scheme",
    [
        quantised.compressed(4, 32),
        quantised.compressed(4, None),
        quantised.compressed(8, 32),
        quantised.fp8((16, 16)),
    ],
    ids=["int4", "int4, a scale a row", "int8", "fp8"],
)
def test_weights_of_quantised_safetensors_are_what_the_model_holds(tmp_path, scheme):
    directory = make_checkpoint(tmp_path / "checkpoint", CheckpointShape(num_mtp=0, dtype="bfloat16"))
    quantised.write(directory, scheme)
    backbone = model_host.load(directory, dtype="bfloat16")
    spec, stored = read(str(directory))
    assert make_plan(spec, host(16), Wish(), stored).resident == pytest.approx(held(backbone), rel=0.02)


def test_every_tensor_belongs_to_a_part(tmp_path):
    shape = CheckpointShape(embedding_copies=True, shards=3)
    spec, stored = read(str(make_checkpoint(tmp_path / "a", shape)))
    table = 512 * 64 * 4
    assert stored.parts.stock == stored.total  # float32: nothing is widened
    assert (stored.parts.embedding, stored.parts.head, stored.parts.mtp_heads) == (table, table, 3 * table)
    assert stored.parts.mtp_embeddings == 3 * table
    assert stored.parts.routed == 6 * 8 * 3 * 64 * 32 * 4 and stored.parts.shared == 6 * 3 * 64 * 32 * 4
    assert stored.parts.router == 6 * (8 * 64 + 8) * 4 and stored.parts.dense == 3 * 3 * 64 * 96 * 4
    assert (stored.files, stored.mtp, len(spec.mtp_layers)) == (3, 3, 3)


def test_step37_counts_its_text_model(tmp_path):
    source = make_checkpoint(tmp_path / "a")
    assert read(str(as_step37(source, tmp_path / "b")))[1].parts == read(str(source))[1].parts


def without_mtp(tmp_path):
    directory = make_checkpoint(tmp_path / "a")
    weights = load_file(directory / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name.split(".")[2:3] not in (["9"], ["10"], ["11"])}
    save_file(kept, directory / "model.safetensors")
    return directory


def test_a_file_without_mtp_layers_is_planned_without_drafts(tmp_path):
    spec, stored = read(str(without_mtp(tmp_path)))
    plan = make_plan(spec, host(16), Wish(), stored)
    assert stored.mtp == 0 and plan.layout.mtp_layers == 0 and plan.weights.mtp == 0


def compressed(**weights) -> dict:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


QUANTISATIONS = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "int4"),
    ({"quant_method": "gptq", "bits": 8}, "int8"),
    ({"quant_method": "awq", "bits": 4}, "int4"),
    (compressed(num_bits=4, type="int"), "int4"),
    (compressed(num_bits=8, type="int"), "int8"),
    (compressed(num_bits=8, type="float"), "fp8"),
]


@pytest.mark.parametrize(("given", "name"), QUANTISATIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_quantisation_of_the_config(tmp_path, given, name):
    directory = make_checkpoint(tmp_path / "a")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
    assert read(str(directory))[1].quantization == name


def test_damaged_files_are_named(tmp_path, gguf_file):
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf_file.read_bytes()[:100_000])
    with pytest.raises(DamagedFile, match="short.gguf is truncated"):
        read(str(short))
    directory = make_checkpoint(tmp_path / "a")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(DamagedFile, match="model.safetensors is truncated"):
        read(str(directory))


def test_types_are_listed_with_their_bytes(tmp_path):
    file = tmp_path / "mixed.gguf"
    write_gguf(NANO, file, lambda name: GGMLQuantizationType.Q4_0 if "mlp" in name else GGMLQuantizationType.F16)
    types = dict(read(str(file))[1].types)
    assert types.keys() == {"F16", "Q4_0", "F32"} and types["F16"] > types["Q4_0"] > types["F32"] > 0
