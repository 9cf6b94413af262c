"""GradualDiff-Fed that takes its time, method.seconds for each update, so that a run can be hit in its middle."""

import time

from gdmpi import method
from gdmpi.config import Section

gradualdiff = method.load("gradualdiff")
Server = gradualdiff.Server


class Options(Section):
    seconds: float = 0.1


class Client(gradualdiff.Client):
    def local_update(self, t, ask=None):
        time.sleep(self.options.seconds)
        return super().local_update(t, ask)
