"""What adapter strategies really put on the wire, against the closed forms of fed_lora.md §2."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config import registry
from fedfuse.errors import UserError, WorldError
from fedfuse.train.basis import basis_sha
from tests.federations import federation, intercept, play
from tests.strategies.adapter_updates import LAYER, SEEDED, D, K, server

R, C, HEAD = 4, 3, 32 * 10 + 10  # rank, clients, numbers of the head of mlp_small
LORA = R * (D + K)

# up and down of two rounds, in numbers a client: head included in every message
FORMS = {
    "fedit": (2 * (LORA + HEAD), 2 * (LORA + HEAD)),
    "ffa_lora": (2 * (R * D + HEAD), 2 * (R * D + HEAD)),
    "fedex_lora": (2 * (LORA + HEAD), (LORA + HEAD) + (C * LORA + HEAD)),
    "flora": (2 * (LORA + HEAD), HEAD + (C * LORA + HEAD)),
    "rolora": ((R * D + HEAD) + (R * K + HEAD), 2 * (R * D + HEAD)),
    "fedsvd": (2 * (R * D + HEAD), (R * D + HEAD) + (LORA + HEAD)),
    "fedsa_lora": (2 * R * K, 2 * R * K),
    "flexlora": (2 * (LORA + HEAD), 2 * (LORA + HEAD)),
    "hetlora": (2 * (LORA + HEAD), 2 * (LORA + HEAD)),
    "fed_sb": (2 * (R * R + HEAD), 2 * (R * R + HEAD)),
}


@pytest.mark.parametrize("name", sorted(FORMS))
def test_bytes_follow_the_closed_form(name: str) -> None:
    totals = play(name, f"strategy.rank={R}", *([SEEDED] if name == "fed_sb" else [])).totals
    up, down = FORMS[name]
    assert totals["up_bytes"] == 4 * C * up
    assert totals["down_bytes"] == 4 * C * down
    assert totals["setup_bytes"] == (32 * C if name == "fed_sb" else 0)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "flora", "fed_sb"])
def test_bytes_follow_each_clients_rank(name: str) -> None:
    totals = play(name, f"strategy.rank={R}", "strategy.ranks=[2,4,1]").totals
    size = sum(r * r for r in (2, 4, 1)) if name == "fed_sb" else sum(r * (D + K) for r in (2, 4, 1))
    assert totals["up_bytes"] == 4 * 2 * (size + C * HEAD)
    if name == "flora":
        assert totals["down_bytes"] == 4 * C * (2 * HEAD + (2 + 4 + 1) * (D + K))
    else:
        assert totals["down_bytes"] == totals["up_bytes"]


@pytest.mark.parametrize(
    ("source", "up"),
    [("clients", D * K + 1), ("sketch", (R + 4) * (D + K) + 1), ("transfer", 0)],
)
def test_one_off_bytes_of_the_basis(source: str, up: int) -> None:
    labelled = ("transfer.labelled=true",) if source == "transfer" else ()
    options = ("strategy.init=sign_grad", f"strategy.init_from={source}", f"strategy.rank={R}")
    totals = play("fed_sb", *options, *labelled).totals
    assert totals["setup_bytes"] == C * (4 * up + 4 * LORA + 32)
    assert totals["up_bytes"] == 4 * C * 2 * (R * R + HEAD)  # per-round traffic is what it is without it


def test_only_r_and_the_head_cross_the_wire_after_setup() -> None:
    """The names in real messages, not what is reported: no A, no B, no base weight."""
    seen: dict[str, set[str]] = {"setup": set(), "round": set()}
    with federation("fed_sb", "strategy.init=raw_grad", "strategy.init_from=clients") as (built, _):

        def note(message) -> None:
            for record in message.content.array_records.values():
                seen["setup" if built.strategy.round == 0 else "round"] |= set(record)

        intercept(built, note)
        intercept(built, sent=note, round=2)  # the first brings the basis
        built.run()
    assert seen["setup"] == {f"{LAYER}.gradient", "rows"}
    assert seen["round"] == {f"{LAYER}.lora_R.weight", "head.weight", "head.bias"}


def test_a_personal_or_frozen_head_stays_at_home() -> None:
    for head in ("personal", "frozen"):
        totals = play("fed_sb", SEEDED, f"strategy.rank={R}", f"strategy.head={head}").totals
        assert totals["up_bytes"] == 4 * C * 2 * R * R


def test_a_wrong_basis_is_refused_and_never_averaged() -> None:
    with federation("fed_sb", SEEDED, "rounds=1") as (built, _):
        built.strategy.ensure_begun()
        sha = built.strategy.board.items["sha", ""].arrays["sha"]
        sha[0] ^= 1
        with pytest.raises(WorldError, match="its basis has hash"):
            built.run()
        assert built.strategy.inbox.failures["replies"] == C


def test_every_site_makes_the_same_basis() -> None:
    first, second = server("fed_sb"), server("fed_sb")
    sha = [s.board.items["sha", ""].arrays["sha"] for s in (first, second, server("fed_sb", "seed=1"))]
    assert torch.equal(sha[0], sha[1])
    assert not torch.equal(sha[0], sha[2])
    assert sha[0].shape == basis_sha({}).shape == (32,)


@pytest.mark.parametrize("init", ["raw_grad", "sign_grad"])
def test_federated_gradient_equals_the_pooled_one(init: str) -> None:
    """The sum of per-client gradients over rows is the gradient of the joined rows."""
    from fedfuse.train.basis import first_step, gradients, leading
    from fedfuse.train.task import task_loss

    played = play(
        "fed_sb",
        f"strategy.init={init}",
        "strategy.init_from=clients",
        "strategy.init_rows=100000",
        f"strategy.rank={R}",
    )
    workspace = played.strategy.workspace
    model = workspace.fresh("mlp_small")
    x, y = workspace.tensors("pooled")
    pooled = gradients(model, lambda i: task_loss(model(x[i]), y[i]), torch.arange(len(x)), 64)[LAYER]
    matrix = first_step(pooled.double() / len(x), init, played.strategy.hyper.rate)
    u, _, vt = leading(matrix, R)
    held = played.strategy.published("basis")
    b, a = held[f"{LAYER}.basis_B"].double(), held[f"{LAYER}.basis_A"].double()
    # the same subspaces; sign() may tip entries that are zero up to rounding
    close = 1e-4 if init == "raw_grad" else 5e-2
    assert (u @ u.T - b @ b.T).abs().max() < close
    assert (vt.T @ vt - a.T @ a).abs().max() < close


def test_a_singular_start_needs_a_gradient_and_ranks_have_bounds() -> None:
    with pytest.raises(UserError, match="r0=singular"):
        server("fed_sb", "strategy.r0=singular")
    with pytest.raises(UserError, match=r"strategy.ranks has 9"):
        server("fed_sb", "strategy.ranks=[2,9]")
    with pytest.raises(UserError, match=r"strategy.rank=33"):
        server("fedit", "strategy.rank=33")
    with pytest.raises(UserError, match="matches no linear layer"):
        server("fedit", "strategy.targets=q_proj")


def test_singular_start_and_momentum_run_and_sampled_clients_follow() -> None:
    options = ("strategy.init=sign_grad", "strategy.r0=singular", "strategy.server_momentum=0.5", "participation=0.67")
    assert play("fed_sb", *options).digest == play("fed_sb", *options, grid="serial").digest
    for name in ("fedex_lora", "flora", "rolora"):  # absent clients catch up by increments
        sampled = ("participation=0.34", "rounds=4")
        assert play(name, *sampled).digest == play(name, *sampled, grid="serial").digest


def test_hetlora_prunes_ranks() -> None:
    played = play("hetlora", "strategy.prune=1.0", "strategy.gamma=0.5", f"strategy.rank={R}", "rounds=3")
    assert played.totals["up_bytes"] < 4 * C * 3 * (LORA + HEAD)


def test_fed_sb_learns_and_its_weights_move() -> None:
    start = server("fed_sb", "strategy.rank=16").state_of_model()
    for seed in range(3):
        played = play("fed_sb", f"seed={seed}", "strategy.rank=16", "rounds=4", "train.lr=0.1")
        history = [h["accuracy/global"] for h in played.federation.history]
        assert history[-1] > 0.3
        if seed == 0:
            moved = played.strategy.state_of_model()[f"{LAYER}.lora_R.weight"]
            assert (moved - start[f"{LAYER}.lora_R.weight"]).abs().max() > 1e-3


def test_every_adapter_strategy_is_registered() -> None:
    assert set(FORMS) <= set(registry.listed())
