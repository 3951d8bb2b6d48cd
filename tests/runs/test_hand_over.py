"""What a run hands over: an adapter that peft loads, a merged directory that transformers loads; with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedfuse.cli import main

transformers = pytest.importorskip("transformers", reason="the extra `lm` is not installed")
peft = pytest.importorskip("peft", reason="peft is an optional extra")

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA = {**SIZE, "vocab_size": 256, "intermediate_size": 24, "num_key_value_heads": 1}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, num_labels=2),
    "bert": lambda: transformers.BertConfig(**SIZE, vocab_size=256, intermediate_size=24, num_labels=2),
}
X = torch.tensor([[5, 6, 7, 8, 9], [65, 66, 67, 68, 69]])


def base(folder: Path, shape: str) -> Path:
    torch.manual_seed(1)
    kind = transformers.AutoModelForCausalLM if shape in ("llama", "gpt2") else (
        transformers.AutoModelForSequenceClassification)  # fmt: skip
    kind.from_config(CONFIGS[shape]()).save_pretrained(folder / "base")
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    return folder / "base"


def run(folder: Path, shape: str, *words: str):
    import fedfuse

    causal = shape in ("llama", "gpt2")
    path = base(folder, shape)
    data = folder / "data"
    data.mkdir()
    rows = [{"text": f"row {i} says {'so' if i % 2 else 'no'}", "label": i % 2} for i in range(40)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "data": "text" if causal else "jsonl", "data.root": str(data), "data.extra.length": 24, "clients": 2,
        "partition": "iid", "model": "hf", "model.path": str(path), "rounds": 1, "runtime": "inline",
        "transfer.size": 0, "train.optimizer": "adamw", "train.lr": 0.01, "train.max_steps": 2,
        "out": str(folder / "run"),
        **({"data.extra.tokenizer": "bytes"} if causal else {"data.extra.text": "tokens", "data.extra.buckets": 256}),
        **dict(word.split("=") for word in words),
    }  # fmt: skip
    return fedfuse.run(settings), path


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("llama", ("strategy=fedit", "strategy.alpha=16")),
        ("llama", ("strategy=fed_sb", "strategy.rank=4", "strategy.init=random_orthonormal")),
        ("llama", ("strategy=fedprox", "model.lora_rank=4", "model.lora_targets=q_proj,v_proj")),
        ("gpt2", ("strategy=fedit",)),
        ("qwen2", ("strategy=fedit",)),
        ("bert", ("strategy=ffa_lora",)),
    ],
)
def test_adapter_and_merged_model_say_what_the_run_says(shape: str, words: tuple[str, ...], tmp_path: Path) -> None:
    found, path = run(tmp_path, shape, *words)
    assert main(["export", str(found.dir), "--peft", str(tmp_path / "p"), "--merged", str(tmp_path / "m")]) == 0
    kind = transformers.AutoModelForCausalLM if shape in ("llama", "gpt2") else (
        transformers.AutoModelForSequenceClassification)  # fmt: skip
    plain = kind.from_pretrained(path)
    if shape == "qwen2":
        plain.config.pad_token_id = 0  # transformers takes no batch without one
    with torch.no_grad():
        ours = found.model()(X)
        before = plain(X).logits
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "p")(X).logits
        merged = kind.from_pretrained(tmp_path / "m")(X).logits
    assert (ours - before).abs().max() > 1e-4  # something was learned
    assert (ours - adapted).abs().max() < 1e-5
    assert (ours - merged).abs().max() < 1e-5
    about = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(path)
    assert len(about["target_modules"]) < 10
    assert (tmp_path / "m" / "tokenizer_config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folded_update_is_merged_and_no_adapter(tmp_path: Path, capsys) -> None:
    found, _ = run(tmp_path, "llama", "strategy=fedex_lora", "strategy.rank=2")
    assert main(["export", str(found.dir), "--peft", str(tmp_path / "p")]) == 2
    assert "merge it instead" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
    assert main(["export", str(found.dir), "--merged", str(tmp_path / "m")]) == 0
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")(X).logits
        assert (found.model()(X) - merged).abs().max() < 1e-5
    assert main(["export", str(found.dir), "--merged", str(tmp_path / "m")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_is_no_language_model_is_refused(tmp_path: Path, capsys) -> None:
    import fedfuse

    found = fedfuse.run({
        "strategy": "fedavg", "data": "digits", "data.limit": 60, "clients": 2, "partition": "iid", "rounds": 1,
        "runtime": "inline", "out": str(tmp_path / "run"),
    })  # fmt: skip
    for flag in ("--peft", "--merged"):
        assert main(["export", str(found.dir), flag, str(tmp_path / "x")]) == 2
        assert f"{flag}: Classifier is no Hugging Face model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_transformers_cannot_read_is_left_out_in_a_line(tmp_path: Path, capsys) -> None:
    """As of shared/models/stories260K, whose padding token lies beyond its vocabulary."""
    from fedfuse.runs.hand_over import _copy_tokenizer

    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "to").mkdir()
    _copy_tokenizer(tmp_path, tmp_path / "to")
    said = capsys.readouterr().out
    assert "a.gguf: transformers cannot read its tokenizer" in said
    assert said.count("\n") == 1
    assert not any((tmp_path / "to").iterdir())
