"""What the flat buffer looks like on the wire: fixed point on a grid that all clients share, so that sums are exact."""

from typing import NamedTuple

import numpy as np

PIECE = 1 << 15  # elements worked on at a time: a piece and its scratch stay in a core's first caches
CHUNK = 1 << 20  # elements that travel at once, about: a rank keeps two chunks of integers, not the whole vector


class Chunk(NamedTuple):
    """A part of the vector that travels by itself: where it lies, and its pieces [(block, slice of the chunk)]."""

    span: slice
    pieces: list


def pieces(schema):
    """The vector's blocks cut into pieces of at most PIECE elements: [(block, slice)]."""
    return [
        (block, slice(start, min(start + PIECE, end)))
        for block, (begin, end) in enumerate(zip(schema.blocks[:-1], schema.blocks[1:], strict=True))
        for start in range(begin, end, PIECE)
    ]


def chunks(schema):
    """The vector cut into Chunks of about CHUNK elements, none across a piece."""
    result, waiting, begin = [], [], 0
    for block, piece in pieces(schema):
        waiting.append((block, slice(piece.start - begin, piece.stop - begin)))
        if piece.stop - begin >= CHUNK or piece.stop == schema.blocks[-1]:
            result.append(Chunk(slice(begin, piece.stop), waiting))
            waiting, begin = [], piece.stop
    return result


def maxima(mean, weight=1):
    """Weigh a Flat of float32 in place; largest absolute value in each block, [blocks]. NaN and infinity come through.

    It is the first to read what a client sends: where that is still on its way from a GPU, piece after piece.
    """
    if not mean.schema.is_vector:
        raise TypeError("only arrays of float32 can be summed")
    result = np.zeros(len(mean.schema.blocks) - 1, np.float32)
    for block, piece in pieces(mean.schema):
        x = mean.part(piece)
        if weight != 1:
            np.multiply(x, np.float32(weight), out=x)
        result[block] = np.maximum(result[block], np.maximum(np.maximum.reduce(x), -np.minimum.reduce(x)))
    return result


class Exact:
    """Fixed-point integers on one power-of-two grid a block: their sum depends on no order, rank or library.

    Client i of m holds x_i = w_i * delta_i (float32) in named blocks, one a tensor. With M_b the largest |x| in block b
    over all clients, the scale is s_b = 2**e, e the largest integer with M_b * 2**e <= (top of the integers) // m; a
    client's wire integers are rint(x * s_b), ranks add them up, and the mean is their sum / s_b / sum(w). Up to 64
    clients int32, 4 bytes a parameter, beyond that int64. The mean's error is at most m / (2 s_b sum(w)).
    """

    def __init__(self, schema, clients):
        """schema: of the vectors; clients: how many take part, over all ranks."""
        self.schema, self.clients = schema, clients
        self.dtype = np.dtype(np.int32 if clients <= 64 else np.int64)
        self.limit = np.iinfo(self.dtype).max // clients
        self.blocks, self.chunks = len(schema.blocks) - 1, chunks(schema)
        # float32 holds x * s_b exactly while it is below 2**31; int64's range needs float64
        self.scratch = np.empty(PIECE, np.float32 if self.dtype == np.int32 else np.float64)
        self.integers = np.empty(PIECE, self.dtype)
        self.wide = np.empty(PIECE, np.float64)

    def exponents(self, maxima):
        """The grid: e_b for the maxima over all clients, int [blocks], within [-126, 126]."""
        # frexp and ldexp are exact where log2 would round: M = f * 2**k, so M * 2**e <= limit decides between two e
        fraction, power = np.frexp(np.asarray(maxima, np.float64))
        limit_fraction, limit_power = np.frexp(np.float64(self.limit))
        # limits above 2**53 round up in float64: the comparison then allows one step less, which is always safe
        e = limit_power - power - (fraction >= limit_fraction if self.limit > 2**53 else fraction > limit_fraction)
        return np.clip(np.where(np.asarray(maxima) > 0, e, 0), -126, 126).astype(np.int64)

    def empty(self):
        """A buffer for any one chunk; its contents are undefined until encode()."""
        return np.empty(max((chunk.span.stop - chunk.span.start for chunk in self.chunks), default=0), self.dtype)

    def encode(self, vectors, exponents, chunk, total):
        """Put the sum of the clients' vectors on the grid into total, a chunk's length; zeros if there are none."""
        scales = np.ldexp(self.scratch.dtype.type(1), exponents)
        if not vectors:
            total[:] = 0
        for block, piece in chunk.pieces:
            scaled, integers = self.scratch[: piece.stop - piece.start], self.integers[: piece.stop - piece.start]
            for position, vector in enumerate(vectors):
                np.multiply(vector[chunk.span][piece], scales[block], out=scaled, dtype=scaled.dtype)
                np.rint(scaled, out=scaled)
                if position == 0:
                    np.copyto(total[piece], scaled, casting="unsafe")
                else:
                    np.copyto(integers, scaled, casting="unsafe")
                    total[piece] += integers

    def decode(self, total, exponents, weight, chunk, out):
        """The mean over the clients, float32, of a chunk, from the sum over all ranks and the sum of the weights."""
        # 2**e * weight is exact in float64, so each element is divided once and rounded once to float32
        divisors = np.ldexp(np.float64(weight), exponents)
        for block, piece in chunk.pieces:
            mean = self.wide[: piece.stop - piece.start]
            np.divide(total[piece], divisors[block], out=mean)
            out[chunk.span][piece] = mean

    def nbytes(self):
        """Bytes on the wire for one rank's sum."""
        return int(self.schema.blocks[-1]) * self.dtype.itemsize
