"""Memory that the processes of a node share: what the server broadcasts lies there once, not once a rank.

The memory belongs to a file without a name (memfd), which the others open through /proc: it needs no directory, counts
against no mount's limit, and goes with the last process, however that ends. Linux only; elsewhere, or where processes
may not look into each other, an OSError, and everyone keeps a copy of their own.
"""

import mmap
import os
from pathlib import Path

import numpy as np


def create(size):
    """(array of size bytes, handle that join() takes in other processes of this user on this node)."""
    if not hasattr(os, "memfd_create"):
        raise OSError("no memfd_create here")
    file = os.memfd_create("gdmpi")
    try:
        os.posix_fallocate(file, 0, size)  # memory that is not there is missed now, not by a signal later
        return np.frombuffer(mmap.mmap(file, size), np.uint8), (os.getpid(), file)
    except BaseException:
        os.close(file)
        raise


def join(handle, size, writable=False):
    """The array of a handle; who writes into what is only to be read gets an error."""
    process, file = handle
    with Path(f"/proc/{process}/fd/{file}").open("r+b" if writable else "rb") as opened:
        if os.fstat(opened.fileno()).st_size != size:
            raise OSError("another file")  # the process of that number is not the one that was meant
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return np.frombuffer(mmap.mmap(opened.fileno(), size, prot=access), np.uint8)


def close(handle):
    """Close what create() opened, once all have joined; the memory stays as long as someone uses it."""
    os.close(handle[1])
