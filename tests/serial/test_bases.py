"""A base that is cast or quantised is made once: what its key stands for, whole or not there, and the same bits."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_model

from gdmpi import bases, config as configuration, model

NF4, CAST = "model.quantize=nf4", "model.dtype=bfloat16"


@pytest.fixture
def place(tiny, tmp_path):
    """A copy of the tiny model that a test may change, with settings for sampling that only loading puts up with."""
    directory = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    settings = json.loads((directory / bases.GENERATION).read_text()) | {"do_sample": False, "temperature": 0.6}
    (directory / bases.GENERATION).write_text(json.dumps(settings))
    return directory


def configured(place, *words):
    return configuration.load(None, [f"model.name={place}", f"run.cache={place.parent / 'cache'}", *words])


def on_cpu():
    import torch

    return torch.device("cpu")


def entry_of(place, *words):
    return model.kept(configured(place, *words), on_cpu())


def make(place, *words, then=lambda: None):
    """Make the entry; then() is called when the base is loaded and not yet written. (Entry, warnings)."""
    config = configured(place, *words)
    entry = model.kept(config, on_cpu())

    def load():
        base = model.load_base(config, on_cpu(), fresh=True)
        then()
        return base

    return entry, bases.make(entry, load)


def mapped_files(base):
    """The names of the mapped files that frozen parameters lie in; None among them for memory of this process's own."""
    areas = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        areas.append((*(int(end, 16) for end in span.split("-")), name[0] if name and name[0][0] == "/" else None))
    return {
        next(name for low, high, name in areas if low <= p.data_ptr() < high)
        for p in base.parameters()
        if not p.requires_grad
    }


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---- what is made, and what for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[NF4], [CAST], [NF4, CAST], [NF4, "model.dtype=float16"]], ids=" ".join)
def test_what_is_made_is_mapped_and_has_the_bits_of_what_is_loaded(place, words):
    import torch

    config, (entry, said) = configured(place, *words), make(place, *words)
    assert said == [] and bases.state(entry) == bases.WHOLE
    ours, plain = model.load_base(config, on_cpu()), model.load_base(config, on_cpu(), fresh=True)
    assert mapped_files(ours) == {str(entry.path / "model.safetensors")}
    assert str(entry.path / "model.safetensors") not in mapped_files(plain)
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    assert all(mine[name].dtype == each.dtype and torch.equal(mine[name], each) for name, each in theirs.items())
    assert ours.config.to_dict() == plain.config.to_dict()
    assert ours.generation_config.to_dict() == plain.generation_config.to_dict()
    assert ours.name_or_path == plain.name_or_path == str(place)
    assert not any(layer.support_avx512bf16_for_cpu for layer in model.four_bit_layers(ours))
    if NF4 in words:  # what export --merge does
        ours, plain = ours.dequantize().state_dict(), plain.dequantize().state_dict()
        assert all(torch.equal(ours[name], each) for name, each in plain.items())


@pytest.mark.parametrize("words", [[NF4], [CAST]], ids=" ".join)
def test_fingerprint_adapter_and_gradients_are_the_same_bits(place, words):
    import torch

    config, tokens = configured(place, *words), torch.arange(3, 40)[None]
    plain = model.build(config, on_cpu())
    make(place, *words)
    ours = model.build(config, on_cpu())
    assert mapped_files(ours.model) != mapped_files(plain.model)
    assert ours.base_sha256 == plain.base_sha256 and ours.adapter_config() == plain.adapter_config()
    assert torch.equal(ours.vector, plain.vector) and ours.warnings == []
    for each in (ours, plain):
        each.model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert torch.equal(ours.gradient, plain.gradient) and ours.gradient.any()


def test_what_is_used_as_saved_is_mapped_and_makes_no_entry(place):
    for words in ([], ["model.dtype=float32"]):
        assert entry_of(place, *words) is None
        base = model.load_base(configured(place, *words), on_cpu())
        assert mapped_files(base) == {str(place / "model.safetensors")}
    assert model.kept(configuration.load(None, []), on_cpu()) is None, "the demo"
    import torch

    assert model.kept(configured(place, NF4), torch.device("cuda", 0)) is None
    assert entry_of(place, NF4) and not (place.parent / "cache").exists()


def test_a_config_json_that_names_another_dtype_than_the_weights_means_a_cast(place):
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}))
    entry, said = make(place)
    assert said == [] and entry.about["dtype"] == "float16"
    assert mapped_files(model.load_base(configured(place), on_cpu())) == {str(entry.path / "model.safetensors")}
    assert entry_of(place, "model.dtype=float16") == entry, "the choice that a resumed run has in its settings"


def test_weights_in_several_files_are_read_and_those_that_lie_beside_them_are_not(tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    base.save_pretrained(tmp_path / "model", max_shard_size="50kB")
    assert entry_of(tmp_path / "model") is None
    before = entry_of(tmp_path / "model", CAST)
    assert len(before.about["files"]) > 2
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"other")
    assert entry_of(tmp_path / "model", CAST) == before
    entry, said = make(tmp_path / "model", CAST)
    assert said == [] and bases.state(entry) == bases.WHOLE


# ---- the key -------------------------------------------------------------------------------------------------------


def test_the_key_is_the_same_until_something_changes(place, tmp_path):
    first = entry_of(place, NF4)
    assert entry_of(place, NF4) == entry_of(place, NF4, "model.dtype=float32", "run.seed=3") == first
    (tmp_path / "link").symlink_to(place)
    assert entry_of(tmp_path / "link", NF4).path == first.path
    others = [entry_of(place, CAST), entry_of(place, NF4, CAST), entry_of(shutil.copytree(place, tmp_path / "b"), NF4)]
    keys = {entry.path.name for entry in (first, *others)}
    weights = place / "model.safetensors"
    about = weights.stat()
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    keys.add(entry_of(place, NF4).path.name)
    with weights.open("ab") as file:
        file.write(b"\0")
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    keys.add(entry_of(place, NF4).path.name)
    with (place / "config.json").open("a") as file:
        file.write("\n")
    keys.add(entry_of(place, NF4).path.name)
    assert len(keys) == 7


@pytest.mark.parametrize("library", ["transformers", "bitsandbytes", "torch"])
def test_another_version_is_another_key(place, library, monkeypatch):
    before, real = entry_of(place, NF4), bases.importlib.metadata.version
    monkeypatch.setattr(bases.importlib.metadata, "version", lambda name: "0" if name == library else real(name))
    assert entry_of(place, NF4).path != before.path


# ---- whole or not there --------------------------------------------------------------------------------------------


def cut(entry):
    os.truncate(entry.path / "model.safetensors", 1000)


def overwrite_header(entry):
    with (entry.path / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff")


def lose_a_file(entry):
    (entry.path / "model.safetensors").unlink()


def change_its_config(entry):
    (entry.path / "config.json").write_text("{}")


def half_a_mark(entry):
    os.truncate(entry.path / bases.ABOUT, 40)


def no_mark(entry):
    (entry.path / bases.ABOUT).unlink()


@pytest.mark.parametrize("harm", [cut, overwrite_header, lose_a_file, change_its_config, half_a_mark, no_mark])
def test_a_damaged_entry_is_not_used_and_is_made_again_with_one_line(place, harm):
    entry, _ = make(place, CAST)
    harm(entry)
    assert bases.state(entry) not in (bases.WHOLE, bases.ABSENT)
    assert mapped_files(model.load_base(configured(place, CAST), on_cpu())) == {None}
    (line,) = make(place, CAST)[1]
    assert "was damaged (" in line and line.endswith("so it was made again") and "\n" not in line
    assert bases.state(entry) == bases.WHOLE and names(entry.path.parent) == [entry.path.name]
    assert make(place, CAST)[1] == []


@pytest.mark.parametrize("harm", [None, cut])
def test_of_two_makers_at_once_the_first_ones_is_kept(place, harm):
    if harm:
        harm(make(place, NF4)[0])
    entry, said = make(place, NF4, then=lambda: make(place, NF4))
    assert said == [] and bases.state(entry) == bases.WHOLE
    assert names(entry.path.parent) == [entry.path.name]


def test_who_comes_between_the_last_look_and_the_name_does_no_harm(place, monkeypatch):
    real = bases._rename

    def late(part, path):
        monkeypatch.setattr(bases, "_rename", real)
        make(place, CAST)
        real(part, path)

    monkeypatch.setattr(bases, "_rename", late)
    entry, said = make(place, CAST)
    assert said == [] and bases.state(entry) == bases.WHOLE and names(entry.path.parent) == [entry.path.name]


SLOW = """
import sys, time
from pathlib import Path
import test_bases
place, mark = map(Path, sys.argv[1:])
def wait():
    mark.touch()
    time.sleep(60)
test_bases.make(place, test_bases.CAST, then=wait)
"""


def test_what_a_killed_maker_leaves_is_swept_and_what_a_living_one_writes_is_not(place, tmp_path):
    mark, folders = tmp_path / "mark", (ROOT, ROOT / "tests", ROOT / "tests" / "serial")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    maker = subprocess.Popen([sys.executable, "-c", SLOW, str(place), str(mark)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert maker.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        other, said = make(place, NF4)
        assert said == []
        assert len(names(other.path.parent)) == 3, "the entry, what is being written, and its lock"
    finally:
        maker.kill()
        maker.wait()
    entry, said = make(place, CAST)
    assert said == [] and names(entry.path.parent) == sorted([entry.path.name, other.path.name])


def test_a_cache_that_cannot_be_written_is_a_line_and_nothing_is_loaded(place):
    (place.parent / "cache").write_text("in the way")
    entry = entry_of(place, NF4)
    (line,) = bases.make(entry, lambda: pytest.fail("loaded in vain"))
    assert line.startswith("run.cache: no base can be kept in") and line.endswith("every rank has a copy of its own")
    assert bases.state(entry) == bases.ABSENT
    assert model.build(configured(place, NF4), on_cpu()).warnings == []


@pytest.mark.parametrize("how", ["no space", "full while writing"])
def test_a_full_disk_is_a_line_and_leaves_nothing(place, how, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    if how == "no space":
        full = type(shutil.disk_usage("/"))(1000, 1000, 0)
        monkeypatch.setattr(bases.shutil, "disk_usage", lambda path: full)
    else:

        def fail(self, directory):
            (directory / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    entry, (line,) = make(place, CAST)
    assert ("are needed and 0 free" in line) if how == "no space" else ("No space left on device" in line)
    assert "\n" not in line and bases.state(entry) == bases.ABSENT and names(entry.path.parent) == []


def test_others_may_read_what_is_made(place):
    before = os.umask(0o022)
    try:
        entry, _ = make(place, CAST)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in entry.path.iterdir()} == {0o644}
