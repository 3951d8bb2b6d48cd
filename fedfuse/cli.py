"""The command `fedfuse`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedfuse.compat.quiet import QUIET
from fedfuse.errors import TRACEBACK, UserError, WorldError, nearest, one_line

USAGE = """\
fedfuse: simulate, deploy and compare federated knowledge fusion

  fedfuse run [key=value …]                one experiment; -m sweeps over key=a,b; --dry-run only says what it would do
  fedfuse compare strategy=a,b seed=0,1 …  a sweep, then the table and the report; out=<dir> holds everything
  fedfuse report DIR… [--out DIR]          tables, plots and report.html from run or sweep directories
  fedfuse diff RUN_DIR RUN_DIR             what first differs between two runs; 0 if nothing, 1 if something
  fedfuse watch DIR… [--port N]            the same page, live on localhost; --host ADDRESS: for whoever has the token
  fedfuse resume RUN_DIR [rounds=N]        go on after the last complete round; --allow-code if its configuration
                                           names code or an address, and you know it (as of export and audit)
  fedfuse list [strategies|datasets|partitions|models|losses|experiments]   or one strategy or preset: fedfuse list knfu
  fedfuse help KEY                         what a key means: fedfuse help train.lr; all of them: fedfuse help run
  fedfuse export RUN_DIR [--client i] [--out FILE]   the final model as safetensors; --peft DIR: its adapters for peft;
                                           --merged DIR: a Hugging Face directory, adapters merged
  fedfuse audit RUN_DIR --audit ldia,pli   what a finished simulation's messages give away
  fedfuse deploy …                         real processes over TLS: fedfuse deploy --help
  fedfuse flower APP_DIR [--nodes N]       run an unmodified Flower app on FedFuse's engine
  fedfuse bench …                          the performance suite

--traceback (or FEDFUSE_TRACEBACK=1) tells a failure's whole story, a client's in a worker too.

Groups, chosen by one word: strategy= data= partition= model= loss= runtime= clock= schedule= secure= attack= defence=
      audit= tracking= experiment=
Keys: strategy.<hyper>= clients=10 participation=1.0 rounds=10 seed=0 train.epochs=5 train.lr=0.05 partition.alpha=0.5
      evaluate.every=1 out=dir
For example:  fedfuse run strategy=knfu data=digits partition.alpha=0.3 rounds=5
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 the world failed (resumable), 2 the command was wrong, 130 interrupted, 143 SIGTERM."""
    started = time.time()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no ⌈ or ± is no reason to end without the result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if argv is None else argv)
    if "--traceback" in words:
        words.remove("--traceback")
        os.environ[TRACEBACK] = "1"
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("fedfuse"))
        return 0
    with contextlib.nullcontext() if words[0] == "deploy" else _terminable():  # Flower's processes listen themselves
        return _carried_out(words, started)


def _carried_out(words: list[str], started: float) -> int:
    command = COMMANDS.get(words[0])
    try:
        if command is None:
            raise UserError(f"fedfuse {words[0]}: no such command; {nearest(words[0], COMMANDS)}")
        if words[0] not in FOREIGN_HELP and any(w in ("-h", "--help") for w in words[1:]):
            return _help(words[:1], started)
        return command(words[1:], started)
    except (UserError, WorldError, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            how, code = ("ended by SIGTERM", 143) if _terminated.is_set() else ("interrupted", 130)
            print(": ".join([f"fedfuse: {how}", *map(str, error.args)]), file=sys.stderr)
            return code
        # a file's or a column's name may be in it
        print(f"fedfuse: {one_line(error, LONGEST)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:
        return 1
    finally:
        _end_ray()


_terminated = threading.Event()  # which signal it was: Ray's calls raise a KeyboardInterrupt of their own


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, as batch systems and containers send it, end a command as Ctrl-C does: what it started ends too."""
    _terminated.clear()

    def terminate(number: int, frame: object) -> None:
        _terminated.set()
        raise KeyboardInterrupt

    free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if free:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_ray() -> None:
    if "fedfuse.engines.ray" in sys.modules:
        from fedfuse.engines.ray import disconnect

        disconnect()


def _as_key(name: str) -> str:
    """How a key is written that was taken for an option."""
    from fedfuse.config.hydra_words import GROUPS
    from fedfuse.config.schema import known

    return f"a key is written {name}=…; " if name in known() or name in (*GROUPS, "strategy") else ""


def _flags(words: list[str], *flags: str) -> tuple[list[str], dict[str, str]]:
    """Split `--flag value` (or a bare flag) from the other words."""
    rest, found, i = [], {}, 0
    while i < len(words):
        word = words[i]
        name, _, value = word.partition("=")
        if word.startswith("-"):
            if name not in flags:
                raise UserError(f"{name}: no such option; {_as_key(name.lstrip('-'))}{nearest(name, flags)}")
            if name in BARE:
                found[name] = "yes"
            elif "=" in word:
                found[name] = value
            elif i + 1 < len(words):
                i += 1
                found[name] = words[i]
            else:
                raise UserError(f"{name}: needs a value")
        else:
            rest.append(word)
        i += 1
    return rest, found


LONGEST = 10_000  # letters of an error
KEY = re.compile(r"[a-z_][\w.]*=")
BARE = ("-m", "--multirun", "--dry-run", "--allow-code")


# --- run, compare, resume ---------------------------------------------------------------------------------


def _run(words: list[str], started: float) -> int:
    overrides, flags = _flags(words, "-m", "--multirun", "--dry-run")
    sweep = "-m" in flags or "--multirun" in flags
    if sweep:
        from fedfuse.runs.sweep import sweep as run_sweep

        run_sweep(overrides, dry="--dry-run" in flags)
        return 0
    from fedfuse.config.compose import compose_one, expand, typed
    from fedfuse.config.idle import idle

    jobs = expand(overrides)
    if len(jobs) > 1:
        raise UserError(f"{len(jobs)} runs are asked for: say `fedfuse run -m …` for a sweep, or `fedfuse compare …`")
    config = compose_one(overrides)
    told = idle(config)  # among the notes of the run
    for name, line in idle(config, False, typed(overrides)).items():
        if name not in told:
            print(f"fedfuse: note: {line}", file=sys.stderr)
    if "--dry-run" in flags:
        from fedfuse.runs.preview import preview

        preview(config)
        return 0
    from fedfuse.runs.experiment import resume, run
    from fedfuse.runs.further import goes_on

    if config.out and goes_on(out := Path(config.out), config):
        print(f"{out}: holds this run with fewer rounds; it goes on to {config.rounds}")
        return _show(resume(out, runtime=config.runtime, rounds=config.rounds))
    return _show(run(config, started))


def _show(path: Path) -> int:
    from rich.console import Console

    from fedfuse.results.run_data import load
    from fedfuse.results.table import print_table
    from fedfuse.results.wording import digest_line

    console = Console(highlight=False)
    run = load(path)
    progress = sys.modules.get("fedfuse.runs.progress")  # not there where nothing was played
    print_table([run], console, progress.said if progress else ())
    console.print(digest_line(run.summary or {}), markup=False, soft_wrap=True)
    console.print(f"run directory: {path}", markup=False, soft_wrap=True)
    return 0


def _compare(words: list[str], started: float) -> int:
    overrides, flags = _flags(words, "--dry-run")
    from fedfuse.runs.sweep import sweep as run_sweep

    run_sweep(overrides, report=True, dry="--dry-run" in flags)
    return 0


def _resume(words: list[str], started: float) -> int:
    rest, flags = _flags(words, "--allow-code")
    asked = [word for word in rest if KEY.match(word) and not Path(word).exists()]
    rest = [word for word in rest if word not in asked]
    if len(rest) != 1:
        raise UserError("fedfuse resume: needs one run directory")
    rounds = None
    for word in asked:
        key, _, value = word.partition("=")
        if key != "rounds":
            raise UserError(f"{word}: a run goes on with what it began with; only rounds=<more> may be said")
        if not value.isdecimal():
            raise UserError(f"{word}: a number of rounds is needed")
        rounds = int(value)
    path = Path(rest[0])
    from fedfuse.results.run_data import load, run_directories

    if (one := next(run_directories(path), path)) != path:
        raise UserError(
            f"{path}: holds the runs of a sweep, which the same fedfuse compare command with out={path} resumes; "
            f"one of them: fedfuse resume {one}"
        )
    if (path / "summary.json").exists():
        kept = load(path)
        if rounds is None or rounds == kept.config.get("rounds"):
            print(f"{path}: finished already; fedfuse resume {path} rounds=<more> goes on")
            return _show(path)
    from fedfuse.runs.experiment import resume

    return _show(resume(path, allow_code="--allow-code" in flags, rounds=rounds))


def _report(words: list[str], started: float) -> int:
    dirs, flags = _flags(words, "--out")
    if not dirs:
        raise UserError("fedfuse report: needs at least one run or sweep directory")
    from fedfuse.results.report import report
    from fedfuse.results.table import print_table

    written = report(dirs, flags.get("--out", dirs[0]))
    print_table(list(written.runs))
    for line in written.skipped:
        print(f"skipped: {line}")
    print(f"report: {written.path}")
    return 0


def _diff(words: list[str], started: float) -> int:
    runs, _ = _flags(words)
    if len(runs) != 2:
        raise UserError(f"fedfuse diff: needs two run directories; {len(runs)} given")
    from fedfuse.results.difference import difference

    found = difference(*runs)
    print("\n".join(found.lines()))
    return 0 if found.alike else 1


def _watch(words: list[str], started: float) -> int:
    from fedfuse.results.watch import command

    return command(words)


# --- list, export -----------------------------------------------------------------------------------------


def _list(words: list[str], started: float) -> int:
    from fedfuse.config import reference, registry
    from fedfuse.config.hydra_words import presets

    rest, _ = _flags(words)
    named = [word for word in rest if word not in reference.KINDS]
    if named and set(rest) <= {*named, "strategies"} and set(named) <= registry.listed().keys():
        print("\n\n".join(map(reference.strategy_text, named)))
        return 0
    if named and set(rest) <= {*named, "experiments"} and set(named) <= set(presets()):
        print("\n\n".join(map(reference.preset_text, named)))
        return 0
    if unknown := [w for w in rest if w not in reference.KINDS]:
        known = [*reference.KINDS, *presets(), *registry.listed()]
        raise UserError(f"fedfuse list {unknown[0]}: unknown; {nearest(unknown[0], known)}")
    for kind in rest or reference.KINDS:
        if len(rest) != 1:
            print(f"{kind}:")
        for name, text in reference.listing(kind):
            print(f"  {name:<18} {text}".rstrip())
    return 0


def _help(words: list[str], started: float) -> int:
    from fedfuse.config import reference

    if words and words[0] in COMMANDS.keys() - {"help"}:
        (part,) = re.findall(rf"^  (fedfuse {words[0]}\b.*(?:\n {{20,}}.*)*)", USAGE, re.MULTILINE)
        print(part)
        if words[0] in ("run", "compare"):
            print("\n" + USAGE[USAGE.index("Groups, ") :] + "\n" + reference.all_rows())
        if words[0] == "audit":  # a key as well, whose words are what a user asks for
            print("\n" + reference.key_text("audit"))
        return 0
    if not words or words[0] in COMMANDS:
        print(USAGE, end="")
        return 0
    for word in words:
        print(reference.key_text(word))
    return 0


def _export(words: list[str], started: float) -> int:
    rest, flags = _flags(words, "--client", "--out", "--peft", "--merged", "--allow-code")
    if len(rest) != 1:
        raise UserError("fedfuse export: needs one run directory")
    asked = flags.get("--client")
    if asked is not None and not asked.isdecimal():
        raise UserError(f"--client={asked}: a client's number is needed")
    run, client = Path(rest[0]), None if asked is None else int(asked)
    allowed = "--allow-code" in flags
    if "--peft" in flags or "--merged" in flags:
        from fedfuse.runs.hand_over import to_merged, to_peft

        for flag, write in (("--peft", to_peft), ("--merged", to_merged)):
            if flag in flags:
                print(write(run, flags[flag], client, allowed))
    if "--out" in flags or not flags.keys() & {"--peft", "--merged"}:
        from fedfuse.runs.export import export

        print(export(run, client, flags.get("--out"), allowed))
    return 0


def _audit(words: list[str], started: float) -> int:
    rest, flags = _flags([word for word in words if word != "--allow-code"], "--audit")
    if len(rest) != 1:
        raise UserError("fedfuse audit: needs one run directory")
    from fedfuse.runs.audit import audit

    names = [name for name in (flags.get("--audit") or "").split(",") if name]
    if not names:
        from fedfuse.config.catalogue import AUDITS

        raise UserError(
            f"fedfuse audit: say which by --audit <name>,…; allowed: {', '.join(AUDITS)} (fedfuse help audit)"
        )
    print(audit(Path(rest[0]), names, "--allow-code" in words))
    return 0


def _deploy(words: list[str], started: float) -> int:
    from fedfuse.deploy import command

    return command(words)


def _flower(words: list[str], started: float) -> int:
    from fedfuse.network.app import command

    return command(words)


def _bench(words: list[str], started: float) -> int:
    from fedfuse.bench.suite import command

    return command(words)


COMMANDS: dict[str, Callable[[list[str], float], int]] = {
    "run": _run,
    "compare": _compare,
    "report": _report,
    "diff": _diff,
    "watch": _watch,
    "resume": _resume,
    "list": _list,
    "help": _help,
    "export": _export,
    "audit": _audit,
    "deploy": _deploy,
    "flower": _flower,
    "bench": _bench,
}
FOREIGN_HELP = ("deploy", "flower", "bench")


if __name__ == "__main__":
    sys.exit(main())
