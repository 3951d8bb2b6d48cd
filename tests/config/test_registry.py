"""Strategies by name: found by looking, registered once, their hyper-parameters checked."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedfuse import FusionClient, FusionStrategy, UserError, hyper, strategy
from fedfuse.config import registry
from fedfuse.config.compose import compose

SHIPPED = {"local", "centralized", "fedavg", "fedprox", "fedmd", "knfu"}


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The registry, put back afterwards."""
    copy = dict(registry.registered)
    monkeypatch.setattr(registry, "registered", copy)
    return copy


def test_listing_reads_and_imports_nothing() -> None:
    found = registry.listed()
    assert set(found) >= SHIPPED
    assert list(found) == sorted(found)
    knfu = found["knfu"]
    assert knfu.module == "fedfuse.strategies.knfu"
    assert "2403.11892" in knfu.paper
    assert knfu.summary


def test_entries_name_both_halves() -> None:
    for name in SHIPPED:
        entry = registry.entry(name)
        assert entry.name == name
        assert issubclass(entry.server, FusionStrategy)
        assert issubclass(entry.client, FusionClient)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="strategy=knfuu: unknown; did you mean 'knfu'"):
        registry.entry("knfuu")


def test_registering_twice_from_one_file_is_harmless(shelf: dict, tmp_path: Path) -> None:
    """A module is loaded again; or `python my_strategy.py` makes it `__main__`, the entry point imports it by name."""
    source = (
        "from fedfuse import FusionClient, FusionStrategy, strategy\n\n"
        '@strategy("twice", client=FusionClient)\nclass Twice(FusionStrategy):\n    """Twice."""\n'
    )
    (tmp_path / "twice.py").write_text(source)
    for name in ("twice", "twice", "again"):
        spec = importlib.util.spec_from_file_location(name, tmp_path / "twice.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
    assert shelf["twice"].server.__module__ == "again"


def test_a_name_belongs_to_one_file(shelf: dict) -> None:
    registry.entry("fedavg")
    with pytest.raises(ValueError, match=r"'fedavg' is registered by fedfuse\.strategies\.fedavg already"):

        @strategy("fedavg", client=FusionClient)
        class Mine(FusionStrategy):
            """Mine."""


def test_hyperparameters_are_a_dataclass(shelf: dict) -> None:
    with pytest.raises(ValueError, match="hyper must be a dataclass"):

        @strategy("mine", client=FusionClient, hyper=dict)
        class Mine(FusionStrategy):
            """Mine."""


def test_one_new_file_is_one_new_strategy(shelf: dict, monkeypatch, tmp_path: Path) -> None:
    """A package named by the entry point grows by a file, and that file's strategy is there; a broken one is named."""
    import fedfuse.strategies as package

    (tmp_path / "fresh.py").write_text(
        "from fedfuse import FusionClient, FusionStrategy, strategy\n\n"
        '@strategy("fresh", client=FusionClient, paper="none")\nclass Fresh(FusionStrategy):\n    """A fresh one."""\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "absent.py").write_text(
        '@strategy("absent")\nclass Absent:\n    """No such import."""\n\nimport no_such_module\n'
    )
    find = importlib.util.find_spec

    def found(name: str, *args):
        spec = find(name, *args)
        if spec is not None and name == "fedfuse.strategies":
            spec = copy.copy(spec)  # it is the package's own, and stays with it
            spec.submodule_search_locations = [*spec.submodule_search_locations, str(tmp_path)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    listed = registry.listed()
    assert listed["fresh"].summary == "A fresh one."
    assert "fedfuse.strategies.fresh" not in sys.modules
    try:
        assert registry.entry("fresh").paper == "none"
    finally:
        sys.modules.pop("fedfuse.strategies.fresh", None)
    with pytest.raises(UserError, match=r"strategy=broken: broken\.py cannot be read \(.*line 1\)"):
        registry.entry("broken")
    with pytest.raises(UserError, match=r"strategy=absent: .* cannot be imported \(NameError: name 'strategy'"):
        registry.entry("absent")


# --- hyper-parameters -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyper:
    """One of each kind."""

    rate: float = hyper(0.1, "η", above=0, high=1)
    rank: int = hyper(4, "r", low=1)
    share: float = hyper(0.5, "ρ", low=0, high=1)
    kind: str = hyper("a", "kind", choices=("a", "b"))
    top: int | None = hyper(None, "k", low=1)
    layers: list[int] = hyper([1, 2], "layers")  # noqa: RUF009 - a field with a factory
    plain: int = 3


@dataclass
class Open:
    """Not frozen."""

    rate: float = hyper(0.1, "η", above=0)


@pytest.fixture
def mine(shelf: dict) -> str:
    @strategy("mine", client=FusionClient, hyper=Hyper)
    class Mine(FusionStrategy):
        """Mine."""

    return "mine"


def test_defaults_and_overrides(mine: str) -> None:
    values = compose(["strategy=mine"]).strategy
    assert (values.name, values.rate, values.top, values.layers) == ("mine", 0.1, None, [1, 2])
    values = compose(["strategy=mine", "strategy.top=3", "strategy.layers=[5]", "strategy.kind=b"]).strategy
    assert (values.top, values.layers, values.kind) == (3, [5], "b")
    assert isinstance(values, Hyper)
    assert compose(["strategy=mine"]).strategy.layers == [1, 2]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("rate=0", "strategy.rate=0.0: mine needs more than 0"),
        ("rate=1.5", "strategy.rate=1.5: mine needs at most 1"),
        ("rate=nan", "strategy.rate=nan: mine needs a finite number"),
        ("share=-0.1", "strategy.share=-0.1: mine needs at least 0"),
        ("rank=0", "strategy.rank=0: mine needs at least 1"),
        ("rank=two", "strategy.rank"),
        ("rank=1.5", "strategy.rank"),
        ("rank=null", "strategy.rank"),
        ("kind=c", "strategy.kind=c: mine allows a, b"),
        ("top=0", "strategy.top=0: mine needs at least 1"),
        ("plain=inf", "strategy.plain"),
        ("ranks=3", "strategy.ranks: no such key; did you mean 'strategy.rank'"),
    ],
)
def test_impossible_hyperparameters_are_refused_in_one_line(mine: str, word: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["strategy=mine", f"strategy.{word}"])
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_endless_numbers_are_refused() -> None:
    with pytest.raises(UserError, match=r"strategy\.beta=inf: knfu needs a finite number"):
        compose(["strategy=knfu", "strategy.beta=inf"])


def test_a_dataclass_need_not_be_frozen(shelf: dict) -> None:
    @strategy("open", client=FusionClient, hyper=Open)
    class Mine(FusionStrategy):
        """Open."""

    assert compose(["strategy=open", "strategy.rate=2"]).strategy.rate == 2.0


def test_what_nobody_declares_is_not_asked_for() -> None:
    """A strategy without a word of its own takes any pool, keeps nothing private and needs nothing of its models."""
    of_server = (
        "pooled", "distils", "whole", "needs_features", "of_classes", "same_features", "aligns", "bare", "deployed",
    )  # fmt: skip
    assert not any(getattr(FusionStrategy, word) for word in of_server)
    assert FusionStrategy.heterogeneous
    assert not FusionClient.personal
    assert not FusionClient.partly_labelled


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_hyper_parameters_stay_as_they_were_asked_for(name: str) -> None:
    assert registry.entry(name).hyper.__dataclass_params__.frozen
