"""The data as an architecture reads them, texts by its own tokenizer; and what there is to predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedfuse import models
from fedfuse.config.catalogue import LANGUAGE
from fedfuse.data.dataset import IGNORED
from fedfuse.data.federated import next_tokens
from fedfuse.data.own_tokenizer import OwnTokenizer, Read, own_tokenizer
from fedfuse.train.vocabularies import Vocabulary

if TYPE_CHECKING:
    from fedfuse.core.workspace import Workspace


class Places(NamedTuple):
    """What there is to predict in rows of the transfer set, as one architecture reads them.

    Attributes
    ----------
    x : Tensor
        Inputs (n, …).
    tokens : Tensor of int64, shape (n, P)
        The token at each place, or the class of an example at its only one; `IGNORED` where none counts.
    ends : Tensor of int64, shape (n, P)
        Where each token ends: a byte where texts are read by tokenizers of their own, else a count of tokens.
    vocabulary : int
        V, tokens there are; a network may have columns for more.
    """

    x: Tensor
    tokens: Tensor
    ends: Tensor
    vocabulary: int

    @property
    def counted(self) -> Tensor:
        """Which places count (n, P)."""
        return self.tokens != IGNORED

    def log_p(self, logits: Tensor) -> Tensor:
        """Log-probabilities of each place's own token (n, P, V), from a model's logits of these rows."""
        shifted = logits[:, None] if logits.ndim == 2 else logits[:, :-1]
        return shifted[..., : self.vocabulary].log_softmax(-1)


class Texts:
    """What a workspace's architectures read, kept as they have read it."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def tokenizer(self, architecture: str) -> OwnTokenizer | None:
        """The tokenizer that an architecture reads rows of bytes by; None where it takes the data as they are."""
        scenario = self._workspace.scenario
        if not scenario.data.dataset.utf8 or architecture.partition("@")[0] not in LANGUAGE:
            return None
        path = models.path_of(architecture, scenario.config.model)
        return None if path is None else own_tokenizer(path)

    def pieces(self, architecture: str) -> tuple[bytes, ...]:
        """What each of an architecture's tokens spells, by id; b"" for special ones.

        Where tokens are not read from bytes, all architectures have one vocabulary, and a token spells its number.
        """
        own, scenario = self.tokenizer(architecture), self._workspace.scenario
        if own is not None:
            return own.pieces
        if scenario.data.dataset.utf8:
            return (b"", *(bytes([i]) for i in range(1, 256)))
        return tuple(b"%d" % i for i in range(scenario.classes))

    def vocabulary(self, architecture: str) -> Vocabulary:
        """What an architecture's tokens spell, and how it cuts bytes into them."""
        own, pieces = self.tokenizer(architecture), self.pieces(architecture)
        if own is not None:
            return Vocabulary(pieces, lambda raw: own.encode(raw)[0])
        return Vocabulary(pieces, list if self._workspace.scenario.data.dataset.utf8 else lambda raw: [int(raw)])

    def read(self, architecture: str, *key: Any) -> Any:
        """Inputs and labels of (client, split), "transfer" or "test"; None where there is no such set."""
        own, found = self.tokenizer(architecture), self._workspace.tensors(*key)
        return found if own is None or found is None else self._by(own, architecture, key)[:2]

    def places(self, architecture: str, rows: Tensor | None = None) -> Places:
        """What there is to predict in rows of the transfer set; in all of it without `rows`."""
        dataset = self._workspace.scenario.data.dataset
        x, y = self._workspace.tensors("transfer")
        own = self.tokenizer(architecture)
        if own is not None:
            x, y, ends = self._by(own, architecture, ("transfer",))
            tokens, ends = y[:, 1:], ends[:, 1:]
        elif dataset.next_token:
            tokens = self._labels(x)[:, 1:]
            ends = (tokens != IGNORED).cumsum(1)
        else:
            tokens = x.new_full((len(x), 1), IGNORED, dtype=torch.int64) if y is None else y[:, None]
            ends = torch.ones_like(tokens)
        chosen = slice(None) if rows is None else rows.to(x.device)
        return Places(x[chosen], tokens[chosen], ends[chosen], len(self.pieces(architecture)))

    def _labels(self, x: Tensor) -> Tensor:
        transfer = self._workspace.scenario.data.transfer
        assert transfer is not None
        return next_tokens(x.cpu(), transfer).to(x.device)

    def _by(self, own: OwnTokenizer, architecture: str, key: tuple[Any, ...]) -> Read:
        def made() -> Read:
            x, y = self._workspace.tensors(*key)
            return own.read(x, (self._labels(x) if key == ("transfer",) else y) != IGNORED)

        return Read(*self._workspace.kept((*key, architecture), made))
