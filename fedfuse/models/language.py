"""Language models of Hugging Face `transformers` from a local directory: next tokens, or a class per text.

`model=causal_lm` and `model=text_classifier` with `model.path=<directory>` of a saved model (config.json and
weights, or one .gguf file, or llama2.c weights as `*_f32.npz` beside `config_tokenizer.json`). Without a path
they are small models with random weights, for trials. Nothing is ever downloaded, and no code of a model
directory is run. The extra `lm` installs what is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError

if TYPE_CHECKING:
    from fedfuse.config.schema import ModelConfig

ARCHITECTURES = ("causal_lm", "text_classifier")
PAD = 0  # what fills short texts, where a model names no padding token


class CausalLM(nn.Module):
    """Logits of the next token at every place, (B, T, V), from tokens (B, T)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, T, V); place t sees tokens up to t."""
        if not len(x):
            return torch.zeros(*x.shape, self.model.config.vocab_size, device=x.device)
        return self.model(input_ids=x, use_cache=False).logits


class TextClassifier(nn.Module):
    """Logits of a class per text, (B, C), from padded tokens (B, T)."""

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, C); padding is not attended to."""
        mask = x != self.pad
        mask[:, 0] = True  # an empty text still has one place to look at
        if not len(x):  # transformers' attention cannot be asked about no text at all
            return torch.zeros(0, self.model.config.num_labels, device=x.device)
        return self.model(input_ids=x, attention_mask=mask.long()).logits


class PooledClassifier(nn.Module):
    """A sentence encoder: the mean of its last states over a text's tokens, and a linear head."""

    def __init__(self, model: Any, pad: int, classes: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad
        self.feature_dim = int(model.config.hidden_size)
        self.head = nn.Linear(self.feature_dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features of shape (B, feature_dim)."""
        mask = x != self.pad
        mask[:, 0] = True
        if not len(x):
            return torch.zeros(0, self.feature_dim, device=x.device)
        states = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, C)."""
        return self.head(self.features(x))


def build(name: str, shape: tuple[int, ...], classes: int, config: ModelConfig) -> nn.Module:
    """Build a language model for texts of `shape` = (T,).

    Parameters
    ----------
    classes
        Size of the vocabulary for `causal_lm`, else number of classes.

    Raises
    ------
    UserError
        If `transformers` is not installed, the directory is missing or holds no model, a text is longer than the
        model's context, or the vocabulary is smaller than the data's.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"model={name} needs transformers: pip install 'fedfuse[lm]'") from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if len(shape) != 1:
        raise UserError(f"model={name} reads tokens, the data have shape {shape}: set data.extra.tokenizer")
    length, causal = shape[0], name == "causal_lm"
    model = (
        _load(transformers, name, Path(config.path).expanduser(), classes)
        if config.path
        else _small(transformers, name, length, classes)
    )
    context = getattr(model.config, "max_position_embeddings", None) or length
    if length > context:
        raise UserError(
            f"model={name}: texts of {length} tokens exceed the model's context of {context}; set data.extra.length"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if causal and classes > vocabulary:
        raise UserError(
            f"model={name}: the data have {classes} tokens, the model knows {vocabulary}: use its tokenizer"
        )
    nn.Module.float(model)  # transformers refuses .float() on what it dequantised from a .gguf file
    if causal:
        return CausalLM(model)
    pad = PAD if model.config.pad_token_id is None else int(model.config.pad_token_id)
    if not hasattr(model, "num_labels") or type(model).__name__.endswith("Model"):
        return PooledClassifier(model, pad, classes)
    return TextClassifier(model, pad)


def _small(transformers: Any, name: str, length: int, classes: int) -> Any:
    if name == "causal_lm":
        config = transformers.LlamaConfig(
            vocab_size=classes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=max(length, 64), tie_word_embeddings=True, pad_token_id=None,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        vocab_size=32768, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=max(length, 64), num_labels=classes,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _load(transformers: Any, name: str, path: Path, classes: int) -> Any:
    if not path.is_dir():
        raise UserError(f"model.path={path} is not a directory")
    if name == "causal_lm" and (found := sorted(path.glob("*_f32.npz"))) and (path / "config_tokenizer.json").exists():
        return _llama2c(transformers, found[0], path / "config_tokenizer.json")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"model.path={path}: expected config.json with weights, or one .gguf file")
        options["gguf_file"] = files[0].name
    try:
        if name == "causal_lm":
            return transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        if (path / "1_Pooling").is_dir():  # a sentence encoder: its pooler was never trained
            return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
        return transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes, **options)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path={path} cannot be loaded as {name}: {line}") from error


def _llama2c(transformers: Any, weights: Path, description: Path) -> Any:
    """A Llama from llama.cpp's tensor names; its rotary pairs are interleaved, Hugging Face's are halves."""
    import numpy as np

    about = json.loads(description.read_text(encoding="utf-8"))["config"]
    heads, kv_heads = int(about["llama.attention.head_count"]), int(about["llama.attention.head_count_kv"])
    with np.load(weights, allow_pickle=False) as file:
        given = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
    config = transformers.LlamaConfig(
        vocab_size=len(given["token_embd.weight"]),
        hidden_size=int(about["llama.embedding_length"]),
        intermediate_size=int(about["llama.feed_forward_length"]),
        num_hidden_layers=int(about["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(about["llama.context_length"]),
        rms_norm_eps=float(about["llama.attention.layer_norm_rms_epsilon"]),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {"model.embed_tokens.weight": given["token_embd.weight"], "model.norm.weight": given["output_norm.weight"]}
    for key, value in given.items():
        if key.startswith("blk."):
            _, layer, part, _ = key.split(".")
            if part in ("attn_q", "attn_k"):
                value = halves(value, heads if part == "attn_q" else kv_heads)
            state[f"model.layers.{layer}.{names[part]}.weight"] = value
    model = transformers.LlamaForCausalLM(config)
    found = model.load_state_dict(state, strict=False)
    missing = [key for key in found.missing_keys if key != "lm_head.weight"]
    if missing or found.unexpected_keys:
        raise UserError(f"model.path={weights.parent}: missing {missing[:2]}, unknown {found.unexpected_keys[:2]}")
    model.tie_weights()
    return model


def halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows of a query or key projection from interleaved rotary pairs to halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
