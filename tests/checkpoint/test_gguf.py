"""GGUF files: config from metadata, names, and what damaged or foreign files are called."""

import json
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from sglang_step35.assets import NANO, PUBLISHED_CONFIG
from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.formats import open_files
from sglang_step35.checkpoint.gguf import GGUFFiles, is_gguf
from sglang_step35.checkpoint.gguf_config import config_fields
from sglang_step35.checkpoint.safetensors import SafetensorsFiles
from sglang_step35.config import parse_config
from sglang_step35.hf_config import Step35HFConfig
from sglang_step35.model.weights import WeightError
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import metadata_of, rope_freqs, write_file, write_gguf

SHAPE = CheckpointShape()
Q_PROJ, GGUF_Q_PROJ = "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"


@pytest.fixture
def directory(tmp_path):
    """A checkpoint whose config.json does not stand beside the GGUF file."""
    return make_checkpoint(tmp_path / "source", SHAPE)


@pytest.fixture
def file(directory, tmp_path):
    write_gguf(directory, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def edited(directory, tmp_path, edit):
    """The checkpoint with metadata or tensors changed by edit(metadata, tensors)."""
    write_gguf(directory, tmp_path / "edited.gguf", edit=edit)
    return tmp_path / "edited.gguf"


def spec_of(directory, **changes):
    return parse_config(json.loads((directory / "config.json").read_text()) | changes)


# Config.


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, window=48, num_mtp=1, limits=False, original_position=131072)])
def test_config_is_the_one_it_was_made_from(tmp_path, shape):
    directory = make_checkpoint(tmp_path / "source", shape)
    write_gguf(directory, tmp_path / "model.gguf")
    config = Step35HFConfig.from_gguf(str(tmp_path / "model.gguf"))
    assert parse_config(config) == spec_of(directory)
    assert config._name_or_path == str(tmp_path / "model.gguf")


def test_config_without_mtp_layers(directory, tmp_path):
    write_gguf(directory, tmp_path / "model.gguf", mtp=False)
    assert parse_config(config_fields(tmp_path / "model.gguf")) == spec_of(directory, num_nextn_predict_layers=0)


def test_nano_config(tmp_path):
    write_gguf(NANO, tmp_path / "nano.gguf")
    assert parse_config(config_fields(tmp_path / "nano.gguf")) == spec_of(NANO)


@pytest.mark.parametrize("over_all", [False, True])
def test_published_config(tmp_path, over_all):
    """Its 128,896 tokens, and rope_freqs as converters of before and after MTP support wrote them."""
    fields = json.loads(PUBLISHED_CONFIG.read_text())
    tokens = [f"t{i}" for i in range(fields["vocab_size"])]
    tokens[128007] = "<|im_end|>"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}
    metadata = metadata_of(fields, True) | {f"tokenizer.ggml.{key}": value for key, value in ids.items()}
    metadata["tokenizer.ggml.tokens"] = tokens
    write_file(
        tmp_path / "model.gguf",
        metadata,
        {"rope_freqs.weight": (rope_freqs(fields, over_all), Q.F32), "output.weight": (np.zeros((1, 32)), Q.F32)},
    )
    assert parse_config(config_fields(tmp_path / "model.gguf")) == parse_config(fields)


def test_no_scaling_and_a_tied_head(directory, tmp_path):
    def edit(metadata, tensors):
        del tensors["rope_freqs.weight"], tensors["output.weight"]

    spec = parse_config(config_fields(edited(directory, tmp_path, edit)))
    assert {layer.attention.rope.scaling for layer in spec.layers} == {None} and spec.tie_word_embeddings


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("embedding_length", None, "embedding_length is missing"),
        ("swiglu_clamp_exp", [0.0], "swiglu_clamp_exp has 1 entries for 12 layers"),
        ("expert_gating_func", 1, "expert_gating_func is 1, not 2"),
        ("attention.value_length", 8, "value_length is not key_length, 16"),
        ("attention.head_count", [4] + [6] * 6 + [5] * 5, "head_count differs between layers of type"),
    ],
)
def test_metadata_that_cannot_be_read(directory, tmp_path, key, value, message):
    def edit(metadata, tensors):
        metadata[f"step35.{key}"] = value
        if value is None:
            del metadata[f"step35.{key}"]

    with pytest.raises(DamagedFile, match=f"edited.gguf: the metadata step35.*{message}"):
        config_fields(edited(directory, tmp_path, edit))


def test_unknown_scaling(directory, tmp_path):
    def edit(metadata, tensors):
        tensors["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32), Q.F32

    with pytest.raises(DamagedFile, match=r"edited.gguf: the tensor rope_freqs.weight .* config.json beside it"):
        config_fields(edited(directory, tmp_path, edit))


# Reading.


def test_formats(file, directory):
    assert isinstance(open_files(str(file)), GGUFFiles)
    assert isinstance(open_files(str(directory)), SafetensorsFiles)
    assert not is_gguf(None) and not is_gguf("stepfun-ai/Step-3.5-Flash")
    plain = file.rename(file.with_suffix(""))
    assert is_gguf(str(plain))  # by its first bytes


def test_tensors_under_published_names(directory, file):
    weights = write_gguf(directory, file)
    files = GGUFFiles(file)
    found = {
        name.replace("transformer.", ""): tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()
        for name, tensor in files.tensors()
    }
    assert found.keys() == {name.replace("transformer.", "") for name in weights}
    for name, expected in weights.items():
        assert torch.equal(found[name.replace("transformer.", "")], torch.from_numpy(expected.copy())), name
    assert files.describe(Q_PROJ) == f"{Q_PROJ} ({GGUF_Q_PROJ} in model.gguf)"
    assert (files.dtype(Q_PROJ), files.dtype("nothing")) == ("Q8_0", None)
    assert files.damaged() == [] and files.describe("nothing") == "nothing"


def test_tensors_are_views_of_the_file(file):
    """Two readers give the same bytes; writing to a view changes neither file nor other readers."""
    before = file.read_bytes()
    tensor = dict(GGUFFiles(file).tensors())[Q_PROJ]
    assert tensor.data.untyped_storage().nbytes() <= len(before)
    tensor.data.fill_(0)
    assert file.read_bytes() == before


# Files that are not what they should be.


def load_error(file, draft: bool = False) -> str:
    with pytest.raises((WeightError, DamagedFile)) as error:
        model_host.load_gguf(file, draft=draft)
    return str(error.value)


def test_wrong_magic(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(DamagedFile, match=f"{path} is no GGUF file: .*download or copy it again"):
        config_fields(path)


def test_truncated_tensor(file):
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DamagedFile, match=rf"{file} is truncated: \d+ bytes, the tensor blk\S+ ends at \d+"):
        config_fields(file)
    assert "is truncated" in GGUFFiles(file).damaged()[0]


@pytest.mark.parametrize("keep", [3, 10, 30, 500, 5000])
def test_truncated_header(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DamagedFile, match=str(file)):
        config_fields(file)


def test_another_architecture(directory, tmp_path):
    path = edited(directory, tmp_path, lambda metadata, tensors: metadata.update({"general.architecture": "llama"}))
    with pytest.raises(DamagedFile, match="edited.gguf holds the architecture 'llama', not 'step35'"):
        config_fields(path)


def test_a_later_part(tmp_path, directory):
    write_gguf(directory, tmp_path / "model.gguf", shards=3)
    second = next(tmp_path.glob("model-00002-*"))
    with pytest.raises(DamagedFile, match="is part 2 of a split file: give part 1, model-00001-of"):
        config_fields(second)


def test_missing_part(tmp_path, directory):
    write_gguf(directory, tmp_path / "model.gguf", shards=3)
    first, second = (next(tmp_path.glob(f"model-0000{i}-*")) for i in (1, 2))
    second.unlink()
    assert [line.split(":")[0] for line in GGUFFiles(first).damaged()] == [f"{second} is missing"]
    with pytest.raises(DamagedFile, match=f"{second} is missing"):
        config_fields(first)


def test_a_part_under_another_name(tmp_path, directory):
    write_gguf(directory, tmp_path / "model.gguf", shards=3)
    first = next(tmp_path.glob("model-00001-*")).rename(tmp_path / "renamed.gguf")
    with pytest.raises(DamagedFile, match=r"renamed.gguf is one of \d parts"):
        list(GGUFFiles(first).tensors())


def raw_type(path, tensor: str, kind: int) -> None:
    """Write another type number into a tensor's entry of the header."""
    data, name = bytearray(path.read_bytes()), tensor.encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (dimensions,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, kind)
    path.write_bytes(data)


def test_unknown_type(file):
    raw_type(file, GGUF_Q_PROJ, 999)
    with pytest.raises(DamagedFile, match=f"model.gguf: the tensor {GGUF_Q_PROJ} has the unknown type 999"):
        config_fields(file)


def test_a_type_that_is_not_implemented(file):
    raw_type(file, GGUF_Q_PROJ, int(Q.Q5_1))
    message = load_error(file)
    assert f"{file}: the tensor {GGUF_Q_PROJ} has the type Q5_1, which is not implemented" in message
    assert "quantise the model to one of F32" in message


def test_tensor_twice_in_one_file(directory, tmp_path):
    path = edited(directory, tmp_path, lambda m, t: t.update({"blk.0.attn_X.weight": t[GGUF_Q_PROJ]}))
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_X.weight", GGUF_Q_PROJ.encode()))
    with pytest.raises(DamagedFile, match=f"edited.gguf holds the tensor {GGUF_Q_PROJ} twice"):
        config_fields(path)


def test_tensor_twice_in_different_parts(directory, tmp_path):
    def edit(metadata, tensors):
        tensors["blk.0.attn_X.weight"] = tensors[GGUF_Q_PROJ]

    write_gguf(directory, tmp_path / "model.gguf", edit=edit, shards=3)
    for part in tmp_path.glob("model-*.gguf"):
        part.write_bytes(part.read_bytes().replace(b"blk.0.attn_X.weight", GGUF_Q_PROJ.encode()))
    message = load_error(next(tmp_path.glob("model-00001-*")))
    assert f"{Q_PROJ} ({GGUF_Q_PROJ} in model-0000" in message and "occurs twice" in message


@pytest.mark.parametrize("name", ["blk.4.ffn_up_exps.weight", "blk.0.attn_q_norm.weight", "blk.1.attn_gate.weight"])
def test_wrong_shape(directory, tmp_path, name):
    path = edited(directory, tmp_path, lambda m, t: t.update({name: (t[name][0][..., :-1, :] if t[name][0].ndim > 1
                                                                     else t[name][0][:-1], t[name][1])}))  # fmt: skip
    message = load_error(path)
    assert f"({name} in edited.gguf) has shape" in message and "config.json asks for" in message


def test_missing_and_unknown_tensors(directory, tmp_path):
    message = load_error(edited(directory, tmp_path, lambda m, t: t.pop(GGUF_Q_PROJ)))
    assert f"edited.gguf lacks {Q_PROJ}" in message
    extra = edited(directory, tmp_path, lambda m, t: t.update({"blk.0.attn_sinks.weight": t["output_norm.weight"]}))
    assert "blk.0.attn_sinks.weight (blk.0.attn_sinks.weight in edited.gguf) belongs to nothing" in load_error(extra)


def test_missing_mtp_tensor_stops_only_the_draft(directory, tmp_path):
    path = edited(directory, tmp_path, lambda m, t: t.pop("blk.10.nextn.eh_proj.weight"))
    model_host.load_gguf(path)
    assert "model.layers.10.eh_proj.weight" in load_error(path, draft=True)


def test_damage_reaches_who_starts_a_server(file):
    """SGLang asks for the architecture first and would go on with transformers' reader."""
    from sglang.srt.utils.hf_transformers.config import get_config

    model_host.load_plugins()
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(DamagedFile, match=f"{file} is truncated"):
        get_config(str(file), trust_remote_code=False)


def test_other_architectures_stay_sglangs(directory, tmp_path):
    from sglang.srt.utils.hf_transformers import gguf_native

    model_host.load_plugins()
    path = edited(directory, tmp_path, lambda metadata, tensors: metadata.update({"general.architecture": "llama"}))
    assert gguf_native.read_gguf_architecture(str(path)) == "llama"
    assert not gguf_native.has_native_gguf_support(str(path))
    assert gguf.GGUFReader(path).fields  # the package's own reader reads what we wrote
