"""Objectives between vocabularies, and distributions of next tokens: closed forms in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.data.alignment import groups, vocabulary_map
from fedfuse.errors import UserError
from fedfuse.train.losses import loss
from fedfuse.train.next_token import (
    NO_BYTE,
    bits,
    bucketed,
    byte_ids,
    chain,
    coarse,
    compress,
    first_bytes,
    id_type,
    merged,
    remapped,
    with_rest,
)
from fedfuse.train.vocabularies import Vocabulary, projection, sorted_difference

DRAW = torch.Generator().manual_seed(3)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def vocabulary(*pieces: bytes) -> Vocabulary:
    """Greedy: the longest token that fits."""

    def encode(text: bytes) -> list[int]:
        found = []
        while text:
            fits = [i for i, piece in enumerate(pieces) if piece and text.startswith(piece)]
            if not fits:
                text = text[1:]
                continue
            best = max(fits, key=lambda i: len(pieces[i]))
            found.append(best)
            text = text[len(pieces[best]) :]
        return found

    return Vocabulary(pieces, encode)


WORDS = vocabulary(b"", b"a", b"b", b"ab", b"abc", b"c")
LETTERS = vocabulary(b"c", b"b", b"a", b"")


# -- next tokens -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 10**6))
def test_the_merged_probability_of_the_text_is_the_chain_rule(sizes, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    count, size = sum(sizes), 4
    log_p = torch.randn(count, size, generator=draw, dtype=torch.float64).log_softmax(1)
    tokens = torch.randint(0, size, (count,), generator=draw)
    last = torch.tensor(sizes).cumsum(0) - 1
    first = torch.cat([torch.zeros(1, dtype=torch.int64), last[:-1] + 1])
    found = merged(log_p, tokens, first, last)
    assert torch.allclose(found.exp().sum(1), torch.ones(len(sizes), dtype=torch.float64), atol=1e-12)
    text = found.gather(1, tokens[last][:, None])[:, 0]
    assert text.sum().item() == pytest.approx(chain(log_p, tokens).sum().item(), abs=1e-10)
    for g, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        beginning = math.exp(chain(log_p, tokens)[a:b].sum().item())
        assert found[g, :size].exp().sum().item() == pytest.approx(beginning, abs=1e-12)  # not 1, and not renormalised
        for y in range(size):  # the last place's distribution, not the first's
            assert found[g, y].item() == pytest.approx(math.log(beginning) + log_p[b, y].item(), abs=1e-9)


def test_a_group_of_one_token_is_its_distribution_to_the_bit() -> None:
    log_p = logits(5, 4).log_softmax(1)
    one = torch.arange(5)
    assert torch.equal(merged(log_p, torch.tensor([0, 3, 1, 2, 2]), one, one)[:, :4], log_p)


def test_compressed_records_keep_the_rest() -> None:
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    top, ids = compress(p.log(), 2)
    assert torch.allclose(top, torch.tensor([[0.5, 0.3], [0.25, 0.25]], dtype=torch.float64))
    assert ids[0].tolist() == [0, 2]
    assert with_rest(top)[:, 2].tolist() == pytest.approx([0.2, 0.5])
    all_of_it, ids = compress(p.log(), 6)
    assert ids[0, 4:].tolist() == [-1, -1]
    assert all_of_it[0, 4:].tolist() == [0, 0]
    assert with_rest(all_of_it)[:, -1].tolist() == pytest.approx([0, 0], abs=1e-15)


def test_a_softmax_over_the_top_k_would_give_the_rest_nothing() -> None:
    """FedMKT's public code; here a student sure of the rest is far from a teacher sure of the top."""
    teacher = torch.tensor([[0.3, 0.3, 0.2, 0.2]], dtype=torch.float64)
    p, ids = compress(teacher.log(), 2)
    student = torch.tensor([[0.01, 0.01, 0.49, 0.49]], dtype=torch.float64)  # in proportion on the top two
    buckets = bucketed(student.log(), ids)
    assert buckets.exp()[0].tolist() == pytest.approx([0.01, 0.01, 0.98])
    value = loss("kl").from_probabilities(buckets, with_rest(p))
    by_hand = 0.6 * math.log(0.3 / 0.01) + 0.4 * math.log(0.4 / 0.98)
    assert value.item() == pytest.approx(by_hand, rel=1e-9)
    blind = loss("kl").from_probabilities(student.log()[:, :2], p / p.sum())
    assert blind.item() == pytest.approx(0, abs=1e-12)  # what softmax over top-k sees


def test_buckets_of_all_tokens_are_the_plain_divergence() -> None:
    s, t = logits(6, 5), logits(6, 5)
    p, ids = compress(t.log_softmax(1), 5)
    buckets = bucketed(s.log_softmax(1), ids)
    found = loss("kl").from_probabilities(buckets, with_rest(p))
    assert found.item() == pytest.approx(loss("kl")(s, t).item(), rel=1e-9)
    s.requires_grad_()
    loss("kl").from_probabilities(bucketed(s.log_softmax(1), ids), with_rest(p)).backward()
    want = (s.detach().softmax(1) - t.softmax(1)) / 6
    assert torch.allclose(s.grad, want, atol=1e-9)


def test_nobody_has_no_bucket() -> None:
    log_p = logits(2, 5).log_softmax(1)
    found = bucketed(log_p, torch.tensor([[1, -1, 0], [-1, -1, -1]])).exp()
    assert found[0, :3].tolist() == pytest.approx([log_p[0, 1].exp().item(), 0, log_p[0, 0].exp().item()])
    assert found.sum(1).tolist() == pytest.approx([1, 1])
    assert found[1].tolist() == pytest.approx([0, 0, 0, 1])


def test_mapped_ids_add_up_and_lose_to_the_rest() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.05]])
    found, ids = remapped(p, torch.tensor([[3, 0, 1, 2]]), torch.tensor([7, 5, -1, 5]))
    assert ids.tolist() == [[5, 7, -1, -1]]
    assert found[0].tolist() == pytest.approx([0.6, 0.3, 0, 0])
    assert with_rest(found)[0, -1].item() == pytest.approx(0.1)
    same, ids = remapped(p, torch.tensor([[3, 0, 1, -1]]), torch.arange(4))
    assert ids.tolist() == [[3, 0, 1, -1]]
    assert torch.equal(same[:, :3], p[:, :3])  # to the bit


def test_equal_tokenisers_are_plain_top_k_to_the_bit() -> None:
    pieces = [bytes([i]) for i in range(97, 107)]
    t = logits(7, 10).float()
    p, ids = compress(t.log_softmax(1), 4)
    mapped, new = remapped(p, ids, torch.from_numpy(vocabulary_map(pieces, pieces)))
    assert torch.equal(mapped, p)
    assert torch.equal(new, ids)
    ends = np.arange(1, 8)
    assert groups(ends, ends).single.all()


def test_ids_may_name_bytes() -> None:
    log_p, first = logits(3, 6).log_softmax(1), first_bytes(WORDS.pieces)
    ids = torch.tensor([[3, 1, -1], [-2 - ord("b"), -2 - ord("a"), -1], [5, 0, 2]])
    assert byte_ids(ids[1]).tolist() == [ord("b"), ord("a"), -1]
    assert byte_ids(byte_ids(ids[1])).tolist() == ids[1].tolist()
    found, p = bucketed(log_p, ids, first).exp(), log_p.exp()
    assert found[0].tolist() == pytest.approx([p[0, 3].item(), p[0, 1].item(), 0, p[0, [0, 2, 4, 5]].sum().item()])
    a = p[1, [1, 3, 4]].sum().item()
    assert found[1].tolist() == pytest.approx([p[1, 2].item(), a, 0, p[1, [0, 5]].sum().item()])
    assert torch.equal(found[2], bucketed(log_p[[2]], ids[[2]])[0].exp())
    mapped, new = remapped(p[:1, [1, 2, 3]], torch.tensor([[1, 2, 3]]), torch.tensor([-1, -99, -100, -99]))
    assert new.tolist()[0].count(-1) == 1
    assert dict(zip(new[0].tolist(), mapped[0].tolist(), strict=True))[-99] == pytest.approx((p[0, 1] + p[0, 3]).item())


def test_next_bytes_are_sums_over_tokens() -> None:
    log_p = logits(3, 6).log_softmax(1)
    found = coarse(log_p, first_bytes(WORDS.pieces)).exp()
    p = log_p.exp()
    assert found[:, ord("a")].tolist() == pytest.approx((p[:, 1] + p[:, 3] + p[:, 4]).tolist())
    assert found[:, ord("b")].tolist() == pytest.approx(p[:, 2].tolist())
    assert found[:, NO_BYTE].tolist() == pytest.approx(p[:, 0].tolist())
    assert found.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_bits_compare_models_of_different_tokenisers() -> None:
    """Uniform over 4 bytes is 2 bits a byte, and so is uniform over the 16 pairs of them, which is 4 a token."""
    bytewise = torch.full((1, 6, 4), -math.log(4))
    pairwise = torch.full((1, 3, 16), -math.log(16))
    counted = torch.ones(1, 6, dtype=torch.bool)
    one = bits(bytewise, torch.zeros(1, 6, dtype=torch.int64), counted)
    two = bits(pairwise, torch.zeros(1, 3, dtype=torch.int64), counted[:, :3])
    assert one.dtype == torch.float64
    assert one.item() / 6 == pytest.approx(2, rel=1e-6)
    assert two.item() / 6 == pytest.approx(2, rel=1e-6)
    per_token = [one.item() / 6, two.item() / 3]
    assert per_token[0] < 0.6 * per_token[1]  # … by which the public code would call the second one worse
    left_out = torch.tensor([[True, False, True, True, True, True]])
    assert bits(bytewise, torch.full((1, 6), -100), left_out).item() == pytest.approx(10, rel=1e-6)


def test_bytes_by_closed_form() -> None:
    assert (id_type(512), id_type(2**15), id_type(49152)) == (torch.int16, torch.int16, torch.int32)
    p, ids = compress(logits(64, 20, 40).log_softmax(-1).float(), 16)
    sent = p.nbytes + ids.to(id_type(40)).nbytes + torch.zeros(64).nbytes
    assert sent == 64 * (20 * 16 * (4 + 2) + 4)


# -- uld ---------------------------------------------------------------------------------------------------------


def test_uld_by_hand() -> None:
    s, t = torch.tensor([[0.7, 0.2, 0.1]]).double().log(), torch.tensor([[0.1, 0.5, 0.15, 0.25]]).double().log()
    assert loss("uld")(s, t).item() == pytest.approx(0.2 + 0.05 + 0.05 + 0.1)
    assert loss("uld", weight=3.0)(s, t).item() == pytest.approx(1.2)
    two = loss("uld")(torch.cat([s, s]), torch.cat([t, torch.cat([s, torch.full((1, 1), -50.0)], 1)]))
    assert two.item() == pytest.approx(0.2)  # the mean over places
    softer = loss("uld", temperature=2.0)(s, t).item()
    assert softer == pytest.approx(sorted_difference((s / 2).softmax(1), (t / 2).softmax(1)).item())
    assert softer != pytest.approx(0.4, rel=0.1)


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 10**6))
def test_uld_is_blind_to_names_and_zero_only_for_equal_sorted_vectors(order, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    assert loss("uld")(s, s[:, list(order)]).item() == pytest.approx(0, abs=1e-14)
    assert loss("uld")(s, t).item() == pytest.approx(loss("uld")(s[:, list(order)], t).item(), abs=1e-14)
    assert loss("uld")(s, t).item() > 1e-6  # other sorted vectors, with probability one


def test_losses_across_vocabularies_have_gradients() -> None:
    """Public FedCoLLM compares token ids, detached: no gradient at all."""
    for name in ("uld", "gold", "xtoken"):
        s, t = logits(4, 6).requires_grad_(), logits(4, 4)
        made = loss(name)
        if name != "uld":
            made.across(WORDS, LETTERS)
        made(s, t).backward()
        assert float(s.grad.abs().sum()) > 1e-3, name


# -- gold --------------------------------------------------------------------------------------------------------


def test_gold_by_hand() -> None:
    s, t = logits(3, 6), logits(3, 4)
    p, q = s.softmax(1), t.softmax(1)
    mine, theirs = [1, 2, 5], [2, 1, 0]  # a, b, c
    left, right = [0, 3, 4], [3]
    a = torch.cat([p[:, mine], p[:, left].sum(1, keepdim=True)], 1)
    b = torch.cat([q[:, theirs], q[:, right].sum(1, keepdim=True)], 1)
    m = (a + b) / 2
    js = 0.5 * ((a * (a / m).log()).sum(1) + (b * (b / m).log()).sum(1)).mean()
    rest = sorted_difference(p[:, left], q[:, right]).mean()
    found = loss("gold").across(WORDS, LETTERS)(s, t)
    assert found.item() == pytest.approx((3 / 4 * js + 1 / 4 * rest).item(), rel=1e-9)


def test_gold_in_one_vocabulary_is_js() -> None:
    s, t = logits(3, 5), logits(3, 5)
    plain = loss("js", temperature=2.0)(s, t).item()
    assert loss("gold", temperature=2.0)(s, t).item() == pytest.approx(plain, rel=1e-12)
    same = vocabulary(b"a", b"b", b"c", b"d", b"e")
    assert loss("gold", temperature=2.0).across(same, same)(s, t).item() == pytest.approx(plain, rel=1e-12)


def test_the_rest_of_a_merged_group_is_a_partner_of_the_others() -> None:
    s, t = logits(3, 7), logits(3, 5)
    found = loss("gold").across(WORDS, LETTERS)(s, t)
    p, q = s.softmax(1), t.softmax(1)
    a = torch.cat([p[:, [1, 2, 5, 6]], p[:, [0, 3, 4]].sum(1, keepdim=True)], 1)
    b = torch.cat([q[:, [2, 1, 0, 4]], q[:, [3]].sum(1, keepdim=True)], 1)
    m = (a + b) / 2
    js = 0.5 * ((a * (a / m).log()).sum(1) + (b * (b / m).log()).sum(1)).mean()
    want = 3 / 4 * js + 1 / 4 * sorted_difference(p[:, [0, 3, 4]], q[:, [3]]).mean()
    assert found.item() == pytest.approx(want.item(), rel=1e-9)


# -- xtoken ------------------------------------------------------------------------------------------------------


def test_the_projection_by_hand() -> None:
    W = projection(WORDS, LETTERS)
    nine = 0.9 / 0.99
    assert W.sum(1).tolist() == pytest.approx([0, 1, 1, 1, 1, 1])  # what spells nothing has no row
    assert W[1].tolist() == [0, 0, 1, 0]
    assert W[3].tolist() == pytest.approx([0, 1 - nine, nine, 0])  # "ab": a, then b
    three = 0.9 + 0.09 + 0.009
    assert W[4].tolist() == pytest.approx([0.009 / three, 0.09 / three, 0.9 / three, 0])
    back = projection(LETTERS, WORDS)  # "ab" adds to a's row, which then divides
    row = torch.tensor([0, 2, 0, nine, 0.9 / three, 0], dtype=torch.float64)  # both passes cut "a" to itself
    assert back[2].tolist() == pytest.approx((row / row.sum()).tolist())
    kept = projection(LETTERS, WORDS, kept=1)
    assert kept[2].tolist() == [0, 1, 0, 0, 0, 0]
    short = projection(WORDS, LETTERS, pieces=1)
    assert short[4].tolist() == [0, 0, 1, 0]


def test_xtoken_is_the_divergence_of_the_projection() -> None:
    s, t = logits(3, 6), logits(3, 4)
    made = loss("xtoken", temperature=2.0).across(WORDS, LETTERS)
    q = (s / 2).softmax(1) @ projection(WORDS, LETTERS)
    p = (t / 2).softmax(1)
    keep = q > 0
    by_hand = 4 * (p * (p.log() - torch.where(keep, q, 1e-30).log())).sum(1).mean()
    assert made(s, t).item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_xtoken_with_the_identity_is_kl() -> None:
    same = vocabulary(b"a", b"b", b"c", b"d", b"e")
    assert torch.equal(projection(same, same), torch.eye(5, dtype=torch.float64))
    s, t = logits(3, 5), logits(3, 5)
    plain = loss("kl", temperature=3.0)(s, t).item()
    assert loss("xtoken", temperature=3.0).across(same, same)(s, t).item() == pytest.approx(plain, rel=1e-12)
    assert loss("xtoken", temperature=3.0)(s, t).item() == plain
    longer = torch.cat([s, s[:, :1]], 1), torch.cat([t, t[:, :1]], 1)  # with a column for the rest
    assert loss("xtoken").across(same, same)(*longer).item() == pytest.approx(loss("kl")(*longer).item(), rel=1e-12)


def test_columns_that_fit_no_vocabulary_are_refused() -> None:
    for name in ("gold", "xtoken"):
        with pytest.raises(UserError, match=f"loss={name}: 4 and 5 columns do not fit one vocabulary"):
            loss(name)(logits(2, 4), logits(2, 5))
        with pytest.raises(UserError, match="do not fit vocabularies of 6 and 4"):
            loss(name).across(WORDS, LETTERS)(logits(2, 7), logits(2, 4))
    with pytest.raises(UserError, match=r"pieces=0\.0 must be positive"):
        loss("xtoken", pieces=0.0)
