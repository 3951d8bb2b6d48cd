"""Several texts in one row, without attention or loss across: what padding a batch would cost is not computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError
from fedfuse.models.in_place import evaluating
from fedfuse.train.task import IGNORED

PROBE = (5, 3, 2)  # lengths of the texts by which a model shows that it keeps them apart
TOLERANCE = 1e-2  # of logits whose weights may be of half precision, over their greatest


def packed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Put the texts of a batch into rows as long as the longest of them.

    A text ends with its last token that counts; one of which none counts is left out. The longest goes first, each
    into the first row with room for it. A text's first token is nobody's next token.

    Parameters
    ----------
    x, y : Tensor of int64, shape (B, T)
        Tokens, and labels as `task_loss` takes them.

    Returns
    -------
    Tensor
        Tokens and positions (R, 2, L), as `fedfuse.models.language.CausalLM` takes them: a position of 0 begins a text.
        What fills a row's end is a text of its own.
    Tensor
        Labels (R, L).
    """
    n, width = y.shape
    last = torch.arange(1, width + 1, device=y.device) * (y != IGNORED)
    lengths = last.amax(1).tolist()
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted((i for i in range(n) if lengths[i] > 1), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(i)
        room[row] -= lengths[i]
    if not rows:
        return torch.stack([x, torch.arange(width, device=x.device).expand_as(x)], 1), y
    length = max(lengths)
    source = torch.zeros(len(rows), length, dtype=torch.int64)
    position = torch.zeros_like(source)
    inside = torch.zeros_like(source, dtype=torch.bool)
    for r, texts in enumerate(rows):
        at = 0
        for i in texts:
            stop = at + lengths[i]
            position[r, at:stop] = torch.arange(lengths[i])
            source[r, at:stop] = i * width + position[r, at:stop]
            inside[r, at:stop] = True
            at = stop
        position[r, at:] = torch.arange(length - at)
    source, position, inside = (one.to(x.device) for one in (source, position, inside))
    tokens, labels = x.flatten()[source], y.flatten()[source]
    return torch.stack([tokens, position], 1), labels.masked_fill(~inside | (position == 0), IGNORED)


@torch.no_grad()
def check(model: nn.Module, architecture: str, vocabulary: int) -> None:
    """Refuse a model that does not keep the texts of a row apart.

    It is asked: three texts in one row must get the logits that they get alone. A model that carries a state along,
    or does not look at positions, fails.

    Raises
    ------
    UserError
        Naming the model.
    """
    if not getattr(model, "packs", False):
        raise UserError(f"data.packing=true: model={architecture} takes a row for one text; allowed: false")
    device = next(model.parameters()).device
    with evaluating(model):
        texts = [(torch.arange(size) * 7 + 3 * size) % vocabulary for size in PROBE]
        x = torch.stack([torch.cat(texts), torch.cat([torch.arange(size) for size in PROBE])])
        together = model(x[None].to(device))[0]
        alone = torch.cat([model(text[None].to(device))[0] for text in texts])
    if not bool((together - alone).abs().max() <= TOLERANCE * alone.abs().max()):
        raise UserError(f"data.packing=true: model={architecture} looks across the texts of a row; allowed: false")
