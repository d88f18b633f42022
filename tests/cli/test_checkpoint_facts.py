"""What doctor says of a checkpoint."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from sglang_step35.assets import NANO, PUBLISHED_CONFIG
from sglang_step35.cli import doctor
from sglang_step35.cli.checkpoint_facts import look
from sglang_step35.cli.readme_command import Device
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import write_gguf

H100 = Device("NVIDIA H100 80GB HBM3", 81_559, (9, 0))


def test_a_whole_checkpoint(tmp_path):
    (text, no_mend), (mtp, _), (room, mend) = look(str(NANO), (), 23.44)
    assert text.startswith("safetensors, bf16, 1 file, 6.5 MiB: BF16 6.5 MiB") and no_mend is None
    assert mtp == "3 MTP layers: drafts with --speculative-num-steps 3"
    assert room.startswith("fits a CPU with 23.4 GiB: 6.5 MiB of weights, 48 requests of ") and mend is None
    assert room.endswith(f"python -m sglang_step35 plan --config {NANO} --cpu-memory-gb 23.4")
    assert look(str(NANO), (H100,) * 2, 512)[2][0].endswith(f"--config {NANO} --devices 2 --memory-gb 79.6")


def test_a_gguf_without_mtp_layers(tmp_path):
    file = tmp_path / "nano.gguf"
    write_gguf(NANO, file, mtp=False)
    (text, _), (mtp, mend), (room, _) = look(str(file), (H100,), 64)
    assert text.startswith("GGUF, gguf, 1 file, 2.6 MiB: Q8_0 2.")
    assert (mtp, mend) == ("no MTP layers: it is served without drafts", None)
    assert room.startswith("fits a CPU with 64 GiB")  # also where there is a GPU


def without_layers(tmp_path, *layers: str) -> str:
    directory = make_checkpoint(tmp_path / "checkpoint")
    weights = load_file(directory / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not set(name.split(".")[2:3]) & set(layers)}
    save_file(kept, directory / "model.safetensors")
    return str(directory)


def test_mtp_layers_that_the_config_names(tmp_path):
    text, mend = look(without_layers(tmp_path, "9", "10", "11"), (), 24)[1]
    assert text == "config.json names 3 MTP layers, the files hold none"
    assert mend == "leave --speculative-algorithm out, or use a file that kept them"
    shutil.rmtree(tmp_path / "checkpoint")
    text, mend = look(without_layers(tmp_path, "11"), (), 24)[1]
    assert (text, mend) == ("config.json names 3 MTP layers, the files hold 2", "download the missing files")


def test_what_does_not_fit():
    text, mend = look(str(NANO), (), 4)[2]
    assert text.startswith("does not fit a CPU with 4 GiB: 6.5 MiB of weights") and mend
    text, mend = look(str(NANO), (H100,) * 8, 512)[2]
    assert text == "--tp 8: does not divide the 4 query heads" and mend.endswith("--memory-gb 79.6 --tp N")


def test_a_quantisation_that_only_gpus_serve(tmp_path):
    directory = make_checkpoint(tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt_fp4"}
    (directory / "config.json").write_text(json.dumps(config))
    text, mend = look(str(directory), (), 64)[2]
    assert "quantization_config.quant_method in config.json is 'modelopt_fp4'" in text and "GPUs" in mend
    assert look(str(directory), (H100,), 64)[2][1] is None


def test_what_is_no_checkpoint(tmp_path):
    [(text, mend)] = look(str(tmp_path / "nowhere"), (), 24)
    assert text == f"{tmp_path}/nowhere: cannot read it: No such file or directory" and "GGUF" in mend
    shutil.copy(PUBLISHED_CONFIG, tmp_path / "config.json")
    [(text, mend)] = look(str(tmp_path), (), 24)
    assert text.endswith("config.json without weights") and "*.safetensors" in mend
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    [(text, mend)] = look(str(tmp_path), (), 24)
    assert "is missing" in text and mend
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    [(text, mend)] = look(str(broken), (), 24)
    assert "broken.gguf" in text and mend == "download or copy the checkpoint again"


@pytest.mark.parametrize("path", [str(NANO), "/nowhere"])
def test_doctor_prints_it(capsys, monkeypatch, path):
    monkeypatch.setattr(doctor, "CHECKS", ())
    code = doctor.main([path])
    out = capsys.readouterr().out
    assert (code, "WRONG" in out) == ((0, False) if path == str(NANO) else (1, True))
    assert "  checkpoint  " in out
