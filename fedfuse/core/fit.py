"""What fits what: a strategy that cannot run on an experiment is refused in words, before anything is written."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from fedfuse.compat.mkl import steady
from fedfuse.compat.torch_norms import BATCH_NORMS
from fedfuse.config import registry
from fedfuse.config.idle import adapts
from fedfuse.config.registry import Entry
from fedfuse.config.schema import Config
from fedfuse.core import client_level
from fedfuse.core.attacks import check_attack
from fedfuse.core.client import FusionClient
from fedfuse.core.collusion import check_collusion
from fedfuse.core.defended import check_defence
from fedfuse.core.scenario import Scenario
from fedfuse.core.secure import check_secure
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError
from fedfuse.train import packed, privacy
from fedfuse.train.losses import chosen
from fedfuse.train.objective import Loss
from fedfuse.train.transformed import DHKD
from fedfuse.train.vocabularies import XToken


def check_fit(strategy: FusionStrategy, entry: Entry) -> None:
    """Refuse, in words, a strategy that cannot run on this experiment.

    Raises
    ------
    UserError
        Naming what does not fit and what would.
    """
    scenario, client = strategy.scenario, entry.client
    pool = sorted(set(scenario.architectures))
    if client.partly_labelled and scenario.data.dataset.next_token:
        raise UserError(
            f"strategy={strategy.name} asks for labels, and data={scenario.data.dataset.name} has none to ask for"
        )
    if strategy.of_classes and scenario.data.dataset.next_token:
        raise UserError(
            f"strategy={strategy.name} computes with a class an example, and the labels of "
            f"data={scenario.data.dataset.name} are next tokens; allowed: data of classes"
        )
    if not strategy.heterogeneous and len(pool) > 1:
        raise UserError(
            f"strategy={strategy.name} needs one architecture, model.pool has {', '.join(pool)}; "
            f"use model=<name>, or a strategy that takes any pool (fedfuse list <strategy> says so)"
        )
    _check_transfer(strategy)
    _check_tokenizers(strategy, pool)
    check_promises(entry, scenario.config)
    _check_settings(strategy, client, pool)
    objective = chosen(scenario.config.loss)  # refuses one that cannot be built
    if objective.needs_labels and strategy.transfer != "none" and not scenario.config.transfer.labelled:
        raise UserError(
            f"loss={scenario.config.loss.name} needs labels, and strategy={strategy.name} distils on an unlabelled "
            f"transfer set: set transfer.labelled=true, or choose another loss"
        )
    if objective.second_head and not strategy.whole:
        raise UserError(
            f"loss={scenario.config.loss.name} trains a second head where whole networks distil a transfer set, which "
            f"strategy={strategy.name} does not do; allowed there: +loss.options.heads=1"
        )
    _check_options(strategy, objective)
    _check_models(strategy, objective, pool)


def _check_options(strategy: FusionStrategy, objective: Loss) -> None:
    """Refuse what is said to an objective that reads it elsewhere alone."""
    config, who = strategy.scenario.config, f"strategy={strategy.name}"
    told = f"loss={config.loss.name}"
    if strategy.of_logits and not objective.softens_logits and objective.temperature != 1:
        raise UserError(
            f"loss.temperature={objective.temperature:g}: {told} softens probabilities, and {who} compares logits; "
            "allowed: 1"
        )
    if isinstance(objective, DHKD) and objective.second_head and objective.gamma != 1 and not config.transfer.labelled:
        raise UserError(
            f"loss.options.gamma={objective.gamma:g}: {told} has no cross-entropy on an unlabelled transfer set; "
            "set transfer.labelled=true, or gamma=1"
        )
    if isinstance(objective, XToken) and not strategy.across:
        for name in ("pieces", "kept"):
            if (value := getattr(objective, name)) != getattr(XToken, name):
                raise UserError(
                    f"loss.options.{name}={value:g}: {told} is kl where one vocabulary is compared, as by {who} here; "
                    f"allowed: {getattr(XToken, name)}"
                )


def check_promises(entry: Entry, config: Config) -> None:
    """Refuse privacy and secure sums that a strategy cannot keep, whatever the data: a site asks it of every run, too.

    Raises
    ------
    UserError
        Naming what breaks the promise.
    """
    server, name = entry.server, entry.name
    if config.privacy.on:
        if server.pooled:
            raise UserError(f"privacy: strategy={name} joins all examples at one client; there N is nobody's own")
        if server.discloses:
            what = ", ".join(server.discloses)
            raise UserError(f"privacy: strategy={name} lets {what} of private examples leave the clients")
        if config.privacy.by_example and (what := registry.declared(entry, config.strategy, "uncovered")):
            raise UserError(
                f"privacy: strategy={name} {what}; allowed are those that only train on them with the task's loss"
            )
        if entry.client.partly_labelled:
            raise UserError(f"privacy: strategy={name} asks for labels as private examples say; N is not fixed there")
    if config.secure.on and not registry.sums_of(entry, config.strategy):
        raise UserError(f"secure=on: strategy={name} sums no records; allowed is off")


def _check_transfer(strategy: FusionStrategy) -> None:
    """Refuse a transfer set that is not there, or smaller than what is asked of it."""
    scenario = strategy.scenario
    if strategy.transfer != "none" and scenario.data.transfer is None:
        if scenario.config.transfer.size == 0:
            raise UserError(f"transfer.size=0: strategy={strategy.name} needs a transfer set; allowed is 1 or more")
        raise UserError(
            f"strategy={strategy.name} needs a transfer set and data={scenario.config.data.name} brings none; "
            f"name one: transfer.source=noise or a data set"
        )
    if strategy.transfer != "none" and scenario.data.transfer is not None:
        rows = len(scenario.data.transfer)
        asked = {"transfer.subset": scenario.config.transfer.subset}
        asked["strategy.subset"] = getattr(strategy.hyper, "subset", None)
        for key, size in asked.items():
            if size is not None and size > rows:
                raise UserError(f"{key}={size}: the transfer set has {rows} examples; allowed is at most that")


def _check_tokenizers(strategy: FusionStrategy, pool: list[str]) -> None:
    """Refuse tokenizers that differ where a transfer set's outputs are compared place by place."""
    asked = {*pool, *(value for value in getattr(strategy.hyper, "__dict__", {}).values() if isinstance(value, str))}
    for word in strategy.scenario.config.model.paths:
        if not any(name.partition("@")[2] == word for name in asked):
            raise UserError(f"model.paths names {word!r}, which nobody has: model.pool=[causal_lm@{word},…] takes it")
    apart = [name for name in pool if strategy.workspace.texts.tokenizer(name) is not None]
    if apart and strategy.transfer != "none" and not strategy.aligns:
        raise UserError(
            f"strategy={strategy.name} compares outputs token by token, and {apart[0]} has a tokenizer of its own: "
            f"set data.extra.tokenizer to its directory for all, or choose a strategy that aligns their tokens"
        )


def _check_settings(strategy: FusionStrategy, client: type[FusionClient], pool: list[str]) -> None:
    """Refuse settings of training, privacy, secure sums, attacks and defences that the strategy cannot follow."""
    scenario = strategy.scenario
    if scenario.config.train.optimizer_state == "keep" and not client.personal:
        raise UserError(
            f"train.optimizer_state=keep: strategy={strategy.name} keeps no private model; allowed there: fresh"
        )
    if scenario.config.privacy.on:
        _check_private(strategy, pool)
    if scenario.config.privacy.by_client:
        client_level.check(strategy)
    if scenario.config.secure.on:
        check_secure(strategy)
    if scenario.config.attack.on:
        check_attack(strategy)
        if scenario.config.attack.colludes:
            check_collusion(strategy)
    if scenario.config.defence.on:
        check_defence(strategy)


def _check_models(strategy: FusionStrategy, objective: Loss, pool: list[str]) -> None:
    """Refuse architectures that cannot be built, or lack what the strategy or the loss asks of them."""
    scenario = strategy.scenario
    for name in pool:  # refuses one that cannot be built, instead of leaving out its clients
        try:
            model = strategy.workspace.model(name)
        except AttributeError:  # what the strategy adds asks for parts that are not there
            model = strategy.workspace.build(name)
        _check_vocabulary(name, model, scenario)
        _check_precision(strategy, model)
        _check_trains(name, model, scenario)
        if scenario.config.data.packing:
            packed.check(strategy.workspace.loaded(name, strategy.workspace.initial(name)), name, scenario.classes)
        missing = [part for part in ("features", "head", "feature_dim") if not hasattr(model, part)]
        if objective.second_head and not isinstance(getattr(model, "head", None), nn.Module):
            missing = missing or ["head that is a module"]
        if missing and (strategy.needs_features or objective.needs_features or objective.second_head):
            who = f"strategy={strategy.name}" if strategy.needs_features else f"loss={scenario.config.loss.name}"
            raise UserError(
                f"{who} needs models with features(x), head(z) and feature_dim, where forward(x) is head(features(x)); "
                f"{name} has no {' and no '.join(missing)}"
            )
    if strategy.same_features:
        sizes = {name: int(strategy.workspace.model(name).feature_dim) for name in pool}  # type: ignore[arg-type]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(
                f"strategy={strategy.name} compares features across clients, which must be of one size; {told}: "
                f"set model.feature_dim={min(sizes.values())}"
            )


def _check_vocabulary(architecture: str, model: nn.Module, scenario: Scenario) -> None:
    """Refuse tokens that a language model has no embedding for."""
    inner = getattr(model, "model", None)
    if architecture.partition("@")[0] != "text_classifier" or not hasattr(inner, "get_input_embeddings"):
        return
    known = int(inner.get_input_embeddings().num_embeddings)  # type: ignore[union-attr,operator]
    inputs = scenario.data.dataset.train.inputs
    if len(inputs) and int(inputs.max()) >= known:
        raise UserError(
            f"model={architecture}: the data have a token {int(inputs.max())}, the model knows {known}: "
            f"use its tokenizer"
        )


def _check_precision(strategy: FusionStrategy, model: nn.Module) -> None:
    """Refuse to train weights of half precision, in which small steps are lost, or of fewer bits, which have none."""
    config = strategy.scenario.config
    if config.model.quantize != "none" and not adapts(config) and config.model.lora_rank is None:
        raise UserError(
            f"model.quantize={config.model.quantize}: strategy={strategy.name} trains the base; allowed: a strategy of "
            f"adapters, or model.lora_rank=<r>"
        )
    half = next((n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16), None)
    if half is not None:
        raise UserError(
            f"model.dtype=bf16: strategy={strategy.name} trains {half}, and steps are lost in bf16; allowed: float32 "
            f"(train.precision=bf16 computes in it), a strategy of adapters, or model.lora_rank=<r>"
        )


def _check_trains(architecture: str, model: nn.Module, scenario: Scenario) -> None:
    """Refuse a model in which nothing is to be trained, and BatchNorm on single values."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"model={architecture}: there is no parameter to train: the model has none, or all are frozen")
    if scenario.config.train.batch_size != 1 or not any(isinstance(m, BATCH_NORMS) for m in model.modules()):
        return
    dataset = scenario.data.dataset
    row = dataset.tensor(dataset.train.inputs[:1])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a copy: neither statistics nor draws are to change
            copy.deepcopy(model).cpu().train()(row)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"train.batch_size=1: model={architecture} has BatchNorm, which cannot train on one value a channel; "
                f"allowed is 2 or more"
            ) from None


def remarks(strategy: FusionStrategy) -> list[str]:
    """What a user has to know of an experiment that can run, and might not do what is expected."""
    scenario, said = strategy.scenario, list[str]()
    if steady() is False:
        said.append("MKL was at work before fedfuse was imported: bits may depend on where arrays lie; import it first")
    if scenario.config.train.epochs == 0 and scenario.config.train.max_steps is None:
        said.append("train.epochs=0: nobody trains on own examples")
    config = scenario.config
    if _ends_early(scenario):
        said.append(
            f"privacy.trainings={config.privacy.trainings}: ε is planned for so many of rounds={config.rounds}, and "
            f"every client is in all of them: once it is spent they refuse, and the run ends there"
        )
    if registry.entry(config.strategy.name).client.partly_labelled and config.labels.initial < 1:
        said.append(
            f"strategy={strategy.name} trains on labels.initial={config.labels.initial:g} of a client's examples and "
            f"on what it asks for: other strategies have all the labels"
        )
        if config.rounds <= config.labels.rounds:
            said.append(
                f"strategy={strategy.name} learns from no label that it asks for: rounds={config.rounds} has no round "
                f"after the first labels.rounds={config.labels.rounds}"
            )
    drawn = [name for name in sorted(set(scenario.architectures)) if strategy.workspace.drawn(name)]
    frozen = [n for n in drawn if not all(p.requires_grad for p in strategy.workspace.model(n).parameters())]
    if frozen:
        said.append(
            f"model={','.join(frozen)}: weights that nobody trains are random, and what is trained builds on them: "
            f"model.checkpoint or model.path starts from a pretrained model"
        )
    if strategy.distils and strategy.transfer != "none" and scenario.data.transfer is not None:
        rows = strategy.rows_distilled
        if rows < FEW * scenario.classes and not scenario.data.dataset.next_token:  # a text is many places
            said.append(
                f"strategy={strategy.name} distils {rows} rows a round for {scenario.classes} classes, which is few: "
                f"transfer.size and transfer.subset say how many there are, distil.steps how often they are used"
            )
    return said


FEW = 10  # rows a class


def _ends_early(scenario: Scenario) -> bool:
    """Whether ε is planned for fewer rounds than everybody takes part in."""
    privacy, rounds = scenario.config.privacy, scenario.config.rounds
    planned = privacy.epsilon is not None and privacy.noise is None and (privacy.trainings or rounds) < rounds
    return planned and (privacy.by_client or scenario.cohort_size == scenario.clients)


def _check_private(strategy: FusionStrategy, pool: list[str]) -> None:
    privacy.check_installed()
    if strategy.scenario.config.privacy.by_client:
        return
    scenario, delta = strategy.scenario, strategy.scenario.config.privacy.delta
    most = max(range(scenario.clients), key=scenario.examples)
    if delta is not None and delta * scenario.examples(most) > 1:
        examples = scenario.examples(most)
        raise UserError(f"privacy.delta={delta}: client {most} has {examples} examples; allowed is at most 1/N")
    texts = scenario.data.dataset.train.texts
    if texts is not None and len(np.unique(texts)) < len(texts):
        raise UserError(
            f"privacy: what is hidden is a text, and data={scenario.data.dataset.name} has {len(texts)} rows of "
            f"{len(np.unique(texts))}; set data.extra.long=cut, or a larger data.extra.length, or privacy.level=client"
        )
    if scenario.config.model.gradient_checkpointing:
        raise UserError("model.gradient_checkpointing=true: gradients by example need the activations; allowed: false")
    if scenario.config.data.packing:
        raise UserError("data.packing=true: gradients by example need a text a row; allowed: false")
    for name in pool:
        privacy.check(strategy.workspace.model(name), name)
