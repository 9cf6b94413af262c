"""Named arrays <-> one flat buffer: what travels, what is hashed and what is saved is always one block of memory."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from math import prod

import numpy as np

ALIGN = 8  # bytes; every array begins at a multiple, so that int64 and float64 views are legal


class Schema:
    """Names, types and shapes of the arrays of a buffer, in order, and where each begins.

    All ranks agree on it by its hash before a byte travels.
    """

    def __init__(self, entries):
        self.entries = tuple((name, np.dtype(dtype).str, tuple(map(int, shape))) for name, dtype, shape in entries)
        self.places, end = {}, 0
        for name, dtype, shape in self.entries:
            if name in self.places:
                raise ValueError(f"two arrays are called {name}")
            # an array of float32 follows another without a gap: the whole of them is one vector
            end += -end % min(ALIGN, max(1, np.dtype(dtype).itemsize))
            size = np.dtype(dtype).itemsize * prod(shape)
            self.places[name] = (end, size, np.dtype(dtype), shape)
            end += size
        self.nbytes = end

    @classmethod
    def of(cls, arrays):
        return cls((name, array.dtype, array.shape) for name, array in arrays.items())

    @classmethod
    def from_json(cls, text):
        return cls(json.loads(text))

    def to_json(self):
        return json.dumps(self.entries)

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def place_of(self, part):
        """The stretch of this one's buffer where another Schema's arrays lie, slice of bytes; ValueError if none is."""
        names = [entry[0] for entry in self.entries]
        first = names.index(part.entries[0][0]) if part.entries and part.entries[0][0] in names else 0
        start = self.places[names[first]][0] if names else 0
        if self.entries[first : first + len(part.entries)] != part.entries:
            raise ValueError("these values belong to another model or adapter: names or shapes differ")
        return slice(start, start + part.nbytes)

    @property
    def is_vector(self):
        """Whether all is float32, so that the buffer is one vector and the codecs apply."""
        return all(dtype == "<f4" for _, dtype, _ in self.entries)

    @cached_property
    def blocks(self):
        """First element of each array in the float32 vector, and the vector's length last."""
        return np.array([place[0] // 4 for place in self.places.values()] + [self.nbytes // 4])

    def __eq__(self, other):
        return isinstance(other, Schema) and self.entries == other.entries

    def __hash__(self):
        return hash(self.entries)


class Flat(Mapping):
    """A mapping from names to arrays that are views into one contiguous buffer of bytes.

    arrives: where the bytes are still on their way from a device, arrives(end) waits until the first end are there.
    Whoever asks for the buffer, the vector or an array waits for all of it; part() waits for no more than it gives.
    there: where the values lie on a device, too, there() gives the vector there, of torch.
    """

    def __init__(self, schema, buffer=None, arrives=None, there=None):
        self.schema, self.arrives, self.there = schema, arrives, there
        self._bytes = np.zeros(schema.nbytes, np.uint8) if buffer is None else buffer.view(np.uint8).reshape(-1)
        if self._bytes.size != schema.nbytes:
            raise ValueError(f"the schema describes {schema.nbytes} bytes, the buffer has {self._bytes.size}")

    @property
    def buffer(self):
        """All bytes."""
        if self.arrives:
            self.arrives(self.schema.nbytes)
            self.arrives = None
        return self._bytes

    def part(self, place):
        """A slice of the vector."""
        if self.arrives:
            self.arrives(4 * place.stop)
        return self._bytes[4 * place.start : 4 * place.stop].view(np.float32)

    @property
    def vector(self):
        """The whole buffer as one float32 vector; only where every array is float32."""
        if not self.schema.is_vector:
            raise TypeError("not all arrays of this buffer are float32")
        return self.buffer.view(np.float32)

    def first(self, schema):
        """The arrays of a schema, which are the first of this buffer, as a Flat in the same memory."""
        return Flat(schema, self.buffer[: schema.nbytes])

    def __getitem__(self, name):
        start, size, dtype, shape = self.schema.places[name]
        return self.buffer[start : start + size].view(dtype).reshape(shape)

    def __iter__(self):
        return iter(self.schema.places)

    def __len__(self):
        return len(self.schema.places)

    def copy(self):
        return Flat(self.schema, self.buffer.copy())

    def holding(self, text):
        """The arrays whose names hold a text, which must follow one another: a Flat in this one's memory."""
        entries = [entry for entry in self.schema.entries if text in entry[0]]
        place = self.schema.place_of(Schema(entries))
        return Flat(Schema(entries), self.buffer[place])


def pack(arrays):
    """Lay named arrays into one buffer; what already is one (a Flat) passes through without a copy."""
    if isinstance(arrays, Flat):
        return arrays
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    flat = Flat(Schema.of(arrays))
    for name, array in arrays.items():
        flat[name][...] = array
    return flat


def sha256(flat):
    """SHA-256 over the buffer's bytes: what two runs compare."""
    return hashlib.sha256(flat.buffer).hexdigest()
