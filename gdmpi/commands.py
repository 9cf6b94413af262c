"""What each command of the command line does; the heavy imports happen here, where they are used."""

import dataclasses
import functools
import sys
from pathlib import Path

from gdmpi import config as configuration
from gdmpi.errors import Paused, PeerError, UserError

PAUSED = 75  # exit status, EX_TEMPFAIL: start again to go on
FIXED = ("model", "method", "clients", "data", "run.seed")  # what a resume cannot change


def run(args):
    """Run a configuration from the beginning."""
    from gdmpi import log, mpi

    link = mpi.start()
    voice = log.Log(link.is_server)
    path, overrides = _words(args.words)
    config = link.together(lambda: configuration.load(path, overrides))
    if not args.go_on:
        return _play(link, config, voice)
    state = _agreed_state(link, config.directory, voice.warn, may_lack=True)
    if state is not None:
        config, changed = link.together(lambda: _continued(config, state))
        return _go_on(link, config, changed, voice, state, args.go_on)
    return _play(link, config, voice, go_on=True)


def resume(args):
    """Go on from a round file with the configuration that it holds, and the changes given."""
    from gdmpi import log, mpi

    link = mpi.start()
    voice = log.Log(link.is_server)
    path, overrides = _words(args.words)
    if path:
        raise UserError(f"{path}: resume takes its configuration from the run; changes look like section.key=value")
    state = _agreed_state(link, args.source, voice.warn)
    config, changed = link.together(lambda: _resumed(args.source, state, overrides))
    return _go_on(link, config, changed, voice, state)


def _agreed_state(link, source, warn, may_lack=False):
    """The round to go on from, at all ranks; may_lack: None if there is no round file."""
    state = link.together(lambda: _state(source, warn, may_lack) if link.is_server else None)
    # the global state stays at the server; the others need the configuration and where their clients' files are
    light = link.share(state and dataclasses.replace(state, server={}, metrics=[]))
    return state or light


def _go_on(link, config, changed, voice, state, go_on=False):
    if state.round >= config.run.rounds:
        if link.together(lambda: link.is_server and _finished(config, state, voice)):
            return 0
        voice.say(
            f"nothing to do: {state.round} of {config.run.rounds} rounds are done; more with "
            f"run.rounds={2 * state.round or 5}"
        )
        return 0
    history = [{"round": state.round, "changes": changed}] if changed else []
    return _play(link, config, voice, state, history, go_on)


def _finished(config, state, voice):
    """Whether the run's end was still to come, as when it is killed after its last round file; then it has come now."""
    from gdmpi import record, report

    if not report.unfinished(config.directory, state, config.run.keep):
        return False
    try:
        record.finish(config, state, voice)
    finally:
        voice.close()
    return True


def _play(link, config, voice, state=None, history=(), go_on=False):
    from gdmpi import run as rounds, starts, stopping

    if config.run.signal != "USR1":
        stopping.listen(f"SIG{config.run.signal}")
        stopping.ignore("SIGUSR1")
    try:
        rounds.play(link, config, voice, state, history, go_on)
    except Paused as why:
        stuck = link.share(starts.stuck(config.directory) if go_on and link.is_server else None)
        if stuck:
            raise PeerError(f"stopped before its end ({why}); {stuck}") from None
        voice.say(f"stopped before its end ({why}); {_how_to_go_on(link, config)}")
        return PAUSED
    finally:
        voice.close()
    return 0


def _how_to_go_on(link, config):
    from gdmpi import checkpoint

    if not checkpoint.files(config.directory):
        return "nothing is saved yet: start it again as before"
    launcher = "" if link.alone else f"mpirun -n {link.size} "
    return f"to go on: {launcher}python -m gdmpi resume {config.directory}"


def _state(source, warn, may_lack):
    from gdmpi import checkpoint

    source = Path(source)
    if may_lack and not checkpoint.files(source):
        return None
    if source.is_dir():
        return checkpoint.newest(source, warn)[1]
    return checkpoint.read(source)


def _saved(state, source, place, name):
    """The configuration that a round was saved with; place: {"out", "name"} of where the run lies now.

    name: of the method, as it is asked for now. Its file may have moved, but must be the same.
    """
    import yaml

    from gdmpi import method

    tree = yaml.safe_load(state.config)
    if name and method.is_file(name) and method.is_file(tree["method"]["name"]):
        tree["method"]["name"] = name
    saved = configuration.build(tree, str(source))
    method.same(saved.method.name, state.about.get("method_sha256"))
    return saved.model_copy(update={"run": saved.run.model_copy(update=place)})


def _resumed(source, state, overrides):
    """The configuration to go on with, and what changed: {key: (old, new)}; UserError for what must not."""
    directory = Path(source) if Path(source).is_dir() else Path(source).parent
    name = next((text.partition("=")[2] for text in overrides if text.startswith("method.name=")), None)
    saved = _saved(state, source, {"out": str(directory.parent), "name": directory.resolve().name}, name)
    return _changed(saved, configuration.load(overrides=overrides, base=saved.plain()), state)


def _continued(config, state):
    """As _resumed(), for a configuration that is given whole; its automatic choices are those of the run."""
    place = {"out": config.run.out, "name": config.run.name}
    saved = _saved(state, config.directory, place, config.method.name)
    return _changed(saved, configuration.keep_choices(config, saved), state)


def _changed(saved, config, state):
    changed = configuration.changes(saved, config)
    for key in changed:
        if key.startswith(tuple(f"{name}." for name in FIXED)) or key in {*FIXED, "run.name", "run.out"}:
            raise UserError(
                f"{key}: cannot change in a resumed run (it is {changed[key][0]}); start a new one for that"
            )
    if config.run.rounds < state.round:
        raise UserError(
            f"run.rounds: {config.run.rounds} is fewer than the {state.round} rounds already done; give more"
        )
    return config, changed


def check(args):
    """Say what a configuration means, without training; or with --method whether methods keep to what all must."""
    path, overrides = _words(args.words)
    if args.method:
        return _check_methods(args, path, overrides)
    from gdmpi import check as checking

    config = configuration.load(path, overrides)
    if args.download:
        checking.download(config)
    for line in checking.report(config):
        print(line)
    return 0


def _check_methods(args, path, overrides):
    from gdmpi import conformance, launcher

    if path or args.download:
        raise UserError(f"{path or '--download'}: --method plays the demo; settings look like section.key=value")
    say = functools.partial(print, flush=True) if launcher.rank() == 0 else lambda line: None
    return conformance.report(args.method, overrides, say)


def show(args):
    """Print one run's rounds, or several runs beside each other."""
    from gdmpi import compare, points, report

    runs = [Path(run) for run in args.runs]
    if args.json and args.at:
        raise UserError("--at: --json gives whole runs; a comparison for programs is --format json")
    if args.json:
        print(report.as_json(runs))
    elif len(runs) == 1 and not args.at:
        print(report.show(runs[0], args.format))
    else:
        text, warnings = compare.show(runs, args.format, args.at and points.budget_of(args.at))
        print(text)
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
    return 0


def plot(args):
    """Draw one run or several."""
    from gdmpi import plot as plotting

    for line in plotting.plot([Path(run) for run in args.runs], Path(args.out)):
        print(line)
    return 0


def verify(args):
    """Recompute all hashes of a run; 0 if a resume would find everything, else 1."""
    from gdmpi import report

    lines, whole = report.verify(Path(args.run))
    print("\n".join(lines))
    return 0 if whole else 1


def export(args):
    """Write the adapter of a run or round file, or the merged model."""
    from gdmpi import export as exporting

    for line in exporting.export(args.source, Path(args.out), args.merge):
        print(line)
    return 0


def eval(args):
    """Loss, perplexity and what else is asked for on the held-out rows."""
    from gdmpi import export as exporting, mpi

    link = mpi.start()
    path, overrides = _words(args.words)
    lines = exporting.evaluate(link, args.source, path, overrides, args.texts)
    if link.is_server:
        print("\n".join(lines))
    return 0


def audit(args):
    """Whether a run's training rows can be told from others."""
    import json

    from gdmpi import audit as auditing, mpi

    link = mpi.start()
    path, words = _words(args.words)
    if path:
        raise UserError(f"{path}: an audit takes its configuration from the run; options look like rows=1000")
    link.together(lambda: auditing.check_out(args.out) if link.is_server else None)
    result = auditing.audit(link, args.source, words)
    if link.is_server:
        print(json.dumps(result, indent=1) if args.json else "\n".join(auditing.report(result)))
    link.together(lambda: auditing.write(result, args.out) if link.is_server and args.out else None)
    return 0


def bench(args):
    """Time the exchange of a round."""
    from gdmpi import bench as benchmark, mpi

    link = mpi.start()
    for line in benchmark.run(link, args.parameters, args.rounds):
        if link.is_server:
            print(line, flush=True)
    return 0


def _words(words):
    """(configuration file or None, overrides) among the words of the command line."""
    overrides = [word for word in words if "=" in word]
    paths = [word for word in words if "=" not in word]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most; settings look like section.key=value")
    return (paths[0] if paths else None), overrides
