"""FedFuse: federated knowledge fusion. One algorithm file, every runtime, same bits, honest comparison.

Everything that a strategy needs comes `from fedfuse import …`: the two halves and what they exchange, the families'
base classes, and a few modules of mathematics (`lora`, `parts`, `pair`, `training`, …) that are used by name, as in
`lora.part("lora_B")`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which cannot follow the table below; a test keeps them equal
    from fedfuse import models
    from fedfuse.api import Run, Runs, compare, load, run
    from fedfuse.config.registry import hyper, strategy, without_effect
    from fedfuse.core.client import FusionClient, transfer_rows
    from fedfuse.core.scenario import Scenario
    from fedfuse.core.shares import Metrics, Records, Share, Shares
    from fedfuse.core.strategy import FusionStrategy
    from fedfuse.core.workspace import Workspace
    from fedfuse.data import alignment
    from fedfuse.errors import UserError, WorldError
    from fedfuse.families import inversion, lora, merged_text, merging, neighbours, one_shot, public_text, synthesis
    from fedfuse.families.adapters import AdapterClient, AdapterHyper, AdapterStrategy
    from fedfuse.families.averaging import AnchoredClient, AveragingStrategy, server_step
    from fedfuse.families.bases import BasisClient, BasisHyper, BasisStrategy
    from fedfuse.families.companion import CompanionClient, CompanionStrategy
    from fedfuse.families.flower_rules import FlowerClient, FlowerHyper, FlowerStrategy
    from fedfuse.families.inversion import InversionHyper, InversionStrategy
    from fedfuse.families.merging import MergingClient, MergingHyper, MergingStrategy, StepHyper
    from fedfuse.families.one_shot import Ensemble, OneShotStrategy
    from fedfuse.families.personal import Part, PartClient, PartStrategy
    from fedfuse.families.ranks import RankedClient, RankedHyper, RankedStrategy
    from fedfuse.families.split import SplitClient, SplitStrategy, SteppedClient, SteppedStrategy
    from fedfuse.families.student import StudentStrategy
    from fedfuse.models import pair, parts, questions, reader, soft_prompt
    from fedfuse.models.in_place import variable
    from fedfuse.seeding import generator, seed_of
    from fedfuse.train import classwise, curvature, distil, next_token, training, truncate
    from fedfuse.train.scores import scores
    from fedfuse.train.task import task_loss
    from fedfuse.wire import label_code
    from fedfuse.wire.knowledge import Item, Topic, model_topic
    from fedfuse.wire.records import (
        Arrays,
        InvalidArrays,
        Layout,
        Scope,
        arrays,
        distributions,
        layout_of,
        model_arrays,
        record,
        validate,
    )
    from fedfuse.wire.sums import Sum

# MKL's kernels otherwise round by where in memory an array happens to lie (seen on AMD: at a multiple of 16 bytes or
# not), so that a resumed run, or clients abreast, may have other bits than one that was never stopped. It takes no more
# time, and is read when MKL is used first.
os.environ.setdefault("MKL_CBWR", "AUTO")

_HOMES = {
    "api": "Run Runs compare load run",
    "config.registry": "hyper strategy without_effect",
    "core.client": "FusionClient transfer_rows",
    "core.scenario": "Scenario",
    "core.workspace": "Workspace",
    "models.in_place": "variable",
    "core.shares": "Metrics Records Share Shares",
    "core.strategy": "FusionStrategy",
    "errors": "UserError WorldError",
    "families.adapters": "AdapterClient AdapterHyper AdapterStrategy",
    "families.averaging": "AnchoredClient AveragingStrategy server_step",
    "families.bases": "BasisClient BasisHyper BasisStrategy",
    "families.companion": "CompanionClient CompanionStrategy",
    "families.flower_rules": "FlowerClient FlowerHyper FlowerStrategy",
    "families.inversion": "InversionHyper InversionStrategy",
    "families.merging": "MergingClient MergingHyper MergingStrategy StepHyper",
    "families.one_shot": "Ensemble OneShotStrategy",
    "families.personal": "Part PartClient PartStrategy",
    "families.ranks": "RankedClient RankedHyper RankedStrategy",
    "families.split": "SplitClient SplitStrategy SteppedClient SteppedStrategy",
    "families.student": "StudentStrategy",
    "seeding": "generator seed_of",
    "train.scores": "scores",
    "train.task": "task_loss",
    "wire.knowledge": "Item Topic model_topic",
    "wire.records": "Arrays InvalidArrays Layout Scope arrays distributions layout_of model_arrays record validate",
    "wire.sums": "Sum",
}
_MODULES = ("families.inversion", "families.lora", "families.merged_text", "families.merging", "families.neighbours",
            "families.one_shot", "families.public_text", "families.synthesis", "data.alignment", "models",
            "models.pair", "models.parts", "models.questions", "models.reader", "models.soft_prompt",
            "train.classwise", "train.curvature", "train.distil", "train.next_token", "train.training",
            "train.truncate", "wire.label_code")  # fmt: skip

_WHERE = {name: (f"fedfuse.{home}", name) for home, names in _HOMES.items() for name in names.split()}
_WHERE |= {home.rpartition(".")[2]: (f"fedfuse.{home}", "") for home in _MODULES}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    # torch, flwr and ray take seconds to import: nothing of them is, until something that needs them is asked for
    if name not in _WHERE:
        raise AttributeError(f"module 'fedfuse' has no attribute {name!r}")
    home, inside = _WHERE[name]
    module = importlib.import_module(home)
    return getattr(module, inside) if inside else module


def __dir__() -> list[str]:
    return __all__
