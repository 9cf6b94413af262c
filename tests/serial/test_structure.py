"""The rules of the code base: who may import whom, sizes, docstrings, what lies where, style."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launch

from gdmpi import method

PACKAGE = ROOT / "gdmpi"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
METHODS = sorted(name for name in TREES if name.startswith("methods/"))
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "matplotlib"}
LIGHT = "mpi config flat codecs checkpoint schedule method hosting server_opt rng record results".split()
LIGHT += "report points compare plot events words launcher".split()
MAY_BE_IMPORTED_BY_METHODS = {"method", "flat", "rng", "model", "train", "server_opt", "config", "errors", "lowrank"}
MAY_BE_IMPORTED_BY_METHODS |= {"halves", "distil"}
TOP = {"setup.cfg", "pyproject.toml", "gdmpi", "slurm", "configs", "tests", "README.md", "LICENSE", "constraints.txt"}


def imports(nodes):
    """The dotted names that import statements among some nodes bring in: gdmpi.flat for 'from gdmpi import flat'."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "gdmpi":
                yield from (f"gdmpi.{alias.name}" for alias in node.names)
            else:
                yield node.module


def at_import(tree):
    """The statements that run when a module is imported: not the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def roots(names):
    return {name.partition(".")[0] for name in names}


# ---- who imports whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", METHODS)
def test_methods_import_the_interface_and_never_each_other(file):
    own = {name.split(".")[1] for name in imports(ast.walk(TREES[file])) if name.startswith("gdmpi.")}
    assert own <= MAY_BE_IMPORTED_BY_METHODS


def test_only_mpi_py_imports_mpi4py():
    users = {file for file, tree in TREES.items() if "mpi4py" in roots(imports(ast.walk(tree)))}
    assert users == {"mpi.py"}


@pytest.mark.parametrize("module", LIGHT)
def test_no_heavy_import_at_module_level(module):
    assert not roots(imports(at_import(TREES[f"{module}.py"]))) & HEAVY


IMPORT_ALL = """
import sys
names = sys.argv[1:]
for first in names:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "gdmpi"]:
        del sys.modules[loaded]
    __import__(first)
    heavy = {"torch", "transformers", "peft", "datasets", "bitsandbytes"} & set(sys.modules)
    assert not heavy, (first, heavy)
    assert "mpi4py.MPI" not in sys.modules, first
"""


def test_every_module_can_be_imported_first_and_none_is_heavy():
    """One after the other, each as if it were the first: a cycle would show; what they import together is light."""
    skipped = {"demo/make.py", "kernels.py"}  # a script of its own; what is made of torch, imported where it is used
    names = [f"gdmpi/{file}"[:-3].removesuffix("/__init__").replace("/", ".") for file in TREES if file not in skipped]
    assert "gdmpi.run" in names and "gdmpi.methods.gradualdiff" in names
    launch(names, program=("-c", IMPORT_ALL)).ok()


def test_importing_a_run_imports_no_torch():
    launch([], program=("-c", "import sys, gdmpi.run; sys.exit('torch' in sys.modules)")).ok()


HELP = """
import sys
from gdmpi.__main__ import main
try:
    main(["--help"])
except SystemExit as leaving:
    assert leaving.code == 0
heavy = {"numpy", "torch", "yaml", "pydantic", "h5py", "mpi4py"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_is_quick_and_imports_nothing():
    assert "RUN_DIR" not in launch([], program=("-c", HELP)).ok().err
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        result = launch(["--help"]).ok()
        seconds.append(time.perf_counter() - begin)
    assert all(command in result.out for command in "run resume check show plot verify export eval audit bench".split())
    assert min(seconds) < 1


# ---- sizes and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TREES)
def test_no_file_is_long(file):
    lines = (PACKAGE / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 420


def documented(node, what):
    """Problems of a docstring: it is missing, or its first sentence does not end."""
    text = ast.get_docstring(node)
    if not text:
        return [f"{what}: no docstring"]
    first = " ".join(text.split("\n\n")[0].split())
    return [] if first.endswith((".", ":")) else [f"{what}: {first[-50:]!r}"]


def undocumented(tree):
    """Problems of a module, its public functions and classes, and their public methods.

    A class that extends one of this package may leave the words to it, and so may a method of a few statements.
    """
    found = documented(tree, "the module")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) or not node.bases:
                found += documented(node, node.name)
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    short = sum(isinstance(part, ast.stmt) for part in ast.walk(inner)) <= 10
                    if ast.get_docstring(inner) or not short:
                        found += documented(inner, f"{node.name}.{inner.name}")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found += documented(node, node.name)
    return found


@pytest.mark.parametrize("file", TREES)
def test_what_is_public_is_documented_in_sentences(file):
    assert undocumented(TREES[file]) == []


def test_the_rule_on_docstrings_finds_something():
    source = '"""Fine."""\ndef bare(): pass\ndef open():\n    """No full stop"""\nclass Bare: pass\ndef _own(): pass\n'
    assert [line.partition(":")[0] for line in undocumented(ast.parse(source))] == ["bare", "open", "Bare"]


# ---- what lies where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "nowhere", "--texts", "f.jsonl", "evaluation.generate=5"], "nowhere"),
        (["audit", "--json", "nowhere", "rows=20"], "nowhere"),
        (["show", "nowhere", "--format", "html"], "invalid choice: 'html'"),
        (["eval", "nowhere", "--text=f", "--colour"], "unrecognized arguments: --colour"),
        (["verify", "one", "two"], "unrecognized arguments: two"),
    ],
)
def test_words_and_options_in_any_order_and_mistakes_in_one_line(words, says):
    result = launch(words)
    assert result.code == 2 and says in result.err, result.err
    assert result.err.count("\n") == 1 and result.err.startswith("gdmpi: ")


def test_every_file_of_the_methods_folder_is_a_method():
    files = {path.stem for path in (PACKAGE / "methods").iterdir() if path.name not in {"__init__.py", "__pycache__"}}
    assert files == set(method.available()) and "gradualdiff" in files
    for name in files:
        module = method.load(name)
        assert issubclass(module.Server, method.Server) and issubclass(module.Client, method.Client)
        assert module.Options() is not None
        assert set(module.Server.schedules) <= {"sync", "hybrid", "async"} and module.Server.schedules


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_methods_of_the_tests_keep_the_same_rules(path):
    assert method.load(str(path)).Options() is not None
    own = {n.split(".")[1] for n in imports(ast.walk(ast.parse(path.read_text()))) if n.startswith("gdmpi.")}
    assert own <= MAY_BE_IMPORTED_BY_METHODS


def test_top_of_the_repository_is_tidy():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"git does not list this checkout: {listed.stderr.strip()}")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP
    assert {"gdmpi", "tests", "setup.cfg", "LICENSE"} <= top
    tracked = listed.stdout.splitlines()
    assert not [name for name in tracked if name.startswith(("runs/", "cache/")) or name.endswith((".pyc", ".part"))]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_style(command):
    beside = Path(sys.executable).parent / "ruff"
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    words = [ruff, *command, "--no-cache", "."]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert result.returncode == 0, result.stdout + result.stderr


def test_installed_package_is_this_checkout():
    installed = Path(importlib.util.find_spec("gdmpi").origin).parent
    theirs, ours = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.py")} for root in (installed, PACKAGE)
    )
    stale = sorted(str(path) for path in theirs.keys() | ours if theirs.get(path) != ours.get(path))
    assert not stale, f"{installed} is not this checkout's: install it again (pip install .); it differs in {stale}"
