"""What strategies declare of themselves decides what they are refused, in words, before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from fedfuse import UserError
from fedfuse.config import registry
from fedfuse.config.idle import idle
from fedfuse.core.build import build_strategy
from fedfuse.core.fit import remarks
from fedfuse.core.strategy import FusionStrategy
from tests.federations import QUICK, TINY, play, scenario_of
from tests.halves import server


def asked(name: str, *words: str) -> FusionStrategy:
    """A server half at its defaults over a scenario that all share: to compose each its own costs more than it asks."""
    needs = [word for word in QUICK.get(name, ()) if not word.startswith("strategy.")]
    _, scenario = scenario_of((*TINY, "strategy=local", *needs, *words))
    own = registry.typed(OmegaConf.to_object(OmegaConf.structured(registry.schema(name))))
    return build_strategy(registry.entry(name), replace(scenario, config=replace(scenario.config, strategy=own)))


BARE = ("model.name=custom", "model.build=tests.halves:featureless")


@pytest.mark.parametrize("name", ["fedavg", "centralized", "ditto", "fedd2s", "gaussian_heads"])
def test_several_architectures_are_refused_where_one_is_needed(name: str) -> None:
    """The words hold for whoever averages weights and for whoever, as fedd2s, compares layers."""
    with pytest.raises(UserError, match=rf"strategy={name} needs one architecture, model.pool has mlp_small, mlp_wide"):
        asked(name, "model.pool=[mlp_small,mlp_wide]")


def test_knowledge_of_several_architectures_can_be_fused() -> None:
    assert len(set(server("fedmd", "model.pool=[mlp_small,mlp_wide]").scenario.architectures)) == 2


APART = ["moon", "fedper", "fedrep", "fedproto", "fedet", "fedgen", "fedhkd", "fedka", "fedov"]


@pytest.mark.parametrize("name", APART)
def test_a_model_has_the_parts_that_a_strategy_takes_apart(name: str) -> None:
    with pytest.raises(UserError, match=rf"strategy={name} needs models with features\(x\), head\(z\) and feature_dim"):
        asked(name, *BARE)


def test_who_takes_nothing_apart_takes_any_model() -> None:
    assert server("fedavg", *BARE).model


@pytest.mark.parametrize("name", ["fedproto", "fedgkt"])
def test_features_that_are_compared_are_of_one_size(name: str) -> None:
    with pytest.raises(UserError, match=rf"strategy={name} compares features across clients.*: set model.feature_dim="):
        asked(name, "model.pool=[mlp_small,mlp_wide]")
    server(name, "model.pool=[mlp_small,mlp_wide]", "model.feature_dim=16")


DISTIL = ["dsfl", "fedmd", "knfu", "ktpfl", "scarlet", "selectivefd"]  # clients do, whole networks
PRIVATE = ["local", "ditto", "fd", "cofed", "comet", "fedproto", "fedgkt", "fedd2s", "fedmkt", *DISTIL]


@pytest.mark.parametrize("name", PRIVATE)
def test_who_keeps_a_private_model_may_keep_its_optimisers_state(name: str) -> None:
    asked(name, "train.optimizer_state=keep")


@pytest.mark.parametrize("name", ["fedavg", "cfd", "moon"])
def test_nobody_keeps_the_optimisers_state_of_a_model_that_is_overwritten(name: str) -> None:
    with pytest.raises(UserError, match=rf"train.optimizer_state=keep: strategy={name} keeps no private model"):
        asked(name, "train.optimizer_state=keep")


@pytest.mark.parametrize("name", [*DISTIL, "cfd", "fedov"])
def test_whole_networks_that_distil_can_have_a_second_head(name: str) -> None:
    asked(name, "loss=dhkd", "transfer.labelled=true")


@pytest.mark.parametrize("name", [*DISTIL, "cfd", "feddf", "fedet", "fedmkt"])
def test_few_rows_to_distil_are_told(name: str) -> None:
    (said,) = remarks(asked(name))
    assert "rows a round for 10 classes, which is few" in said
    assert not remarks(asked(name, "transfer.size=200", "transfer.subset=100"))  # ten a class are enough


@pytest.mark.parametrize("name", ["fedgkt", "fedd2s", "fedmd", "fedavg"])
def test_how_long_to_distil_is_asked_of_who_distils(name: str) -> None:
    assert ("distil.steps" in idle(asked(name, "distil.steps=3").scenario.config)) == (name == "fedavg")


def test_a_tokenizer_that_nobody_reads_with_is_a_slip() -> None:
    with pytest.raises(UserError, match=r"model.paths names 'own', which nobody has: model.pool=\[causal_lm@own"):
        server("fedavg", "model.paths.own=/somewhere")


def test_delta_is_at_most_one_over_the_examples_of_the_largest_client() -> None:
    pytest.importorskip("opacus", reason="the extra `privacy` is not installed")
    built = server("fedavg", "privacy.noise=1", "partition=size")
    most = max(range(3), key=built.scenario.examples)
    largest = built.scenario.examples(most)
    assert largest > max(built.scenario.examples(c) for c in range(3) if c != most)
    server("fedavg", "privacy.noise=1", "partition=size", f"privacy.delta={0.99 / largest}")
    with pytest.raises(UserError, match=rf"client {most} has {largest} examples; allowed is at most 1/N"):
        server("fedavg", "privacy.noise=1", "partition=size", f"privacy.delta={1.01 / largest}")


LOGITS = (
    "fedgen",
    "fedgkt",
    "fedkd",
    "fedmd",
    "fml",
    "fd with strategy.space=logit",
    "feddf",
)
PROBABILITIES = (
    "fd",
    "feddf with strategy.ensemble=prob",
    "fedhkd",
    "dsfl",
    "cfd",
    "knfu",
    "ktpfl",
    "scarlet",
    "fedet",
    "fedov",
)


@pytest.mark.parametrize("told", LOGITS)
def test_a_temperature_that_no_logits_are_softened_by_is_refused(told: str) -> None:
    name, _, word = told.partition(" with ")
    words = [word] * bool(word)
    for loss in ("mae", "mse", "rkd"):
        with pytest.raises(UserError, match=rf"loss.temperature=3: loss={loss} softens probabilities.*allowed: 1"):
            play(name, f"loss={loss}", "loss.temperature=3", *words)


@pytest.mark.parametrize("told", PROBABILITIES)
def test_a_temperature_of_probabilities_is_heard(told: str) -> None:
    name, _, word = told.partition(" with ")
    words = ["clients=2", "loss=mse", *[word] * bool(word)]
    digests = {play(name, *words, f"loss.temperature={T}").digest for T in (1, 3)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("fedmd", "loss=dhkd", "loss.options.gamma=3"),
        ("fedmd", "loss=dhkd", "loss.options.gamma=3", "loss.options.heads=1"),
        ("fedmd", "loss=xtoken", "loss.options.pieces=2"),
        ("fedmd", "loss=xtoken", "loss.options.kept=3"),
        ("knfu", "loss=xtoken", "loss.options.pieces=2"),
        ("fedmkt", "loss=xtoken", "loss.options.pieces=2"),
        ("fedmkt", "loss=xtoken", "loss.options.kept=3", "strategy.mapping=groups"),
    ],
)
def test_an_option_that_a_loss_reads_elsewhere_alone_is_refused(words) -> None:
    option = words[2].partition("=")[0].rpartition(".")[2]
    with pytest.raises(UserError, match=rf"loss.option.*{option}=.*1|{option}=.*allowed: (4|32)"):
        play(*words)
