"""Final models for other tools: an adapter that peft loads, or a Hugging Face directory with the adapter merged."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.errors import UserError, in_words
from fedfuse.runs.export import rebuild

if TYPE_CHECKING:
    from torch import nn

# beside a model's weights: what is needed to turn texts into its tokens, and its tokens into texts
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip


def to_peft(run: Path, out: str, client: int | None = None, allow_code: bool = False) -> Path:
    """Write the adapters of a final model as `PeftModel.from_pretrained(base, DIR)` takes them.

    Raises
    ------
    UserError
        If the model is no Hugging Face model, has no adapters or ones that no LoRA can carry, or DIR is in use.
    """
    from safetensors.torch import save_file

    from fedfuse.train.adapters import peft_state

    model, scenario, inner = _language(run, client, "--peft", allow_code)
    state, config = peft_state(inner)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__ == "CausalLM" else "SEQ_CLS",
        "base_model_name_or_path": scenario.config.model.path,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **config,
    }

    def write(folder: Path) -> None:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")

    return _whole(Path(out), "--peft", write)


def to_merged(run: Path, out: str, client: int | None = None, allow_code: bool = False) -> Path:
    """Write a final model with what was learned in its weights, and its tokenizer, as `from_pretrained(DIR)` takes it.

    Raises
    ------
    UserError
        If the model is no Hugging Face model, or DIR is in use.
    """
    from fedfuse.train.adapters import merge

    model, scenario, inner = _language(run, client, "--merged", allow_code)
    merge(model)
    path = scenario.config.model.path

    def write(folder: Path) -> None:
        inner.save_pretrained(folder)
        if path is not None:
            _copy_tokenizer(Path(path).expanduser(), folder)

    return _whole(Path(out), "--merged", write)


def _language(run: Path, client: int | None, flag: str, allow_code: bool) -> tuple[nn.Module, Any, Any]:
    """The final model, its scenario, and the Hugging Face model inside."""
    model, scenario = rebuild(run, client, allow_code)
    inner = getattr(model, "model", None)
    if not hasattr(inner, "save_pretrained"):
        raise UserError(f"{flag}: {type(model).__name__} is no Hugging Face model; allowed: model=hf")
    if type(model).__name__ == "PooledClassifier":
        raise UserError(f"{flag}: a sentence encoder with a head of FedFuse's is no class of transformers; use --out")
    return model, scenario, inner


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in BESIDE:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)
    files = sorted(source.glob("*.gguf"))
    if files and not (folder / "tokenizer.json").exists():  # the tokenizer is inside
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(
                source, gguf_file=files[0].name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers reads fewer of these than FedFuse does
            print(f"fedfuse: {files[0]}: transformers cannot read its tokenizer ({in_words(error)}); none was written")
            return
        found.save_pretrained(folder)


def _whole(target: Path, flag: str, write: Callable[[Path], None]) -> Path:
    """Write a directory at once: nobody sees half of it.

    Raises
    ------
    UserError
        If it is there and not empty, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{flag}={target}: is there already; name a new or empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{flag}={target}: cannot be written ({error})") from error
    try:
        write(staging)
        staging.chmod(0o777 & ~_umask())
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise UserError(f"{flag}={target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
