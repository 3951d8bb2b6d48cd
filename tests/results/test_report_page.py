"""The report page as a file: what stands in it, what must never, and how long it takes."""

from __future__ import annotations

import json
import re
import resource
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from synthetic import write_run, write_sweep

from fedfuse.errors import UserError
from fedfuse.results import sections
from fedfuse.results.curves import Series, by_bytes, by_round
from fedfuse.results.figures import client_spread, label_map, time_breakdown
from fedfuse.results.measures import gather, label_counts, similarities
from fedfuse.results.report import report
from fedfuse.results.rerun import reproduce
from fedfuse.results.run_data import load
from fedfuse.results.target import reach, targets

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'$\\frac{a$&amp;{{7*7}}{%x%}\x00\x1b[31m"


class Markup(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_sweep(root / "sweep", ["local", "fedavg", "knfu"], 3, rounds=8, clients=6)
    write_run(root / "sweep" / "late", "fedprox", rounds=8, clients=6, done=3)
    (root / "sweep" / "foreign").mkdir()
    (root / "sweep" / "foreign" / "summary.json").write_text("{}")
    torn = write_run(root / "sweep" / "torn", "fedavg", 9, rounds=8, clients=6) / "metrics.parquet"
    content = bytearray(torn.read_bytes())
    content[4:200] = b"\xff" * 196  # the footer is whole, the data is not
    torn.write_bytes(content)
    written = report([root / "sweep"], root / "out")
    return written, written.path.read_text(encoding="utf-8")


def test_files_and_skipped(page):
    written, text = page
    assert sorted(p.name for p in written.path.parent.iterdir()) == [
        "report.html",
        "table.csv",
        "table.md",
        "table.tex",
    ]
    assert len(written.runs) == 10
    assert len(written.skipped) == 2
    for name in ("foreign", "torn"):
        assert any(name in line for line in written.skipped)
        assert name in text
    assert "late left out: interrupted after round 3 of 8" in text
    assert "cannot reach p &lt; 0.05" in text


def test_sections_and_figures(page):
    text = page[1]
    words = " ".join(Markup(text).words)
    for title in ("Global accuracy by round", "Global accuracy by bytes", "Clients, one by one", "Where the time went"):
        assert title in words
    for title in (
        "who holds what",
        "how alike strategies find them",
        "Paired tests over seeds",
        "To a target accuracy",
    ):
        assert title in words
    assert text.count("<svg") == 9
    assert "fedfuse run strategy=knfu" in text
    assert "n = 3" in words


def test_worst_tenth_of_a_figure_is_that_of_the_table(tmp_path, monkeypatch):
    """A seed whose clients are worst does not give the lowest tenth of all: each seed has its own."""
    shares = {0: [0.8] + [0.9] * 9, 1: [0.1, 0.2] + [0.9] * 8}
    runs = []
    for seed, values in shares.items():
        path = write_run(tmp_path / str(seed), seed=seed, clients=10)
        rows = pl.read_parquet(path / "metrics.parquet")
        own = (pl.col("scope") == "client") & (pl.col("split") == "personal") & (pl.col("metric") == "accuracy")
        given = pl.col("client").replace_strict(dict(enumerate(values)), default=0.0, return_dtype=pl.Float64)
        rows.with_columns(value=pl.when(own).then(given).otherwise("value")).write_parquet(path / "metrics.parquet")
        runs.append(gather(load(path)))
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, *more, **how: drawn.append(x))
    assert client_spread([Series(0, "fedavg", tuple(runs))], "f")
    assert drawn == [[pytest.approx(100 * (0.8 + 0.1) / 2)]]


def test_self_contained(page):
    text = page[1]
    for _, attributes in Markup(text).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in Markup(page[1]).tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_same_figures_twice(page, tmp_path):
    again = report([page[0].runs[0].dir.parent], tmp_path / "again").path.read_text(encoding="utf-8")
    assert re.findall(r"<svg.*?</svg>", again, re.S) == re.findall(r"<svg.*?</svg>", page[1], re.S)


def test_hostile_names_never_become_markup(tmp_path):
    root = tmp_path / "x<img src=x onerror=alert(3)>"
    for seed in (0, 1):
        path = write_run(
            root / f"{seed}", EVIL, seed, hyper={EVIL: EVIL}, environment={EVIL: EVIL}, config={"data": {"name": EVIL}}
        )
        rows = pl.read_parquet(path / "metrics.parquet")
        evil = rows.filter(scope="server").head(1).with_columns(metric=pl.lit(EVIL), split=pl.lit(EVIL))
        matrix = evil.with_columns(scope=pl.lit("matrix"), metric=pl.lit(f"similarity/{EVIL}/1"))
        pl.concat([rows, evil, matrix]).write_parquet(path / "metrics.parquet")
        timing = pl.read_parquet(path / "timing.parquet")
        timing.with_columns(what=pl.lit(EVIL)).write_parquet(path / "timing.parquet")
        labels = pl.read_parquet(path / "partition.parquet").with_columns(label=pl.lit(EVIL))
        labels.write_parquet(path / "partition.parquet")
    write_run(root / "2", EVIL + "2", 0)
    (root / EVIL.replace("/", "").replace("\x00", "")).mkdir()
    (root / EVIL.replace("/", "").replace("\x00", "") / "summary.json").write_text("{")
    written = report([root], tmp_path / "out")
    text = written.path.read_text(encoding="utf-8")
    parsed = Markup(text)
    assert len(written.runs) == 3
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "object", "foreignobject", "a")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" in " ".join(parsed.words)
    assert "{{7*7}}" in text
    assert "\x1b" not in text
    assert "\x00" not in text


def test_one_run_one_seed(tmp_path):
    text = report([write_run(tmp_path / "a")], tmp_path / "out").path.read_text(encoding="utf-8")
    assert "One seed: no interval and no test" in text
    table = text[text.index('id="comparison"') : text.index("</table>")]
    assert "±" not in table


def test_identical_runs_say_so(tmp_path):
    for seed in range(3):
        one = write_run(tmp_path / f"a{seed}", "fedavg", seed)
        other = write_run(tmp_path / f"b{seed}", "fedopt", seed)
        kept = json.loads((one / "summary.json").read_text())
        (other / "summary.json").write_text(json.dumps(kept | {"strategy": "fedopt"}))
    words = " ".join(Markup(report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")).words)
    assert "identical in every seed: difference 0" in words
    assert "+0.00 ± 0.00" in words


def test_settings_apart(tmp_path):
    for alpha in (0.1, 1.0):
        for name in ("local", "fedavg"):
            write_run(tmp_path / f"{name}-{alpha}", name, config={"partition": {"name": "dirichlet", "alpha": alpha}})
    words = " ".join(Markup(report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")).words)
    assert "Setting: partition.alpha=0.1" in words
    assert "Not only strategy and seed differ: partition.alpha: 0.1 (2 runs), 1.0 (2 runs)" in words


def test_unequal_partitions_are_flagged(tmp_path):
    write_run(tmp_path / "a", "local")
    other = write_run(tmp_path / "b", "fedavg") / "partition.parquet"
    pl.read_parquet(other).with_columns(pl.col("examples") + 1).write_parquet(other)
    text = report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")
    assert "Not the same partition although seed and data agree: a, b" in text


def test_unfinished_only_and_no_rows(tmp_path):
    write_run(tmp_path / "a", rounds=5, done=2)
    assert "interrupted" in report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no run to report on"):
        report([tmp_path / "none"], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report([tmp_path / "a"], tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("dirichlet", "linear", True), ("size", "dirichlet", True), ("size", "linear", False),
        ("iid", "dirichlet", False), ("natural", "dirichlet", False),
    ],
)  # fmt: skip
def test_the_head_names_an_alpha_only_where_something_was_dealt_by_it(tmp_path, name, sizes, told):
    write_run(tmp_path / "a", config={"partition": {"name": name, "sizes": sizes}})
    head = report([tmp_path / "a"], tmp_path / "out").path.read_text(encoding="utf-8").split("Made ")[0]
    assert f"partition {name}" in head
    assert ("partition.alpha" in head) == told


def test_the_head_names_the_models_of_a_pool(tmp_path):
    write_run(tmp_path / "a", config={"model": {"name": "auto", "pool": ["mlp", "cnn"]}})
    head = report([tmp_path / "a"], tmp_path / "out").path.read_text(encoding="utf-8").split("Made ")[0]
    assert "model mlp + cnn, clients" in head


def test_bars_of_unfinished_runs_are_told_apart(tmp_path):
    """Of a strategy that has finished runs they are not in it; else its name is in brackets."""
    done, late = write_run(tmp_path / "done"), write_run(tmp_path / "late", seed=1, done=2)
    both = Series(0, "fedavg", (gather(load(done)),), (gather(load(late)),))
    alone = Series(1, "fedmd", (), (gather(load(late)),))
    for drawn in (client_spread([both, alone], "f"), time_breakdown([both, alone], "t")[0]):
        names = re.findall(r">([^<>]*fed[^<>]*)<", drawn)
        assert names == ["fedavg", "(fedmd)"]


def test_labels_of_many_classes_stand_apart_and_of_one_are_no_map():
    drawn = label_map(range(3), range(1000), np.ones((3, 1000)), "p")
    told = [int(found) for found in re.findall(r">(\d+)</text>", drawn)]
    ticks = [number for number in told if number >= 100]
    assert ticks == list(range(200, 1000, 200))
    assert "label" in drawn
    names = label_map(range(3), [f"a long name {i}" for i in range(20)], np.ones((3, 20)), "p")
    assert len(re.findall(r">a long name[^<]*<", names)) <= 4
    of_texts = label_map(range(3), ["0"], np.ones((3, 1)), "p")
    assert "label" not in re.sub(r"<[^>]*>", "", of_texts)


def _stop(path, why):
    (path / "stopped.json").write_text(json.dumps({"why": why}))


def test_survivors_of_a_strategy_that_lost_seeds_win_nothing(tmp_path):
    """Whoever dies by seeds 1 and 2 is not highest by seed 0; a strategy that has all seeds is not called so either."""
    root = tmp_path / "runs"
    for seed in range(3):
        write_run(root / f"local{seed}", "local", seed)
    write_run(root / "knfu0", "knfu", 0)
    for seed, done in ((1, 1), (2, 1)):
        _stop(write_run(root / f"knfu{seed}", "knfu", seed, done=done), f"round 2, train: nobody: <b>{EVIL}")
    written = report([root], tmp_path / "out")
    text = written.path.read_text(encoding="utf-8")
    words = " ".join(Markup(text).words)
    assert "is highest with" not in words
    for kind in ("Global", "Personal"):
        assert f"{kind} test accuracy: not compared, since seeds 1, 2 of knfu stopped." in words
    assert "knfu1 left out: stopped after round 1 of 5: round 2, train: nobody: <b>" in words
    assert "2 stopped" in words
    assert not [tag for tag, _ in Markup(text).tags if tag in ("b", "img")]
    assert "\x1b" not in text
    for seed in (1, 2):
        write_run(root / f"again{seed}", "knfu", seed)
    again = " ".join(Markup(report([root], tmp_path / "out").path.read_text(encoding="utf-8")).words)
    assert "Global test accuracy: knfu is highest" in again


def test_seeds_that_left_nothing_or_no_value_are_named(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"local{seed}", "local", seed)
    write_run(tmp_path / "knfu0", "knfu", 0)
    write_run(tmp_path / "knfu1", "knfu", 1, done=2)
    path = tmp_path / "local2" / "summary.json"
    summary = json.loads(path.read_text())
    summary["final"]["accuracy/global"] = None
    path.write_text(json.dumps(summary))
    words = " ".join(Markup(report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")).words)
    why = "seed 1 of knfu did not finish; seed 2 of knfu left no result"
    assert f"Global test accuracy: not compared, since {why}; seed 2 of local gave no value." in words
    assert f"Personal test accuracy: not compared, since {why}." in words


def test_forty_strategies_are_told_apart(tmp_path):
    """Each has a mark of its own, as its curve has; the line per run, of hundreds, is folded away."""
    for i in range(40):
        for seed in (0, 1):
            write_run(tmp_path / "runs" / f"s{i}-{seed}", f"s{i}", seed, rounds=2, clients=2)
    text = report([tmp_path / "runs"], tmp_path / "out").path.read_text(encoding="utf-8")
    legend = text[text.index('<ul class="legend">') :]
    legend = legend[: legend.index("</ul>")]
    marks = re.findall(r'<span class="(swatch[^"]*)" style="([^"]*)"', legend)
    assert len(set(marks)) == 40
    looks = dict(re.findall(r"(\.dash\d) \{ background: ([^}]+)\}", text))
    assert len(set(looks.values())) == 3  # the fourth is the plain one
    opened = text[: text.index('<table id="runs">')].rpartition("<details")[2]
    assert "Each with its figures (80)" in opened
    assert not opened.startswith(" open")


def test_missing_metrics_are_dashes(tmp_path):
    path = write_run(tmp_path / "a")
    rows = pl.read_parquet(path / "metrics.parquet").filter(~pl.col("metric").str.starts_with("accuracy"))
    rows.write_parquet(path / "metrics.parquet")
    summary = json.loads((path / "summary.json").read_text())
    summary["final"] = dict.fromkeys(summary["final"])
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "partition.parquet").unlink()
    words = " ".join(Markup(report([path], tmp_path / "out").path.read_text(encoding="utf-8")).words)
    assert "nan" not in words.lower().split()


def test_evidence(tmp_path):
    run = load(write_run(tmp_path / "a", "knfu", rounds=6, clients=4, similarity=True))
    found = gather(run)
    assert found.rounds.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert found.cumulative_bytes.tolist() == [k * 4 * 2 * 40_000 for k in range(7)]
    assert len(found.cumulative_seconds) == 7
    assert np.all(np.diff(found.cumulative_seconds) > 0)
    assert sorted(found.clients) == [0, 1, 2, 3]
    assert np.mean(list(found.clients.values())) == pytest.approx(run.final["accuracy/personal"])
    clients, labels, counts = label_counts(run)
    assert (clients, len(labels), counts.sum()) == ([0, 1, 2, 3], 10, 400)
    shown = similarities(run)
    assert [number for number, _ in shown] == [1, 3, 6]
    assert all(matrix.shape == (4, 4) and np.isfinite(matrix).all() for _, matrix in shown)


def test_targets(tmp_path):
    found = [gather(load(write_run(tmp_path / f"{seed}", "knfu", seed, rounds=10))) for seed in range(2)]
    last = max(one.curves["accuracy/global"][1][-1] for one in found)
    chosen = targets(found, "accuracy/global")
    assert chosen == [np.floor(100 * share * last) / 100 for share in (0.8, 0.9, 0.95)]
    cost = reach(found, "accuracy/global", chosen[0])
    first = [1 + np.argmax(one.curves["accuracy/global"][1] >= chosen[0]) for one in found]
    assert (cost.reached, cost.n, cost.rounds) == (2, 2, np.mean(first))
    assert cost.megabytes == pytest.approx(np.mean(first) * 4 * 2 * 40_000 / 1e6)
    assert reach(found, "accuracy/global", 2.0).reached == 0


def test_reproduce_round_trips(tmp_path):
    """The printed command composes to the very configuration of the run."""
    yaml = pytest.importorskip("yaml")
    compose = pytest.importorskip("fedfuse.config.compose").compose
    as_yaml = pytest.importorskip("fedfuse.runs.configuration").as_yaml
    words = ["strategy=fedprox", "strategy.mu=0.25", "data=usps", "partition.alpha=0.1", "clients=7", "seed=3"]
    words += ["model.pool=[mlp,mlp]", "data.root='a b, {c}=$d\\'e'", "participation=0.5", "runtime=inline"]
    config = as_yaml(compose(words))
    path = write_run(tmp_path / "a")
    (path / "config.yaml").write_text(config)
    command = shlex.split(reproduce(load(path)))
    assert command[:3] == ["fedfuse", "run", "strategy=fedprox"]
    assert yaml.safe_load(as_yaml(compose(command[2:]))) == yaml.safe_load(config)
    tuned = config.replace("trials: null", "trials: 9").replace("keys: []", "keys: [train.lr]")
    assert tuned.count("9") > config.count("9")
    (path / "config.yaml").write_text(tuned)
    assert shlex.split(reproduce(load(path))) == command  # a run that was tuned is played as a run, not as a search


def test_size_and_time(tmp_path):
    """Far below the promise (200 runs, 100 rounds, 100 clients in 20 s, 1 GB, 8 MB); full size: synthetic.py."""
    write_sweep(tmp_path / "runs", ["local", "fedavg", "fedmd", "knfu", "ditto"], 4, rounds=50, clients=50)
    began = time.process_time()
    written = report([tmp_path / "runs"], tmp_path / "out")
    assert time.process_time() - began < 20
    assert written.path.stat().st_size < 2_000_000
    assert len(written.runs) == 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000  # kB, of the whole test process


def test_template_files_are_found():
    import fedfuse.results.report as module

    names = {path.name for path in (Path(module.__file__).parent / "template").iterdir()}
    assert {"page.css", "page.js", "report.html", "body.html", "parts.html", "live.html", "watch.js"} <= names


def swept(tmp_path, words):
    """What the page draws over keys, for runs of (strategy, seed, config, hyper)."""
    from fedfuse.results.parameters import over_parameters
    from fedfuse.results.run_data import find
    from fedfuse.results.setting import group
    from fedfuse.results.table import row

    for k, (name, seed, config, hyper) in enumerate(words):
        write_run(tmp_path / str(k), name, seed, config=config, hyper=hyper, rounds=2)
    groups, _ = group(find([tmp_path])[0])
    return over_parameters([(one, i, row(one)) for i, one in enumerate(groups)])


def test_accuracy_over_a_swept_key(tmp_path):
    alphas = [1.0, 0.1, 0.3]
    runs = [(n, s, {"partition": {"alpha": a}}, None) for n in ("local", "fedavg") for s in (0, 1) for a in alphas]
    (found,) = swept(tmp_path, runs)
    assert (found.key, found.context, found.values) == ("partition.alpha", "", (0.1, 0.3, 1.0))
    assert [line.label for line in found.lines] == ["fedavg", "local"]
    for line in found.lines:
        assert [value for value, _ in line.points] == [0.1, 0.3, 1.0]
        assert all(final["accuracy/global"].n == 2 for _, final in line.points)
        assert all(0 <= final["accuracy/global"].low <= final["accuracy/global"].high <= 1 for _, final in line.points)
    text = report([tmp_path], tmp_path / "out").path.read_text(encoding="utf-8")
    assert text.count("Accuracy over partition.alpha") == 1
    figures = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", text[text.index("Over a swept key") :], re.S)[0])
    drawn = [e.get("class") for e in figures.iter() if (e.get("class") or "").startswith("series")]
    assert drawn.count("series series-0") == 1 + 3  # a line, and an interval for each value


def test_a_swept_list_is_no_part_of_a_lines_name(tmp_path):
    (found,) = swept(tmp_path, [("knfu", 0, None, {"targets": value}) for value in (["q", "v"], ["q"])])
    assert [line.label for line in found.lines] == ["knfu"]


def test_two_swept_keys_and_one_that_follows_another(tmp_path):
    """Clients and α: each is drawn at each value of the other; what follows a data set's name is not drawn apart."""
    runs = [
        ("fedavg", 0, {"partition": {"alpha": a}, "clients": n, "participation": n / 10}, None)
        for a in (0.1, 1.0)
        for n in (5, 10)
    ]
    assert {(one.key, one.context) for one in swept(tmp_path, runs)} == {
        ("partition.alpha", "clients=5"),
        ("partition.alpha", "clients=10"),
        ("clients", "partition.alpha=0.1"),
        ("clients", "partition.alpha=1.0"),
    }


def test_a_hyper_parameter_and_who_has_none(tmp_path):
    runs = [("knfu", 0, None, {"beta": b}) for b in (20, 1, 5)] + [("fedavg", 0, None, None)]
    (found,) = swept(tmp_path, runs)
    assert (found.key, found.values) == ("strategy.beta", (1, 5, 20))
    assert [(line.label, line.level, len(line.points)) for line in found.lines] == [
        ("fedavg", True, 1),
        ("knfu", False, 3),
    ]


def test_words_and_nulls_are_drawn_in_their_order(tmp_path):
    runs = [("fedavg", 0, {"model": {"name": name}}, None) for name in ("mlp", "cnn")]
    (found,) = swept(tmp_path, runs)
    assert (found.key, set(found.values)) == ("model", {"mlp", "cnn"})
    assert report([tmp_path], tmp_path / "out").path.exists()


def test_nothing_swept_no_section(page):
    assert "Over a swept key" not in page[1]


@pytest.mark.parametrize("span", [1.1, 1.6, 4, 40, 500, 2e4, 1e7, 1e10])
def test_the_axis_of_bytes_can_be_read(tmp_path, span):
    """Two ticks or more, and none in another's place, whatever lies between the first bytes and the last."""
    run = gather(load(write_run(tmp_path / "a")))
    run.cumulative_bytes[:] = np.geomspace(3.1e6, 3.1e6 * span, len(run.cumulative_bytes))
    drawn = ElementTree.fromstring(by_bytes([Series(0, "fedavg", (run,))], "accuracy/global", "x"))
    axis = next(one for one in drawn.iter() if one.get("id", "").endswith("matplotlib.axis_1"))
    ticks = [one.text for one in axis.iter() if one.tag.endswith("text")]
    assert 3 <= len(ticks) <= 10  # the axis' name is one of them


def test_rounds_are_whole_where_one_was_scored(tmp_path):
    run = gather(load(write_run(tmp_path / "a")))
    for metric, (rounds, values) in run.curves.items():
        run.curves[metric] = (rounds[-1:], values[-1:])
    drawn = ElementTree.fromstring(by_round([Series(0, "fedavg", (run,))], "accuracy/global", "x"))
    axis = next(one for one in drawn.iter() if one.get("id", "").endswith("matplotlib.axis_1"))
    assert [one.text for one in axis.iter() if one.tag.endswith("text")] == ["5", "round"]


def test_nobody_sends_no_axis_of_bytes(tmp_path):
    runs = {name: gather(load(write_run(tmp_path / name, name))) for name in ("local", "fedavg")}
    alone, other = (Series(i, name, (run,)) for i, (name, run) in enumerate(runs.items()))
    assert by_bytes([alone], "accuracy/global", "f") is None
    assert by_bytes([alone, other], "accuracy/global", "f")


def test_time_is_that_of_the_rounds_and_a_phase_keeps_its_tone(tmp_path):
    """Starting up is in no figure of the table either."""
    named = []
    for name, tail in (("a", 0.0), ("b", 90.0)):
        path = write_run(tmp_path / name)
        summary = json.loads((path / "summary.json").read_text())
        summary["seconds"] = {"startup": 500.0, "rounds": 100.0 + tail, "total": 600.0 + tail}
        (path / "summary.json").write_text(json.dumps(summary))
        run = gather(load(path))
        assert sum(run.phases.values()) == pytest.approx(100.0 + tail)
        one = Series(0, "fedavg", (run,))
        named.append(time_breakdown([one], "x")[1])
        table = sections.runs([(one, "")], [run], {run.run.dir: name})
        cell = table.rows[0][[column.name for column in table.columns].index("seconds")]
        assert float(cell.sort) == pytest.approx(100.0 + tail)
    assert named[0] == named[1]


def test_where_lessons_are_taken_in_to_be_scored_the_time_says_so(tmp_path):
    """Otherwise distilling, most of such a run, would pass for the price of measuring."""
    path = write_run(tmp_path / "fedmd", "fedmd")
    said = "with taking in the newest lesson"
    assert said not in report([path], tmp_path / "out").path.read_text(encoding="utf-8")
    summary = json.loads((path / "summary.json").read_text())
    summary["final"]["accuracy/personal_trained"] = 0.5
    (path / "summary.json").write_text(json.dumps(summary))
    assert said in report([path], tmp_path / "out").path.read_text(encoding="utf-8")
