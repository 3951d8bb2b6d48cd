"""Where two runs part: keys, libraries, partition, then the first row that differs, then models."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedfuse.config.files import checked
from fedfuse.config.keys import said
from fedfuse.errors import UserError, printable
from fedfuse.results.run_data import RunRecord, load
from fedfuse.results.setting import WITHOUT_EFFECT, flatten, hashes_in

if TYPE_CHECKING:
    import polars as pl

MOST = 20  # lines of one kind that are told
SHOWN = 60  # characters of a value
ENVIRONMENT = ("python", "machine", "cpu_flags", "cpu_capability", "mkldnn", "threads", "data")
# What a row is named by, and what is compared of it.
TABLES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("schedule", ("round", "client", "phase", "attempt"),
     ("outcome", "since", "start_ns", "received_ns", "computed_ns", "end_ns", "weight", "down_bytes", "up_bytes",
      "flops")),
    ("traffic", ("round", "client", "direction", "message", "record"), ("bytes",)),
    ("metrics", ("round", "scope", "client", "split", "metric"), ("value",)),
)  # fmt: skip

ORDER = ("setup", "train", "resend", "evaluate", "personal", "global")  # of messages and splits in a round


@dataclass
class Difference:
    """What differs between two runs.

    Attributes
    ----------
    settings : list of str
        Keys of the configuration that differ; those that cannot change a result, apart, in `places`.
    places : list of str
    environment : list of str
        What equal digests depend on beside the configuration.
    partition : str
        The first client whose examples differ; empty if none.
    first : str
        The first row that differs; empty if none of those that both have.
    models : list of str
        Final models that differ, where no row does.
    digests : (str or None, str or None)
        Null while a run goes on.
    rounds : (int, int)
        Rounds done.
    """

    digests: tuple[str | None, str | None]
    rounds: tuple[int, int]
    settings: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    partition: str = ""
    first: str = ""
    models: list[str] = field(default_factory=list)

    @property
    def alike(self) -> bool:
        """Whether the results are the same, as far as both have them."""
        one, other = self.digests
        return (one == other or one is None or other is None) and not (self.partition or self.first or self.models)

    def lines(self) -> list[str]:
        """The same in lines for a screen."""
        one, other = (str(digest or "none yet")[:16] for digest in self.digests)
        told = [f"digest: {one}" if one == other else f"digest: {one} against {other}"]
        for name, found in (
            ("keys", self.settings),
            ("environment", self.environment),
            ("without effect on results", self.places),
        ):
            told += [f"{name}: {line}" for line in found[:MOST]]
            if len(found) > MOST:
                told.append(f"{name}: and {len(found) - MOST} more")
        if self.rounds[0] != self.rounds[1]:
            told.append(f"rounds done: {self.rounds[0]} against {self.rounds[1]}; compared as far as both have them")
        if self.partition:
            told.append(f"partition: {self.partition}")
        if self.first:
            told.append(f"first difference: {self.first}")
        told += [f"final models: {line}" for line in self.models[:MOST]]
        if not self.alike and not (self.partition or self.first or self.models):
            told.append("first difference: none in what is recorded; a client's or the server's private state differs")
        elif self.alike:
            told.append("alike in all that both have recorded")
        return told


def difference(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> Difference:
    """Compare two run directories.

    Raises
    ------
    UserError
        If one of them is no run directory, or cannot be read.
    """
    import polars as pl

    runs = load(one), load(other)
    digests = tuple((run.summary or {}).get("digest") for run in runs)
    found = Difference((digests[0], digests[1]), (runs[0].rounds_done, runs[1].rounds_done))
    _settings(found, *(flatten(run.config) for run in runs))
    _environment(found, *runs)
    try:
        found.partition = _partition(*runs)
        found.first = _rows(*runs)
        if not found.first and all(digests) and digests[0] != digests[1]:
            found.models = _models(*runs)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{one}, {other}: cannot be compared: {' '.join(str(error).split())[:200]}") from error
    return found


def _settings(found: Difference, one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in dict.fromkeys((*one, *other)):
        if key == "out" or (key in one and key in other and one[key] == other[key]):
            continue
        free = key != "seed" and any(key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT)
        (found.places if free else found.settings).append(f"{key}: {_said(one, key)} against {_said(other, key)}")


def _said(values: dict[str, Any], key: str) -> str:
    return printable(said(values[key]), SHOWN) if key in values else "nothing"


def _environment(found: Difference, *runs: RunRecord) -> None:
    known = [run.environment for run in runs]
    one_strategy = len({flatten(run.config).get("strategy.name") for run in runs}) == 1
    flat = [
        {k: v for k, v in env.items() if k in ENVIRONMENT}
        | {f"{name} (version)": v for name, v in dict(env.get("versions") or {}).items()}
        | {f"code of the {name}": v for name, v in hashes_in(env).items() if name != "strategy" or one_strategy}
        for env in known
    ]
    for key in dict.fromkeys((*flat[0], *flat[1])):
        if key == "cpu_flags" and flat[0].get(key) != flat[1].get(key):
            flags = [set(str(env.get(key, "")).split()) for env in flat]
            apart = sorted(flags[0] ^ flags[1])
            found.environment.append(f"cpu_flags: {', '.join(apart[:8])}{' …' if len(apart) > 8 else ''} in one only")
        elif flat[0].get(key) != flat[1].get(key):
            found.environment.append(f"{key}: {_said(flat[0], key)} against {_said(flat[1], key)}")


def _partition(one: RunRecord, other: RunRecord) -> str:
    apart = _apart(one.partition, other.partition, ("client", "split", "label"), ("examples",), None)
    if apart is None:
        return ""
    row, what = apart
    return f"client {row['client']}, {row['split']}, label {row['label']}: {what}"


def _rows(one: RunRecord, other: RunRecord) -> str:
    """The first row that differs, by round, then by the order of a round's steps."""
    last, found = min(one.rounds_done, other.rounds_done), []
    for place, (kind, keys, values) in enumerate(TABLES):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        if kind == "schedule" and not all(frame.head(1).collect().height for frame in (mine, theirs)):
            continue  # one of them keeps no virtual time
        apart = _apart(mine, theirs, keys, values, last)
        if apart is not None:
            row = apart[0]
            found.append((row["round"], row["step"], place, _told(kind, *apart)))
    return min(found)[-1] if found else ""


def _told(kind: str, row: dict[str, Any], what: str) -> str:
    who = "server" if row.get("scope") == "server" or row["client"] < 0 else f"client {row['client']}"
    if kind == "traffic":
        where = f"{row['message']}, {who}, record {row['record']!r}, {row['direction']}"
    elif kind == "schedule":
        where = f"{row['phase']}, {who}, its {row['attempt'] + 1}. dispatch"
    else:
        where = f"{row['split']}, {who}, {row['metric']}"
    return f"round {row['round']}, {where}: {what}"


def _apart(
    one: pl.LazyFrame, other: pl.LazyFrame, keys: tuple[str, ...], values: tuple[str, ...], last: int | None
) -> tuple[dict[str, Any], str] | None:
    """The first row, in the order of its keys, whose values differ or that one side lacks; and how."""
    import polars as pl

    kind = {"message", "split"}.intersection(keys)
    word = pl.col(*kind) if kind else pl.lit("train")
    step = pl.lit(len(ORDER))
    for rank, name in reversed(list(enumerate(ORDER))):
        step = pl.when(word == name).then(rank).otherwise(step)

    def kept(frame: pl.LazyFrame, side: str) -> pl.DataFrame:
        rows = frame.select([*keys, *values])
        if last is not None:
            rows = rows.filter(pl.col("round") <= last)
        if "label" in keys:  # classes may be numbers or names
            rows = rows.with_columns(pl.col("label").cast(pl.String))
        counted = rows.with_columns(nth=pl.int_range(pl.len()).over(keys), here=pl.lit(True), step=step)
        return counted.rename({name: f"{name}_{side}" for name in (*values, "here")}).collect()

    sides = kept(one, "one"), kept(other, "other")
    joined = sides[0].join(sides[1], on=[*keys, "nth", "step"], how="full", coalesce=True)
    same = [pl.col(f"{name}_one").eq_missing(pl.col(f"{name}_other")) for name in (*values, "here")]
    joined = joined.filter(~pl.all_horizontal(same))
    if last is not None:  # a run may be evaluated at other rounds than the other, and is no other run for it
        scored = ORDER.index("evaluate")
        both = [set(side.filter(pl.col("step") >= scored)["round"]) for side in sides]
        joined = joined.filter((pl.col("step") < scored) | pl.col("round").is_in(sorted(both[0] & both[1])))
    order = ["round", "step", *keys[1:], "nth"] if last is not None else [*keys, "nth"]
    apart = joined.sort(order).head(1).to_dicts()
    if not apart:
        return None
    row = apart[0]
    if not (row["here_one"] and row["here_other"]):
        return row, f"only the {'first' if row['here_one'] else 'second'} run has it"
    name = next(name for name in values if not _same(row[f"{name}_one"], row[f"{name}_other"]))
    named = "" if len(values) == 1 else f"{name} "
    return row, f"{named}{row[f'{name}_one']!r} against {row[f'{name}_other']!r}"


def _same(one: Any, other: Any) -> bool:
    return one == other or (one != one and other != other)


def _models(one: RunRecord, other: RunRecord) -> list[str]:
    """Final models that differ, with the first of their arrays that does."""
    from safetensors import SafetensorError, safe_open

    files = [{path.name for path in (run.dir / "final").glob("*.safetensors")} for run in (one, other)]
    told = [f"{name}: only one run has it" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        paths = [checked(run.dir / "final" / name) for run in (one, other)]
        try:
            with safe_open(paths[0], "numpy") as a, safe_open(paths[1], "numpy") as b:
                keys = sorted({*a.keys(), *b.keys()})
                for key in keys:
                    if key not in a.keys() or key not in b.keys():  # noqa: SIM118 - no dictionaries
                        told.append(f"{name}: only one has {key}")
                        break
                    x, y = a.get_tensor(key), b.get_tensor(key)
                    if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                        told.append(f"{name}: {key}{_distance(x, y)}")
                        break
        except SafetensorError as error:
            raise UserError(f"{paths[0]}, {paths[1]}: cannot be read: {error}") from error
    return told


def _distance(x: Any, y: Any) -> str:
    if x.shape != y.shape or x.dtype != y.dtype:
        return f", {x.dtype}{list(x.shape)} against {y.dtype}{list(y.shape)}"
    return f", by {abs(x.astype(float) - y.astype(float)).max():.3g} at most"
