"""FedMKT: texts between tokenisers, in closed form and in federations of bytes and tokens of one's own."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")

from fedfuse.core.build import build_strategy  # noqa: E402
from fedfuse.core.fit import remarks  # noqa: E402
from fedfuse.core.texts import Places, Texts  # noqa: E402
from fedfuse.errors import UserError  # noqa: E402
from fedfuse.families.public_text import (  # noqa: E402
    Said,
    aligned,
    best,
    by_perplexity,
    examine,
    mixture,
    partners,
    said,
)
from fedfuse.strategies.fedmkt import FedMKTHyper, lesson  # noqa: E402
from fedfuse.train.losses import loss  # noqa: E402
from fedfuse.train.next_token import bucketed, compress, with_rest  # noqa: E402
from fedfuse.train.scores import scored  # noqa: E402
from fedfuse.wire.records import InvalidArrays  # noqa: E402
from tests.data.test_alignment import byte_level  # noqa: E402
from tests.federations import answer, federation, intercept, play, registry, scenario_of  # noqa: E402

LINES = ["the cat sat on the mat", "to be or not to be", "that is the question", "naïve cat, the end"]
IGNORED = -100


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A federation of four roles: two clients with 330 tokens of their own, two that read bytes."""
    root = tmp_path_factory.mktemp("texts")
    roles = [{"role": name, "lines": LINES[i:] + LINES * 3} for i, name in enumerate("abcd")]
    (root / "roles.jsonl").write_text("\n".join(map(json.dumps, roles)), encoding="utf-8")
    config = transformers.LlamaConfig(
        vocab_size=336, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "own")
    byte_level().save(str(root / "own" / "tokenizer.json"))
    return (
        "data=text", f"data.root={root / 'roles.jsonl'}", "data.groups=role", "data.inputs=lines",
        "data.extra.tokenizer=bytes", "data.extra.length=17", "partition=natural", "clients=null", "rounds=2",
        "transfer.size=12",
        "model.pool=[causal_lm@own,causal_lm]", f"model.paths.own={root / 'own'}", "train.lr=0.01", "runtime=inline",
        "train.optimizer=adamw",
    )  # fmt: skip


def server(words: tuple[str, ...], *more: str) -> Any:
    _, scenario = scenario_of((*words, "strategy=fedmkt", *more))
    built = build_strategy(registry.entry("fedmkt"), scenario)
    built.ensure_begun()
    built.round = 1
    return built


def random_said(texts: Texts, name: str, rows: torch.Tensor, seed: int, k: int = 4) -> dict[str, torch.Tensor]:
    places = texts.places(name, rows)
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(places.tokens), places.tokens.shape[1] + 1, places.vocabulary, generator=draw)
    return said(places, logits, k)


# -- closed forms ----------------------------------------------------------------------------------------------------


def text_places(tokens: list[list[int]], vocabulary: int = 5) -> Places:
    y = torch.tensor(tokens)
    x = torch.cat([torch.zeros(len(y), 1, dtype=torch.int64), y.clamp_min(0)], 1)
    return Places(x, y, (y != IGNORED).cumsum(1), vocabulary)


PIECES = (b"a", b"b", b"ab", b"c", b"")


def test_the_loss_by_hand() -> None:
    """α·CE of the next token at the places that count, and (1 − α)·KL with the rest, where somebody knows better."""
    draw = torch.Generator().manual_seed(1)
    places = text_places([[0, 2, 1], [3, 3, IGNORED]])
    logits = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    teacher = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64).log_softmax(-1)
    p, ids = compress(teacher, 2)
    h = FedMKTHyper(alpha=0.3, k=2)
    step = lesson(h, places, {"p": p, "ids": ids}, torch.tensor([True, False]), PIECES, loss("kl"))
    found = step(logits, None, torch.tensor([0, 1]))
    log_p = logits[:, :-1].log_softmax(-1)
    ce = -(log_p[0, 0, 0] + log_p[0, 1, 2] + log_p[0, 2, 1] + log_p[1, 0, 3] + log_p[1, 1, 3]) / 5
    kl = 0.0
    for place in range(3):
        top = teacher[0, place].exp().sort(descending=True)
        q, r = top.values[:2], top.values[2:].sum()
        s = log_p[0, place].exp()[top.indices[:2]]
        kl += (q * (q / s).log()).sum() + r * (r / (1 - s.sum())).log()
    assert found.item() == pytest.approx((0.3 * ce + 0.7 * kl / 3).item(), rel=1e-9)


def test_a_batch_finds_its_rows_by_index() -> None:
    places = text_places([[0, 2], [3, 1], [1, 1]])
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 3, 5, generator=draw, dtype=torch.float64)
    p, ids = compress(torch.randn(3, 2, 5, generator=draw, dtype=torch.float64).log_softmax(-1), 3)
    step = lesson(FedMKTHyper(alpha=0.5), places, {"p": p, "ids": ids}, torch.ones(3).bool(), PIECES, loss("kl"))
    whole = step(logits, None, torch.arange(3))
    turned = torch.tensor([2, 0, 1])
    assert step(logits[turned], None, turned).item() == pytest.approx(whole.item(), rel=1e-12)
    assert step(logits, None, turned).item() != pytest.approx(whole.item(), rel=1e-3)


def test_what_is_taught_is_the_next_token_and_ids_are_no_logits() -> None:
    """Defects 1 and 6 of public code: it taught the token that stands there, and gave ids as logits, detached."""
    places = text_places([[0, 2, 1]])
    logits = torch.zeros(1, 4, 5, dtype=torch.float64, requires_grad=True)
    p, ids = torch.zeros(1, 3, 2, dtype=torch.float64), torch.full((1, 3, 2), -1)
    p[0, :, 0], ids[0, :, 0] = 1.0, places.tokens[0]  # one-hot, as of places without a partner
    step = lesson(FedMKTHyper(alpha=0.0), places, {"p": p, "ids": ids}, torch.ones(1).bool(), PIECES, loss("kl"))
    step(logits, None, torch.tensor([0])).backward()
    rises = (-logits.grad[0]).argmax(1)
    assert rises[:3].tolist() == [0, 2, 1]  # place i, which has read x[i], learns x[i + 1]
    assert (places.x[0, 1:]).tolist() == [0, 2, 1]
    assert rises[:3].tolist() != places.x[0, :3].tolist()
    assert float(logits.grad[0, 3].abs().sum()) == 0
    assert logits.grad[0, 0].tolist() == pytest.approx([-0.8 / 3, *[0.2 / 3] * 4])


def test_prompts_and_padding_are_not_distilled() -> None:
    """Defect 5: the public code masks by attention, so that what is only read is distilled too."""
    places = text_places([[IGNORED, 2, 1, IGNORED]])
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 5, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    p, ids = compress(torch.randn(1, 4, 5, generator=draw, dtype=torch.float64).log_softmax(-1), 2)
    step = lesson(FedMKTHyper(alpha=0.0), places, {"p": p, "ids": ids}, torch.ones(1).bool(), PIECES, loss("kl"))
    step(logits, None, torch.tensor([0])).backward()
    assert logits.grad[0].abs().sum(1).gt(0).tolist() == [False, True, True, False, False]


def test_nothing_to_teach_is_a_zero_with_a_gradient() -> None:
    places = text_places([[0, 2]])
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    nobody = {"p": torch.zeros(1, 2, 2), "ids": torch.full((1, 2, 2), -1)}
    step = lesson(FedMKTHyper(alpha=0.0), places, nobody, torch.ones(1).bool(), PIECES, loss("kl"))
    value = step(logits, None, torch.tensor([0]))
    value.backward()
    assert value.item() == 0
    assert float(logits.grad.abs().sum()) == 0


def test_whom_a_row_learns_from() -> None:
    bits = torch.tensor([[8.0, 3.0, 4.0], [2.0, 3.0, 5.0]], dtype=torch.float64)
    assert best(bits).tolist() == [[0, 1, 1], [1, 0, 0]]  # of equals the first
    sizes = torch.tensor([4, 2, 0])
    w = by_perplexity(bits, sizes, tau=0.5)
    ce = torch.tensor([[2.0, 0.5], [1.5, 1.5], [4.0, 5.0]], dtype=torch.float64) * math.log(2)  # nats a byte
    want = torch.exp(-ce / 0.5)
    assert torch.allclose(w.T, want / want.sum(1, keepdim=True))
    assert torch.allclose(by_perplexity(bits, sizes, 1e-6)[:, [0, 2]], best(bits)[:, [0, 2]])
    assert torch.allclose(by_perplexity(bits, sizes, 1e9), torch.full((2, 3), 0.5, dtype=torch.float64))
    stale = by_perplexity(bits, sizes, 1e9, torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert torch.allclose(stale[0], torch.full((3,), 0.75, dtype=torch.float64))


def test_a_mixture_adds_what_is_equal_and_leaves_out_who_says_nothing() -> None:
    one = torch.tensor([[[0.6, 0.3], [0.9, 0.05]]], dtype=torch.float64), torch.tensor([[[4, 1], [2, 3]]])
    two = torch.tensor([[[0.5, 0.4], [0.0, 0.0]]], dtype=torch.float64), torch.tensor([[[1, 7], [-1, -1]]])
    p, ids = mixture([one, two], torch.tensor([[0.25], [0.75]], dtype=torch.float64), 2)
    assert ids.tolist() == [[[1, 7], [2, 3]]]
    assert p[0, 0].tolist() == pytest.approx([0.25 * 0.3 + 0.75 * 0.5, 0.75 * 0.4])
    assert p[0, 1].tolist() == pytest.approx([0.9, 0.05])
    alone, same = mixture([one, two], torch.tensor([[1.0], [0.0]], dtype=torch.float64), 2)
    assert torch.equal(alone, one[0])
    assert torch.equal(same, one[1])


# -- between tokenisers ----------------------------------------------------------------------------------------------


def test_places_of_two_tokenisers_hold_the_same_bytes(words) -> None:
    texts = server(words).workspace.texts
    own, raw = texts.places("causal_lm@own"), texts.places("causal_lm")
    pieces, letters = texts.pieces("causal_lm@own"), texts.pieces("causal_lm")
    assert raw.vocabulary == 256
    assert own.vocabulary == len(pieces) < 336  # the network has columns for more
    for row in range(len(own.tokens)):
        mine = b"".join(pieces[i] for i in own.tokens[row][own.counted[row]])
        theirs = b"".join(letters[i] for i in raw.tokens[row][raw.counted[row]])
        assert mine == theirs
        assert own.ends[row].max() == raw.ends[row].max() == len(mine)
    assert own.tokens.shape[1] < raw.tokens.shape[1]


def test_bits_per_byte_are_of_the_same_bytes_for_all(words) -> None:
    """What an evaluation says of a uniform model is log₂ V a token, over the test set's bytes, in anybody's tokens."""
    built = server(words)
    texts, data = built.workspace.texts, built.scenario.data
    rows = data.dataset.test
    said_bytes = b"".join(bytes(x[w].tolist()) for x, w in zip(rows.inputs, rows.wanted, strict=True))
    assert data.byte_count("global") == len(said_bytes)
    for name in ("causal_lm@own", "causal_lm"):
        x, y = texts.read(name, "test")
        pieces = texts.pieces(name)
        assert b"".join(pieces[i] for row in y for i in row.tolist() if i != IGNORED) == said_bytes
        uniform = scored(lambda part: torch.zeros(*part.shape, 64), x, y.clamp(max=63), 64, len(said_bytes))
        assert uniform["bits_per_byte"] == pytest.approx(6 * int((y != IGNORED).sum()) / len(said_bytes), rel=1e-6)


@pytest.mark.parametrize("coarse", [False, True])
def test_partners_cover_or_start_the_same_bytes(words, coarse) -> None:
    texts = server(words).workspace.texts
    own, raw = texts.places("causal_lm@own"), texts.places("causal_lm")
    found = 0
    for row in range(len(own.tokens)):
        i, j = partners(own, raw, row, coarse)
        found += len(i)
        starts = [torch.cat([torch.zeros(1, dtype=torch.int64), one.ends[row]]) for one in (own, raw)]
        assert torch.equal(starts[0][i], starts[1][j])
        if not coarse:
            assert torch.equal(own.ends[row][i], raw.ends[row][j])
        else:
            assert len(i) == int(own.counted[row].sum())  # bytes start everywhere
    assert found


def test_aligned_records_by_hand(words) -> None:
    texts, rows = server(words).workspace.texts, torch.arange(4)
    own, raw = texts.places("causal_lm@own", rows), texts.places("causal_lm", rows)
    pieces = texts.pieces("causal_lm@own")
    one = Said("causal_lm", random_said(texts, "causal_lm", rows, 0))
    p, ids = aligned(texts, "causal_lm@own", one, rows, coarse=False, unmatched_label=True)
    sent_p, sent_ids = one.arrays["p"].double(), one.arrays["ids"].long()
    seen = set()
    for row in range(4):
        pairs = dict(zip(*(t.tolist() for t in partners(own, raw, row, False)), strict=True))
        for i in own.counted[row].nonzero()[:, 0].tolist():
            seen.add(i in pairs)
            got = {k: v for k, v in zip(ids[row, i].tolist(), p[row, i].tolist(), strict=True) if k != -1}
            if i not in pairs:
                assert got == {own.tokens[row, i].item(): 1.0}  # the next token, as place i is of token i
            else:
                j = pairs[i]
                want = {
                    pieces.index(bytes([c])): v
                    for c, v in zip(sent_ids[row, j].tolist(), sent_p[row, j].tolist(), strict=True)
                    if c
                }
                assert got == pytest.approx(want)
    assert seen == {True, False}
    empty, _ = aligned(texts, "causal_lm@own", one, rows, coarse=False, unmatched_label=False)
    assert (empty.sum(-1) == 0).any(1).all()


def test_coarse_records_are_next_bytes(words) -> None:
    texts, rows = server(words).workspace.texts, torch.arange(4)
    own, raw = texts.places("causal_lm@own", rows), texts.places("causal_lm", rows)
    pieces = texts.pieces("causal_lm@own")
    one = Said("causal_lm@own", random_said(texts, "causal_lm@own", rows, 1))
    p, ids = aligned(texts, "causal_lm", one, rows, coarse=True, unmatched_label=True)
    for row in range(4):
        pairs = dict(zip(*(t.tolist() for t in partners(raw, own, row, True)), strict=True))
        for i in raw.counted[row].nonzero()[:, 0].tolist():
            got = {-2 - k: v for k, v in zip(ids[row, i].tolist(), p[row, i].tolist(), strict=True) if k != -1}
            want: dict[int, float] = {}
            if i in pairs:
                for token, v in zip(one.arrays["ids"][row, pairs[i]], one.arrays["p"][row, pairs[i]], strict=True):
                    if piece := pieces[token]:
                        want[piece[0]] = want.get(piece[0], 0) + v.item()
            else:
                want = {raw.tokens[row, i].item(): 1.0}
            assert got == pytest.approx(want, abs=1e-6)


def test_equal_tokenisers_are_plain_distillation_of_the_top_k_to_the_bit(words) -> None:
    built = server(words, "model.pool=[causal_lm@own]", "strategy.k=4")
    rows = built.rows
    record = random_said(built.workspace.texts, "causal_lm@own", rows, 2)
    found = built.targets("causal_lm@own", [Said("causal_lm@own", record)])
    assert torch.equal(found["p"], record["p"])
    assert torch.equal(found["ids"], record["ids"])
    assert torch.equal(found["bits"], record["bits"])
    places = built.workspace.texts.places("causal_lm@own", rows)
    logits = torch.randn(*places.x.shape, 336, generator=torch.Generator().manual_seed(3))
    h = FedMKTHyper(alpha=0.0, k=4)
    batch = torch.arange(len(rows))
    step = lesson(
        h, places, found, torch.ones(len(rows)).bool(), built.workspace.texts.pieces("causal_lm@own"), loss("kl")
    )
    log_p = places.log_p(logits)[places.counted]
    plain = loss("kl").from_probabilities(
        bucketed(log_p, record["ids"][places.counted].long()), with_rest(record["p"][places.counted])
    )
    assert step(logits, None, batch).item() == plain.item()


def test_the_best_is_chosen_by_bits_of_the_same_text(words) -> None:
    """Defect 3: a mean per token calls the byte model better wherever it says less a token, of which it has more."""
    built = server(words, "strategy.k=4", "strategy.mapping=byte")
    texts, rows = built.workspace.texts, built.rows
    own = random_said(texts, "causal_lm@own", rows, 4)
    raw = random_said(texts, "causal_lm", rows, 5)
    own["bits"], raw["bits"] = torch.full((len(rows),), 30.0), torch.full((len(rows),), 40.0)
    counts = [texts.places(name, rows).counted.sum(1) for name in ("causal_lm@own", "causal_lm")]
    per_token = [one["bits"] / count for one, count in zip((own, raw), counts, strict=True)]
    assert bool((per_token[0] > per_token[1]).any())
    found = built.targets("causal_lm", [Said("causal_lm", raw), Said("causal_lm@own", own)])
    assert torch.equal(found["bits"], own["bits"])
    assert found["bits"].dtype == torch.float32
    assert not torch.equal(found["p"], raw["p"])
    raw["bits"][3] = 29.0
    found = built.targets("causal_lm", [Said("causal_lm", raw), Said("causal_lm@own", own)])
    assert torch.equal(found["p"][3], raw["p"][3])
    assert torch.equal(found["ids"][3], raw["ids"][3])
    assert found["bits"][3] == 29


def test_a_mixture_of_tokenisers_is_of_one_kind(words) -> None:
    built = server(words, "strategy.k=4", "strategy.select=weighted_mean", "strategy.mapping=byte")
    texts, rows = built.workspace.texts, built.rows
    both = [Said(name, random_said(texts, name, rows, 6)) for name in ("causal_lm@own", "causal_lm")]
    found = built.targets("causal_lm", both)
    assert bool((found["ids"] <= -1).all())  # bytes, also of the model that reads them
    alone = built.targets("causal_lm", both[1:])
    assert torch.equal(alone["ids"], both[1].arrays["ids"])
    worth = by_perplexity(torch.stack([b.arrays["bits"].double() for b in both]), torch.full((len(rows),), 16), 1.0)
    bits = (worth * torch.stack([b.arrays["bits"].double() for b in both])).sum(0)
    sizes = texts.places("causal_lm", rows).ends.amax(1)
    full = sizes == 16
    assert torch.allclose(found["bits"][full].double(), bits[full], rtol=1e-5)


# -- attacks and refusals --------------------------------------------------------------------------------------------


def test_records_that_make_no_sense_are_refused() -> None:
    good = {"p": torch.tensor([[[0.5, 0.4]]]), "ids": torch.tensor([[[3, 0]]]), "bits": torch.tensor([2.0])}
    examine("said", good, 4)
    examine("said", {**good, "ids": torch.tensor([[[-1, -1]]])}, 4)
    for key, value, why in (
        ("p", [[[0.9, 0.4]]], "said/p: no probabilities"),
        ("p", [[[-0.1, 0.4]]], "said/p: no probabilities"),
        ("ids", [[[4, 0]]], "said/ids: allowed is -1 to 3"),
        ("ids", [[[-2, 0]]], "said/ids: allowed is -1 to 3"),
        ("ids", [[[3, 3]]], "said/ids: a token twice at a place"),
        ("bits", [-1.0], "said/bits: negative"),
    ):
        with pytest.raises(InvalidArrays, match=why):
            examine("said", {**good, key: torch.tensor(value)}, 4)


def test_a_lying_record_is_rejected_and_counted(words) -> None:
    with federation("fedmkt", "rounds=1", base=words) as (built, _):

        def lie(reply):
            from fedfuse.wire.records import record, tensors

            arrays = {k: v.clone() for k, v in tensors(reply.content.array_records["said"]).items()}
            arrays["p"] += 1
            return answer(reply, said=record(arrays))

        intercept(built, lie, kind="train", client=2)
        built.run()
        assert built.strategy.inbox.failures["rejected"] == 1


def test_refusals(words) -> None:
    with pytest.raises(UserError, match=r"chooses whom to learn from by labels: set transfer\.labelled=true"):
        play("fedmkt", "transfer.labelled=false")
    with pytest.raises(UserError, match=r"strategy=feddf compares outputs token by token, and causal_lm@own has a tok"):
        play("feddf", base=words)
    with pytest.raises(UserError, match=r"model='causal_lm@other': model.paths has no 'other'"):
        play("fedmkt", "model.pool=[causal_lm@other]", base=words)
    with pytest.raises(UserError, match=r"model.paths names 'own', which nobody has"):
        play("fedmkt", "model.pool=[causal_lm]", base=words)


# -- federations -----------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    plain: Any
    records: dict[int, int]


@pytest.fixture(scope="module")
def runs(words) -> Runs:
    sizes: dict[int, int] = {}
    with federation("fedmkt", base=words) as (built, _):

        def seen(reply):
            content = reply.content.array_records["said"]
            sizes[int(reply.content.config_records["config"]["client"])] = sum(
                math.prod(a.shape) * {"float32": 4, "int16": 2}[a.dtype] for a in content.values()
            )

        intercept(built, seen, kind="train")
        built.run()
        return Runs(built, sizes)


def test_it_runs_and_every_byte_is_counted(words, runs) -> None:
    strategy = runs.plain.strategy
    assert strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    texts = strategy.workspace.texts
    places = {name: texts.places(name).tokens.shape[1] for name in set(strategy.scenario.architectures)}
    for client, name in enumerate(strategy.scenario.architectures):
        assert runs.records[client] == 12 * (places[name] * 16 * (4 + 2) + 4)
    total = strategy.outbox.traffic.summary()
    assert total["up_bytes"] == 2 * sum(runs.records.values())
    assert total["down_bytes"] == sum(runs.records.values())  # of round 2; the last lesson is for evaluation


def test_texts_are_not_told_to_be_few_for_a_vocabulary(runs) -> None:
    """12 rows of 16 places are no 12 examples of 256 classes."""
    assert not [line for line in remarks(runs.plain.strategy) if "which is few" in line]


def test_over_the_wire_it_is_the_same(words, runs) -> None:
    assert play("fedmkt", grid="serial", base=words).digest == runs.plain.digest


@pytest.mark.parametrize("key", ["mapping=byte", "unmatched=nothing", "select=weighted_mean", "server=causal_lm"])
def test_keys_are_heard_between_tokenisers(words, runs, key) -> None:
    assert play("fedmkt", f"strategy.{key}", base=words).digest != runs.plain.digest


def test_without_a_target_it_is_training_on_public_text(words) -> None:
    """α = 1: nobody hears what others know, however much of it travels."""
    from tests.halves import final_states

    models = [
        [state["model"] for state in final_states("fedmkt", *words, "strategy.alpha=1", f"strategy.k={k}")[1]]
        for k in (2, 5)
    ]
    for one, other in zip(*models, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_server_model_learns_and_teaches(words) -> None:
    with federation("fedmkt", "strategy.server=causal_lm", base=words) as (built, _):
        built.run()
        strategy = built.strategy
        begun = strategy.workspace.initial("causal_lm")
        ended = strategy.server_models()["server"][1]
        assert any(not torch.equal(begun[name], ended[name]) for name in begun)
        assert math.isfinite(built.headline["bits_per_byte/global"])
        texts, rows = strategy.workspace.texts, strategy.rows
        places = texts.places("causal_lm", rows)
        model = strategy.workspace.loaded("causal_lm", ended)
        own = said(places, strategy.predict(model, places.x, 64), 16)
        # what the byte clients get is what the server's model says, in its own tokens
        got = strategy.published("targets", "causal_lm")
        assert torch.equal(got["ids"], own["ids"])
        assert torch.allclose(got["p"], own["p"])
