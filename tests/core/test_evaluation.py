"""Clients' scores in one line, in numbers of which no two are alike."""

import math

import pytest

from fedfuse.core.evaluation import of_clients
from tests.federations import federation


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
