"""The arithmetic on memory and time against what training then takes, and what is chosen by it."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import launch, tiny_model, within

from gdmpi import config as configuration, data, errors, estimate, evaluate, generate, timing

STEP = estimate.Step("float32", "float32", 128)

# trains on random rows of full length in a process of its own, with the words of each case; prints for each what that
# added to its memory at most
GROWTH = """
import gc, json, sys
import numpy as np, torch
from gdmpi import config as configuration, data, estimate, libraries, model, train

def status(key):
    text = open("/proc/self/status").read()
    return 1024 * int(text.split(key + ":")[1].split()[0])

def growth(words):
    config = configuration.load(None, words)
    built = model.build(config, torch.device("cpu"))
    length, count = config.data.max_length, 32
    tokens = np.random.default_rng(0).integers(3, 200, length * count).astype(np.int32)
    starts = np.arange(0, length * count + 1, length)
    target = ~np.isin(np.arange(length * count), starts)
    trainer = train.Trainer(built, config, {0: data.Rows(tokens, target, starts, np.arange(count))})
    shape = estimate.shape_of(built.model)
    step = estimate.Step(config.train.dtype, "float32", length, config.model.adapter.dropout > 0,
                         packed=built.forward.packed, quantized=config.model.quantize != "none")
    gc.collect()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
    trainer(1, 0)
    tokens = estimate.tokens_of_pass(config.train.batch_size, length, estimate.PASS["cpu"])
    guess = estimate.activations(shape, step, tokens) + estimate.loss(shape, step, tokens)
    # rows of one length need few of the kernels that are kept
    beside = 2.5 * built.schema.nbytes + estimate.ONEDNN / 2 * (config.train.dtype == "bfloat16")
    return status("VmHWM") - before - beside, guess, step.gaps

libraries.environment("cache")
torch.set_num_threads(1)
print(json.dumps([growth(words) for words in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("small") / "model", layers=4, hidden=192)


CASES = [
    ["train.dtype=float32"],
    ["train.dtype=float32", "model.adapter.dropout=0.1"],
    ["train.dtype=float32", "train.packing=false"],
    ["train.dtype=bfloat16"],
]


@pytest.fixture(scope="module")
def grown(small, tmp_path_factory):
    """(measured, estimated, gaps) of each of CASES."""
    program = tmp_path_factory.mktemp("grown") / "growth.py"
    program.write_text(GROWTH)
    words = [f"model.name={small}", "data.max_length=128", "train.batch_size=16", "train.steps=3"]
    whole = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # every tensor has pages of its own, so that there are no gaps
    cases = json.dumps([[*words, *settings] for settings in CASES])
    return json.loads(launch([cases], program=(program,), env=whole).ok().out)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(settings) for settings in CASES])
def test_memory_of_training_is_as_estimated(grown, case):
    measured, guess, gaps = grown[case]
    assert guess / gaps == pytest.approx(measured, rel=0.2)


def test_what_is_kept_is_what_the_formula_says(small):
    """Without malloc's part: the tensors that autograd holds after a forward pass."""
    import torch

    from gdmpi import model

    for settings in ([], ["model.adapter.dropout=0.1"], ["train.dtype=bfloat16"], ["train.packing=false"]):
        config = configuration.load(None, [f"model.name={small}", "train.dtype=float32", *settings])
        built, kept = model.build(config, torch.device("cpu")), {}
        own = {p.untyped_storage().data_ptr() for p in built.model.parameters()}

        def pack(tensor, kept=kept, own=own):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        rows = data.Rows(
            np.arange(512, dtype=np.int32) % 90, np.arange(512) % 128 > 0, np.arange(0, 513, 128), np.arange(4)
        )
        built.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            built.forward.losses(rows, range(4))
        measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - built.schema.nbytes / 2
        step = replace(STEP, compute=config.train.dtype, dropout="dropout" in "".join(settings))
        step = replace(step, packed=built.forward.packed)
        guess = estimate.activations(estimate.shape_of(built.model), step, 512) / step.gaps
        assert guess == pytest.approx(measured, rel=0.15), settings


@pytest.mark.parametrize("settings", [["train.dtype=float32"], ["train.dtype=bfloat16"]], ids=" ".join)
def test_keys_and_values_of_answers_are_as_many_bytes_as_estimated(small, monkeypatch, settings):
    import torch
    import transformers

    from gdmpi import model

    config = configuration.load(None, [f"model.name={small}", *settings])
    built, made = model.build(config, torch.device("cpu")), []

    class Kept(transformers.DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(transformers.generation.utils, "DynamicCache", Kept)
    generate.greedy(built, [np.arange(3, 3 + n) for n in (20, 7, 12)], [], 13)
    (kept,) = made
    measured = sum(tensor.nbytes for layer in kept.layers for tensor in (layer.keys, layer.values))
    step = replace(STEP, compute=config.train.dtype)
    # the last token's are never needed
    assert measured == estimate.cache(estimate.shape_of(built.model), step, 3 * (20 + 13 - 1))


def test_largest_pass_of_answers_is_what_batches_come_to():
    def largest(*words):
        return generate.largest_pass(configuration.load(None, list(words)))

    words = ["data.max_length=100", "evaluation.new_tokens=28"]
    assert largest(*words, "evaluation.generate=3") == 3 * 128
    assert largest(*words, "evaluation.generate=500") == evaluate.BATCH * 128
    assert largest("evaluation.generate=500", "data.max_length=2000") == generate.TOKENS
    assert largest("evaluation.generate=1", "data.max_length=20000") == 20128


def test_time_of_training_is_as_estimated(small):
    import torch

    from gdmpi import model, train

    config = configuration.load(None, [f"model.name={small}", "train.dtype=float32", "train.steps=2"])
    built = model.build(config, torch.device("cpu"))
    starts = np.arange(0, 8 * 128 + 1, 128)
    target = ~np.isin(np.arange(8 * 128), starts)
    trainer = train.Trainer(built, config, {0: data.Rows(starts[-1:].repeat(1024) % 90, target, starts, np.arange(8))})
    trainer(1, 0)
    begin = time.thread_time()
    counts = trainer(1, 0)
    taken = time.thread_time() - begin
    step = replace(STEP, packed=built.forward.packed)
    guess = timing.seconds(estimate.shape_of(built.model), step, (counts["seen"], counts["tokens"]), 2)
    assert 0.5 < guess / taken < 2  # so wide because other jobs take turns with both


# ---- what is chosen -------------------------------------------------------------------------------------------------

LLAMA = estimate.Shape(
    layers=32,
    width=4096,
    vocabulary=32000,
    shared=2 * 32 * 4096,
    own=5 * 32 * 4096,
    last=32 * (4096 + 11008),
    ranks=7 * 32 * 64,
    inner=3 * 32 * 11008,
    queries=32 * 4096,
    keys=32 * 4096,
    heads=32 * 32,
    largest=4096 * 11008,
    sides=((4096, 4096, 128), (4096, 11008, 64), (11008, 4096, 32)),
)
ON_GPU = estimate.Step("bfloat16", "bfloat16", 512, dropout=True, device="cuda", quantized=True)


def test_a_pass_is_the_largest_that_fits_into_the_gpu():
    found = [estimate.choose_pass(LLAMA, ON_GPU, free * 1e9) for free in (1000, 70, 17, 3)]
    tokens = [each[0] for each in found]
    assert tokens[0] == 16384 and tokens == sorted(tokens, reverse=True) or found[-1][1]
    for (tokens, checkpointing, said), free in zip(found, (1000, 70, 17, 3), strict=True):
        how = replace(ON_GPU, checkpointing=checkpointing)
        needed = [estimate.activations(LLAMA, how, n) + estimate.loss(LLAMA, how, n) for n in (tokens, 2 * tokens)]
        assert needed[0] <= estimate.SHARE * free * 1e9 or tokens == 512
        assert needed[1] > estimate.SHARE * free * 1e9 or tokens == 16384
        assert f"{free:.1f} GB of the GPU are free" in said
    assert [each[1] for each in found] == [False, False, False, True]


def test_what_is_set_is_left_alone():
    assert estimate.choose_pass(LLAMA, ON_GPU, 70e9, pass_tokens=777)[:2] == (777, False)
    assert estimate.choose_pass(LLAMA, ON_GPU, 10e9, pass_tokens=4096)[:2] == (4096, True)
    assert estimate.choose_pass(LLAMA, ON_GPU, 3e9, checkpointing=False)[:2] == (512, False)


def test_checkpointing_keeps_little():
    plain, short = (estimate.activations(LLAMA, replace(ON_GPU, checkpointing=each), 512) for each in (False, True))
    assert short < plain / 10


def test_memory_errors_are_told_from_others():
    import torch

    assert errors.out_of_memory(MemoryError()) and errors.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert errors.out_of_memory(error.value)
    assert not errors.out_of_memory(RuntimeError("sizes differ")) and "pass_tokens" not in errors.describe(
        KeyError(), ""
    )


def test_choices_are_saved_and_kept(tiny):
    import yaml

    found = {}
    for checkpointing in ("auto", "true"):
        run = tiny / "runs" / f"passes-{checkpointing}"
        words = [f"run.name={run.name}", "run.rounds=1", f"train.checkpointing={checkpointing}"]
        said = within(["run", tiny / "tiny.yaml", *words]).ok().out
        assert "passes of 2048 tokens (" in said
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert saved["train"]["pass_tokens"] == 2048
        assert saved["train"]["checkpointing"] is (checkpointing == "true")
        found[checkpointing] = [line for line in said.splitlines() if line.startswith("adapter ")]
    assert found["auto"] == found["true"]  # the same bits, only later
    saved = configuration.build(saved, "config.yaml")
    kept = configuration.keep_choices(configuration.load(tiny / "tiny.yaml"), saved)
    assert (kept.train.pass_tokens, kept.train.checkpointing, kept.train.dtype) == (2048, True, saved.train.dtype)
