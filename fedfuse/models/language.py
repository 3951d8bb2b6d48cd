"""Language models of Hugging Face `transformers` from a local directory: next tokens, or a class per text.

`model=causal_lm` and `model=text_classifier` with `model.path=<directory>` of a saved model (config.json and
weights, or one .gguf file, or llama2.c weights as `*_f32.npz` beside `config_tokenizer.json`). Without a path
they are small models with random weights, for trials. Nothing is ever downloaded, and no code of a model
directory is run. The extra `lm` installs what is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedfuse.errors import UserError, nearest
from fedfuse.models.from_directory import DTYPES, load, quantized
from fedfuse.models.parts import HEADS

if TYPE_CHECKING:
    from fedfuse.config.schema import ModelConfig

ARCHITECTURES = ("causal_lm", "text_classifier")
PAD = 0  # what fills short texts, where neither data nor model name a token


def attended(x: Tensor, pad: int) -> Tensor:
    """Which places (B, T) hold a text: all up to the last token that is not padding, at least the first.

    Only the end is padding, so a text may hold the padding token itself (GPT-2's is its end of text).
    """
    mask = (x != pad).flip(1).cummax(1).values.flip(1)
    mask[:, 0] = True  # an empty text still has one place to look at
    return mask


def embedded(model: Any, x: Tensor) -> Tensor:
    """Tokens as a model can look them up: what it has no embedding for is its last one.

    A lookup that fails depends on what a row holds, and a site's failure tells its server so. Where a run begins, such
    tokens are refused (`core.fit`).
    """
    return x.clamp(0, model.get_input_embeddings().num_embeddings - 1)


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
            return self.model(
                input_ids=embedded(self.model, x[:, 0]), position_ids=x[:, 1], use_cache=False
            ).logits.float()
        return self.model(input_ids=embedded(self.model, x), use_cache=False).logits.float()


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
        mask, x = attended(x, self.pad), embedded(self.model, x)
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
        mask, x = attended(x, self.pad), embedded(self.model, x)
        states = self.model(input_ids=x, attention_mask=mask.long()).last_hidden_state
        states, weights = states.float(), mask[:, :, None].float()
        return (states * weights).sum(1) / weights.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (B, C)."""
        return self.head(self.features(x))


def build(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    config: ModelConfig,
    pad: int | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """Build a language model for texts of `shape` = (T,).

    Parameters
    ----------
    classes
        Size of the vocabulary for `causal_lm`, else number of classes.
    pad
        What fills short texts of the data; it becomes the model's padding token. None: the model's own.
    vocabulary
        Embeddings of a small `text_classifier`; None: more than data are likely to have tokens.

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
    length, causal, more = shape[0], name == "causal_lm", quantized(transformers, config)
    model = (
        load(transformers, name, Path(config.path).expanduser(), classes, more)
        if config.path
        else _small(transformers, name, length, classes, vocabulary)
    )
    context = getattr(model.config, "max_position_embeddings", None) or length
    if length > context:
        raise UserError(
            f"model={name}: texts of {length} tokens exceed the model's context of {context}; set data.extra.length"
        )
    known = model.get_input_embeddings().num_embeddings
    if causal and classes > known:
        raise UserError(
            f"model={name}: the data have {classes} tokens, the model knows {known}: use its tokenizer, or "
            f"save it with more embeddings (resize_token_embeddings)"
        )
    own = model.config.pad_token_id
    pad = int(pad) if pad is not None else PAD if own is None else int(own)
    if not 0 <= pad < known:
        raise UserError(f"model={name}: the data are padded by token {pad}, the model knows {known}")
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


def _small(transformers: Any, name: str, length: int, classes: int, vocabulary: int | None) -> Any:
    if name == "causal_lm":
        config = transformers.LlamaConfig(
            vocab_size=classes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=max(length, 64), tie_word_embeddings=True, pad_token_id=None,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(
        vocab_size=vocabulary or 32768, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=max(length, 64), num_labels=classes,
        # BERT's 0.02 is for a width of 768: here it would leave nothing of a text but its first token
        initializer_range=32**-0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)
