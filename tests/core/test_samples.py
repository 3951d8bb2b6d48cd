"""What a language model answers in a run: greedy, on held-out prompts, changing nothing, and shown in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedfuse.cli import main
from fedfuse.config.compose import compose
from fedfuse.core.samples import greedy, prompts
from fedfuse.data.dataset import Examples
from fedfuse.errors import UserError

pytest.importorskip("transformers", reason="the extra `lm` is not installed")


class Next(nn.Module):
    """Says the number after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return torch.nn.functional.one_hot((x + 1) % 9, 9).float()


def test_greedy_goes_on_until_an_end_or_long_enough() -> None:
    model = Next().train()
    assert greedy(model, [2], {5}, 20) == [3, 4, 5]
    assert greedy(model, [2], set(), 4) == [3, 4, 5, 6]
    assert model.training


def test_prompts_end_where_the_first_answer_begins() -> None:
    wanted = np.array([[0, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=bool)
    examples = Examples(np.arange(21).reshape(3, 7), np.zeros(3), wanted=wanted, byte_counts=np.ones(3))
    assert list(prompts(examples, 3)) == [
        ([0, 1], [2, 3], {3}),  # a chat: the first answer alone
        ([7], [8, 9, 10, 11], set()),  # a text
        ([14, 15, 16], [17], {17}),
    ]
    assert len(list(prompts(examples, 2))) == 2


def settings(folder: Path, **more):
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows = [{"prompt": f"{i % 7}?", "completion": "<b>ja" if i % 2 else "no"} for i in range(60)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "strategy": "fedavg", "data": "instruct", "data.root": str(data), "data.extra.tokenizer": "bytes",
        "data.extra.length": 12, "model": "hf", "clients": 2, "partition": "iid", "rounds": 2, "runtime": "inline",
        "transfer.size": 0, "evaluate.every": 2, "train.optimizer": "adamw", "train.lr": 0.01, **more,
    }  # fmt: skip


def test_answers_are_kept_shown_and_change_nothing(tmp_path: Path) -> None:
    import fedfuse

    with_them = fedfuse.run(
        settings(tmp_path, **{"evaluate.samples": 2, "evaluate.max_tokens": 4, "out": str(tmp_path / "a")})
    )
    without = fedfuse.run(settings(tmp_path, out=str(tmp_path / "b")))
    assert with_them.digest == without.digest
    assert not (tmp_path / "b" / "samples").exists()
    files = sorted((tmp_path / "a" / "samples").iterdir())
    assert [file.name for file in files] == ["round-000002.jsonl"]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 2
    assert all(set(row) == {"prompt", "wanted", "said"} for row in rows)
    assert rows[0]["wanted"] in ("<b>ja", "no")
    assert rows[0]["prompt"].endswith("?")
    final = with_them.summary["final"]
    assert 0 < final["bits_per_byte/global"] < 12
    assert 0 <= final["exact_match/global"] <= 1
    assert final["bits_per_byte/personal"] > 0
    test = with_them.metrics.filter(with_them.metrics["metric"] == "bits_per_byte/global")
    assert test["value"][-1] == final["bits_per_byte/global"]
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "page")]) == 0
    page = next((tmp_path / "page").glob("*.html")).read_text()
    assert "What models answered" in page
    assert "bits/byte global" in page
    assert "<b>ja" not in page


def test_what_is_not_allowed() -> None:
    with pytest.raises(UserError, match=r"evaluate.max_tokens=0: allowed is at least 1"):
        compose(("evaluate.max_tokens=0",))
