"""The exact codec against rational arithmetic, and the flat buffer."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gdmpi import codecs, flat

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NAMES = st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=8)


def schema_of(*sizes):
    return flat.Schema((f"t{i}", np.float32, (size,)) for i, size in enumerate(sizes))


def encode_all(schema, vectors, clients=None):
    """(mean, codec, exponents) of vectors that are encoded one by one and summed."""
    codec = codecs.Exact(schema, clients or len(vectors))
    maxima = np.max([codecs.maxima(flat.Flat(schema, vector)) for vector in vectors], axis=0)
    exponents, out = codec.exponents(maxima), np.empty(schema.blocks[-1], np.float32)
    total = np.empty(out.size, codec.dtype)
    for chunk in codec.chunks:
        codec.encode(vectors, exponents, chunk, total[chunk.span])
        codec.decode(total[chunk.span], exponents, len(vectors), chunk, out)
    return out, codec, exponents, total


@given(st.lists(st.lists(FLOATS, min_size=5, max_size=5), min_size=1, max_size=7))
def test_mean_is_within_the_stated_error_of_the_exact_mean(rows):
    vectors = [np.array(row, np.float32) for row in rows]
    mean, codec, exponents, _ = encode_all(schema_of(2, 3), vectors)
    for i in range(5):
        exact = sum(Fraction(float(vector[i])) for vector in vectors) / len(vectors)
        step = Fraction(2) ** -int(exponents[0 if i < 2 else 1])
        bound = step * Fraction(len(vectors), 2 * len(vectors))
        rounding = abs(exact) * Fraction(1, 2**23) + Fraction(1, 2**149)
        assert abs(Fraction(float(mean[i])) - exact) <= bound + rounding


@given(st.lists(FLOATS, min_size=1, max_size=6), st.integers(1, 100))
def test_grid_is_the_finest_whose_sum_cannot_overflow(values, clients):
    vector = np.array(values, np.float32)
    schema = schema_of(vector.size)
    codec = codecs.Exact(schema, clients)
    largest = codecs.maxima(flat.Flat(schema, vector))
    (e,) = codec.exponents(largest).tolist()
    limit = Fraction((2**31 - 1 if clients <= 64 else 2**63 - 1) // clients)
    top = Fraction(float(largest[0]))
    assert -126 <= e <= 126
    assert top * Fraction(2) ** e <= limit or e == -126
    if top and e < 126:
        finer = top * Fraction(2) ** (e + 1)
        # above 2**53 the limit is compared in float64, which may give away one step
        assert finer > limit if clients <= 64 else 2 * finer > limit


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.randoms())
def test_sum_does_not_depend_on_the_order(seed, clients, shuffler):
    draw = np.random.default_rng(seed)
    schema = schema_of(3, 4)
    vectors = [
        draw.standard_normal(7).astype(np.float32) * np.float32(10.0 ** draw.integers(-8, 8)) for _ in range(clients)
    ]
    mean, *_ = encode_all(schema, vectors)
    shuffler.shuffle(vectors)
    assert np.array_equal(mean, encode_all(schema, vectors)[0])


def test_largest_values_of_all_clients_do_not_overflow():
    top = np.full(4, np.finfo(np.float32).max)
    for clients in (1, 3, 64, 65):
        mean, _, _, total = encode_all(schema_of(4), [top] * clients)
        assert np.array_equal(mean, top)
        assert (total > 0).all()


def test_wire_types_and_bytes():
    schema = schema_of(3, 5)
    assert codecs.Exact(schema, 64).nbytes() == 4 * 8
    assert codecs.Exact(schema, 65).nbytes() == 8 * 8


def test_zeros_and_tiny_values():
    mean, _, exponents, total = encode_all(schema_of(2, 2), [np.float32([0, 0, 1e-45, 0])] * 2)
    assert exponents.tolist() == [0, 126]
    assert not total.any()
    assert not mean.any()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 40))
def test_pieces_and_chunks_change_nothing(sizes, piece, chunk):
    schema = schema_of(*sizes)
    vectors = [np.random.default_rng(i).standard_normal(sum(sizes)).astype(np.float32) for i in range(3)]
    whole, *_ = encode_all(schema, vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "PIECE", piece)
        patch.setattr(codecs, "CHUNK", chunk)
        mean, codec, *_ = encode_all(schema, vectors)
    assert np.array_equal(whole, mean)
    spans = [chunk.span for chunk in codec.chunks]
    assert [span.start for span in spans] == [0, *(span.stop for span in spans)][: len(spans)]
    assert sum(span.stop - span.start for span in spans) == sum(sizes)
    assert all(span.stop - span.start <= codec.empty().size < chunk + piece for span in spans)


def test_a_rank_without_clients_adds_nothing():
    codec = codecs.Exact(schema_of(3, 4), 2)
    total = codec.empty()
    total[:] = 7
    codec.encode([], np.zeros(2, np.int64), codec.chunks[0], total)
    assert not total.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_maxima_show_what_is_not_finite(bad):
    vector = np.float32([1, bad, 2, 3])
    assert not np.isfinite(codecs.maxima(flat.Flat(schema_of(2, 2), vector))[0])


ARRAYS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(["<f4", "<f8", "<i4", "<i8", "|b1", "|u1"]), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=60)
@given(ARRAYS, st.integers(0, 2**32 - 1))
def test_packing_round_trips(shapes, seed):
    draw = np.random.default_rng(seed)
    arrays = {name: draw.integers(0, 100, shape).astype(dtype) for name, (dtype, shape) in shapes.items()}
    packed = flat.pack(arrays)
    again = flat.Flat(flat.Schema.from_json(packed.schema.to_json()), packed.buffer)
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype
        assert np.array_equal(again[name], array)
        assert again[name].flags.aligned
    assert flat.pack(packed) is packed


def test_arrays_are_views_of_one_vector():
    packed = flat.pack({"a": np.float32([[1, 2]]), "b": np.float32([3])})
    packed.vector[2] = 9
    assert packed["b"][0] == 9
    assert packed.schema.is_vector
    assert not flat.pack({"a": np.float64([1])}).schema.is_vector
    with pytest.raises(TypeError, match="float32"):
        _ = flat.pack({"a": np.arange(3)}).vector


def test_schema_tells_names_types_and_shapes_apart():
    one = flat.Schema([("a", np.float32, (2, 3))])
    for other in ([("a", np.float32, (3, 2))], [("b", np.float32, (2, 3))], [("a", np.int32, (2, 3))]):
        assert flat.Schema(other).sha256 != one.sha256
    with pytest.raises(ValueError, match="two arrays are called a"):
        flat.Schema([("a", np.float32, ()), ("a", np.float32, ())])


def test_weight_is_multiplied_in_before_the_maxima():
    vector = np.float32([1, -3, 0.5, 2, np.nextafter(np.float32(1), np.float32(2))])
    mean = flat.Flat(schema_of(3, 2), vector.copy())
    assert codecs.maxima(mean, 7).tolist() == [21, (np.float32(7) * vector)[3:].max()]
    assert np.array_equal(mean.vector, np.float32(7) * vector)
