"""Every file of configs/ is complete, commented, and means what it says."""

from pathlib import Path

import pytest
import yaml

from gdmpi import check, config as configuration, libraries, method, model, words
from gdmpi.config import UserError

ROOT = Path(__file__).parents[2]
OBVIOUS = {"name", "out", "rounds", "kind", "optimizer", "weight_decay", "schedule", "validation", "test"}
FILES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def keys(tree, prefix=""):
    for key, value in tree.items():
        free = f"{prefix}{key}" in {"data.columns", "clients.split", "model.others"}
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) and not free else [f"{prefix}{key}"]


def test_there_are_some():
    assert {"llama2-7b-mental-health", "counsel-chat"} <= {path.stem for path in FILES}


def test_it_loads_and_every_key_is_a_real_one(path):
    config, written = configuration.load(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    real = set(keys(config.plain()))
    assert set(keys(written)) <= real
    options = set(method.load(config.method.name).Options.model_fields)
    assert set(written.get("method", {})) <= options | {"name", "weighting"}


def test_it_is_complete_and_every_key_has_its_line(path):
    config, text = configuration.load(path), path.read_text(encoding="utf-8")
    assert set(keys(yaml.safe_load(text))) == set(keys(config.plain())), "a key is missing"
    lines = text.splitlines()
    assert text.startswith("#") and len(lines) > 20
    bare = [line for line in lines if line.startswith("  ") and "#" not in line and not line.rstrip().endswith(":")]
    unexplained = [line.strip() for line in bare if line.split(":")[0].strip() not in OBVIOUS]
    assert not unexplained


def test_the_runs_have_names_of_their_own():
    names = [configuration.load(path).run.name for path in FILES]
    assert len(set(names)) == len(names)


def test_check_accepts_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(libraries, "hub_answers", lambda: False)
    config = configuration.load(path, [f"run.cache={tmp_path}"])
    try:
        model.locate(config.model.name)
    except UserError as error:
        pytest.skip(f"needs a model that is not here: {error}")
    lines = check.report(config)
    assert lines[0].startswith(f"{config.method.name} over {config.run.rounds} rounds")


def test_the_papers_recipe_is_the_papers():
    config = configuration.load(ROOT / "configs" / "llama2-7b-mental-health.yaml")
    assert (config.clients.count, config.train.epochs, config.train.clip_norm) == (5, 1, 0.3)
    assert (config.model.adapter.r, config.model.quantize, config.method.weighting) == (64, "nf4", "uniform")
    shape = check.lay_out(config)
    assert (shape.parameters, shape.nbytes) == (6_738_415_616, 4 * 159_907_840)
    assert words.size(shape.nbytes) == "639.6 MB"


def test_counsel_chat_keeps_the_files_own_parts(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    places = [f"model.name={shared / 'models/tinystories-656k'}", f"data.name={shared / 'data/counsel_chat.jsonl'}"]
    config = configuration.load(ROOT / "configs" / "counsel-chat.yaml", [f"run.cache={tmp_path}", *places])
    text = "\n".join(check.report(config))
    assert "656,000 parameters" in text and "77,824 trainable" in text
    assert "2,129 rows; columns prompt, response" in text and "92 steps a round" in text


def test_the_frameworks_differ_by_their_methods_alone():
    found = {path.stem: configuration.load(path).plain() for path in (ROOT / "configs" / "frameworks").glob("*.yaml")}
    assert {name: plain.pop("method")["name"] for name, plain in found.items()} == {
        "fedllm": "fedit",
        "kd": "kd",
        "split": "split",
    }
    assert {name: plain["run"].pop("name") for name, plain in found.items()} == {name: name for name in found}
    assert {name: plain["data"].pop("public") for name, plain in found.items()} == {"fedllm": 0, "kd": 0.1, "split": 0}
    assert found["fedllm"] == found["kd"] == found["split"]
