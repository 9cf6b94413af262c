"""What is exported means outside of gdmpi what it meant in the run: the loss is the one that the run reported."""

import json
import shutil

import pytest
from conftest import launch, tiny_model, tiny_rows, tiny_tokenizer, within, write_rows

from gdmpi import adapters, checkpoint, config as configuration, data, evaluate, export, log, model, mpi, results, train
from gdmpi.errors import UserError

CLOSE = 1e-4  # between a sum of two products and a product with a sum, in float32


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written to where pytest was started: the default of run.cache is relative."""
    monkeypatch.chdir(tmp_path)


def alone():
    """The Link of a single process."""
    from mpi4py import MPI

    return mpi.Link(MPI.COMM_SELF)


def score(source, *words, path=None):
    """(title, Config, {kind: (loss, tokens, rows)}, notes) of export.score()."""
    title, config, scores, notes = export.score(alone(), str(source), path and str(path), list(words))
    return title, config, {kind: (found.loss, found.tokens, rows) for kind, (found, rows, *_) in scores.items()}, notes


def says(source, *words, path=None):
    with pytest.raises(UserError) as caught:
        score(source, *words, path=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def settings(tiny, name):
    return [
        *(f"run.name={name}", f"run.out={tiny}/exported", f"run.cache={tiny}/cache", "run.rounds=2", "clients.count=2"),
        *(f"model.name={tiny}/model", f"data.name={tiny}/data.jsonl", "data.max_length=64", "data.validation=0.2"),
        *("train.batch_size=8", "train.lr=0.02", "train.dtype=float32", "model.adapter.r=4"),
    ]


@pytest.fixture(scope="session")
def done(tiny):
    """The directory of a run of two clients and two rounds by the command line."""
    within(["run", *settings(tiny, "plain")]).ok()
    return tiny / "exported" / "plain"


VARIANTS = {
    "rslora": ["model.adapter.rslora=true", "model.adapter.alpha=5"],
    "head": ["model.adapter.targets=[q_proj, lm_head]"],
    "embedding": ["model.adapter.targets=[v_proj, embed_tokens]"],
    "nf4": ["model.quantize=nf4"],
    "gpt2": ["model.name={tiny}/gpt2"],  # its linear layers hold their weights transposed
    "gpt2-nf4": ["model.name={tiny}/gpt2", "model.quantize=nf4"],
}


def tiny_gpt2(directory):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    count = len(tiny_tokenizer(directory, [row["prompt"] + row["response"] for row in tiny_rows(60)]))
    torch.manual_seed(0)
    sizes = {"vocab_size": count, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(directory)


@pytest.fixture(scope="session")
def trained(tiny, done):
    """trained(name): the run directory of a variant, run once, in this process."""

    tiny_gpt2(tiny / "gpt2")

    def get(name):
        directory = tiny / "exported" / name
        if name != "plain" and not directory.exists():
            from gdmpi import run

            words = [word.format(tiny=tiny) for word in VARIANTS[name]]
            config = configuration.load(overrides=[*settings(tiny, name), *words])
            run.play(alone(), config, log.Log(False))
        return directory

    return get


@pytest.fixture(scope="session")
def merged(trained):
    """merged(name): the directory of a variant's merged model."""

    def get(name):
        directory = trained(name).parent / f"{name}-merged"
        if not directory.exists():
            export.export(trained(name), directory, True)
        return directory

    return get


def reported(directory):
    row = checkpoint.newest(directory, pytest.fail)[1].metrics[-1]
    return row["eval_loss"], row["test"]["loss"]


def independent(network, directory):
    """The loss on the run's validation rows, by other code than the program's."""
    import torch

    config = configuration.load(directory / "config.yaml")
    rows = data.prepare(config, model.tokenizer(config.model.name)).validation
    total = count = 0
    for first in range(0, len(rows), 5):
        pieces = [rows.row(i) for i in range(first, min(first + 5, len(rows)))]
        width = max(len(tokens) for tokens, _ in pieces)
        ids = torch.tensor([tokens.tolist() + [0] * (width - len(tokens)) for tokens, _ in pieces])
        seen = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in pieces])
        with torch.no_grad():
            scores = torch.log_softmax(network.eval()(ids, attention_mask=seen).logits.double(), -1)
        for i, (tokens, target) in enumerate(pieces):
            for place in target.nonzero()[0]:
                total, count = total - scores[i, place - 1, tokens[place]].item(), count + 1
    return total / count


def plain_model(place, **options):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(place, **options)


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "rslora", "head", "embedding", "gpt2"])
def test_the_adapter_loads_with_peft(tiny, trained, name):
    import peft

    run = trained(name)
    base = plain_model(configuration.load(run / "config.yaml").model.name)
    before = independent(base, run)
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter")
    loss = independent(adapted, run)
    assert loss == pytest.approx(reported(run)[0], abs=CLOSE)
    assert abs(loss - before) > 0.05  # the adapter matters


@pytest.mark.parametrize("name", ["plain", *VARIANTS])
def test_the_merged_model_stands_alone(tiny, trained, merged, name, monkeypatch):
    import transformers

    monkeypatch.chdir("/")
    place = merged(name)
    network = plain_model(place)
    assert independent(network, trained(name)) == pytest.approx(reported(trained(name))[0], abs=CLOSE)
    written = json.loads((place / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["use_cache"] and written["dtype"] == "float32"
    # the embeddings were tied, and are where neither end was changed
    tied = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert tied == written["tie_word_embeddings"] == (name not in {"head", "embedding"})
    assert not (place / "adapter_config.json").exists()
    assert transformers.AutoTokenizer.from_pretrained(place)("12 red") == transformers.AutoTokenizer.from_pretrained(
        tiny / "model"
    )("12 red")
    assert (place / "generation_config.json").exists()
    modes = {file.stat().st_mode & 0o777 for file in place.iterdir()}
    assert len(modes) == 1 and modes.pop() == (tiny / "data.jsonl").stat().st_mode & 0o777
    assert not list(place.parent.glob(".*"))


def test_merging_adds_to_the_weights_that_were_trained_against(tiny, trained, merged):
    import torch

    directory = trained("nf4")
    config = configuration.load(directory / "config.yaml")
    base = model.load_base(config, torch.device("cpu")).dequantize().state_dict()
    adapter = results.server_of(checkpoint.newest(directory, pytest.fail)[1])[1].adapter()
    state = plain_model(merged("nf4")).state_dict()
    scale = config.model.adapter.alpha / config.model.adapter.r
    layers = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith("lora_A.weight")]
    for layer in layers:
        a, b = (torch.from_numpy(adapter[f"{layer}.lora_{end}.weight"].copy()) for end in "AB")
        name = layer.removeprefix("base_model.model.") + ".weight"
        assert torch.allclose(state[name], base.pop(name) + scale * b @ a, rtol=1e-6, atol=1e-7)
    assert len(layers) == 14
    for name, value in base.items():
        assert torch.equal(state[name], value), name


def test_bfloat16_sums_are_rounded_once(tiny, tmp_path):
    import torch

    from gdmpi import run

    words = ["model.dtype=bfloat16", f"run.out={tmp_path}", "run.rounds=1", "data.test=0.1"]
    config = configuration.load(overrides=[*settings(tiny, "bf16"), *words])
    run.play(alone(), config, log.Log(False))
    export.export(tmp_path / "bf16", tmp_path / "merged", True)
    adapter = results.server_of(checkpoint.newest(tmp_path / "bf16", pytest.fail)[1])[1].adapter()
    layer = "model.layers.1.mlp.down_proj"
    a, b = (torch.from_numpy(adapter[f"base_model.model.{layer}.lora_{end}.weight"].copy()) for end in "AB")
    before, after = (plain_model(p, dtype="auto").state_dict() for p in (tiny / "model", tmp_path / "merged"))
    start = before[f"{layer}.weight"].bfloat16().float()
    assert torch.equal(after[f"{layer}.weight"], (start + 16 / 4 * (b @ a)).bfloat16())
    assert not torch.equal(after[f"{layer}.weight"], start.bfloat16())


def test_the_adapter_of_any_round_without_torch(tmp_path, done):
    code = (
        "import sys\nfrom gdmpi.__main__ import main\n"
        f"assert main(['export', '{done}/round-000001.h5', '{tmp_path}/a/b']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert "round 1 of" in launch([], program=("-c", code)).ok().out
    lines = export.export(done, tmp_path / "last", False)
    digest = checkpoint.newest(done, pytest.fail)[1].adapter_sha256
    assert digest in lines[0]
    weights = "adapter_model.safetensors"
    assert (tmp_path / "last" / weights).read_bytes() == (done / "adapter" / weights).read_bytes()
    assert (tmp_path / "a/b" / weights).read_bytes() != (done / "adapter" / weights).read_bytes()


def test_export_refuses_what_it_would_destroy(tmp_path, done):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "file").touch()
    for out in ("full", "file"):
        with pytest.raises(UserError, match="exists and is not an empty directory"):
            export.export(done, tmp_path / out, False)
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        export.export(done, tmp_path / "file" / "below", False)
    with pytest.raises(UserError, match="no such file"):
        export.export(tmp_path / "nowhere.h5", tmp_path / "out", False)
    with pytest.raises(UserError, match="no round files here"):
        export.export(tmp_path, tmp_path / "out", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    export.export(done, tmp_path / "empty", False)
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


def test_a_failed_merge_leaves_nothing(tmp_path, done, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "merge", full)
    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        export.export(done, tmp_path / "out", True)
    assert not list(tmp_path.iterdir())


def test_a_damaged_round_is_named_and_the_one_before_is_used(tmp_path, done):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    newest = checkpoint.files(run)[0]
    newest.write_bytes(newest.read_bytes()[:5000])
    lines = export.export(run, tmp_path / "out", False)
    assert lines[0].startswith(f"warning: {newest}") and "round 1 of" in lines[1]
    _, _, scores, notes = score(run)
    assert notes[0] == lines[0]
    assert scores["validation"][0] == checkpoint.read(run / checkpoint.name(1)).metrics[-1]["eval_loss"]


# ---- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", *VARIANTS])
def test_a_run_its_adapter_and_its_merged_model_score_alike(trained, merged, name):
    run = trained(name)
    _, config, scores, notes = score(run)
    assert (scores["validation"][0], scores["test"][0]) == reported(run)  # exactly
    assert notes[-1] == "exactly what the run reported (validation and test)"
    assert all("head cannot be split" in note for note in notes[:-1]) and len(notes[:-1]) == (name == "head")
    assert scores["validation"][2] == 12 and scores["test"][2] == 6
    for source in (run / checkpoint.name(2), run / "adapter"):
        assert score(source, path=run / "config.yaml")[2] == scores
    again = score(merged(name), "model.quantize=none", path=run / "config.yaml")
    assert again[1].model.name == str(merged(name))
    for kind in export.KINDS:
        assert again[2][kind][0] == pytest.approx(scores[kind][0], abs=CLOSE)
        assert again[2][kind][1:] == scores[kind][1:]


@pytest.mark.mpi(min_size=3)
def test_eval_prints_the_same_with_any_number_of_ranks(done):
    alone = within(["eval", done]).ok()
    assert within(["eval", done], ranks=3).ok().out == alone.out
    assert alone.err == ""
    loss, test = reported(done)
    assert f"loss {loss:.6f}" in alone.out and f"loss {test:.6f}" in alone.out
    assert "12 rows: 20% of" in alone.out and "exactly what the run reported" in alone.out


def test_the_base_model_scores_as_before_the_training(tiny, done):
    base = checkpoint.newest(done, pytest.fail)[1].metrics[0]["eval_loss"]
    _, _, scores, _ = score(tiny / "model", path=done / "config.yaml")
    assert scores["validation"][0] == base


def test_other_data(tiny, tmp_path, done):
    other = write_rows(tmp_path / "other.jsonl", tiny_rows(90)[60:])
    _, config, scores, notes = score(done, f"data.validation={other}")
    assert scores["validation"][2] == 30 and scores["test"][0] == reported(done)[1]
    assert export._of(config, "validation") == f"all of {other}" and not notes
    for source in (done / "adapter", tiny / "model"):
        words = [f"data.validation={other}", "data.max_length=64"]
        found = score(source, *words)[2]
        assert list(found) == ["validation"] and found["validation"][2] == 30
        assert (found["validation"] == scores["validation"]) == (source.name == "adapter")
    # of a table the held-out parts, as a run would cut them
    assert score(done, f"data.name={other}")[2]["validation"][2] == 6
    assert score(done / "adapter", f"data.name={other}", "data.test=0.5")[2]["test"][2] == 15
    # of a configuration only whose data it is
    path = tmp_path / "other.yaml"
    path.write_text(f"data: {{name: {other}, validation: 0.5}}\nmodel: {{name: elsewhere}}\nrun: {{seed: 3}}\n")
    _, config, scores, _ = score(done, path=path)
    assert scores["validation"][2] == 15 and config.run.seed == 3 and config.model.name == str(tiny / "model")


def test_clients_with_files_of_their_own(tiny, tmp_path):
    from gdmpi import run

    rows = tiny_rows(60)
    files = [str(write_rows(tmp_path / f"{i}.jsonl", rows[20 * i : 20 * i + 20])) for i in range(2)]
    words = [f"clients.split={{kind: files, files: {files}}}", "clients.boundary=site", f"run.out={tmp_path}"]
    config = configuration.load(overrides=[*settings(tiny, "sites"), *words])
    run.play(alone(), config, log.Log(False))
    done = tmp_path / "sites"
    _, config, scores, _ = score(done)
    assert (scores["validation"][0], scores["test"][0]) == reported(done)
    assert export._of(config, "test") == "10% of the clients' files, held out by run.seed 0"
    assert score(done / "adapter", path=done / "config.yaml")[2] == scores
    other = write_rows(tmp_path / "other.jsonl", rows[40:])
    assert score(done, f"data.name={other}")[2]["validation"][2] == 4


def test_the_demo_model_is_scored_on_the_demo_data(tiny, monkeypatch):
    monkeypatch.setattr(model, "DEMO", tiny)
    monkeypatch.setattr(data, "DEMO", tiny / "data.jsonl")
    _, config, scores, _ = score(tiny / "model", "data.max_length=64", f"run.cache={tiny}/cache")
    assert config.data.name == "demo" and scores["test"][2] == 6


@pytest.mark.parametrize("settings", [[], ["model.adapter.kind=full"], ["exchange.what=merged"]], ids=str)
def test_what_a_run_has_made_of_the_demo_is_scored_on_the_demo_data(tiny, tmp_path, monkeypatch, settings):
    from gdmpi import run

    monkeypatch.setattr(model, "DEMO", tiny)
    monkeypatch.setattr(data, "DEMO", tiny / "data.jsonl")
    words = ["data.max_length=64", f"run.cache={tiny}/cache", f"run.out={tmp_path}", "run.rounds=1", "train.steps=2"]
    config = configuration.load(overrides=[*words, *settings])
    run.play(alone(), config, log.Log(False))
    (place,) = (config.directory / name for name in results.RESULTS if (config.directory / name).is_dir())
    assert place.name == ("model" if settings else "adapter")
    _, _, scores, _ = score(place, *words[:2])
    assert (scores["validation"][0], scores["test"][0]) == pytest.approx(reported(config.directory), abs=CLOSE)


def test_wrong_input_to_eval(tiny, tmp_path, done):
    adapter = done / "adapter"
    rows = f"data.name={tiny}/data.jsonl"
    assert f"which rows is {adapter}" in says(adapter) and f"as in 'eval {adapter} {done}/config.yaml'" in says(adapter)
    assert "as in" not in says(tiny / "model") and "data.name=FILE" in says(tiny / "model")
    assert "no rows are held out" in says(done, "data.validation=0", "data.test=0")
    assert "no rows are held out" in says(adapter, rows, "data.validation=0", "data.test=0")
    assert says(done, "model.adapter.alpha=3").startswith("model.adapter.alpha: belongs to the run")
    assert "no such file" in says(tmp_path / "nowhere")
    assert "no run, adapter or model" in says(tmp_path)
    assert "unknown key" in says(done, "data.nam=x")

    wide = tiny_model(tmp_path / "wide", hidden=64)
    assert "is not the model that the run began with" in says(done, f"model.name={wide}")
    assert f"cannot be put on {wide}" in says(adapter, rows, f"model.name={wide}")
    deep = tiny_model(tmp_path / "deep", layers=3)
    bent = tmp_path / "bent"
    shutil.copytree(adapter, bent)
    about = json.loads((bent / "adapter_config.json").read_text())
    about["target_modules"] = ["q_proj"]
    about["base_model_name_or_path"] = None
    (bent / "adapter_config.json").write_text(json.dumps(about))
    assert "names no base model; give it with model.name" in says(bent, rows)
    assert "lacks values for some layers" in says(bent, rows, f"model.name={deep}")
    (bent / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "cannot be put on" in says(bent, rows, f"model.name={tiny}/model")
    (bent / "adapter_config.json").write_text("{")
    assert "cannot be read" in says(bent, rows)


# ---- 4 bits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_bit(tiny):
    """A configuration, and the model that it makes, with the tiny model's linear layers in 4 bits."""
    import torch

    config = configuration.load(overrides=[*settings(tiny, "unused"), "model.quantize=nf4"])
    return config, model.build(config, torch.device("cpu"))


def test_the_base_is_in_four_bits(four_bit):
    import bitsandbytes
    import torch

    _, trainable = four_bit
    layers = model.four_bit_layers(trainable.model)
    assert len(layers) == 14 and not trainable.warnings
    for layer in layers:
        weight, state = layer.weight, layer.weight.quant_state
        count = layer.in_features * layer.out_features
        assert isinstance(weight, bitsandbytes.nn.Params4bit) and weight.dtype == torch.uint8
        assert weight.nbytes == count // 2
        assert state.quant_type == "nf4" and state.nested and state.absmax.dtype == torch.uint8
        assert not layer.support_avx512bf16_for_cpu
    assert not any(p.requires_grad for name, p in trainable.model.named_parameters() if "lora_" not in name)
    assert all(p.dtype == torch.float32 for p in trainable.parameters)


def test_evaluating_in_between_does_not_change_four_bit_training(four_bit):
    import torch

    config, trainable = four_bit
    prepared = data.prepare(config, model.tokenizer(config.model.name))
    trainer = train.Trainer(trainable, config, prepared.train)
    start, results = trainable.values(), []
    for between in (False, True):
        trainable.load(start)
        trainer(1, 0)
        middle = trainable.values()
        before = evaluate.losses(trainable, prepared.validation, [0]) if between else None
        trainer(2, 0)
        results.append(trainable.vector.clone())
        if between:
            trainable.load(middle)
            assert evaluate.losses(trainable, prepared.validation, [0]) == before
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.from_numpy(start.vector.copy()))


def test_merging_needs_the_base(tiny, tmp_path, done):
    state = checkpoint.newest(done, pytest.fail)[1]
    state.config = state.config.replace(f"{tiny}/model", f"{tmp_path}/gone")
    checkpoint.write(tmp_path, state)
    with pytest.raises(UserError, match="model.name: there is no directory"):
        export.export(tmp_path, tmp_path / "out", True)
    assert not (tmp_path / "out").exists()
