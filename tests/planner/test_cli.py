"""`python -m sglang_step35 plan`: the printed text, the JSON line, the command, exit codes and errors."""

import json
import shlex
import subprocess
import sys

import pytest

from sglang_step35 import assets
from sglang_step35.cli.plan import load, main
from sglang_step35.planner.command import serve_line
from sglang_step35.planner.hardware import MACHINES
from sglang_step35.planner.plan import Wish, make_plan

NANO = str(assets.NANO)
SPEC, _ = load(None)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *argv: str) -> dict:
    _, out, _ = run(capsys, *argv, "--json")
    assert out.count("\n") == 1
    return json.loads(out)


# The seed's command, and what a plan may add to it.
SEED = (
    "--served-model-name step3p5-flash --tp-size 8 --tool-call-parser step3p5 "
    "--reasoning-parser step3p5 --speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4 --enable-multi-layer-eagle"
)


def test_command_of_eight_h100_is_the_seeds_with_a_smaller_sliding_pool():
    line = serve_line(make_plan(SPEC, MACHINES["8xh100"], Wish()))
    assert line == (
        f"sglang serve --model-path stepfun-ai/Step-3.5-Flash {SEED} --swa-full-tokens-ratio 0.073 "
        "--host 0.0.0.0 --port 8000"
    )


def test_command_of_four_h200_shards_by_expert():
    line = serve_line(make_plan(SPEC, MACHINES["4xh200"], Wish(context=131_072, concurrency=32)))
    assert "--model-path stepfun-ai/Step-3.5-Flash-FP8 " in line
    assert "--tp-size 4 --ep-size 4 --quantization fp8 " in line
    assert "--context-length 131072 --max-running-requests 32 --swa-full-tokens-ratio 0.019 --host" in line


def test_command_of_a_tight_machine_names_what_differs_from_the_defaults():
    line = serve_line(make_plan(SPEC, MACHINES["dgx-spark"], Wish()))
    assert line.endswith(
        "--context-length 82944 --max-running-requests 1 --swa-full-tokens-ratio 0.086 --mem-fraction-static 0.967 "
        "--chunked-prefill-size 2048 --host 0.0.0.0 --port 8000"
    )
    assert "--quantization" not in line  # named by the checkpoint
    assert "--attention-backend flashinfer" in line  # fa4, SGLang's choice on Blackwell, reads no paged KV there
    assert "--moe-runner-backend triton" in line  # Marlin, the default, would drop the SwiGLU clamp


def test_command_without_mtp_or_with_default_ratio():
    line = serve_line(make_plan(SPEC, MACHINES["8xh200"], Wish(mtp=False, swa_ratio=0.8, page_size=64)))
    assert "speculative" not in line and "eagle" not in line and "--swa" not in line
    assert "--page-size 64 --max-running-requests 48" in line


def test_model_path_of_a_given_config_is_its_folder(capsys):
    _, out, _ = run(capsys, "--config", NANO, "--devices", "1", "--memory-gb", "24")
    assert f"--model-path {shlex.quote(NANO)} " in out
    assert "weights, MiB on each device" in out and "GGUF" not in out


# Text, as printed: (part of a line, the numbers in it), worked out in test_planner.py.
H100_LINES = """
parameters: 196.96B backbone, 11.46B active per token, 0.84B in 3 MTP layers, 1.58B in their own heads
embedding 0.12
attention 1.05
dense feed-forward 0.10
routed experts 44.30
shared experts 0.15
routers 0.18
norms 0.00
output head 0.12
MTP layers 0.36
a head of its own for each 0.37 not counted
an embedding of its own for each 0.37 not counted
total, embedding and head shared 46.39
total if the MTP heads differ 46.76
total with stock SGLang's copies 47.13
for comparison, the GGUF Q4_K_S file: 103.84 GiB (111.5 GB, given)
12 full layers, kept for all tokens 6144
33 sliding layers, 512 tokens + chunk 16896
3 MTP layers, sliding too (8.3% of the sliding pool) 1536
in all 79.65
CUDA context, NCCL (estimate) 3.10
weights 46.39
activations, graphs: not touched 14.39
KV cache 15.76
mem_fraction_static 0.812 (SGLang's default), chunk 8192 tokens, graphs up to 512 requests
full tokens 2260111 810316
sliding tokens 164988 648252
cached prompts beside 48 192 1130
of 131072 tokens 17 6
of 262144 tokens 8 3
FITS: 1 request of 262144 tokens; at most 8 at once
"""


def test_text_of_eight_h100(capsys):
    code, out, err = run(capsys, "--hardware", "8xh100")
    assert (code, err) == (0, "")
    printed = [" ".join(line.split()) for line in out.splitlines()]
    assert [line for line in H100_LINES.strip().splitlines() if line not in printed] == []


def test_text_of_copied_kv_heads(capsys):
    _, out, _ = run(capsys, "--devices", "16", "--memory-gb", "80")
    assert "every KV head is held by 2 devices" in out


def test_text_when_nothing_fits(capsys):
    code, out, _ = run(capsys, "--devices", "8", "--memory-gb", "48")
    assert code == 1
    assert "DOES NOT FIT: 1 request of 262144 tokens: 46.39 GiB of weights leave no room for a KV pool" in out
    assert "sglang serve" not in out
    code, out, _ = run(capsys, "--hardware", "dgx-spark")
    assert code == 1
    assert "DOES NOT FIT: 1 request of 262144 tokens; up to 83901 tokens do, the command takes 82944" in out
    assert "has not been run by us" in out


def test_json_of_eight_h100(capsys):
    plan = run_json(capsys, "--hardware", "8xh100")
    assert (plan["tp"], plan["ep"], plan["quantization"], plan["fits"]) == (8, 1, "bf16", True)
    assert plan["parameters"]["backbone"] == 196_956_130_368 and plan["parameters"]["active"] == 11_459_365_952
    assert plan["weight_bytes"]["resident"] == 49_812_888_832
    assert plan["kv"]["full_cell"] == 6144 and plan["kv"]["sliding_cell"] == 18_432
    assert plan["setup"]["full_tokens"] == 2_260_111 and plan["setup"]["kv_budget_bytes"] == 16_927_185_955
    assert plan["stock_setup"]["full_tokens"] == 810_316
    assert (plan["requests_at_once"], plan["longest_request"]) == (8, 262_144)
    assert plan["command"].startswith("sglang serve --model-path stepfun-ai/Step-3.5-Flash ")


def test_json_without_room_has_no_command(capsys):
    plan = run_json(capsys, "--devices", "8", "--memory-gb", "48")
    assert (plan["fits"], plan["setup"], plan["command"], plan["requests_at_once"]) == (False, None, None, 0)


def test_machines_of_llama_cpp(capsys):
    code, out, _ = run(capsys, "--hardware", "mac-studio")
    assert code == 0
    for line in ("GGUF Q4_K_S (given) 103.84", "KV cache of 262144 tokens 12.14", "usable as shipped 96.00"):
        assert line in [" ".join(printed.split()) for printed in out.splitlines()]
    assert "FITS with the GPU limit raised" in out and "untried on macOS" in out
    judged = run_json(capsys, "--hardware", "mac-studio", "--context", "32768")
    assert (judged["engine"], judged["fits"], judged["command"]) == ("llama.cpp", True, None)
    assert judged["kv_bytes"] == 32_768 * 49_152 + 1024 * 147_456


def test_a_machine_of_the_portable_platform(capsys):
    code, out, _ = run(capsys, "--hardware", "ai-max-395", "--context", "131072", "--concurrency", "1")
    assert code == 0
    printed = [" ".join(line.split()) for line in out.splitlines()]
    assert "AMD AI Max+ 395 128 GB, gguf, on the CPU" in printed
    assert "the server's processes (estimate) 1.50" in printed and "CUDA" not in out and "graphs" not in out
    assert "FITS: 1 request of 131072 tokens; at most 1 at once" in printed
    line = printed[-1]
    assert "--model-path /path/to/step-3.5-flash-Q4_K_S.gguf " in line and "--tp-size" not in line
    assert "--device cpu --tool-call-parser" in line
    assert "--mem-fraction-static 0.969 --max-total-tokens 131372 --host" in line


def test_a_cpu_by_its_memory(capsys):
    plan = run_json(capsys, "--cpu-memory-gb", "125.5", "--quantization", "int4")
    assert (plan["engine"], plan["quantization"], plan["machine"]) == ("portable", "int4", "a CPU with 125.5 GiB")
    assert plan["fits"] is False and plan["longest_request"] > 200_000


def test_the_weights_of_a_given_checkpoint_are_its_files(capsys):
    plan = run_json(capsys, "--config", NANO, "--cpu-memory-gb", "16")
    stored = sum(file.stat().st_size for file in assets.NANO.glob("*.safetensors"))
    assert plan["checkpoint"]["path"] == NANO and plan["checkpoint"]["mtp"] == 3
    assert plan["checkpoint"]["bytes"] == pytest.approx(stored, rel=0.02)
    assert plan["weight_bytes"]["resident"] == pytest.approx(stored, rel=0.02)
    _, out, _ = run(capsys, "--config", NANO, "--cpu-memory-gb", "16")
    assert f"weights, MiB in {NANO}" in out


def test_overview_has_a_line_for_every_machine(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1 : len(MACHINES) + 1]] == list(MACHINES)
    machines = run_json(capsys)["machines"]
    assert [row["name"] for row in machines] == list(MACHINES)
    assert {row["name"]: row["fits"] for row in machines}["dgx-spark"] is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--hardware abacus", "--hardware abacus: unknown; expected one of 8xh100, "),
        ("--hardware 8xh100 --devices 2", "--hardware: names the devices already"),
        ("--devices 2", "--memory-gb: missing"),
        ("--hardware 8xh100 --cpu-memory-gb 64", "--hardware: names the devices already"),
        ("--devices 2 --cpu-memory-gb 64", "--cpu-memory-gb: is for machines without a GPU"),
        (f"--config {NANO} --cpu-memory-gb 64 --quantization int4", "is bf16; leave the option out"),
        ("--memory-gb 80", "--devices: missing"),
        ("--quantization fp8", "--quantization: needs a machine"),
        (f"--config {NANO}", "--config: needs a machine"),
        (f"--config {NANO} --hardware mac-studio", "--config: the GGUF figure is of the published"),
        (
            "--config /nowhere/config.json --hardware 8xh100",
            "--config /nowhere/config.json: cannot read it: No such file",
        ),
        (f"--config {__file__} --hardware 8xh100", "is no GGUF file"),
        ("--hardware 8xh100 --tp 3", "--tp 3: does not divide the 64 query heads"),
        ("--hardware 4xh200 --ep 1", "--ep 1: --tp 4 cuts experts of width 1280"),
        ("--hardware 8xh100 --context 262145", "--context 262145: the model takes 262144 tokens"),
        ("--hardware 8xh100 --quantization gguf", "--quantization gguf: SGLang's GGUF kernels"),
        ("--hardware mac-studio --quantization int4", "--quantization int4: not on Mac Studio"),
        ("--cpu-memory-gb 64 --tp 2", "--tp 2: more than the 1 device"),
    ],
)
def test_errors_name_the_option(capsys, argv: str, message: str):
    code, out, err = run(capsys, *argv.split())
    assert (code, out) == (2, "")
    assert err.startswith("plan: error: ") and message in err


def test_a_config_that_is_no_json(capsys, tmp_path):
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        code, _, err = run(capsys, "--config", str(tmp_path), "--hardware", "8xh100")
        assert code == 2 and message in err


@pytest.mark.parametrize("argv", ["--concurrency 0", "--memory-gb x", "--mem-fraction-static 1.5", "--quantization q2"])
def test_bad_values_are_refused_by_the_parser(capsys, argv: str):
    with pytest.raises(SystemExit, match="2"):
        main(argv.split())
    assert f"argument {argv.split()[0]}" in capsys.readouterr().err


def test_runs_as_a_command_without_torch_and_sglang():
    script = (
        "import sys; from sglang_step35.__main__ import main; code = main(['plan', '--hardware', '8xh100', '--json']); "
        "assert not {'torch', 'sglang', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True
