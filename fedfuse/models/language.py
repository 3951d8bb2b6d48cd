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

from fedfuse.errors import UserError, nearest
from fedfuse.models.parts import HEADS

if TYPE_CHECKING:
    from fedfuse.config.schema import ModelConfig

ARCHITECTURES = ("causal_lm", "text_classifier")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PAD = 0  # what fills short texts, where neither data nor model name a token


def attended(x: Tensor, pad: int) -> Tensor:
    """Which places (B, T) hold a text: all up to the last token that is not padding, at least the first.

    Only the end is padding, so a text may hold the padding token itself (GPT-2's is its end of text).
    """
    mask = (x != pad).flip(1).cummax(1).values.flip(1)
    mask[:, 0] = True  # an empty text still has one place to look at
    return mask


class CausalLM(nn.Module):
    """Logits of the next token at every place, (B, T, V), from tokens (B, T).

    Padding stands at the end, where no place before it looks: it needs no mask, and its own logits say nothing.
    Tokens and positions together, (B, 2, T), may hold several texts in a row: each begins at position 0, and no place
    of it sees another text.
    """

    packs = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, T, V); place t sees tokens up to t."""
        if not len(x):
            return torch.zeros(*x.shape, self.model.config.vocab_size, device=x.device)
        if x.ndim == 3:  # positions that begin anew are how transformers is told of several texts in a row
            return self.model(input_ids=x[:, 0], position_ids=x[:, 1], use_cache=False).logits.float()
        return self.model(input_ids=x, use_cache=False).logits.float()


class TextClassifier(nn.Module):
    """Logits of a class per text, (B, C), from padded tokens (B, T).

    A decoder (Llama, Qwen2, GPT-2) is read at its text's last token, which is found here: `transformers` looks for
    the last token that is not padding by its own rule, and refuses batches where it knows no padding token.
    """

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad
        self.decoder = isinstance(getattr(model, "score", None), nn.Module)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, C); padding is not attended to."""
        if not len(x):  # transformers' attention cannot be asked about no text at all
            return torch.zeros(0, self.model.config.num_labels, device=x.device)
        mask = attended(x, self.pad)
        if not self.decoder:
            return self.model(input_ids=x, attention_mask=mask.long()).logits.float()
        states = self.model.base_model(input_ids=x, use_cache=False).last_hidden_state
        last = states[torch.arange(len(x), device=x.device), mask.sum(1) - 1]
        return self.model.score(last.to(self.model.score.weight.dtype)).float()


class PooledClassifier(nn.Module):
    """A sentence encoder: the mean of its last states over a text's tokens, and a linear head."""

    def __init__(self, model: Any, pad: int, classes: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad
        self.feature_dim = int(model.config.hidden_size)
        self.head = nn.Linear(self.feature_dim, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features of shape (B, feature_dim)."""
        if not len(x):
            return torch.zeros(0, self.feature_dim, device=x.device)
        mask = attended(x, self.pad)
        states = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state
        states, weights = states.float(), mask[:, :, None].float()
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, C)."""
        return self.head(self.features(x))


def build(name: str, shape: tuple[int, ...], classes: int, config: ModelConfig, pad: int | None = None) -> nn.Module:
    """Build a language model for texts of `shape` = (T,).

    Parameters
    ----------
    classes
        Size of the vocabulary for `causal_lm`, else number of classes.
    pad
        What fills short texts of the data; it becomes the model's padding token. None: the model's own.

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
    own = model.config.pad_token_id
    pad = int(pad) if pad is not None else PAD if own is None else int(own)
    if not 0 <= pad < vocabulary:
        raise UserError(f"model={name}: the data are padded by token {pad}, the model knows {vocabulary}")
    model.config.pad_token_id = pad
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype!r} is not known: {nearest(config.dtype, DTYPES)}")
    nn.Module.to(model, DTYPES[config.dtype])  # transformers refuses .float() on what it dequantised from .gguf
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.dtype != "float32":
        for part, module in model.named_children():
            if part in HEADS:  # trained, so of full precision, on states that are not
                module.float().register_forward_pre_hook(_single)
    if causal:
        return CausalLM(model)
    if not hasattr(model, "num_labels") or type(model).__name__.endswith("Model"):
        return PooledClassifier(model, pad, classes)
    return TextClassifier(model, pad)


def _single(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.float() if isinstance(one, Tensor) else one for one in given)


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
            return plain(transformers.AutoModelForCausalLM.from_pretrained(path, **options))
        if (path / "1_Pooling").is_dir():  # a sentence encoder: its pooler was never trained
            return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
        return plain(
            transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes, **options)
        )
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path={path} cannot be loaded as {name}: {line}") from error


def plain(model: Any) -> Any:
    """A model that came from a .gguf file without the mark of one: it is dequantised by now, and can be saved."""
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


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
