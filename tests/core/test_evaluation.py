"""Clients' scores in one line, in numbers of which no two are alike."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from fedfuse.core.evaluation import of_clients, of_server, panel_notes, splits_of
from fedfuse.errors import UserError
from fedfuse.runs import progress
from tests.federations import federation, play
from tests.halves import client


def test_test_examples_are_for_scores_alone():
    half = client("fedavg")
    for verb in ("receive", "train"):
        half.begin(verb)
        for split in ("personal", "global"):
            with pytest.raises(UserError, match=rf"examples\('{split}'\) outside of evaluate\(\)"):
                half.examples(split)
        assert len(half.examples("validation")[0])
    half.begin("evaluate")
    assert all(len(half.examples(split)[0]) for split in ("personal", "global"))


def test_the_worst_tenth_is_the_mean_of_the_lowest():
    scores = [0.9, 0.31, 0.8, 0.7, 0.05, 0.6, 0.99, 0.5, 0.41, 0.85, 0.95]  # 11 clients: ⌈1.1⌉ = 2
    line = of_clients({"personal/accuracy": value} for value in scores)
    assert line["accuracy/personal_worst10"] == pytest.approx((0.05 + 0.31) / 2)
    assert line["accuracy/personal"] == pytest.approx(sum(scores) / 11)
    ten = of_clients({"personal/accuracy": value} for value in scores[:10])
    assert ten["accuracy/personal_worst10"] == 0.05


def test_clients_without_a_score_are_in_no_mean():
    line = of_clients([
        {"personal/accuracy": 0.4, "global/accuracy": 0.2, "global/accuracy_macro": 0.1, "validation/accuracy": 0.7},
        {"personal/accuracy": math.nan, "global/accuracy": 0.6, "global/accuracy_macro": 0.3},
    ])  # fmt: skip
    assert line["accuracy/personal"] == line["accuracy/personal_worst10"] == 0.4
    assert line["accuracy/global"] == pytest.approx(0.2)
    assert line["accuracy/global_plain"] == pytest.approx(0.4)
    assert line["accuracy/validation"] == 0.7
    assert "accuracy/validation" not in of_clients([{}])
    assert math.isnan(of_clients([{}])["accuracy/personal_worst10"])


def test_the_bare_network_is_built_once_and_holds_only_what_it_is_given() -> None:
    """A companion's server model has no pair in it; after others' weights it is as a new one, and a gap is refused."""
    with federation("fml", "rounds=1") as (built, _):
        workspace = built.strategy.workspace
        name = built.strategy.architecture
        first, second = ({k: v + i for k, v in workspace.build(name).state_dict().items()} for i in (1, 2))
        one = workspace.bare(name, first)
        other = workspace.bare(name, second)
        assert one is other
        assert type(other) is not type(workspace.model(name))
        assert {k: v.tolist() for k, v in other.state_dict().items()} == {k: v.tolist() for k, v in second.items()}
        lacking = dict(list(first.items())[1:])
        with pytest.raises(RuntimeError, match="does not fit"):
            workspace.bare(name, lacking)


class Sure(nn.Module):
    """Says the same classes whatever it is asked."""

    def __init__(self, classes: list[int], count: int) -> None:
        super().__init__()
        self.logits = 10.0 * torch.nn.functional.one_hot(torch.tensor(classes), count)


def judged(headline: str | None = None, y: torch.Tensor | None = None, **models: tuple[str, Sure]):
    """`of_server` of given models on four examples, of clients with architectures a, b, b."""
    loaded = {name: model for name, (_, model) in models.items()}
    labels = torch.tensor([0, 0, 1, 2]) if y is None else y
    texts = SimpleNamespace(read=lambda architecture, split: (labels, labels) if split == "test" else None)
    strategy = SimpleNamespace(
        bare=False, headline=headline, classes=3, predict=lambda model, x, size: model.logits,
        scenario=SimpleNamespace(
            architectures=["a", "b", "b"], config=SimpleNamespace(evaluate=SimpleNamespace(batch_size=9)),
            data=SimpleNamespace(byte_count=lambda split: None),
        ),
        workspace=SimpleNamespace(
            loaded=lambda architecture, arrays: loaded[arrays], bare=lambda architecture, arrays: None, texts=texts
        ),
    )  # fmt: skip
    return of_server(strategy, {name: (architecture, name) for name, (architecture, _) in models.items()}, 7)


def test_several_server_models_count_by_their_clients() -> None:
    knows, zero = Sure([0, 0, 1, 2], 3), Sure([0, 0, 0, 0], 3)  # 1 and 1; 1/2 plain and 1/3 by class
    line, rows = judged(one=("a", knows), two=("b", zero))
    assert line == {
        "accuracy/global": pytest.approx((1 + 2 / 3) / 3),
        "accuracy/global_plain": pytest.approx((1 + 2 / 2) / 3),
    }
    assert rows == [
        (7, "server", -1, "global", "accuracy/global/one", 1.0),
        (7, "server", -1, "global", "two/constant", 1.0),
        (7, "server", -1, "global", "accuracy/global/two", pytest.approx(1 / 3)),
    ]
    line, _ = judged("two", one=("a", knows), two=("b", zero))
    assert line["accuracy/global"] == pytest.approx(1 / 3)
    line, rows = judged(only=("another", zero))  # of no client's architecture
    assert (line["accuracy/global_plain"], rows) == (0.5, [(7, "server", -1, "global", "only/constant", 1.0)])


def test_what_is_no_number_is_told_of_a_server_model() -> None:
    broken = Sure([0, 0, 1, 2], 3)
    broken.logits = broken.logits.index_fill(0, torch.tensor([1]), math.nan)
    line, rows = judged(one=("a", broken))
    assert line["accuracy/global_plain"] == 0.75
    assert rows == [(7, "server", -1, "global", "one/undefined", 0.25)]


def test_the_clients_score_what_somebody_asks_for() -> None:
    def asked(test: bool, models: bool, stop: bool, validation: bool) -> tuple[str, ...]:
        config = SimpleNamespace(stop=SimpleNamespace(on=stop), evaluate=SimpleNamespace(validation=validation))
        dataset = SimpleNamespace(test=(1, 2) if test else None)
        scenario = SimpleNamespace(config=config, data=SimpleNamespace(dataset=dataset))
        return splits_of(SimpleNamespace(scenario=scenario, server_models=lambda: {"m": 1} if models else {}))

    assert asked(True, True, False, False) == asked(False, False, False, False) == ("personal",)
    assert asked(True, False, False, False) == ("personal", "global")
    assert asked(True, True, True, False) == asked(False, False, False, True) == ("personal", "validation")


def test_texts_and_the_other_moment_have_means_of_their_own() -> None:
    line = of_clients([
        {"personal/accuracy": 0.5, "personal/bits_per_byte": 3.0, "personal/accuracy_trained": 0.2},
        {"personal/accuracy": 0.7, "personal/bits_per_byte": 4.0, "global/exact_match": 0.1},
    ])  # fmt: skip
    assert line["bits_per_byte/personal"] == 3.5
    assert line["exact_match/global"] == 0.1
    assert line["accuracy/personal_trained"] == 0.2
    assert not {"bits_per_byte/global", "exact_match/personal", "accuracy/personal_received"} & line.keys()


def test_a_rounds_loss_is_weighted_by_examples() -> None:
    with federation("fedavg", "rounds=1") as (built, _):
        built.strategy.phase = "train"
        built.strategy.inbox.losses = [(3.0, 0.5), (9.0, 2.0)]
        built.collect(4)
        assert built.headline["loss/train"] == (3 * 0.5 + 9 * 2.0) / 12
        assert built.rows == [(4, "server", -1, "train", "loss/train", 1.625)]
        built.collect(5)
        assert math.isnan(built.headline["loss/train"])


@pytest.mark.parametrize("grid", ["inline", "serial"])
def test_a_panel_scores_the_global_test_and_nothing_else_changes(grid: str, tmp_path: Path) -> None:
    """It is drawn by the seed, the same in all rounds, and its mean is of the very scores that all would have given."""

    def scores(*words: str) -> Any:
        path = tmp_path / "-".join(words or ("all",))
        played = play("fd", "clients=6", "seed=3", *words, grid=grid, path=path)
        rows = pl.read_parquet(path / "metrics.parquet").filter(pl.col("scope") == "client").rows()
        found = {(round, client, split, metric): value for round, _, client, split, metric, value, *_ in rows}
        return found, played.federation.history, played.digest

    whole, line, digest = scores()
    some, short, same = scores("evaluate.panel=2")
    asked = {client for _, client, split, _ in some if split == "global"}
    assert len(asked) == 2
    assert some == {key: value for key, value in whole.items() if key[2] != "global" or key[1] in asked}
    for round, (one, all_of_them) in enumerate(zip(short, line, strict=True), start=1):
        wanted = [whole[round, client, "global", "accuracy_macro"] for client in sorted(asked)]
        assert one["accuracy/global"] == pytest.approx(sum(wanted) / 2)
        assert one["accuracy/personal"] == all_of_them["accuracy/personal"]
    assert same == digest
    assert scores("evaluate.panel=6") == (whole, line, digest)


def test_of_a_panel_those_are_counted_that_give_one_answer() -> None:
    notes = play("local", "clients=4", "evaluate.panel=2", "train.lr=50", "train.clip=null").notes
    (told,) = [note for note in notes if note.startswith("one answer")]
    assert "2 of 2 clients' models" in told


def test_a_panel_is_said_and_where_the_server_has_a_model_that_it_does_nothing() -> None:
    with federation("fd", "evaluate.panel=2") as (built, _):
        assert panel_notes(built.strategy) == [
            "accuracy/global is the mean over the models of 2 of 3 clients, drawn once (evaluate.panel)"
        ]
    assert play("fedavg", "evaluate.panel=2").federation.headline["accuracy/global"] > 0
    with federation("fedavg", "evaluate.panel=2") as (built, _):
        built.strategy.ensure_begun()
        assert panel_notes(built.strategy) == [
            "evaluate.panel=2 does nothing here: accuracy/global is of the server's model"
        ]
    with federation("fd") as (built, _):
        assert panel_notes(built.strategy) == []


ALL = "3 clients are scored, and 3 predict 60 test examples; evaluate.every=<rounds> or evaluate.panel=<clients>"
SOME = "3 clients are scored, and 2 predict 60 test examples; evaluate.every=<rounds> asks for less"
NONE = "took 6 of these 10 s: 3 clients are scored; evaluate.every=<rounds> asks for less"


@pytest.mark.parametrize(
    ("name", "panel", "took", "seconds", "said"),
    [
        ("fd", "null", 6.0, 10.0, ALL),
        ("fd", "2", 6.0, 10.0, SOME),
        ("fedavg", "null", 6.0, 10.0, NONE),
        ("fd", "null", 4.0, 5.0, ""),
        ("fd", "null", 6.0, 13.0, ""),
    ],
)
def test_a_round_that_is_mostly_evaluated_says_how_to_ask_for_less(name, panel, took, seconds, said) -> None:
    with federation(name, f"evaluate.panel={panel}") as (built, _):
        built.run()
        built.evaluating = took
        found = progress._mostly_evaluated(built, seconds)
        assert said in found
        assert bool(said) == bool(found)
        built.evaluated -= 1
        assert progress._mostly_evaluated(built, seconds) == ""
