"""Language models in a directory: Hugging Face's, a .gguf file, or llama2.c's weights; whole, or in fewer bits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedfuse.config.keys import leaves
from fedfuse.errors import UserError, first_line
from fedfuse.models.parts import HEADS

if TYPE_CHECKING:
    from fedfuse.config.schema import ModelConfig

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def load(transformers: Any, name: str, path: Path, classes: int, more: dict[str, Any]) -> Any:
    """The model in a directory.

    Parameters
    ----------
    name : str
        `causal_lm`, or a classifier of `classes`.
    more : dict
        What `quantized` says.

    Raises
    ------
    UserError
        If there is none, it cannot be read as that, or it lacks weights (`transformers` would draw them and go on).
    """
    if not path.is_dir():
        raise UserError(f"model.path={path} is not a directory")
    if (
        not more
        and name == "causal_lm"
        and (found := sorted(path.glob("*_f32.npz")))
        and (path / "config_tokenizer.json").exists()
    ):
        return _llama2c(transformers, found[0], path / "config_tokenizer.json")
    # sizes that differ are told here: transformers' own line names no weight
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **more}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if more and not (path / "config.json").exists():
        raise UserError(f"model.quantize: model.path={path} has no config.json; allowed is a Hugging Face directory")
    if not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"model.path={path}: expected config.json with weights, or one .gguf file")
        options["gguf_file"] = files[0].name
    try:
        _leads_nowhere(path)
        if name == "causal_lm":
            model, found = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
        elif (path / "1_Pooling").is_dir():  # a sentence encoder: its pooler was never trained
            model, found = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, **options)
        else:
            kind = transformers.AutoModelForSequenceClassification
            model, found = kind.from_pretrained(path, num_labels=classes, **options)
        _whole(model, found, head=name != "causal_lm")
        return model if more else plain(model)
    except Exception as error:
        raise UserError(f"model.path={path} cannot be loaded as {name}: {first_line(error)}") from error


def _whole(model: Any, found: dict[str, Any], head: bool) -> None:
    """Refuse weights that are missing, of other sizes, or no numbers; with `head`, a classifier's own may be missing.

    Raises
    ------
    ValueError
        Naming the first.
    """
    for key, there, here in sorted(found["mismatched_keys"]):
        raise ValueError(f"{key} is {tuple(there)} there, and would be {tuple(here)}")
    base = f"{model.base_model_prefix}."
    lost = [key for key in found["missing_keys"] if not head or (key.startswith(base) and ".pooler." not in key)]
    if lost:
        raise ValueError(f"it lacks {len(lost)} of the model's weights, such as {min(lost)}")
    for key, value in model.named_parameters():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key} holds what is no number")


def _leads_nowhere(path: Path) -> None:
    """Refuse a directory whose files lead to weights or code elsewhere: `transformers` follows all three.

    Links are followed: in the cache of a hub every file is one.

    Raises
    ------
    ValueError
        Naming the file.
    """
    if (path / "adapter_config.json").exists():
        raise ValueError("its adapter_config.json names a base of its own; merge the adapter into a base")
    for index in sorted(path.glob("*.index.json")):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if strange := sorted(shard for shard in shards if Path(shard).name != shard):
            raise ValueError(f"{index.name} names {strange[0]!r}, which is no file of this directory")
    if (path / "config.json").exists():
        for key, value in leaves(json.loads((path / "config.json").read_text(encoding="utf-8"))):
            if key.endswith("attn_implementation") and "/" in str(value):
                raise ValueError(f"{key} of its config.json is {value!r}: code of a hub, which is not run")


def quantized(transformers: Any, config: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is told of a base in fewer bits: where it lies, and how it is kept.

    In 4 bits it is NF4 with its scales quantised again, computed in bfloat16, as QLoRA has it (arXiv 2305.14314); in 8
    bits LLM.int8() (arXiv 2208.07339). Heads that are trained are not quantised.

    Raises
    ------
    UserError
        Without a GPU, or without bitsandbytes.
    """
    if config.quantize == "none":
        return {}
    if not torch.cuda.is_available():
        raise UserError(f"model.quantize={config.quantize} needs a GPU, and there is none; allowed here: none")
    if config.path is None:
        raise UserError(f"model.quantize={config.quantize}: there is no model.path to quantise; allowed here: none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantize={config.quantize} needs bitsandbytes: pip install bitsandbytes")
    options: dict[str, Any] = {"llm_int8_skip_modules": [*HEADS, "lm_head"]}
    if config.quantize == "8bit":
        options["load_in_8bit"] = True
    else:
        options |= {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }  # fmt: skip
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**options),
        "device_map": {"": torch.cuda.current_device()},
        "dtype": DTYPES[config.dtype],
    }


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
