"""No key is ignored: changing a hyper-parameter of any strategy changes the digest, or is refused, or says why not."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.errors import UserError
from tests.federations import play

# three clients of quite different sizes and classes, 40 transfer rows, two batches of them a pass
BASE = (
    "data=digits", "data.limit=240", "data.test_limit=20", "partition=dirichlet", "partition.alpha=0.5",
    "partition.min_size=5", "clients=3", "rounds=2", "model=mlp_small", "transfer.size=40", "train.epochs=1",
    "train.batch_size=16", "evaluate.every=2", "runtime=inline",
)  # fmt: skip

# values where neither the choices nor twice the default will do
OTHER: dict[str, Any] = {
    "subset": 20, "ranks": "[2,4,8]", "rank": 3, "targets": "body.1", "alpha": 3, "dropout": 0.5, "top_k": 1,
    "min_weight": 0.4, "large": "mlp", "tail": "mlp", "student": "mlp_wide", "meme": "mlp_wide", "patience": 1,
    "coefficient_lr": 0.5, "server_threshold": 0.4, "refresh": 1, "personal_epochs": 2, "body_epochs": 2,
    "client_learning_rate": 0.2, "min_train_nodes": 4, "generator_lr": 0.1, "generator_lr_decay": 0.5,
    "generator_decay": 0.5, "energy_start": 0.2, "energy_end": 0.2, "lam": 2.0, "finetune_batch": 20,
    "digest_batch": 20, "distill_batch": 20, "server_batch": 20, "distill_epochs": 2, "digest_epochs": 2,
    "regularised_steps": 1, "clip": 0.01, "period": 2, "vote_round": 2, "validation": 0.3, "prune": 0.1, "gamma": 0.1,
    "num_malicious_nodes": 1, "num_nodes_to_select": 1, "margin": 0.9, "threshold": 0.9, "server_lr": 0.5,
    "client_quantile": 0.9, "beta_2": 0.5, "clusters": 3, "duration": 0, "head_epochs": 2, "projection": 16,
    "server_momentum": 0.5, "auxiliary": 5, "samples": 20, "layers": "head", "voters": 1, "epochs": 3,
    "accumulate": 1, "vote_lr": 0.1, "local_momentum": 0.5,
}  # fmt: skip
VALUES: dict[tuple[str, str], Any] = {
    **{(name, "generator_steps"): 3 for name in ("dense", "coboosting")},
    **{(name, "batch"): 24 for name in ("dense", "coboosting", "fedftg")},
    ("fedftg", "iterations"): 1,
    ("fml", "alpha"): 0.9,
    ("feddyn", "alpha"): 0.5,
    ("fedd2s", "tau"): 1,
    ("fedd2s", "head_batch"): 8,
    ("flwr_krum", "num_malicious_nodes"): 2,
    ("flwr_multikrum", "num_malicious_nodes"): 2,
    ("fednano", "language"): "/nowhere",
    ("fednano", "question"): "Which?",
    ("fednano", "optimizer"): "sgd",
    ("fednano", "width"): 32,
    ("fednano", "tokens"): 3,
    ("fedmkt", "alpha"): 0.5,
    ("fedmkt", "server"): "mlp",
    ("fedmkt", "mapping"): "byte",
}

FLOWER = [name.removeprefix("flwr_") for name in registry.listed() if name.startswith("flwr_")]
SEVEN = ("clients=7",)  # of whom one may be malicious

ADAPTERS = [name for name in registry.listed() if "targets" in registry.entry(name).hyper.__dataclass_fields__]
MERGING = ("dare", "fisher", "regmean", "sce", "task_arithmetic", "ties", "twin_merging")

# what a key needs in order to say anything, said in the key's own help too
BESIDE: dict[tuple[str, str], tuple[str, ...]] = {
    ("comet", "distill_epochs"): ("strategy.distill=separate",),
    ("feddf", "validation"): ("strategy.drop_worst=true", "transfer.labelled=true"),
    ("fedmd", "public_epochs"): ("transfer.labelled=true",),
    ("fed_sb", "init_from"): ("transfer.labelled=true",),
    ("fedmkt", "tau"): ("strategy.select=weighted_mean",),
    ("kafal", "acquisition"): ("labels.rounds=1",),
    ("kafal", "compensation"): ("train.epochs=3",),
    ("kafal", "restart"): ("labels.rounds=1",),
    ("knfu", "finetune_loss"): ("transfer.labelled=true",),
    ("knfu", "neighbours"): ("transfer.labelled=true",),
    ("ktpfl", "neighbours"): ("transfer.labelled=true",),
    **{(name, "targets"): ("model=mlp",) for name in ADAPTERS},
    **{(name, "targets"): ("model=mlp", "strategy.rank=2") for name in MERGING},
    **{(name, "alpha"): ("strategy.rank=2",) for name in MERGING},
    **{(name, "statistics"): ("model=resnet8_bn", "rounds=1") for name in ("dense", "coboosting")},
    ("fed_sb", "rate"): ("strategy.r0=singular",),
    ("hetlora", "gamma"): ("strategy.ranks=[2,8,4]", "strategy.prune=0.1"),
    ("hetlora", "weighting"): ("strategy.sparsity=false",),
    ("scarlet", "distill_batch"): ("transfer.subset=40",),
    ("selectivefd", "server_threshold"): ("train.epochs=8",),
    ("selectivefd", "auxiliary"): ("train.epochs=8", "strategy.client_quantile=0.5"),
    **{("selectivefd", key): ("train.epochs=8",) for key in ("distill_batch", "distill_epochs", "subset", "width")},
    **{("cofed", key): ("train.epochs=8", "rounds=3", "strategy.vote_round=1") for key in (
        "margin", "threshold", "weighting", "learn", "repeat", "subset", "restart", "vote_round",
    )},
    ("flwr_krum", "num_malicious_nodes"): SEVEN,
    ("flwr_multikrum", "num_malicious_nodes"): SEVEN,
    ("flwr_multikrum", "num_nodes_to_select"): SEVEN,
    ("flwr_bulyan", "num_malicious_nodes"): SEVEN,
}  # fmt: skip

# (strategy, key) or (strategy, key, value): why nothing can differ
SILENT: dict[tuple[str, ...], str] = {
    ("flwr_multikrum", "num_malicious_nodes"): "few clients, none of whom lies: the same two are chosen",
    ("fednano", "letters"): "bounds the question's length: test_fednano.py",
    ("knfu", "distance", "perplexity"): "of texts, and else refused: test_knfu.py",
    **{
        ("proxy_tuning", key): "how the server predicts, not what is learned: test_proxy_tuning.py"
        for key in (
            "large",
            "alpha",
        )
    },
    ("fed_sb", "svd", "exact"): "small layers are exact by themselves (auto): test_svd.py",
    ("fedproto", "inference"): "says how a client predicts, not what it learns",
    ("fedproto", "among"): "says how a client predicts, not what it learns",
    ("feddyn", "scored"): "says which model is the run's figure",
    ("twin_merging", "keep"): "says how a client predicts, not what it learns: test_merging.py",
    (
        "fedbn",
        "norms",
    ): "no small model has a norm without running statistics: test_partial_sharing.py",
}


# what is refused as it stands, and the words that say why
REFUSED: dict[tuple[str, str], str] = {
    ("fednano", "language"): "/nowhere is not a directory",
    ("proxy_tuning", "weights"): "weighs several experts of texts",
    ("proxy_tuning", "search"): "is of several experts",
    ("proxy_tuning", "tau"): "does nothing with strategy.weights=uniform",
    ("fedmkt", "mapping"): "mapping=byte does nothing where all models have one tokeniser; allowed there: edit",
    ("fedmkt", "unmatched"): "unmatched=nothing does nothing where all models have one tokeniser",
    ("feddf", "patience"): "patience=1 needs labels",
    ("knfu", "k"): "k=32 does nothing where data are no texts",
    ("feddf", "drop_worst"): "drop_worst=true needs labels",
    **{(f"flwr_{rule}", "min_train_nodes"): "at least 4 clients" for rule in FLOWER},
}


# what is refused beside another word, which leaves nothing to read it
IDLE: dict[tuple[str, str], str] = {
    ("fed_sb", "strategy.init=weight_svd strategy.init_rows=8"): "which takes no gradient",
    ("fed_sb", "strategy.init=random_orthonormal strategy.init_from=clients"): "which takes no gradient",
    ("fed_sb", "strategy.init=random_orthonormal strategy.svd=exact"): "which decomposes nothing",
    ("fed_sb", "strategy.init_from=clients strategy.oversample=1"): "which sends no sketch",
    ("regmean", "strategy.gram=diag strategy.a=0.3"): "nothing beside the diagonal",
    ("fednano", "strategy.optimizer=null strategy.lr=0.1"): "where train.lr says it",
    ("scaffold", "train.optimizer=adam strategy.local_momentum=0.5"): "which is no SGD",
}


@pytest.mark.parametrize(("name", "words"), IDLE)
def test_a_key_that_nothing_reads_beside_another_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=IDLE[name, words]):
        play(name, *words.split(), base=BASE)


def values(name: str, field: Any) -> list[Any]:
    """What a key is set to in its turn: each other choice, or one other number."""
    default = None if field.default is MISSING else field.default
    if (name, field.name) in VALUES:
        return [VALUES[name, field.name]]
    if field.metadata.get("choices"):
        return [choice for choice in field.metadata["choices"] if choice != default]
    if isinstance(default, bool):
        return [not default]
    if field.name in OTHER:
        return [OTHER[field.name]]
    assert isinstance(default, int | float), f"{name}.{field.name}: say in OTHER what else it can be"
    high = field.metadata.get("high")
    twice = 2 * default if default else 1
    return [default / 2 if high is not None and twice > high else twice]


KEYS = [(name, field.name) for name in sorted(registry.listed()) for field in fields(registry.entry(name).hyper)]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_key_is_heard(name: str, key: str) -> None:
    (field,) = (f for f in fields(registry.entry(name).hyper) if f.name == key)
    beside = BESIDE.get((name, key), ())
    for value in values(name, field):
        if (name, key) in SILENT or (name, key, str(value)) in SILENT:
            continue
        word = f"strategy.{key}={value}"
        if (name, key) in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name, key]):
                play(name, word, *beside, base=BASE)
            continue
        heard = (
            play(name, rounds, *beside, word, base=BASE).digest != _digest(name, (rounds, *beside))
            for rounds in ("rounds=1", "rounds=2")  # most are heard in the first
        )
        assert any(heard), f"{name}: {key}={value} changes nothing"


_made: dict[tuple[str, tuple[str, ...]], str] = {}


def _digest(name: str, beside: tuple[str, ...]) -> str:
    if (name, beside) not in _made:
        _made[name, beside] = play(name, *beside, base=BASE).digest
    return _made[name, beside]


def test_the_lists_name_what_there_is() -> None:
    known = set(KEYS)
    assert {entry[:2] for entry in SILENT} <= known
    assert set(BESIDE) <= known
    assert all(SILENT.values())


# a strategy, what silences keys of it, and those keys
SILENCED = [
    ("cfd", "strategy.bits_up=32 strategy.bits_down=32", ("delta=false",)),
    ("coboosting", "strategy.weight_step=0", ("weight_decay=0.5",)),
    ("comet", "strategy.lam=0", ("distill=separate", "distill_batch=20")),
    ("fedd2s", "strategy.mu=0 strategy.lam=0", ("temperature=2",)),
    ("feddyn", "strategy.alpha=0", ("scaled=true",)),
    ("fedftg", "strategy.iterations=0 strategy.batch=128", ("distill_steps=2", "diversity=2", "distill_lr=0.2")),
    ("fedftg", "strategy.distill_steps=0", ("distill_lr=0.2",)),
    ("fedgen", "strategy.alpha=0 strategy.beta=0", ("decay=0.5", "regularised_steps=3")),
    ("fedgen", "strategy.generator_steps=0", ("diversity=2", "generator_lr=0.1", "generator_decay=0.1")),
    ("fedka", "strategy.vote_epochs=0", ("majority=0", "vote_batch=8", "vote_lr=0.1")),
    ("flwr_qfedavg", "strategy.q=0", ("client_learning_rate=0.2",)),
    ("hetlora", "strategy.prune=0", ("gamma=0.5",)),
    ("moon", "strategy.mu=0", ("temperature=0.2",)),
    ("dsfl", "strategy.aggregation=sa", ("temperature=0.5",)),
    ("fedka", "strategy.adversarial=false", ("hidden=7",)),
    ("fedka", "strategy.matching=false", ("kernels=3", "accumulate=2")),
    ("fedka", "strategy.voting=false", ("majority=0", "vote_epochs=2", "vote_batch=8", "vote_lr=0.1")),
    ("fedka", "strategy.adversarial=false strategy.matching=false strategy.voting=false", ("gamma=2",)),
    ("fedov", "strategy.adversarial_steps=0", ("adversarial_step=0.1",)),
    ("fedproto", "strategy.inference=head", ("among=held",)),
    ("kafal", "strategy.update=fedavg", ("compensation=2",)),
    ("ktpfl", "strategy.coefficient_lr=0", ("rho=2", "distance=mse", "rows=softmax", "coefficient_steps=2")),
    ("ktpfl", "strategy.coefficient_steps=0", ("rho=2", "distance=mse", "rows=softmax", "coefficient_lr=0.5")),
    ("selectivefd", "strategy.client_quantile=null", ("width=2", "auxiliary=20", "fit_share=0.5")),
    *(
        (name, "strategy.distill_epochs=0", ("distill_batch=20",))
        for name in (
            "cfd",
            "dsfl",
            "ktpfl",
            "scarlet",
            "selectivefd",
        )
    ),
    ("comet", "strategy.distill=separate strategy.distill_epochs=0", ("distill_batch=20",)),
    ("fedd2s", "strategy.head_epochs=0", ("lam=2", "head_batch=8", "head_lr=0.1")),
    ("fedd2s", "strategy.head_epochs=0 strategy.mu=0", ("temperature=2",)),
    ("feddf", "strategy.distill_epochs=0", ("distill_batch=20", "distill_lr=0.1", "ensemble=prob", "clip=1")),
    ("fedet", "strategy.distill_epochs=0", ("lam=2", "distill_batch=20", "distill_lr=0.1")),
    ("fedgkt", "strategy.server_epochs=0", ("alpha_server=2", "server_batch=20")),
    ("fedmd", "strategy.digest_epochs=0", ("digest_batch=20",)),
    ("fedmkt", "strategy.epochs=0", ("alpha=0.5", "batch=8")),
    ("knfu", "strategy.beta=0", ("distance=l2", "epd_source=argmax_histogram")),
    ("knfu", "strategy.finetune_epochs=0", ("finetune_loss=ce_soft", "kd_temperature=2", "finetune_batch=20")),
]


@pytest.mark.parametrize(("name", "beside", "key"), [(n, words, key) for n, words, keys in SILENCED for key in keys])
def test_a_key_that_another_silences_is_refused_beside_it(name: str, beside: str, key: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{key.split('=')[0]}=.* does nothing with"):
        play(name, *beside.split(), f"strategy.{key}", base=BASE)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("strategy=fedmd strategy.digest_epochs=3 distil.epochs=2", "beside distil.epochs=2"),
        ("strategy=fedmd strategy.digest_epochs=0 distil.steps=2", "beside distil.steps=2"),
        ("strategy=dsfl strategy.distill_batch=20 distil.batch_size=30", "beside distil.batch_size=30"),
        ("strategy=fedet strategy.distill_lr=0.1 distil.lr=0.2", "beside distil.lr=0.2"),
        ("strategy=fedmd strategy.digest_batch=20 distil.steps=0", "with distil.steps=0"),
        ("strategy=fedd2s strategy.mu=0 strategy.temperature=2 distil.epochs=0", "with .* and distil.epochs=0"),
        ("strategy=fedmd distil.epochs=0 distil.lr=0.1", "here"),
        ("strategy=fedmd strategy.digest_epochs=0 distil.batch_size=20", "here"),
    ],
)
def test_a_strategys_own_word_that_distil_goes_before_is_refused(words: str, why: str) -> None:
    with pytest.raises(UserError, match=f"does nothing {why}"):
        compose(words.split())


@pytest.mark.parametrize(
    "words",
    [
        "strategy=fedmd strategy.digest_batch=20 distil.steps=3 distil.lr=0.1",
        "strategy=fedmd strategy.digest_batch=20",  # null epochs are not none
        "strategy=fedd2s strategy.temperature=2 distil.epochs=0",  # mu hears it
        "strategy=knfu strategy.beta=0 strategy.top_k=2 strategy.distance=l2",  # the nearest two
    ],
)
def test_a_distillations_words_go_together(words: str) -> None:
    compose(words.split())


@pytest.mark.parametrize("name", sorted(registry.listed()))
def test_what_a_key_goes_with_is_a_key_that_can_be_off(name: str) -> None:
    kinds = {field.name: field for field in fields(registry.entry(name).hyper)}
    for field in kinds.values():
        for factor in field.metadata.get("only", "").replace(" with ", " or ").split(" or "):
            if factor:
                known = kinds[factor]
                assert known.metadata["low"] == 0 or known.default in (True, False, None), (name, field.name)


@pytest.mark.parametrize(
    ("name", "key"), [("fed_sb", "rate"), ("feddf", "validation"), ("fedmkt", "tau"), ("proxy_tuning", "tau")]
)
def test_a_key_that_goes_with_another_is_refused_without_it(name: str, key: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{key}=.* does nothing with"):
        play(name, f"strategy.{key}=0.3", base=BASE)
