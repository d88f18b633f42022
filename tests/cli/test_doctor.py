"""The doctor: healthy here, non-zero with the mend where something is wrong, and an honest word on the machine."""

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from sglang_step35 import plugin, upstream
from sglang_step35.cli import doctor
from sglang_step35.cli.readme_command import Device, outcome
from sglang_step35.cli.threads import advice
from sglang_step35.packed import amx_rows, int8_rows

H100 = Device("NVIDIA H100 80GB HBM3", 81_559, (9, 0))
GB10 = Device("NVIDIA GB10", 122_070, (12, 1))


def report(capsys) -> tuple[int, str]:
    code = doctor.main([])
    return code, capsys.readouterr().out


def mends(out: str) -> list[str]:
    return [line.split("-> ")[1] for line in out.splitlines() if "-> " in line]


@pytest.fixture
def versions(monkeypatch):
    """`versions(sglang="0.5.24")`: what the metadata say is installed; None for a missing package."""
    real = importlib.metadata.version

    def pretend(**installed):
        def version(name):
            found = installed.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(plugin, "_registered", False)

    return pretend


@pytest.fixture
def entries(monkeypatch):
    """`entries(...)`: entry points of SGLang's two groups, as (group, value) of plug-ins named step35."""

    def pretend(*found):
        points = EntryPoints(EntryPoint("step35", value, group) for group, value in found)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.select(group=group))

    return pretend


def test_a_healthy_installation(capsys):
    code, out = report(capsys)
    assert code == 0, out
    assert "WRONG" not in out and mends(out) == []
    topics = "versions plug-in upstream register machine platform serve threads kernels"
    for topic in topics.split():
        assert f"  {topic} " in out
    assert f"{len(upstream.TABLE)} names with their signatures" in out


def test_the_kernels_for_a_cpu(monkeypatch):
    for vnni, amx, said in ((0, 0, "passed"), (1, 0, "ours for AVX-512 VNNI"), (1, 1, "ours for AVX-512 VNNI and AMX")):
        monkeypatch.setattr(int8_rows, "supported", lambda vnni=vnni: vnni)
        monkeypatch.setattr(amx_rows, "supported", lambda amx=amx: amx)
        (found,) = doctor.check_kernels()
        assert found.text.endswith(said)


def test_without_the_kernels_of_ggml(capsys, versions):
    """Slow, not wrong."""
    versions(ik_llama_cpp_python=None)
    code, out = report(capsys)
    assert code == 0
    assert "kernels     plain torch, slow with" in out and "pip install ik-llama-cpp-python==0.1.5" in out


def test_another_sglang(capsys, versions):
    versions(sglang="0.5.24")
    code, out = report(capsys)
    assert code == 1
    assert "WRONG  versions    sglang 0.5.24" in out
    assert mends(out)[0] == "pip install sglang==0.5.23"
    assert "WRONG  register" in out and "refuses to let stock code serve" in out


def test_no_sglang(capsys, versions):
    versions(sglang=None)
    code, out = report(capsys)
    assert code == 1
    assert "sglang is missing" in out and mends(out)[0] == "pip install sglang==0.5.23"


def test_sglang_that_cannot_be_imported():
    """In a process of its own: nothing of SGLang is loaded yet."""
    code = "import sys; sys.modules['sglang'] = None; from sglang_step35.cli import doctor; sys.exit(doctor.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "WRONG  import" in done.stdout and mends(done.stdout)[-1] == "pip install sglang==0.5.23 sglang-step35"


def test_missing_torch_names_the_package(versions):
    versions(torch=None)
    [finding] = [finding for finding in doctor.check_versions() if finding.mend]
    assert (finding.text, finding.mend) == ("torch is missing", "pip install torch")


def test_no_entry_points(capsys, entries):
    entries()
    code, out = report(capsys)
    assert code == 1
    assert mends(out) == ["reinstall sglang-step35 (pip install .)"] * 2


def test_one_entry_point_missing(entries):
    entries(("sglang.srt.plugins", "sglang_step35.plugin:register"))
    assert [finding.mend is None for finding in doctor.check_entry_points()] == [True, False]


def test_somebody_elses_entry_point(entries):
    entries(
        ("sglang.srt.plugins", "other.plugin:register"),
        ("sglang.srt.platforms", "sglang_step35.plugin:activate_platform"),
    )
    [finding] = [finding for finding in doctor.check_entry_points() if finding.mend]
    assert finding.mend == "uninstall the package that names other.plugin:register step35"


@pytest.mark.parametrize(
    ("variable", "value", "mend"),
    [
        ("SGLANG_PLUGINS", "other, another", "unset SGLANG_PLUGINS or add step35 to it"),
        ("SGLANG_PLATFORM", "nowhere", "unset SGLANG_PLATFORM, or set it to step35"),
    ],
)
def test_variables_that_keep_us_out(monkeypatch, variable, value, mend):
    monkeypatch.setenv(variable, value)
    findings = doctor.check_entry_points()
    assert [finding.mend for finding in findings if finding.mend] == [mend]
    monkeypatch.setenv(variable, "step35")
    assert all(finding.mend is None for finding in doctor.check_entry_points())


def test_a_changed_upstream_name(capsys, monkeypatch):
    gone = upstream.Upstream("sglang.srt.model_loader.utils.no_such_function", ())
    monkeypatch.setattr(upstream, "TABLE", (*upstream.TABLE, gone))
    code, out = report(capsys)
    assert code == 1
    assert "no_such_function" in out and mends(out) == ["reinstall sglang==0.5.23"]


def test_the_command_on_a_cpu():
    first, second = outcome((), 24)
    assert "GiB of bf16 weights into 24 GiB: does not fit" in first
    assert "nano-cpu" in second
    assert outcome((), 125)[1].endswith("plan --cpu-memory-gb 125 --quantization gguf")
    assert outcome((), 200)[1].endswith("plan --cpu-memory-gb 200 --quantization gguf")
    assert outcome((), 240)[1].endswith("plan --cpu-memory-gb 240 --quantization int8")
    first, second = outcome((), 2048)
    assert first.endswith("into 2048 GiB: fits") and second.endswith("--cpu-memory-gb 2048 --quantization bf16")


def test_the_command_on_eight_gpus():
    first, second = outcome((H100,) * 8, 2048)
    assert "command starts" in first and "GiB of weights on each GPU" in first
    assert second.endswith("plan --devices 8 --memory-gb 79.6 --quantization bf16")
    small = Device("NVIDIA L4", 23_034, (8, 9))
    first, second = outcome((small,) * 8, 512)
    assert "runs out of memory" in first
    assert "--devices 8 --memory-gb 22.5 --quantization int4" in second


def test_the_command_on_fewer_gpus():
    first, second = outcome((H100,), 256)
    assert "asks for 8 GPUs (--tp-size 8), here are 1" in first
    assert "no 4-bit checkpoint fits 1 x 80 GiB" in second
    assert outcome((H100,) * 4, 256)[1].endswith("--devices 4 --memory-gb 79.6 --quantization fp8")


def test_the_command_on_a_dgx_spark():
    lines = outcome((GB10,), 119)
    assert lines[1].endswith("--quantization int4")
    assert "--attention-backend flashinfer" in lines[2]


def test_threads_of_a_cpu_server():
    [(text, mend)] = advice(32, 16, 1, None)
    assert text.startswith("16 physical cores, 32 hardware threads, 1 NUMA node; a server computes with 16")
    assert mend is None
    assert advice(32, 16, 1, "16")[0][1] is None
    for wrong in ("32", "0", "many"):
        assert "to the number of physical cores, 16" in advice(32, 16, 1, wrong)[0][1]
    assert "a larger model wants them all" in advice(2, 2, 1, "1")[0][0] and advice(2, 2, 1, "1")[0][1] is None
    assert "--tp-size 4 gives each rank a node" in advice(64, 32, 4, None)[1][0]


def test_devices_are_reported(monkeypatch):
    monkeypatch.setattr(plugin, "activate_platform", lambda: None)
    monkeypatch.setattr(doctor, "cuda_devices", lambda: (H100,) * 8)
    texts = [finding.text for finding in doctor.check_machine()]
    assert texts.count("NVIDIA H100 80GB HBM3, 81559 MiB, SM 9.0") == 8
    assert "SGLang's own platform with our model and MTP worker" in texts
    assert all(finding.mend is None for finding in doctor.check_machine())


@pytest.mark.gpu
def test_real_devices():
    assert all(device.memory > 0 and device.capability >= (5, 0) for device in doctor.cuda_devices())
