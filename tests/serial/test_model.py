"""The model: what is trained is one vector, with the bits of separate parameters; warnings; quiet imports."""

import numpy as np
import pytest
from conftest import launch, tiny_model

from gdmpi import config as configuration, data, flat, model, rng, train, views
from gdmpi.errors import UserError

LAYERS = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def configured(tiny, *words):
    return configuration.load(tiny / "tiny.yaml", ["clients.count=2", *words])


def built(tiny, *words):
    import torch

    return model.build(configured(tiny, *words), torch.device("cpu"))


@pytest.fixture
def trainable(tiny):
    return built(tiny)


def random_like(trainable, seed=0):
    values = flat.Flat(trainable.schema)
    values.vector[:] = rng.stream(seed, "test").normal(size=values.vector.size)
    return values


def separate(trainable):
    """Parameters of their own with the same values and gradients, as every other program has them."""
    import torch

    copies = []
    for p in trainable.parameters:
        copies.append(torch.nn.Parameter(p.detach().clone()))
        copies[-1].grad = p.grad.detach().clone()
    return copies


def same(trainable, copies):
    import torch

    return all(torch.equal(p, copy) for p, copy in zip(trainable.parameters, copies, strict=True))


def some_rows(tiny):
    config = configured(tiny)
    return data.prepare(config, model.tokenizer(config.model.name)).train


# ---- one vector ----------------------------------------------------------------------------------------------------


def test_the_vector_holds_what_peft_saves(trainable):
    import peft
    import torch

    values = random_like(trainable)
    trainable.load(values)
    saved = peft.get_peft_model_state_dict(trainable.model)
    assert set(saved) == set(values) and len(saved) == 28
    for name, tensor in saved.items():
        assert torch.equal(tensor, torch.from_numpy(values[name].copy())), name
    assert flat.sha256(trainable.values()) == flat.sha256(values)
    assert trainable.vector.numel() == sum(p.numel() for p in trainable.model.parameters() if p.requires_grad)
    trainable.check_views()


def test_loading_into_another_adapter_is_refused(trainable, tiny):
    with pytest.raises(ValueError, match="another model or adapter"):
        trainable.load(built(tiny, "model.adapter.r=2").values())


def test_delta_is_the_difference_to_the_bit(trainable):
    start, end = random_like(trainable, 1), random_like(trainable, 2)
    trainable.load(end)
    delta = trainable.delta(start)
    assert delta.schema == start.schema
    assert (delta.vector == end.vector - start.vector).all()
    assert delta.buffer.ctypes.data == trainable.vector.data_ptr()  # on the CPU no second copy is made
    trainable.load(end)
    assert not trainable.delta(end).vector.any()


def test_parts_of_what_leaves_a_device_are_waited_for_one_after_the_other():

    class Event:
        def __init__(self, name):
            self.name = name

        def synchronize(self):
            seen.append(self.name)

    seen, size = [], 10
    under_way = [(4 * first, Event(first)) for first in (0, 4, 8)]
    arriving = flat.Flat(
        flat.Schema([("a", np.float32, (size,))]),
        np.zeros(4 * size, np.uint8),
        lambda end: views._arrived(under_way, end),
    )
    arriving.part(slice(0, 4))
    assert seen == [0]
    arriving.part(slice(3, 5))
    assert seen == [0, 4]
    arriving.part(slice(1, 2))
    assert seen == [0, 4]
    assert arriving["a"].shape == (size,) and seen == [0, 4, 8]


def test_the_initial_adapter_depends_on_the_seed_alone(tiny, trainable):
    import torch

    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = built(tiny)
    torch.random.set_rng_state(state)
    assert flat.sha256(again.values()) == flat.sha256(trainable.values())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert flat.sha256(built(tiny, "run.seed=1").values()) != flat.sha256(trainable.values())


def test_backward_writes_into_the_gradient_vector(tiny, trainable):
    import torch

    trainable.load(random_like(trainable))
    rows = some_rows(tiny)
    loss = trainable.forward.losses(rows[0], range(4)).mean()
    expected = torch.autograd.grad(loss, trainable.parameters, retain_graph=True)
    loss.backward()
    assert torch.equal(trainable.gradient, torch.cat([grad.reshape(-1) for grad in expected]))
    assert trainable.gradient.any()
    trainable.check_views()


@pytest.mark.parametrize("how", ["zero_grad", "replaced data", "replaced parameter", "replaced gradient", "frozen"])
def test_a_lost_view_is_caught(trainable, how):
    import torch

    name, p = next((n, p) for n, p in trainable.model.named_parameters() if p.requires_grad)
    trainable.check_views()
    if how == "zero_grad":
        trainable.model.zero_grad()
    elif how == "replaced data":
        p.data = p.data.clone()
    elif how == "replaced parameter":
        owner, _, last = name.rpartition(".")
        setattr(trainable.model.get_submodule(owner), last, torch.nn.Parameter(p.detach().clone()))
    elif how == "replaced gradient":
        p.grad = p.grad.clone()
    else:
        p.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no longer"):
        trainable.check_views()


def test_a_bfloat16_base_trains_a_float32_adapter(tiny):
    import torch

    trainable = built(tiny, "model.dtype=bfloat16")
    assert {p.dtype for p in trainable.parameters} == {torch.float32}
    assert {p.dtype for p in trainable.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    losses = trainable.forward.losses(some_rows(tiny)[0], range(4))
    assert losses.dtype == torch.float32
    losses.mean().backward()
    trainable.check_views()
    assert trainable.gradient.any()


def test_a_hundred_layers_train(tmp_path, tiny):
    place = tiny_model(tmp_path / "deep", layers=100)
    words = [f"model.name={place}", "train.steps=1", "train.clip_norm=null", "model.adapter.r=1"]
    trainable, config = built(tiny, *words), configured(tiny, *words)
    rows = some_rows(tiny)
    start = trainable.values()
    trainer = train.Trainer(trainable, config, rows)
    assert trainer(1, 0)["steps"] == 1
    trainable.check_views()
    end = trainable.values()
    moved = [name for name in end if (end[name] != start[name]).any()]
    # B begins at zero: the first step moves all of B and leaves A where it was
    assert moved == [name for name in end if "lora_B" in name] and len(moved) == 700
    trainer(2, 0)
    assert all((trainable.values()[name] != start[name]).any() for name in start)


# ---- optimisers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_optimisers_give_the_bits_of_torchs(trainable, kind, decay):
    import torch

    trainable.load(random_like(trainable))
    copies = separate(trainable)
    if kind == "adamw":
        mine, theirs = (
            train.AdamW(trainable.vector, trainable.gradient, decay),
            torch.optim.AdamW(copies, weight_decay=decay, fused=True),
        )
    else:
        mine, theirs = (
            train.SGD(trainable.vector, trainable.gradient, decay),
            torch.optim.SGD(copies, weight_decay=decay, lr=1.0),
        )
    for step in range(5):
        gradient = random_like(trainable, 10 + step)
        trainable.gradient[:] = torch.from_numpy(gradient.vector)
        for copy, p in zip(copies, trainable.parameters, strict=True):
            copy.grad.copy_(p.grad)
        theirs.param_groups[0]["lr"] = 0.01 / (1 + step)
        mine.step(0.01 / (1 + step))
        theirs.step()
        assert same(trainable, copies)
    trainable.check_views()


def test_moments_of_8_bits_go_nearly_where_adamw_goes(trainable):
    import torch

    trainable.load(random_like(trainable))
    start, ends = trainable.vector.clone(), []
    for make in (train.AdamW, train.AdamW8bit):
        trainable.vector.copy_(start)
        optimizer = make(trainable.vector, trainable.gradient, 0.1)
        for step in range(5):
            trainable.gradient[:] = torch.from_numpy(random_like(trainable, 10 + step).vector)
            optimizer.step(0.01)
        ends.append(trainable.vector.clone())
    assert 0 < torch.linalg.norm(ends[1] - ends[0]) < 0.05 * torch.linalg.norm(ends[0] - start)
    kept = optimizer.state()
    assert kept["first"].dtype == kept["second"].dtype == torch.uint8 and int(kept["count"]) == 5
    trainable.check_views()


@pytest.mark.parametrize("make", [train.AdamW, train.AdamW8bit, train.SGD])
def test_an_optimiser_set_back_or_restored_goes_on_as_another_would(trainable, make):
    import torch

    start, gradient = (torch.from_numpy(random_like(trainable, seed).vector) for seed in (0, 1))

    def stepped(optimizer):
        trainable.vector.copy_(start)
        trainable.gradient.copy_(gradient)
        optimizer.step(0.01)
        return trainable.vector.clone()

    used = make(trainable.vector, trainable.gradient, 0.1)
    first = stepped(used)
    kept = train._on_host(used.state(), {})
    second = stepped(used)
    assert torch.equal(second, first) == (make is train.SGD)
    again = train._on_host(used.state(), dict(kept))
    assert all(again[name] is kept[name] for name in kept)  # in the memory that is there
    used.reset()
    assert torch.equal(stepped(used), first)
    kept = train._on_host(used.state(), {})
    used.step(1.0)
    used.reset()
    used.restore(kept)
    assert torch.equal(stepped(used), second)


@pytest.mark.parametrize("limit", [0.3, 1e9])
def test_clipping_is_torchs(trainable, limit):
    import torch

    trainable.gradient[:] = torch.from_numpy(random_like(trainable).vector)
    copies, before = separate(trainable), trainable.gradient.clone()
    torch.nn.utils.clip_grad_norm_(copies, limit)
    train.clip(trainable.gradient, limit)
    theirs = torch.cat([copy.grad.reshape(-1) for copy in copies])
    torch.testing.assert_close(trainable.gradient, theirs, rtol=1e-5, atol=0)
    assert torch.equal(trainable.gradient, before) == (limit > 1)
    trainable.check_views()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_local_training_is_a_plain_loop(tiny, quantize):
    """The whole of local training against peft's and transformers' own, torch's AdamW, and rows that are padded."""
    import peft
    import torch

    words = [f"model.quantize={quantize}", "train.clip_norm=null", "train.weight_decay=0.1"]
    config, trainable = configured(tiny, *words), built(tiny, *words)
    rows = some_rows(tiny)
    base = model.load_base(config, torch.device("cpu"))
    plain = peft.get_peft_model(base, trainable.model.peft_config["default"])
    start = {name: torch.from_numpy(array) for name, array in trainable.values().items()}
    peft.set_peft_model_state_dict(plain, start)
    train.Trainer(trainable, config, rows)(3, 1)

    plain.train()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=0.1, fused=True)
    for ids in data.batches(rows[1], config.train.batch_size, rng.stream(0, "order", 3, 1)):
        tokens, seen, target = map(torch.from_numpy, data.pad(rows[1], ids))
        logits = plain(input_ids=tokens, attention_mask=seen).logits
        labels = tokens.masked_fill(~target, -100)
        wanted = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][wanted], labels[:, 1:][wanted], reduction="none")
        optimizer.zero_grad()
        (loss.sum() / int(wanted.sum())).backward()
        optimizer.step()
    before = flat.pack({name: t.numpy() for name, t in start.items()})
    moved = torch.cat([p.detach().reshape(-1) for p in parameters]) - torch.from_numpy(before.vector)
    delta = torch.from_numpy(trainable.delta(before).vector)
    assert torch.linalg.norm(delta - moved) < 1e-3 * torch.linalg.norm(moved)  # AdamW's first steps magnify rounding


# ---- where the adapter and the 4 bits are --------------------------------------------------------------------------


def test_nothing_to_warn_of(tiny, trainable):
    assert trainable.warnings == []
    four_bit = built(tiny, "model.quantize=nf4")
    assert four_bit.warnings == []
    assert four_bit.base_parameters == trainable.base_parameters  # two weights lie in a byte
    assert built(tiny, "model.adapter.targets=[q_proj, mlp.up_proj]").warnings == []
    assert built(tiny, "model.adapter.targets=q_proj").warnings == []


def test_a_layer_without_lora_is_warned_of(tiny, trainable):
    attention = trainable.model.get_base_model().model.layers[1].self_attn
    attention.q_proj = attention.q_proj.base_layer
    said = model.misplaced(configured(tiny), trainable.model)
    assert said == ["LoRA is missing on 1 of 14 linear layers, such as model.layers.1.self_attn.q_proj"]


def test_a_target_that_is_not_there_is_warned_of(tiny):
    said = built(tiny, "model.adapter.targets=[q_proj, query]").warnings
    assert said == ["LoRA is not on query: this model has no such linear layer"]


def test_layers_that_are_not_in_4_bits_are_warned_of(tiny, trainable):
    config = configured(tiny, "model.quantize=nf4")
    said = model.misplaced(config, trainable.model)
    assert said == ["14 of 14 linear layers are not 4-bit, such as model.layers.0.self_attn.q_proj"]
    mixed = built(tiny, "model.quantize=nf4")
    inner = trainable.model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    mixed.model.get_base_model().model.layers[1].mlp.up_proj.base_layer = inner
    assert model.misplaced(config, mixed.model) == [
        "1 of 14 linear layers are not 4-bit, such as model.layers.1.mlp.up_proj"
    ]


@pytest.mark.parametrize("targets", ["query", "[query, key]"])
def test_wrong_targets_name_the_right_ones(tiny, targets):
    with pytest.raises(UserError) as caught:
        built(tiny, f"model.adapter.targets={targets}")
    text = str(caught.value)
    assert text.startswith("model.adapter.targets:") and "query" in text and "\n" not in text
    assert text.endswith(f"This model's linear layers are {LAYERS}")


def test_a_model_that_is_not_there(tmp_path):
    for name in (tmp_path / "gone", "./gone", "a/b/c"):
        with pytest.raises(UserError, match="model.name: there is no directory"):
            model.locate(str(name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no config.json"):
        model.locate(str(tmp_path / "empty"))


# ---- imports -------------------------------------------------------------------------------------------------------

QUIET = """
import sys
from gdmpi import config as configuration, data, libraries, model, train
config = configuration.load({yaml!r}, ["model.quantize={quantize}", "train.steps=1", "clients.count=1"])
libraries.environment(config.run.cache)
torch, transformers, peft = libraries.load(config.model.quantize != "none")
assert transformers.__name__ == "transformers" and hasattr(peft, "LoraConfig")
assert "torch._dynamo" not in sys.modules, "loading imported the compiler"
assert ("bitsandbytes" in sys.modules) <= (config.model.quantize != "none"), "loading imported bitsandbytes"
rows = data.prepare(config, model.tokenizer(config.model.name)).train
trainable = model.build(config, torch.device("cpu"))
train.Trainer(trainable, config, rows)(1, 0)
assert "torch._dynamo" not in sys.modules or {quantize!r} != "none", "training imported the compiler"
assert torch.distributed.is_available()
"""

COMPILES = """
doubled = torch.compile(lambda x: 2 * x + 1, backend="eager")
assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 3.0))
import torch._dynamo
assert torch._dynamo.__file__ and torch._dynamo.config.cache_size_limit
compiled = torch.compile(trainable.model, backend="eager")
tokens = torch.ones((1, 5), dtype=torch.long)
assert torch.equal(compiled(input_ids=tokens).logits, trainable.model(input_ids=tokens).logits)
"""


@pytest.fixture(scope="module")
def unquantized(tiny):
    """The Result of loading and training, and of the compiler afterwards: what each says, parted by a line."""
    part = "for stream in sys.stdout, sys.stderr: print('compiles', file=stream, flush=True)\n"
    code = QUIET.format(yaml=str(tiny / "tiny.yaml"), quantize="none") + part + COMPILES
    return launch([], cwd=tiny, program=("-c", code))


def test_loading_and_training_say_nothing(unquantized):
    assert [text.partition("compiles\n")[:2] for text in (unquantized.out, unquantized.err)] == 2 * [("", "compiles\n")]


def test_loading_and_training_in_4_bits_say_nothing(tiny):
    code = QUIET.format(yaml=str(tiny / "tiny.yaml"), quantize="nf4")
    result = launch([], cwd=tiny, program=("-c", code)).ok()
    assert (result.out, result.err) == ("", "")


def test_the_compiler_still_works_afterwards(unquantized):
    unquantized.ok()


NAMES = """
import importlib, pathlib, transformers
from gdmpi import libraries
libraries.load()
from transformers.utils import import_utils
models = pathlib.Path(transformers.__file__).parent / "models"
quickly = import_utils.define_import_structure(models)
assert quickly, "transformers keeps its names elsewhere"
assert importlib.reload(import_utils).define_import_structure(models) == quickly
"""


def test_names_that_are_found_quickly_are_the_names(tiny):
    launch([], cwd=tiny, program=("-c", NAMES)).ok()
