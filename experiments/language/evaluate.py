"""Score a run's exported adapter, loaded by peft and nothing of FedFuse's, beside the model that it started from.

fedfuse export RUN --peft ADAPTER
python experiments/language/evaluate.py RUN ADAPTER      # bits per byte of the run's held-out answers
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedfuse.data.load import load
from fedfuse.runs.configuration import load_config
from fedfuse.train.scores import scored


def main(run: Path, adapter: Path) -> None:
    """Print bits per byte, of the start and with the adapter."""
    torch.set_num_threads(1)
    config = load_config(run)
    dataset = load(config.data)
    test = dataset.test
    x = torch.from_numpy(test.inputs.copy())
    y = x.masked_fill(~torch.from_numpy(test.wanted.copy()), -100)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()

    def told(model: torch.nn.Module) -> float:
        with torch.no_grad():
            bytes_held = int(test.byte_counts.sum())
            found = scored(lambda part: model(input_ids=part).logits, x, y, len(dataset.classes), bytes_held)
        return found["bits_per_byte"]

    print(f"start {told(base):.4f} bits/byte")
    print(f"adapter {told(PeftModel.from_pretrained(base, adapter).eval()):.4f} bits/byte")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
