import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_step35.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
# Trained or upstream data may hold such words by chance.
DATA = ("sglang_step35/nano/", "LICENSE")
ADDRESSES = re.compile(
    r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|index[-_]url|find[-_]links"
    r"|(?<![\w.:/-])/(?:root|work|opt/wheels|opt/pypi)/"
)


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def project_files() -> list[Path]:
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if name and not name.startswith(DATA)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script_parses_and_is_executable(script):
    done = run("bash", "-n", str(script))
    assert done.returncode == 0, done.stderr
    assert script.stat().st_mode & 0o111


def test_constraints_are_exact_versions_without_addresses():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "sglang==0.5.23" in lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!+]*", line)] == []
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)


def test_no_registry_host_or_machine_path_in_project_files():
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in ADDRESSES.finditer(text)]
    assert found == []


def test_nano_command_prints_the_checkpoint_folder():
    done = run(sys.executable, "-m", "sglang_step35", "nano")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_absolute()
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_explains_itself(command):
    done = run(sys.executable, "-m", "sglang_step35", command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_unknown_command_is_refused():
    done = run(sys.executable, "-m", "sglang_step35", "no-such-command")
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_serve_lists_presets_without_a_valid_one():
    done = run("bash", "scripts/serve.sh", "no-such-preset")
    assert done.returncode == 2
    assert "presets:" in done.stderr
