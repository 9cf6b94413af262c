"""The forward pass and its kernels against transformers' own passes and torch's own derivatives."""

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gdmpi import data, forward, kernels

WORDS = 90
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
WINDOW = {"sliding_window": 4}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {  # transformers' name: (its sizes, packed, head split off)
    "llama": (SIZES | HEADS, True, True),
    "mistral": (SIZES | HEADS | WINDOW, True, True),
    "qwen2": (SIZES | HEADS, True, True),
    "gpt2": (GPT2, True, True),
    "gpt_neox": (SIZES | {"num_attention_heads": 4, "max_position_embeddings": 64}, True, True),
    "gemma2": (SIZES | HEADS | WINDOW | {"head_dim": 8}, False, False),
    "granite": (SIZES | HEADS | {"logits_scaling": 8.0}, True, False),
    "bloom": ({"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, False, True),
    "mamba": ({"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False, True),
}


def made(name, **more):
    """A small model with random weights, large enough that its predictions differ."""
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(name, **MODELS[name][0] | more)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    return model.requires_grad_(False)


def rows_of(lengths, seed=0):
    """Rows of random tokens, some of which carry loss."""
    draw = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    target = draw.random(starts[-1]) < 0.6
    target[starts[1:] - 1], target[starts[:-1]] = True, False
    return data.Rows(draw.integers(0, WORDS, starts[-1]).astype(np.int32), target, starts, np.arange(len(lengths)))


def by_hand(model, rows):
    """The losses of each row's targets, one row at a time, by nothing but the model and a softmax."""
    losses = []
    for tokens, target in map(rows.row, range(len(rows))):
        ids = torch.from_numpy(tokens.astype(np.int64))
        shares = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        losses += [-shares[place - 1, ids[place]] for place in np.flatnonzero(target)]
    return torch.stack(losses).float()


def lora(model, **more):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    adapted = peft.get_peft_model(model, config)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return adapted


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_packed_or_padded_a_row_has_the_losses_that_it_has_alone(name):
    model, rows = made(name), rows_of([9, 1 + 1, 20, 5, 13])
    expected = by_hand(model, rows)
    runs = forward.Forward(model, torch.device("cpu"))
    assert (runs.packed, runs.split) == MODELS[name][1:], runs.notes
    assert len(runs.notes) == (not runs.packed) + (not runs.split)
    assert torch.allclose(runs.losses(rows, range(5)), expected, atol=1e-5, rtol=1e-5)
    padded = forward.Forward(model, torch.device("cpu"), packing=False)
    assert not padded.packed
    assert torch.allclose(padded.losses(rows, range(5)), expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours(packed_llama, lengths, draw):
    rows = rows_of(lengths, draw.randrange(1000))
    ids = draw.sample(range(len(rows)), len(rows))
    together = packed_llama.losses(rows, ids)
    alone = torch.cat([packed_llama.losses(rows, [i]) for i in ids])
    assert torch.allclose(together, alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def packed_llama():
    return forward.Forward(made("llama"), torch.device("cpu"))


def test_rows_longer_than_a_tile_attend_as_ever(packed_llama):
    rows = rows_of([3, kernels.TILE + 7, 2 * kernels.TILE, kernels.TILE])
    assert torch.allclose(packed_llama.losses(rows, range(4)), by_hand(packed_llama.model, rows), atol=1e-5, rtol=1e-5)


def test_the_model_itself_still_runs_as_ever(packed_llama):
    ids, seen = torch.randint(0, WORDS, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    seen[1, 7:] = 0
    packed_llama.losses(rows_of([5, 6]), [0, 1])
    logits = packed_llama.model(input_ids=ids, attention_mask=seen).logits
    assert torch.equal(logits[0], made("llama")(input_ids=ids, attention_mask=seen).logits[0])


def test_an_adapted_model_that_is_called_by_itself_computes_as_its_base():
    ids, model = torch.randint(0, WORDS, (3, 11)), lora(made("llama"))
    expected = model(input_ids=ids).logits
    forward.Forward(model, torch.device("cpu"), "bfloat16")
    found = model(input_ids=ids).logits
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=0.1, rtol=0.1)


def test_in_bfloat16_losses_are_near_those_in_float32():
    rows, model = rows_of([9, 20, 33]), made("llama")
    expected = by_hand(model, rows)
    found = forward.Forward(model, torch.device("cpu"), "bfloat16").losses(rows, range(3))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=0.1, rtol=0.05) and not torch.equal(found, expected)
    assert abs(float(found.mean() - expected.mean())) < 0.02


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("limit", [None, 60, 20, 1])
def test_passes_hold_each_row_once_and_no_more_tokens_than_allowed(limit, packing):
    runs = forward.Forward(made("llama"), torch.device("cpu"), packing=packing)
    lengths = [20, 3, 17, 40, 41, 2, 9]
    rows, ids = rows_of(lengths), [6, 0, 3, 4, 5, 1]
    groups = runs.groups(rows, ids, limit)
    assert sorted(sum(groups, [])) == sorted(ids) and all(groups)
    for group in groups:
        long = max(lengths[i] for i in group)
        tokens = len(group) * long if not packing else sum(lengths[i] for i in group)
        assert limit is None or tokens <= limit or len(group) == 1
        assert packing or long <= forward.UNLIKE * min(lengths[i] for i in group)
    if packing:
        assert sum(groups, []) == ids  # in the step's order
    assert runs.groups(rows, [], limit) == []


def test_gradients_add_up_over_passes():
    rows, ids = rows_of([20, 3, 17, 40]), range(4)

    def gradient(limit):
        model = lora(made("llama"))
        runs = forward.Forward(model, torch.device("cpu"))
        for group in runs.groups(rows, ids, limit):
            (runs.losses(rows, group).sum() / rows.target_tokens).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])

    assert torch.allclose(gradient(None), gradient(20), atol=1e-6)


def test_checkpointed_layers_give_the_same_gradient():
    rows = rows_of([20, 3, 17, 40])
    model = lora(made("llama"))
    runs = forward.Forward(model, torch.device("cpu"))
    found = []
    for _ in range(2):
        model.train()
        model.zero_grad()
        runs.losses(rows, range(4)).mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        runs.base.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, *found))


def test_a_compiled_model_gives_the_same_losses_and_gradient(monkeypatch):
    """By torch's tracing, but without the C++ of its usual backend, which takes minutes; tests/gpu has that one."""
    real, found = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, backend="eager", **how))
    for compiled in (False, True):
        model = lora(made("llama", num_hidden_layers=1))
        runs = forward.Forward(model, torch.device("cpu"), compiled=compiled)
        assert runs.notes == [] or "compiler" in runs.notes[0]
        model.train()
        losses = runs.losses(rows_of([20, 3, 17]), range(3))
        losses.mean().backward()
        found.append((losses, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])))
    (losses, gradient), (own_losses, own_gradient) = found
    assert torch.allclose(own_losses, losses, rtol=1e-3, atol=1e-5)
    assert torch.linalg.norm(gradient - own_gradient) < 1e-3 * torch.linalg.norm(gradient)


def test_where_nothing_can_be_compiled_it_is_said_and_the_model_runs(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", fail))
    model, rows = made("llama"), rows_of([20, 3])
    runs = forward.Forward(model, torch.device("cpu"), compiled=True)
    said = "train.compile: torch cannot compile here (no working C++ compiler): it runs uncompiled"
    assert runs.notes == [said]
    assert torch.allclose(runs.losses(rows, range(2)), by_hand(model, rows), atol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements that any result has while it is on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [each.numel() for each in (out if isinstance(out, (list, tuple)) else [out]) if hasattr(each, "numel")]
        self.most = max([getattr(self, "most", 0), *found])
        return out


def test_no_matrix_of_tokens_and_vocabulary_is_made():
    count, words = 700, 997
    hidden = torch.randn(count, 8, requires_grad=True)
    weight, targets = torch.randn(words, 8), torch.randint(0, words, (count,))
    with Largest() as noted:
        kernels.HeadLoss.apply(hidden, weight, None, targets)[0].sum().backward()
    assert noted.most <= kernels.CHUNK["cpu"] * words < count * words


# ---- kernels --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    *(st.integers(1, 600), st.integers(2, 300), st.integers(1, 9), st.booleans(), st.floats(0.01, 5)),
    st.sampled_from([{}, {4: 16}]),
)
def test_head_and_loss(count, words, width, with_bias, scale, filled):
    torch.manual_seed(count * words)
    hidden = (scale * torch.randn(count, width)).requires_grad_()
    weight, targets, outer = torch.randn(words, width), torch.randint(0, words, (count,)), torch.rand(count)
    bias = torch.randn(words) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FILLED", filled)
        losses, hits = kernels.HeadLoss.apply(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad(losses, hidden, outer)
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (by_torch,) = torch.autograd.grad(expected, hidden, outer.double())
    assert torch.allclose(losses.double(), expected, atol=1e-5 * (1 + scale), rtol=1e-5)
    assert torch.allclose(gradient, by_torch, atol=1e-4, rtol=1e-4)
    margin = logits.gather(1, targets[:, None])[:, 0] - logits.scatter(1, targets[:, None], -torch.inf).amax(-1)
    clear = margin.abs() > 1e-4 * (1 + scale)
    assert torch.equal(hits[clear], margin[clear] > 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 600), st.integers(2, 300), st.integers(1, 9), st.booleans(), st.floats(0.01, 5))
def test_head_that_is_trained(count, words, width, with_bias, outer):
    torch.manual_seed(count + words)
    hidden, targets = torch.randn(count, width), torch.randint(0, words, (count,))
    trained = [torch.randn(words, width, requires_grad=True)]
    trained += [torch.randn(words, requires_grad=True)] * with_bias
    bias = trained[1] if with_bias else None
    gradients = torch.autograd.grad(outer * kernels.HeadLoss.apply(hidden, trained[0], bias, targets)[0].sum(), trained)
    logits = torch.nn.functional.linear(hidden.double(), trained[0].double(), bias.double() if with_bias else None)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    for mine, theirs in zip(gradients, torch.autograd.grad(outer * expected, trained), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3, rtol=1e-4)


def test_head_that_is_trained_wants_losses_that_count_alike():
    weight = torch.randn(5, 3, requires_grad=True)
    losses, _ = kernels.HeadLoss.apply(torch.randn(2, 3), weight, None, torch.tensor([1, 4]))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(losses, weight, torch.tensor([1.0, 2.0]))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.one_of(st.none(), st.integers(1, 200)),
    st.sampled_from([0, 1024]),
    st.sampled_from([0, kernels.TILE]),
)
def test_attention_within_rows(lengths, heads, window, kept, short):
    torch.manual_seed(sum(lengths))
    total, (queries, keys) = sum(lengths), heads
    q, k, v = (torch.randn(1, count, total, 8, requires_grad=True) for count in (queries, keys, keys))
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(total)
    seen = (row[:, None] == row) & (place[:, None] >= place) & (place[:, None] - place < (window or total))
    scores = q @ k.repeat_interleave(queries // keys, 1).transpose(2, 3) * 0.3
    whole = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.repeat_interleave(queries // keys, 1)
    outer = torch.randn(1, total, queries, 8)
    expected = torch.autograd.grad(whole.transpose(1, 2), (q, k, v), outer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "KEPT", kept)
        patch.setattr(kernels, "SHORT", {4: short})
        out = kernels.row_attention(q, k, v, lengths, 0.3, torch.float32, window)
    found = torch.autograd.grad(out, (q, k, v), outer)
    assert torch.allclose(out, whole.transpose(1, 2), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
    split = kernels.row_attention(q, k, v, lengths, 0.3, torch.float32, window, dropout=1e-9)  # torch's own kernel
    assert torch.allclose(split, whole.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_lora_layers_are_those_of_peft(name, dropout):
    """Losses and gradients with the kernels, and without them."""
    rows, found = rows_of([9, 20, 33]), []
    for kernels_too in (False, True):
        model = made(name, **({"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if name == "gpt2" else {}))
        torch.manual_seed(3)
        model = lora(model, lora_dropout=dropout)
        with pytest.MonkeyPatch.context() as patch:
            if not kernels_too:
                patch.setattr(forward, "_put_kernels", lambda *_: None)
            runs = forward.Forward(model, torch.device("cpu"))
        model.train()
        torch.manual_seed(4)
        losses = runs.losses(rows, range(3))
        losses.mean().backward()
        found.append((losses, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])))
    (losses, gradient), (own_losses, own_gradient) = found
    assert torch.allclose(own_losses, losses, atol=1e-5, rtol=1e-5)
    assert torch.linalg.norm(gradient - own_gradient) < 1e-5 * torch.linalg.norm(gradient)


def test_the_adapter_can_still_be_switched_off():
    model, rows = lora(made("llama")), rows_of([9, 20])
    runs = forward.Forward(model, torch.device("cpu"))
    with model.disable_adapter():
        bare = runs.losses(rows, range(2))
    assert torch.allclose(bare, by_hand(made("llama"), rows), atol=1e-5)
    assert not torch.allclose(runs.losses(rows, range(2)), bare, atol=1e-2)
