"""MiniLM of which the last layer alone is adapted: the states below it never change and are computed once.

For studies on little hardware: `data=custom data.load=last_layer:texts` and `model=custom model.build=last_layer:Last`.
The same network as `model=text_classifier`, but that the five layers below train without dropout.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from prepare import MINILM
from torch import Tensor, nn

from fedfuse.config.compose import compose
from fedfuse.data.cache import key_of, stored_dataset
from fedfuse.data.dataset import Dataset, Examples
from fedfuse.data.load import load


@functools.cache
def encoder() -> Any:
    """MiniLM, without the pooler that nobody trained."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(MINILM, add_pooling_layer=False, local_files_only=True).eval()


def texts(name: str, length: int, limit: int, test_limit: int) -> Dataset:
    """A text data set as states below the last layer, (n, length, 385): the last number says whether a token is there.

    Parameters
    ----------
    name : str
        `sst2`, `trec`, `newsgroups`, …
    length, limit, test_limit : int
        Tokens a text; examples.
    """
    extra = [f"data.extra.tokenizer={MINILM}", f"data.extra.length={length}"]
    config = compose([f"data={name}", f"data.limit={limit}", f"data.test_limit={test_limit}", *extra]).data
    return stored_dataset(key_of("below", name, length, limit, test_limit), lambda: _below(load(config)))


@torch.no_grad()
def _below(dataset: Dataset) -> Dataset:
    model, splits = encoder(), []
    for examples in (dataset.train, dataset.test):
        assert examples is not None
        parts = []
        for tokens in torch.from_numpy(np.array(examples.inputs)).split(32):
            mask = tokens != 0
            states = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-2]
            parts.append(torch.cat([states, mask[:, :, None].float()], 2).numpy())
        splits.append(Examples(np.concatenate(parts), examples.targets))
    return Dataset(name=dataset.name, train=splits[0], test=splits[1], classes=dataset.classes, kind="features")


class Last(nn.Module):
    """The last layer, the mean over a text's tokens, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        model = encoder()
        self.layer = copy.deepcopy(model.encoder.layer[-1]).train()
        self.head = nn.Linear(model.config.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) of states (B, T, 385)."""
        if not len(x):
            return x.new_zeros(0, self.head.out_features)
        states, mask = x[:, :, :-1], x[:, :, -1]
        hidden = (1 - mask)[:, None, None, :] * torch.finfo(x.dtype).min
        out = self.layer(states, attention_mask=hidden)
        out = out[0] if isinstance(out, tuple) else out
        return self.head((out * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
