"""The comparison: grouping, flags, and the four formats."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console
from synthetic import write_run, write_sweep

from fedfuse.results import sections
from fedfuse.results.curves import Series
from fedfuse.results.measures import gather
from fedfuse.results.run_data import find, load
from fedfuse.results.setting import differences, flatten, group
from fedfuse.results.statistics import mean_interval
from fedfuse.results.table import against_nothing_sent, compare, foot, notes, print_table, to_csv, to_latex, to_markdown
from fedfuse.results.wording import digest_line

EVIL = 'x</script><img src=x onerror=alert(1)>|$\\write18{id}$"\x1b[31m'


def _printed(runs):
    out = io.StringIO()
    print_table(runs, Console(file=out, width=120))
    return out.getvalue()


def test_rows(tmp_path):
    runs, _ = find([write_sweep(tmp_path, ["local", "knfu"], 3)])
    knfu, local = compare(runs)
    assert (knfu.strategy, knfu.seeds, knfu.n, knfu.setting, local.strategy) == (
        "knfu",
        (0, 1, 2),
        3,
        "",
        "local",
    )
    values = [run.final["accuracy/global"] for run in runs if run.strategy == "knfu"]
    assert knfu.final["accuracy/global"] == mean_interval(values)
    assert knfu.up_mb == pytest.approx(40_000 * 5 * 4 / 1e6)
    text = _printed(runs)
    assert "±" in text
    assert "Best round, not the result" in text
    assert "cannot reach p < 0.05" in text


def test_one_seed_has_no_interval(tmp_path):
    text = _printed([load(write_run(tmp_path / "a"))])
    assert "One seed: no interval" in text
    assert " ± " not in text.split("Accuracy after")[0]


def test_differences_are_named(tmp_path):
    runs = [
        load(write_run(tmp_path / "a", "fedavg", 0)),
        load(write_run(tmp_path / "b", "knfu", 1, hyper={"beta": 2.0})),
        load(write_run(tmp_path / "c", "knfu", 1, hyper={"beta": 1.0}, config={"partition": {"alpha": 0.1}})),
        load(write_run(tmp_path / "d", "knfu", 1, config={"data": {"root": "/elsewhere"}, "runtime": {"workers": 9}})),
    ]
    lines = differences(runs)
    assert lines == [
        "partition.alpha: 0.1 (1 run), 0.3 (3 runs)",
        "runtime.workers: 1 (3 runs), 9 (1 run) (changes times or scored rounds, not results)",
    ]
    assert [one.setting for one in compare(runs)] == ["partition.alpha=0.1"] + ["partition.alpha=0.3"] * 3
    assert {one.strategy for one in compare(runs)} == {"fedavg", "knfu", "knfu beta=2.0", "knfu beta=absent"}
    assert any("partition.alpha" in line for line in notes(runs))


def test_values_that_are_long_and_alike_at_both_ends_stay_two(tmp_path):
    long = ["/models/" + "x" * 80 + middle + "y" * 80 for middle in "ab"]
    paths = [write_run(tmp_path / f"p{i}", "fedavg", 0, config={"model": {"path": long[i]}}) for i in range(2)]
    assert len({one.setting for one in compare([load(path) for path in paths])}) == 2
    assert len(differences([load(path) for path in paths])[0].split(" (1 run)")) == 3
    hypers = [write_run(tmp_path / f"h{i}", "knfu", 0, hyper={"init_from": long[i]}) for i in range(2)]
    labels = {one.strategy for one in compare([load(path) for path in hypers])}
    assert len(labels) == 2
    assert all(len(label) < 80 for label in labels)


def test_same_configuration_twice_counts_once(tmp_path):
    runs = [load(write_run(tmp_path / name, "fedavg", 0)) for name in "ab"]
    groups, lines = group(runs)
    assert [one.seeds for one in groups] == [(0,)]
    assert "b left out: same configuration and seed" in lines[0]


def test_unfinished_runs_enter_no_mean(tmp_path):
    runs = [load(write_run(tmp_path / "a")), load(write_run(tmp_path / "b", seed=1, rounds=5, done=2))]
    (row,) = compare(runs)
    assert (row.n, row.unfinished) == (1, 1)
    assert any("interrupted after round 2 of 5" in line for line in notes(runs))


def test_nothing_finished(tmp_path):
    run = load(write_run(tmp_path / "a", rounds=5, done=2))
    (row,) = compare([run])
    assert row.n == 0
    assert "–" in _printed([run])
    assert compare([]) == []
    _printed([])


def test_formats(tmp_path):
    runs, _ = find([write_sweep(tmp_path, ["local", "fedavg"], 2)])
    rows = compare(runs)
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["strategy"] for line in table] == ["fedavg", "local"]
    assert float(table[0]["accuracy/global"]) == rows[0].final["accuracy/global"].mean
    assert float(table[0]["accuracy/global/t_low"]) < float(table[0]["accuracy/global/boot_low"])
    markdown = to_markdown(rows).splitlines()
    assert markdown[0].count("|") == markdown[1].count("|") == markdown[2].count("|")
    latex = to_latex(rows)
    assert r"\toprule" in latex
    assert r"$\pm$" in latex
    assert latex.count(r"\\") == 3


def test_hostile_names_stay_text(tmp_path):
    runs = [load(write_run(tmp_path / "a", EVIL)), load(write_run(tmp_path / "b", "=cmd()|[red]x[/red]"))]
    rows = compare(runs)
    text = _printed(runs)
    assert "\x1b" not in text
    assert "[red]x[/red]" in text
    markdown = to_markdown(rows)
    assert "<img" not in markdown
    assert all(line.replace("\\|", "").count("|") == 9 + 1 for line in markdown.splitlines()[:4])
    latex = to_latex(rows)
    assert r"\write18" not in latex
    assert r"\textbackslash{}write18\{id\}\$" in latex
    assert [line["strategy"][:5] for line in csv.DictReader(io.StringIO(to_csv(rows)))] == ["'=cmd", "x</sc"]


def test_flatten():
    assert flatten({"strategy": "a", "data": {"name": "digits", "extra": {"x": [1]}}}) == {
        "strategy.name": "a",
        "data.name": "digits",
        "data.extra.x": [1],
    }


def _bytes(directory, up, setup=0):
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    summary["traffic"] |= {"up_bytes": up, "down_bytes": up, "setup_bytes": setup}
    path.write_text(json.dumps(summary))


def test_what_set_up_cost_stands_beside_what_training_did(tmp_path):
    """A method that sends its basis once is not cheaper than it was; without set-up there is no such column."""
    _bytes(write_run(tmp_path / "a", "fed_sb"), 56_000, 148_000)
    _bytes(write_run(tmp_path / "b", "fedavg"), 90_000)
    runs, _ = find([tmp_path])
    rows = compare(runs)
    header, fed_sb, fedavg = _printed(runs).splitlines()[:3]
    assert "set-up MB" in header
    assert fed_sb.split()[-5:] == ["0.056", "0.056", "0.15", "5.0", "0"]
    assert fedavg.split()[-5:] == ["0.09", "0.09", "0.0", "5.0", "0"]
    assert [line["setup_mb"] for line in csv.DictReader(io.StringIO(to_csv(rows)))] == ["0.148", "0.0"]
    assert "down MB | set-up MB | seconds" in to_markdown(rows)
    assert "down MB & set-up MB & seconds" in to_latex(rows)
    table = sections.comparison(rows, group(runs)[0], [Series(k, one.strategy, (), ()) for k, one in enumerate(rows)])
    place = [column.name for column in table.columns].index("set-up MB")
    assert [line[place].text for line in table.rows] == ["0.15", "0.0"]
    assert "set-up MB" not in _printed(runs[1:]).splitlines()[0]
    assert csv.DictReader(io.StringIO(to_csv(rows[1:]))).fieldnames.count("setup_mb") == 1


def test_what_is_sent_in_set_up_alone_is_sent(tmp_path):
    _bytes(write_run(tmp_path / "a", "once"), 0, 5)
    _bytes(write_run(tmp_path / "b", "fedavg"), 5)
    assert against_nothing_sent(find([tmp_path])[0]) == []


def test_what_is_added_to_training_alone(tmp_path):
    """Paired by seed, against whoever sends nothing, in a sentence."""
    for seed in range(3):
        for name, up in (("alone", 0), ("fedavg", 5), ("knfu", 7)):
            _bytes(write_run(tmp_path / f"{name}{seed}", name, seed), up)
    runs, _ = find([tmp_path])
    told = against_nothing_sent(runs)
    by = {(one.strategy, one.seed): one.final["accuracy/global"] for one in runs}
    mean = sum(by["knfu", s] - by["alone", s] for s in range(3)) / 3
    assert [line.partition(", in points")[0] for line in told] == [
        "Against alone, global test",
        "Against alone, personal test",
    ]
    assert f"knfu {100 * mean:+.1f} ± " in told[0]
    assert "told apart by the seeds: " in told[0]
    assert against_nothing_sent([one for one in runs if one.strategy != "alone"]) == []
    single = against_nothing_sent([one for one in runs if one.seed == 0])
    assert [line.partition(": ")[2].count("seeds") for line in single] == [0, 0]  # nothing was tested
    assert all(line.endswith(".") for line in single)


def _ends_at(directory, value):
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    summary["final"] |= {"accuracy/global": value, "accuracy/personal": value}
    path.write_text(json.dumps(summary))


def _scored(root, **values):
    """Runs whose final accuracies are given, by strategy, one a seed; `local` sends nothing."""
    for name, shares in values.items():
        for seed, share in enumerate(shares):
            path = write_run(root / f"{name}{seed}", name, seed)
            _ends_at(path, share)
            _bytes(path, 0 if name == "local" else 5)
    return find([root])[0]


def test_an_interval_without_length_is_named(tmp_path):
    runs = _scored(tmp_path, fedavg=(0.9, 0.9, 0.9), fedprox=(0.4, 0.7, 0.5), local=(0.3,))
    (line,) = [line for line in notes(runs) if "interval without length" in line]
    assert line.partition(": ")[2] == "fedavg, global; fedavg, personal"
    assert not any("without length" in line for line in notes(_scored(tmp_path / "b", fedavg=(0.9, 0.8))))
    worst = [write_run(tmp_path / f"c{seed}", seed=seed) for seed in (0, 1)]
    for path in worst:
        summary = json.loads((path / "summary.json").read_text())
        summary["final"]["accuracy/personal_worst10"] = 0.0
        (path / "summary.json").write_text(json.dumps(summary))
    (line,) = [line for line in notes([load(path) for path in worst]) if "interval without length" in line]
    assert line.endswith(": fedavg, worst 10 %")


def test_p_values_of_a_sentence_are_those_of_the_table(tmp_path):
    """One family: p = 0.017 stays below 0.05 times two comparisons with local, not times the three of all pairs."""
    runs = _scored(tmp_path, local=(0.5, 0.5, 0.5), fedavg=(0.60, 0.63, 0.66), fedprox=(0.4, 0.7, 0.5))
    groups = group(runs)[0]
    line = against_nothing_sent(runs)[0]
    assert line.endswith("told apart by the seeds: none (paired t, Holm over all pairs).")
    table = sections.tests(groups)
    p = {row[1].text: row[5].text for row in table.rows if row[0].text == "global"}
    assert p["fedavg − local"] == "0.052"
    (verdict, _) = sections.verdicts(compare(runs), groups)
    assert f"Holm-adjusted p = {p['fedavg − fedprox']}" in verdict


def test_of_many_strategies_a_sentence_names_those_that_the_seeds_tell_apart(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"local-{seed}", "local", seed)
        for i in range(12):  # told apart: the first, by much
            write_run(tmp_path / f"s{i}-{seed}", f"s{i}", seed, skill=0.95 if i == 0 else 0.55, hyper={"far": i == 0})
    line = against_nothing_sent(find([tmp_path])[0])[0]
    told = sum(f"s{i} " in line for i in range(12))
    assert re.search(r"tell (\d+) of 12 strategies apart", line)[1] == str(told)
    assert told < 12
    assert "table of paired tests" in line


def test_of_many_strategies_with_one_seed_a_sentence_does_not_say_that_none_is_told_apart(tmp_path):
    for name in ("local", *(f"s{i}" for i in range(12))):
        write_run(tmp_path / name, name, 0)
    (line, _) = against_nothing_sent(find([tmp_path])[0])
    assert ": none of 12 strategies tested (one seed: no test). The report's table" in line


def test_who_was_not_tested_is_not_among_those_that_seeds_cannot_tell_apart(tmp_path):
    runs = _scored(tmp_path, local=(0.5, 0.5, 0.5), fedavg=(0.60, 0.63, 0.62), fedprox=(0.4,), knfu=(0.5, 0.5, 0.5))
    line = against_nothing_sent(runs)[0]
    assert "fedprox -10.0 (1 of 3 seeds)".replace("-", "−") in line
    assert "told apart by the seeds: fedavg (paired t, Holm over all pairs)" in line
    untested = "fedprox (one seed: no test), knfu (identical in every seed: difference 0)"
    assert line.endswith(f"; not tested: {untested}.")
    alone = against_nothing_sent([run for run in runs if run.strategy in ("local", "fedprox")])[0]
    assert "tell apart" not in alone
    assert alone.endswith("; not tested: fedprox (one seed: no test).")


def test_the_lead_is_that_of_shared_seeds_or_there_is_none(tmp_path):
    """Means over different seeds may say the opposite of what the shared seeds say."""
    runs = _scored(tmp_path, local=(0.9, 0.2, 0.2), fedavg=(0.8,), fedprox=(0.7,))
    lines = sections.verdicts(compare(runs), group(runs)[0])
    why = "seeds 1, 2 of fedavg left no result; seeds 1, 2 of fedprox left no result"
    assert lines[0] == f"Global test accuracy: not compared, since {why}."
    same = [run for run in runs if run.seed == 0 or run.strategy == "fedavg"]
    write_run(tmp_path / "late", "fedmd", 0, done=2)
    same = [*same, load(tmp_path / "late")]
    (verdict, _) = sections.verdicts(compare(same), group(same)[0])
    assert "local is highest with 90.00 % (n = 1), 10.00 points above fedavg" in verdict
    assert verdict.endswith("; not tested (one seed: no test); without a value: fedmd.")


def test_a_verdict_says_whether_the_seeds_tell_the_two_highest_apart(tmp_path):
    for place, local, fedavg, told in (
        ("sure", (0.5, 0.51, 0.53), (0.8, 0.82, 0.81), "; the seeds tell them apart (paired t, Holm-adjusted p = 0.00"),
        (
            "open",
            (0.5, 0.8, 0.2),
            (0.6, 0.7, 0.5),
            "; the seeds cannot tell them apart (paired t, Holm-adjusted p = 0.",
        ),
    ):
        runs = _scored(tmp_path / place, local=local, fedavg=fedavg)
        verdict = sections.verdicts(compare(runs), group(runs)[0])[0]
        assert "fedavg is highest" in verdict
        assert told in verdict


def test_the_line_of_a_run_has_its_own_figures(tmp_path):
    (run,) = _scored(tmp_path, fedavg=(0.8125,))
    measured = gather(run)
    table = sections.runs([(Series(0, "fedavg", (measured,)), "")], [measured], {run.dir: "here"})
    (cells,) = table.rows
    shown = {column.name: cell.text for column, cell in zip(table.columns, cells, strict=True)}
    assert [shown[name] for name in ("run", "seed", "status", "global %")] == ["here", "0", "finished", "81.25"]
    assert float(shown["MB"]) == pytest.approx(measured.cumulative_bytes[-1] / 1e6, rel=0.01)


def test_nobody_is_highest_in_a_tie(tmp_path):
    runs = _scored(tmp_path, local=(0.5, 0.5), fedavg=(0.8, 0.7), fedprox=(0.7, 0.8))
    (verdict, _) = sections.verdicts(compare(runs), group(runs)[0])
    assert verdict == "Global test accuracy: fedavg, fedprox share the highest mean, 75.00 %."


def test_settings_are_named_where_there_are_several(tmp_path):
    """In the sentences beside the table as in it: no setting stands for another."""
    for k, alpha in enumerate((0.1, 1.0)):
        path = write_run(tmp_path / f"{alpha}", "fedmd", config={"partition": {"alpha": alpha}})
        summary = json.loads((path / "summary.json").read_text())
        summary["final"]["accuracy/personal_trained"] = 0.5 + k / 10
        summary["best"] = {"accuracy/global": 0.2 + k / 10, "accuracy/personal": 0.3 + k / 10}
        (path / "summary.json").write_text(json.dumps(summary))
    runs = find([tmp_path])[0]
    (line,) = (line for line in notes(runs) if line.startswith("evaluate.moment"))
    assert line.endswith(": fedmd at partition.alpha=0.1 50.0 %; fedmd at partition.alpha=1.0 60.0 %")
    said = " ".join(_printed(runs).split())
    assert "fedmd at partition.alpha=0.1 20.0 / 30.0; fedmd at partition.alpha=1.0 30.0 / 40.0" in said
    (line,) = (line for line in notes(runs[:1]) if line.startswith("evaluate.moment"))
    assert line.endswith(": fedmd 50.0 %")


def test_a_mean_over_clients_models_is_marked(tmp_path):
    """Beside a server's model it is another quantity: FedAvg's one model, and five that nobody would choose among."""
    for name, whose in (("fedavg", "server"), ("local", "clients"), ("older", None)):
        path = write_run(tmp_path / name, name)
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | ({"global_of": whose} if whose else {})))
    runs = find([tmp_path])[0]
    rows = compare(runs)
    assert [line.count("†") for line in _printed(runs).splitlines()[:4]] == [0, 0, 1, 0]
    assert to_markdown(rows).splitlines()[3].split(" | ")[2].endswith(" †")
    assert to_latex(rows).count(r"$\dagger$") == 1
    assert [line["global_of"] for line in csv.DictReader(io.StringIO(to_csv(rows)))] == ["server", "clients", ""]
    table = sections.comparison(rows, group(runs)[0], [Series(k, one.strategy, (), ()) for k, one in enumerate(rows)])
    assert [line[2].text.endswith("†") for line in table.rows] == [False, True, False]
    assert [line[3].text.endswith("†") for line in table.rows] == [False] * 3
    assert "mean over clients' own" in " ".join(_printed(runs).split())


def test_seeds_without_a_value_are_not_counted_in_its_interval(tmp_path):
    """n counts seeds; an interval of two of three says two."""
    for seed in range(3):
        path = write_run(tmp_path / str(seed), "fedavg", seed)
        if seed == 2:
            _ends_at(path, None)
    runs = find([tmp_path])[0]
    rows = compare(runs)
    markdown = to_markdown(rows).splitlines()[2]
    assert markdown.count(r"\[n = 2\]") == 2  # of three metrics: worst 10 % has all
    assert markdown.split(" | ")[1] == "3"
    assert _printed(runs).splitlines()[1].count("[n = 2]") == 2
    line = next(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line[key] for key in ("n", "accuracy/global/n", "accuracy/personal_worst10/n")] == ["3", "2", "3"]
    table = sections.comparison(rows, group(runs)[0], [Series(0, "fedavg", (), ())])
    assert [cell.text.endswith("[n = 2]") for cell in table.rows[0][2:5]] == [True, True, False]


@pytest.mark.parametrize("terminal", [False, True])
def test_no_column_is_lost_on_a_narrow_screen(tmp_path, terminal):
    """Intervals that are written by their ends are wide; the names stay."""
    for seed, skill in ((0, 0.99), (1, 0.6)):
        write_run(tmp_path / f"a{seed}", "a_rather_long_name", seed, skill=skill)
        write_run(tmp_path / f"b{seed}", "fedavg", seed, skill=skill)
    console = Console(file=io.StringIO(), width=60, force_terminal=terminal)
    print_table(find([tmp_path])[0], console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    header, first, second = text.splitlines()[:3]
    assert header.split()[0] == "strategy"
    assert header.split()[-1] == "failed"
    assert first.startswith("a_rather_long_name")
    assert second.startswith("fedavg")


def test_texts_have_their_bits_per_byte_and_a_wide_table_keeps_its_names(tmp_path):
    for strategy, bits in (("fedavg", (2.0, 2.5)), ("fed_sb", (1.5, None))):
        for seed, found in enumerate(bits):
            path = write_run(tmp_path / f"{strategy}{seed}", strategy, seed, skill=(0.99, 0.6)[seed])
            _bytes(path, 10, 5)
            summary = json.loads((path / "summary.json").read_text())
            summary["final"] |= {} if found is None else {"bits_per_byte/global": found, "bits_per_byte/personal": 2.25}
            (path / "summary.json").write_text(json.dumps(summary))
    runs = find([tmp_path])[0]
    console = Console(file=io.StringIO(), width=60)
    print_table(runs, console)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert lines[1].split()[0] == "strategy"
    assert [line.split()[0] for line in lines[2:4]] == ["fed_sb", "fedavg"]
    half = 12.706204736 * 0.25  # of two seeds, t(0.975, 1) · s/√2, s/√2 = |2.5 − 2|/2
    assert f"2.250 ± {half:.3f}" in lines[3]
    assert " 1.500 " in lines[2]
    assert "less is better" in " ".join(text.split())
    first = list(csv.DictReader(io.StringIO(to_csv(compare(runs)))))[1]
    assert [first[f"bits_per_byte/{split}"] for split in ("global", "personal")] == ["2.25", "2.25"]
    assert float(first["bits_per_byte/global/t_high"]) == pytest.approx(2.25 + half)  # bits know no upper end
    classes = foot(compare([load(write_run(tmp_path / "classes"))]))
    assert "bits" not in classes
    assert "class-averaged" in classes
    assert "class-averaged" not in foot(compare(runs))  # tokens are no classes: each counts alike


def test_of_texts_the_lowest_bits_per_byte_are_best_and_come_first(tmp_path):
    """Shares of tokens do not compare tokenizers, and may say the opposite."""
    runs = []
    for strategy, bits, share in (("fedavg", (2.0, 2.5), 0.9), ("local", (3.0, 3.25), 0.99)):
        for seed, found in enumerate(bits):
            path = write_run(tmp_path / f"{strategy}{seed}", strategy, seed)
            summary = json.loads((path / "summary.json").read_text())
            summary["final"] |= {"bits_per_byte/global": found, "accuracy/global": share}
            (path / "summary.json").write_text(json.dumps(summary))
            runs.append(load(path))
    first, second, *_ = sections.verdicts(compare(runs), group(runs)[0])
    assert first.startswith("Global test, bits per byte: fedavg is lowest with 2.250 ± ")
    assert "(n = 2), 0.875 below local; the seeds cannot tell them apart" in first
    assert "Global test accuracy: local is highest" in second
    for run in runs:
        run.final["bits_per_byte/global"] = 2.25
    assert "fedavg, local share the lowest mean, 2.250." in sections.verdicts(compare(runs), group(runs)[0])[0]


def test_the_foot_explains_what_the_table_has(tmp_path):
    one = foot(compare([load(write_run(tmp_path / "a"))]))
    assert not any(mark in one for mark in ("±", "n seeds", "[n = …]", "†", "low–high", "set-up MB"))
    for seed, skill in ((0, 0.99), (1, 0.6)):
        write_run(tmp_path / f"b{seed}", "fedavg", seed, skill=skill)
    _bytes(tmp_path / "b1", 10, 5)
    several = foot(compare([load(tmp_path / f"b{seed}") for seed in (0, 1)]))
    assert all(mark in several for mark in ("±", "over n seeds", "set-up MB"))


def test_what_liars_score_is_told_apart(tmp_path):
    path = write_run(tmp_path / "a", "fedavg", 0)
    assert "that lie" not in foot(compare([load(path)]))
    summary = json.loads((path / "summary.json").read_text())
    summary["final"]["accuracy/personal_honest"] = 0.875
    (path / "summary.json").write_text(json.dumps(summary))
    runs = [load(path)]
    assert "those that lie" in foot(compare(runs))
    assert [line for line in notes(runs) if "87.5 %" in line]


def test_what_was_printed_while_it_ran_is_not_said_again(tmp_path):
    path = write_run(tmp_path / "a", "fedavg", 0)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "notes": ["one thing", "another"]}))
    told = notes([load(path)], known={"one thing"})
    assert not any("one thing" in line for line in told)
    assert any("another" in line for line in told)


def test_a_note_names_the_setting_where_not_all_say_it(tmp_path):
    for alpha in (0.1, 0.2):
        for seed in (0, 1):
            path = write_run(tmp_path / f"{alpha}-{seed}", "fedavg", seed, config={"partition": {"alpha": alpha}})
            summary = json.loads((path / "summary.json").read_text())
            said = ["by all", *(["by few"] if (alpha, seed) == (0.2, 1) else [])]
            (path / "summary.json").write_text(json.dumps({**summary, "notes": said}))
    told = notes(find([tmp_path])[0])
    assert "by all [fedavg, seed 0; fedavg, seed 1]" in told
    assert "by few [fedavg at partition.alpha=0.2, seed 1]" in told


def test_long_settings_go_on_below(tmp_path):
    for name, alpha in (("a", 0.1), ("b", 0.2)):
        keys = {
            "partition": {"alpha": alpha},
            "model": {"name": f"a_long_name_{name}"},
            "attack": {"name": f"at_{name}"},
        }
        write_run(tmp_path / name, "fedavg", 0, config={**keys, "clock": {"name": name * 20}, "rounds": 5})
    console = Console(file=io.StringIO(), width=80)
    print_table(find([tmp_path])[0], console)
    table = console.file.getvalue().split("Accuracy after")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert "partition.alpha=0.1" in table  # no word is cut in two


def test_one_strategy_has_no_rank(tmp_path):
    def heads(*names):
        runs = [load(write_run(tmp_path / name, name)) for name in names]
        groups = group(runs)[0]
        table = sections.comparison(
            compare(runs), groups, [Series(i, one.label, (), ()) for i, one in enumerate(groups)]
        )
        return [column.name for column in table.columns], table.note

    for names, there in ((["fedavg"], False), (["local", "knfu"], True)):
        columns, note = heads(*names)
        assert ("rank global" in columns) is there
        assert ("Rank:" in note) is there


def test_a_digest_that_is_not_there_says_why() -> None:
    assert digest_line({"digest": "ab12", "digest_missing": []}) == "digest ab12"
    assert digest_line({"digest": None, "digest_missing": [2, 5]}).endswith("no answer of client 2, 5")
    assert digest_line({"digest": None, "digest_missing": list(range(11))}).endswith("8, 9, …")
    assert "\x1b" not in digest_line({"digest": None, "digest_missing": ["\x1b[2J"]})
    assert digest_line({}) == "digest None"


def test_how_much_was_trained_is_told_where_it_differs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "fedavg", seed, trained={"clients": 2000, "server": 0})
        write_run(tmp_path / f"b{seed}", "fedprox", seed, trained={"clients": 2010, "server": 0})
    alike = find([tmp_path])[0]
    assert not any("amount of training" in line for line in notes(alike))
    write_run(tmp_path / "c0", "feddf", 0, trained={"clients": 2000, "server": 300})
    write_run(tmp_path / "d0", "local", 0)  # of a version that did not count
    kept = find([tmp_path])[0]
    assert [line for line in notes(kept) if "amount of training" in line] == [
        "Not the same amount of training, in thousands of examples a run, each as often as it was trained on: at the "
        "server feddf 0.3"
    ]
    write_run(tmp_path / "e0", "knfu", 0, trained={"clients": 23456, "server": 0})
    kept = find([tmp_path])[0]
    assert any(
        "at the clients fedavg 2.0, feddf 2.0, fedprox 2.0, knfu 23.5; at the server feddf 0.3" in line
        for line in notes(kept)
    )
    rows = list(csv.DictReader(io.StringIO(to_csv(compare(kept)))))
    told = {row["strategy"]: (row["trained"], row["trained_at_server"]) for row in rows}
    assert told["feddf"] == ("2000.0", "300.0")
    assert told["local"] == ("", "")
