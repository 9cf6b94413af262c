"""The sum of all ranks' integers at the server, chunk after chunk: in shared memory on a node, by MPI between nodes.

What a rank encodes it writes once, where its neighbours read it: each rank of a node adds up its own share of every
chunk. Nothing is copied, and of a node only the first rank takes part in the Reduce. Two lanes alternate, so that one
barrier a chunk is enough:

    rank          chunk k                                         chunk k + 1
    each          encode into lane k % 2, barrier, add a share    encode into the other lane, barrier, ...
    first         ...                                             after this barrier: Reduce chunk k between nodes
    server        ...                                             and decode it

After the barrier of chunk k + 1 everyone has added up chunk k, so lane k % 2 may be written again.
"""

import numpy as np

LANES = 2


class Sum:
    """The memory for sums of chunks of at most size integers of a type; made by all ranks together."""

    def __init__(self, link, size, dtype):
        self.link, self.dtype = link, np.dtype(dtype)
        self.shared = None if link.alone else link.common_memory(self._nbytes(size), writable=True)
        if self.shared is not None:
            self.slots = self.shared.view(self.dtype).reshape(LANES, len(link.node), size)
            self.mine, self.first = link.node.index(link.rank), link.rank == link.node[0]
        else:
            self.lanes = np.empty((LANES, size), self.dtype)

    def _nbytes(self, size):
        everyone = self.link.agree(self.link.host)
        return LANES * everyone.count(self.link.host) * size * self.dtype.itemsize

    def reduce(self, sizes, encode, decode):
        """Sum chunks of these sizes: encode(k, part) puts in this rank's integers, decode(k, part) takes the sum.

        decode is called at the server only. All ranks pass the same sizes.
        """
        (self._by_mpi if self.shared is None else self._by_node)(sizes, encode, decode)

    def _by_mpi(self, sizes, encode, decode):
        """Each rank by itself; while a chunk is on its way, the next is encoded."""
        under_way = []

        def land():
            k, part, request = under_way.pop(0)
            self.link.finish(request)
            if self.link.is_server:
                decode(k, part)

        for k, size in enumerate(sizes):
            if len(under_way) == LANES:
                land()
            part = self.lanes[k % LANES, :size]
            encode(k, part)
            under_way.append((k, part, self.link.reduce(part)))
        while under_way:
            land()

    def _by_node(self, sizes, encode, decode):
        for k, size in enumerate(sizes):
            encode(k, self.slots[k % LANES, self.mine, :size])
            self.link.finish(self.link.comm.Ibarrier())
            if k:
                self._between_nodes(k - 1, sizes[k - 1], decode)
            self._add_share(k, size)
        if sizes:
            self.link.finish(self.link.comm.Ibarrier())
            self._between_nodes(len(sizes) - 1, sizes[-1], decode)

    def _add_share(self, k, size):
        """Add up the node's ranks, in this rank's share of a chunk, in the slot of the first."""
        ranks = len(self.slots[0])
        share = slice(size * self.mine // ranks, size * (self.mine + 1) // ranks)
        total = self.slots[k % LANES, 0, share]
        for other in self.slots[k % LANES, 1:, share]:
            total += other

    def _between_nodes(self, k, size, decode):
        if not self.first:
            return
        total = self.slots[k % LANES, 0, :size]
        if self.link.leaders is not None:
            self.link.finish(self.link.reduce(total, self.link.leaders))
        if self.link.is_server:
            decode(k, total)
