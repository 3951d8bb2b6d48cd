"""What a language model answers: greedy generation on held-out prompts, for people to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fedfuse.core.loop import Callback, Federation
from fedfuse.data.dataset import Examples
from fedfuse.data.tokenize import tokenizer_of
from fedfuse.models.in_place import evaluating


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], ends: set[int], most: int) -> list[int]:
    """Tokens that a model finds likeliest after a prompt, one after the other, up to one of `ends` or `most` of them.

    Parameters
    ----------
    model
        Logits (B, T, V) of tokens (B, T), each place seeing those before it.
    """
    device = next(model.parameters()).device
    said: list[int] = []
    with evaluating(model):
        while len(said) < most:
            said.append(int(model(torch.tensor([prompt + said], device=device))[0, -1].argmax()))
            if said[-1] in ends:
                break
    return said


def prompts(examples: Examples, count: int) -> Iterator[tuple[list[int], list[int], set[int]]]:
    """Token ids of the first held-out prompts, of what follows there, and what ends an answer.

    A prompt ends where the first answer begins, of a chat too; of a text without prompt, after a quarter.
    """
    for row, (ids, length) in enumerate(zip(examples.inputs[:count], examples.lengths, strict=False)):
        tokens = [int(i) for i in ids[:length]]
        first = 1 if examples.wanted is None else int(examples.wanted[row].argmax())
        if first <= 1 or examples.wanted is None:
            cut = max(1, length // 4)
            yield tokens[:cut], tokens[cut:], set()
            continue
        later = (~examples.wanted[row, first:length]).nonzero()[0]
        answer = tokens[first : first + int(later[0])] if len(later) else tokens[first:]
        yield tokens[:first], answer, set(answer[-1:])


class Samples(Callback):
    """After each evaluation, keeps what the server's model says to held-out prompts; it changes nothing.

    Parameters
    ----------
    count, most
        Prompts, and tokens of an answer.
    keep : callable
        `keep(round, rows)` with rows of `prompt`, `wanted` and `said`.
    """

    def __init__(self, count: int, most: int, keep: Callable[[int, list[dict[str, str]]], None]) -> None:
        self.count, self.most, self.keep = count, most, keep
        self._tokenizer: Any = None

    def round(self, federation: Federation) -> None:
        """Generate, if this round was evaluated and the server has a model."""
        strategy, test = federation.strategy, federation.scenario.data.dataset.test
        models = strategy.server_models()
        if federation.evaluated != federation.done or test is None or not models:
            return
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(str(federation.scenario.config.data.extra["tokenizer"]))
        tokenizer = self._tokenizer
        architecture, arrays = models[strategy.headline or next(iter(models))]
        model = strategy.workspace.loaded(architecture, arrays)
        rows = []
        for prompt, wanted, ends in prompts(test, self.count):
            said = greedy(model, prompt, ends | ({tokenizer.eos} - {None}), self.most)
            told = {"prompt": prompt, "wanted": wanted, "said": said}
            rows.append({name: tokenizer.text(ids) for name, ids in told.items()})
        self.keep(federation.done, rows)
