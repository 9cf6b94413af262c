"""A Slurm cluster of three nodes on this machine, in a directory of its own: a controller, two slurmd, a munged.

All belong to the user who starts it and use free ports, so that it stands beside any other Slurm.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CONFIG = """
ClusterName=gdmpi
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# MPICH names shared memory by the job's number: not those of another such cluster, or of an earlier one's killed jobs
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until the credentials of its last start have expired, two minutes as a rule; but a machine that
# stands still for longer than that while a job starts ends it: "Job credential expired"
AuthInfo=socket={directory}/munge.socket,cred_expire=15
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
# what needs no cgroups, and nodes with more cores than the machine has
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# everything soon
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
KillWait=10
# no job fails because the machine stands still for a while: all these are 10 s or less as a rule
SlurmdTimeout=120
MessageTimeout=60
TCPTimeout=20
BatchStartTimeout=60
# a job that has ended is still looked at when all others have
MinJobAge=3600
# a node set down stays down until it is resumed; one that was only late comes back
ReturnToService=1
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=16
PartitionName=firm Nodes=n1,n2 Default=YES MaxTime=INFINITE
# with a node that may be taken down while jobs of the other partition run
PartitionName=frail Nodes=n1,n3 MaxTime=INFINITE
"""


class Unavailable(Exception):
    """No Slurm can be started here; the message says why."""


class Cluster:
    """The running cluster: its commands, and what its jobs have come to."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.env = dict(os.environ, SLURM_CONF=str(self.directory / "slurm.conf"))
        self.daemons = []
        self.over = threading.Event()  # set when nobody is interested any more: who waits for something gives up

    def start(self):
        missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
        if missing:
            raise Unavailable(f"needs Slurm and MUNGE (Debian: slurm-wlm munge); missing: {', '.join(missing)}")
        if os.geteuid() != 0:
            raise Unavailable("needs root: slurmd starts jobs for users")
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        with contextlib.ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in range(1 + len(NODES))]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in sockets]
        first = random.randrange(1, 60_000) * 1000
        text = CONFIG.format(host=socket.gethostname(), ports=ports, first=first, user="root", directory=self.directory)
        (self.directory / "slurm.conf").write_text(text)
        files = [
            f"--{name}={self.directory}/munge.{name.split('-')[0]}" for name in ("key-file", "pid-file", "log-file")
        ]
        self._daemon("munged", "-F", f"--socket={self.directory}/munge.socket", f"--seed-file={key}.seed", *files)
        self.until(lambda: (self.directory / "munge.socket").exists(), "munged makes its socket", 20)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: set(self.call("sinfo", "-h", "-o", "%t").split()) == {"idle"}, "all nodes are idle", 60)

    def stop(self):
        """End everything that was started here, the jobs' processes included."""
        alive = self.daemons and all(process.poll() is None for process in self.daemons)
        with contextlib.suppress(subprocess.SubprocessError, AssertionError, Unavailable):
            if alive and (jobs := self.call("squeue", "-h", "-o", "%i").split()):
                self.call("scancel", *jobs)
                self.until(lambda: not self.call("squeue", "-h", "-o", "%i"), "all jobs have ended", 30)
        for process in reversed(self.daemons):
            process.terminate()
        for process in reversed(self.daemons):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in _marked(self.env["SLURM_CONF"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def call(self, *words, env=None, cwd=None):
        """Run a Slurm command and return what it prints."""
        run = subprocess.run(
            words, env=self.env | (env or {}), cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if run.returncode:
            raise subprocess.CalledProcessError(run.returncode, words, run.stdout, run.stderr)
        return run.stdout.strip()

    def state(self, job):
        """A job's state in Slurm's words, such as RUNNING or COMPLETED, and the code that it ended with."""
        text = self.call("scontrol", "-o", "show", "job", str(job))
        words = dict(word.partition("=")[::2] for word in text.split())
        return words["JobState"], int(words["ExitCode"].partition(":")[0])

    def processes(self):
        """What runs for this cluster: number, what it waits for, command line."""
        pids = ",".join(map(str, _marked(self.env["SLURM_CONF"])))
        words = ["ps", "-o", "pid,ppid,stat,etimes,wchan:24,args", "-p", pids or "0"]
        logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.directory.glob("slurm*.log")))
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout + logs

    def until(self, true, what, seconds=240):
        """Poll until true() holds; fails after so many seconds, and says what was waited for."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.over.is_set():
            self._alive()
            with contextlib.suppress(subprocess.SubprocessError):  # a controller that is busy answers the next time
                if value := true():
                    return value
            time.sleep(0.4)
        raise AssertionError(f"waited {seconds} s in vain until {what}")

    def _alive(self):
        for process in self.daemons:
            if process.poll() is not None:
                log = (self.directory / f"{Path(process.args[0]).name}.out").read_text(errors="replace")
                raise Unavailable(f"{' '.join(process.args)} ended with {process.returncode}: {log.strip()[-500:]}")

    def _daemon(self, *words):
        program = shutil.which(words[0], path=_path())
        with (self.directory / f"{words[0]}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen([program, *words[1:]], env=self.env, stdout=out, stderr=out, start_new_session=True)
            )


@contextlib.contextmanager
def running():
    """A cluster for a with block; Unavailable if it cannot be started."""
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    directory.chmod(0o755)  # munged insists
    cluster = Cluster(directory)
    try:
        try:
            cluster.start()
        except AssertionError as error:
            raise Unavailable(f"{error}; {cluster.directory.name}: {_last_words(directory)}") from None
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _last_words(directory):
    return " | ".join(
        f"{log.name}: {log.read_text(errors='replace')[-200:]}" for log in sorted(directory.glob("*.log"))
    )


def _marked(text):
    """Processes that have a text in their environment: what jobs and daemons of this cluster may have left."""
    mine = os.getpid()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if int(path.parent.name) != mine and f"SLURM_CONF={text}\0".encode() in path.read_bytes():
                yield int(path.parent.name)
