"""GradualDiff-Fed that takes its time, method.seconds for each update, so that a run can be hit in its middle."""

import time

from gdmpi.config import Section
from gdmpi.methods import gradualdiff
from gdmpi.methods.gradualdiff import Server  # noqa: F401 (the method's other half)


class Options(Section):
    seconds: float = 0.1


class Client(gradualdiff.Client):
    def local_update(self, t, ask=None):
        time.sleep(self.options.seconds)
        return super().local_update(t, ask)
