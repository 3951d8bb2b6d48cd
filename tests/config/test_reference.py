"""The reference: every key and hyper-parameter has a meaning, and a user who asks for one finds it."""

from __future__ import annotations

import re

import pytest

from fedfuse.cli import main
from fedfuse.config import keys, registry
from fedfuse.config.compose import ELSEWHERE, meant
from fedfuse.config.hydra_words import GROUPS
from fedfuse.config.idle import CONDITIONS, holds
from fedfuse.config.reference import all_rows, key_text, listing, preset_text, strategy_text
from fedfuse.config.rules import allowed, check
from fedfuse.config.schema import Config, known
from fedfuse.errors import UserError


def test_every_key_means_something_and_its_condition_can_be_read() -> None:
    config = Config()
    config.strategy = registry.typed(registry.schema("knfu")())
    for key in known().values():
        assert len(key.meaning) > 1, key.name
        if key.only:
            holds(key.only, config)
        assert key.name in all_rows()
    named = " ".join(key.only for key in known().values())
    assert all(condition in named for condition in CONDITIONS)


def test_a_default_that_help_shows_can_be_typed() -> None:
    """Lists among them: quotes of Python's would be taken by a shell."""
    assert " clock.tiers=[laptop,phone,board] " in all_rows()
    assert keys.said([True, None, 0.5, ["a"]]) == "[true,null,0.5,[a]]"


BOUND = re.compile(r"(more than|at least|below|at most) (-?[\d.,]*\d)|^(-?\d[\d.]*) to (\d[\d.]*)")


def _ends(text: str):
    """Ends of the range that a text tells, each with whether it is allowed."""
    for word, end, low, high in BOUND.findall(text.partition(";")[0].partition("(")[0]):
        if word:
            yield float(end.replace(",", "")), word in ("at least", "at most")
        else:
            yield from ((float(low), True), (float(high), True))


def test_the_range_that_is_told_is_the_one_that_is_enforced() -> None:
    tried = 0
    for key in known().values():
        if key.kind.split()[0] not in ("whole", "number") or " bits" in allowed(key.name):
            continue
        for end, good in _ends(allowed(key.name)):
            config = Config()
            group, _, leaf = key.name.rpartition(".")
            setattr(getattr(config, group) if group else config, leaf, type(key.default or 0.0)(end))
            try:
                check(config)
                said = ""
            except UserError as error:
                said = str(error)
            assert said.startswith(f"{key.name}=") is not good, (key.name, end, allowed(key.name), said)
            tried += 1
    assert tried > 60


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_every_strategy_has_a_page(name: str) -> None:
    text = strategy_text(name)
    for key in registry.hypers(name):
        assert key.meaning, key.name
        assert f"{key.name}=" in text
    assert registry.entry(name).paper in text
    assert len(text) > 300


def test_what_is_asked_for_is_found(capsys) -> None:
    for words, said in (
        (["list", "knfu"], "strategy.beta=10.0                β, inverse temperature"),
        (["help", "train.lr"], "  default: 0.05"),
        (["help", "strategy.knfu.beta"], "  may be: number ≥ 0"),
        (["help", "train.lr"], "  may be: number: more than 0"),
        (["help", "clients"], "  may be: whole number or null: at least 1"),
        (["help", "evaluate.moment"], "  may be: text: received, trained"),
        (["help", "model.path"], "  may be: text or null\n"),
        (["help", "partition"], "partition=dirichlet|prior|clustered"),
        (["help", "audit"], "  coop_lira "),
        (["help", "knfu"], "T_s·C·B_f bytes each way"),
        (["run", "--help"], "train.weight_decay=0.0"),
        (["help"], "fedfuse help KEY"),
    ):
        assert main(words) == 0
        assert said in capsys.readouterr().out, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run lr=0.1", "lr: no such key; did you mean 'train.lr' or 'distil.lr'?"),
        ("run alpha=0.1", "did you mean 'partition.alpha'?"),
        ("run dir=x", "dir: no such key; did you mean 'out'?"),
        ("run fraction_fit=0.5", "did you mean 'participation'?"),
        ("run num_workers=2", "did you mean 'runtime.workers'?"),
        ("run local_epochs=2", "did you mean 'train.epochs'?"),
        ("help lr", "did you mean 'train.lr'"),
        ("help strategy.knfu.bta", "knfu has no such setting; did you mean 'beta'"),
        ("list knfuu", "did you mean 'knfu'"),
    ],
)
def test_what_was_meant_is_said(words: str, said: str, capsys) -> None:
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strategy.temperature", "say whose: fedfuse help strategy.<strategy>.temperature, or fedfuse list <strategy>"),
        ("strategy.a.b.c", "no such key"),
        ("nowhere.lr", "no such key"),
    ],
)
def test_whose_setting_is_meant_has_to_be_said(name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{name}: {said}")):
        key_text(name)


def test_listings_are_of_what_there_is() -> None:
    assert dict(listing("losses"))["kl"]
    assert {"smoke", "label_skew"} <= dict(listing("experiments")).keys()
    with pytest.raises(UserError):
        key_text("nonsense")


def test_presets_are_told_like_the_words_of_a_group() -> None:
    assert "  label_skew         Clients hold few of the classes." in key_text("experiment")
    assert "strategy=local,fedavg,fedmd,knfu seed=0,1,2" in preset_text("label_skew")


def test_what_other_platforms_call_it_leads_to_keys_that_there_are() -> None:
    for word, key in ELSEWHERE.items():
        assert meant(word, [*known(), *GROUPS]) == f"did you mean {key!r}?"
