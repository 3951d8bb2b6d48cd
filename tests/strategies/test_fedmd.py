"""FedMD: a plain mean of logits, whatever the clients' sizes; digest effort as in the paper; labels it needs."""

import pytest
import torch

from fedfuse.errors import UserError
from tests.federations import federation, play, uploads
from tests.halves import client, take


def test_the_consensus_is_the_plain_mean_however_many_examples_a_client_has():
    """Clients of quite different sizes: a mean weighted by examples would be another."""
    words = ("partition=size", "partition.min_size=5", "rounds=1")
    with federation("fedmd", *words) as (built, _):
        sizes = [built.scenario.examples(client) for client in range(3)]
        assert max(sizes) > 1.5 * min(sizes)
        arrived = uploads(built, "logits")
        built.run()
        consensus = built.strategy.published("consensus")["logits"]
    sent = [one["logits"].double() for one in arrived]
    torch.testing.assert_close(consensus, torch.stack(sent).mean(0).float(), rtol=2e-7, atol=0)
    weighted = sum(n * z for n, z in zip(sizes, sent, strict=True)) / sum(sizes)
    assert (weighted - consensus).abs().max() > 1e-3


def test_the_digest_is_the_mean_absolute_error():
    with federation("fedmd", "rounds=2", "strategy.digest_epochs=1") as (built, _):
        built.run()
        assert built.digest
    assert play("fedmd", "loss=mse").digest != play("fedmd").digest


def test_by_default_as_many_digest_steps_as_in_the_paper(monkeypatch):
    from fedfuse.train import training

    found, original = [], training.train

    def counted(*args, **options):
        result = original(*args, **options)
        if options.get("batch_size") == 128:
            found.append(result["steps"])
        return result

    monkeypatch.setattr(training, "train", counted)
    play("fedmd", "rounds=2")  # 24 rows: one step an epoch
    assert set(found) == {40}


def test_a_client_that_comes_late_learns_the_public_set_before_its_first_digest():
    half = client("fedmd", "strategy.public_epochs=2", "transfer.labelled=true", round=4)
    trained, train = [], half.train
    half.train = lambda *given, **told: trained.append(told.get("purpose")) or train(*given, **told)
    logits = torch.zeros(24, 10)
    take(half, "consensus", 3, logits=logits)
    half.fit()
    assert trained == ["public", None, None]  # then the digest, then its own examples
    take(half, "consensus", 4, logits=logits)
    assert trained[3:] == [None]  # once


def test_public_epochs_need_labels():
    with pytest.raises(UserError, match=r"public_epochs=2 needs labels: set transfer.labelled=true"):
        play("fedmd", "strategy.public_epochs=2")
    assert (
        play("fedmd", "strategy.public_epochs=2", "transfer.labelled=true").digest
        != play("fedmd", "transfer.labelled=true").digest
    )
