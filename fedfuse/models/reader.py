"""A frozen language model that reads embeddings and says how likely an answer is: the large half of a split network.

`build(path)` takes the directory of a causal language model, as `model=causal_lm` does, with its tokenizer beside it;
without a path it is a small transformer with random weights over bytes, for trials. Nothing of it is ever trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.seeding import seed_of

NONE = -1  # fills short answers


class Reader(nn.Module):
    """A causal language model on embeddings.

    Attributes
    ----------
    width : int
        Size d of an embedding.
    run : callable
        `run(embeddings, seen=None, places=None)`: logits (B × T × V) of embeddings (B × T × d). `seen` (B × T × T) bool
        says what each place may look at, `places` (B × T) where it stands; default: all before it, and in a row.
    encode : callable
        Token ids of a text.
    """

    def __init__(
        self, model: nn.Module, table: Tensor, run: Callable[..., Tensor], encode: Callable[[str], list[int]]
    ) -> None:
        super().__init__()
        self.model, self.run, self.encode, self.width = model, run, encode, table.shape[1]
        self.register_buffer("table", table.detach().clone())
        self.eval().requires_grad_(False)

    @functools.cached_property
    def minds(self) -> bool:
        """Whether the model looks where `seen` says and stands where `places` says: a text with a hole is the text."""
        text = self.table[None, :4]  # type: ignore[index]
        holed = torch.cat([text[:, :2], text[:, :1], text[:, 2:]], 1)
        seen = torch.ones(1, 5, 5, dtype=torch.bool, device=text.device).tril()
        seen[:, 3:, 2] = False
        with torch.no_grad():
            plain, other = self.run(text), self.run(holed, seen, torch.tensor([[0, 1, 2, 2, 3]], device=text.device))
        return bool((other[:, [0, 1, 3, 4]] - plain).abs().max() <= 1e-3 * (1 + plain.abs().max()))

    def embed(self, text: str) -> Tensor:
        """Embeddings (L × d) of a text's tokens."""
        return self.table[torch.tensor(self.encode(text), dtype=torch.int64, device=self.table.device)]  # type: ignore

    def answers(self, texts: Sequence[str], *, differ: bool = True) -> Tensor:
        """Token ids (C × A) of answers, short ones filled with −1.

        Raises
        ------
        UserError
            If one is nothing to the tokenizer, or, where they must differ, the same as another.
        """
        ids = [self.encode(text) for text in texts]
        for i, one in enumerate(ids):
            if not one or (differ and one in ids[:i]):
                other = texts[ids.index(one)] if one else "nothing"
                raise UserError(f"answer {texts[i]!r}: is the same tokens as {other!r}; answers must differ")
        longest = max(map(len, ids))
        return torch.tensor([one + [NONE] * (longest - len(one)) for one in ids], device=self.table.device)  # type: ignore

    def loss(self, prefix: Tensor, answers: Tensor, present: Tensor | None = None) -> Tensor:
        """−log p(answer | prefix) of each row (B,).

        Parameters
        ----------
        prefix : Tensor
            B × T × d.
        answers : Tensor
            Token ids (B × A) with −1 after the end.
        present : Tensor, optional
            Which places of the prefix there are (B × T) bool, the first and the last among them; needs `minds`.
        """
        answers = answers[:, : int((answers != NONE).sum(1).max()) if len(answers) else 1]
        ids, there = answers.clamp_min(0), answers != NONE
        inputs = torch.cat([prefix, self.table[ids[:, :-1]]], 1)  # type: ignore[index]
        looks: tuple[Tensor, ...] = ()
        if present is not None:
            all_of = torch.cat([present, torch.ones_like(ids[:, 1:], dtype=torch.bool)], 1)
            looks = (all_of[:, None] & torch.ones_like(all_of[0, :, None] & all_of[0]).tril(), all_of.cumsum(1) - 1)
        logits = self.run(inputs, *looks)[:, prefix.shape[1] - 1 :]
        log_p = logits.log_softmax(-1).gather(2, ids[:, :, None]).squeeze(2)
        return -(log_p * there).sum(1)

    @torch.no_grad()
    def scores(self, prefix: Tensor, answers: Tensor) -> Tensor:
        """log p(answer | prefix) of each prefix and answer (B × C): prefixes (B × T × d), token ids (C × A).

        Answers branch off one reading of the prefix, side by side in one sequence, each blind to the others; a model
        that does not take such a mask reads the prefix once for each answer.
        """
        if not len(prefix):
            return prefix.new_zeros(0, len(answers))
        return (self._together if self.minds else self._one_by_one)(prefix, answers)

    def _one_by_one(self, prefix: Tensor, answers: Tensor) -> Tensor:
        return torch.stack([-self.loss(prefix, one.expand(len(prefix), -1)) for one in answers], 1)

    def _together(self, prefix: Tensor, answers: Tensor) -> Tensor:
        there, T = answers != NONE, prefix.shape[1]
        goes_on = there[:, 1:]  # a token that another follows is read: token j of answer i stands at place at[i, j]
        count = int(goes_on.sum())
        at = torch.zeros_like(answers[:, 1:]).masked_scatter(goes_on, T + torch.arange(count, device=answers.device))
        whose, depth = goes_on.nonzero(as_tuple=True)
        read = self.table[answers[:, :-1][goes_on]]  # type: ignore[index]
        inputs = torch.cat([prefix, read.expand(len(prefix), -1, -1)], 1)
        seen = torch.ones(T + count, T + count, dtype=torch.bool, device=prefix.device).tril()
        seen[T:, T:] &= whose[:, None] == whose
        places = torch.cat([torch.arange(T, device=prefix.device), T + depth])
        b = len(prefix)
        log_p = self.run(inputs, seen.expand(b, -1, -1), places.expand(b, -1))[:, T - 1 :].log_softmax(-1)
        at = torch.cat([torch.full_like(answers[:, :1], T - 1), at], 1) - (T - 1)
        return (log_p[:, at.clamp_min(0), answers.clamp_min(0)] * there).sum(2)


def build(path: str | None, width: int, seed: int) -> Reader:
    """Build the model of a directory, or a small random one of this width.

    Raises
    ------
    UserError
        If the directory holds no model or its width is another.
    """
    if path is None:
        return _random(width, seed)
    from fedfuse.data.tokenize import Tokenizer
    from fedfuse.models.from_directory import load

    try:
        import transformers
    except ImportError as error:
        raise UserError(f"language model {path} needs transformers: pip install 'fedfuse[lm]'") from error
    transformers.logging.set_verbosity_error()
    model: Any = nn.Module.float(load(transformers, "causal_lm", Path(path).expanduser(), 0, {}))
    tokenizer, table = Tokenizer(path), model.get_input_embeddings().weight
    if table.shape[1] != width:
        raise UserError(f"language model {path}: its embeddings have {table.shape[1]} numbers, {width} were asked for")

    def run(embeddings: Tensor, seen: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        if seen is None or places is None:
            return model(inputs_embeds=embeddings, use_cache=False).logits
        mask = torch.where(seen, 0.0, torch.finfo(embeddings.dtype).min)[:, None]
        return model(inputs_embeds=embeddings, use_cache=False, attention_mask=mask, position_ids=places).logits

    return Reader(model, table, run, lambda text: tokenizer.ids([text], special=False)[0])


def _random(width: int, seed: int) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of("reader", seed))
        heads = 4
        blocks = [
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        model, table = nn.ModuleList([*blocks, nn.LayerNorm(width)]), torch.randn(256, width)

    def run(embeddings: Tensor, seen: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        length, h = embeddings.shape[1], embeddings  # it has no sense of place
        if seen is None:
            later = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
        else:
            later = ~seen.repeat_interleave(heads, 0)
        for block in blocks:
            h = block(h, src_mask=later)
        return model[-1](h) @ table.to(h.device).T / width**0.5

    return Reader(model, table, run, lambda text: list(text.encode()))
