"""What `data.packing` saves: places, and CPU seconds of gradients, of three batches of 16 instructions on SmolLM2-135M.

python experiments/language/packing.py      # after prepare.py; half a minute, one thread, 3 GB
"""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import torch
from prepare import INSTRUCTIONS, MODEL

from fedfuse.config.schema import DataConfig, ModelConfig
from fedfuse.data.load import load
from fedfuse.models.language import build
from fedfuse.train.batch import backward
from fedfuse.train.packed import packed
from fedfuse.train.task import IGNORED, task_step, trimmed

BATCH, BATCHES = 16, 3


def main() -> None:
    """Measure the same batches both ways, and print each and the sums."""
    torch.set_num_threads(1)
    options = {"tokenizer": str(MODEL), "length": 256}
    data = load(DataConfig(name="instruct", root=str(INSTRUCTIONS), extra=options))
    print("tokens, quartiles:", np.percentile(data.train.lengths, [0, 25, 50, 75, 100]).tolist())
    model = build("causal_lm", (256,), len(data.classes), ModelConfig(path=str(MODEL)), data.pad).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "v_proj" in name)
    order, total = np.random.default_rng(0).permutation(len(data.train)), np.zeros((2, 2))
    for start, stop in pairwise(range(0, BATCH * BATCHES + 1, BATCH)):
        part = data.train.take(order[start:stop])
        x = torch.from_numpy(part.inputs)
        y = x.masked_fill(~torch.from_numpy(part.wanted), IGNORED)
        for i, pack in enumerate((False, True)):
            begun = time.process_time()
            loss = backward(model, task_step, (x, y, torch.arange(BATCH)), trim=True, pack=pack).item()
            places = (packed(x, y)[1] if pack else trimmed(y)[0]).numel()
            total[i] += places, time.process_time() - begun
            print(f"packed={pack}: {places} places, loss {loss:.6f}", flush=True)
    for i, pack in enumerate((False, True)):
        print(f"packed={pack}: {total[i, 0]:.0f} places, {total[i, 1]:.1f} s")


if __name__ == "__main__":
    main()
