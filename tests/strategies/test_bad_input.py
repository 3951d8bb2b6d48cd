"""What makes no sense is named, refused or excluded, counted in the summary, and never averaged in."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from fedfuse.config import registry
from fedfuse.core.shares import FAILED, check_share
from fedfuse.errors import UserError
from fedfuse.wire.records import Arrays, InvalidArrays, arrays_in, record, tensors
from tests.federations import answer, asked, federation, intercept, play
from tests.halves import client, server

DISTIL = (
    "cfd", "cofed", "comet", "dsfl", "fd", "fedd2s", "feddf", "fedet", "fedgen", "fedgkt", "fedhkd", "fedka", "fedkd",
    "fedmd", "fedproto", "fml", "knfu", "ktpfl", "scarlet", "selectivefd",
)  # fmt: skip
SOFT = {
    "comet",
    "dsfl",
    "fd",
    "fedd2s",
    "fedhkd",
    "knfu",
    "ktpfl",
    "scarlet",
    "selectivefd",
}  # send probabilities


def nan(name: str, arrays: Arrays) -> Arrays:
    """Not a number in the first float; where there is none, bytes that no coder writes or classes that are none."""
    out = {key: value.clone() for key, value in arrays.items()}
    key = next((k for k, v in out.items() if v.is_floating_point()), next(iter(out)))
    out[key].view(-1)[: 1 if out[key].is_floating_point() else None] = (
        torch.nan if out[key].is_floating_point() else 100
    )
    return out


def another_class(name: str, arrays: Arrays) -> Arrays:
    """One more class, or embedding dimension, or input unit; where there is no matrix, more of all."""
    if all(value.ndim < 2 for value in arrays.values()):
        return {key: torch.cat([value] * 101) for key, value in arrays.items()}
    return {k: torch.cat([v, v[..., -1:]], -1) if v.ndim > 1 and v.shape[-1] else v for k, v in arrays.items()}


def no_distribution(name: str, arrays: Arrays) -> Arrays:
    """Rows with sum 2."""
    key = "predictions" if name == "fedhkd" else "p"
    return {**arrays, key: 2 * arrays[key]} if key in arrays else arrays


# (round, client): client 1 fails in round 1; in round 2 only client 1 is right
SPOILS = {(1, 1): nan, (2, 2): another_class, (2, 0): no_distribution}


def disturbed(name: str, lost: bool, path: Path) -> tuple[Any, dict[str, Any], int]:
    """A run in which replies are spoilt, or do not come at all."""
    words = ("strategy.fuse_space=prob",) if name == "knfu" else ()  # logits need not be distributions
    with federation(name, *words, path=path) as (built, _):
        count = 0

        def tampered(reply: Message, spoil: Any) -> Message | None:
            nonlocal count
            if not reply.has_content() or not arrays_in(reply.content):
                return None
            count += 1
            if lost:
                return Message(Error(code=FAILED, reason="lost"), reply_to=asked(reply))
            return answer(reply, **{k: record(spoil(name, tensors(v))) for k, v in reply.content.array_records.items()})

        for (round, who), spoil in SPOILS.items():
            if spoil is not no_distribution or name in SOFT:
                intercept(built, partial(tampered, spoil=spoil), kind="train", round=round, client=who)
        built.run()
        return built, json.loads((path / "summary.json").read_text()), count


@pytest.mark.parametrize("name", DISTIL)
def test_what_is_refused_is_as_good_as_lost(name: str, tmp_path: Path) -> None:
    """Equal digests: nothing of a refused share is in any average, any state, or what the client goes on from."""
    spoilt, told, count = disturbed(name, False, tmp_path / "spoilt")
    lost, _, _ = disturbed(name, True, tmp_path / "lost")
    assert count >= 1
    assert told["failures"] == {"replies": 0, "rejected": count, "retried": 0}, spoilt.strategy.inbox.left_out
    assert told["cohort_complete"] is False
    assert spoilt.digest == lost.digest
    assert spoilt.digest is not None


@pytest.mark.parametrize("name", [n for n in DISTIL if "subset" in registry.entry(n).hyper.__dataclass_fields__])
def test_a_transfer_set_smaller_than_the_subset_is_refused(name: str) -> None:
    for key in ("strategy.subset", "transfer.subset"):
        with pytest.raises(UserError, match=rf"{key}=25.*24"):
            server(name, f"{key}=25")


@pytest.mark.parametrize(("name", "key"), [("fedproto", "means"), ("fedhkd", "embeddings")])
def test_a_prototype_of_another_dimension_is_named(name: str, key: str) -> None:
    half, strategy = client(name), server(name)
    half.begin("train")
    half.fit()
    records = half.share()
    topic = "prototypes" if name == "fedproto" else "classes"
    check_share(type(strategy), strategy.hyper, strategy.workspace, 0, "train", records, {"num-examples": 3})
    records[topic][key] = records[topic][key][:, :-1]
    with pytest.raises(InvalidArrays, match=rf"{topic}/{key}: shape \(10, 31\), expected \(10, 32\)"):
        check_share(type(strategy), strategy.hyper, strategy.workspace, 0, "train", records, {"num-examples": 3})


def test_the_server_cannot_teach_other_shapes_either(monkeypatch) -> None:
    """Every node checks what it is sent: one class more is an error of all clients, in words."""
    from fedfuse.errors import WorldError
    from fedfuse.strategies.knfu import KnFu

    publish = KnFu.publish

    def wider(self, topic, arrays, to=None):
        publish(self, topic, {"p": torch.cat([arrays["p"], arrays["p"][:, :1]], 1)}, to)

    monkeypatch.setattr(KnFu, "publish", wider)
    with pytest.raises(WorldError, match=r"soft_labels/p: shape \(24, 11\), expected \(24, 10\)"):
        play("knfu")


def test_a_pool_with_a_model_that_cannot_be_built_does_not_start() -> None:
    """Else its clients would be left out, round by round, of a run that seems to succeed."""
    with pytest.raises(UserError, match=r"model\.build=nowhere_at_all:fn: cannot import nowhere_at_all"):
        server("knfu", "model.pool=[mlp,'nowhere_at_all:fn']")
