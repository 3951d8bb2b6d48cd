"""Architectures of the clients: built by name, scaled by width, dealt from a pool.

Every built-in model has `features(x)` of shape (B, feature_dim), `head(z)` giving logits, and `feature_dim`;
`forward(x)` is `head(features(x))`. Importing this package costs nothing: torch comes with the first model.
This room may import `data`, `wire`, `config` and what is below them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedfuse.config.catalogue import LANGUAGE, MODELS
from fedfuse.errors import UserError, nearest
from fedfuse.seeding import seed_of

if TYPE_CHECKING:
    from torch import nn

    from fedfuse.config.schema import ModelConfig


def names() -> dict[str, str]:
    """Return the built-in architectures: name to one line."""
    return dict(MODELS)


def architectures(
    config: ModelConfig, kind: str, shape: tuple[int, ...], clients: int, next_token: bool = False
) -> list[str]:
    """Name the architecture of each client.

    Parameters
    ----------
    config
        One name, or a pool dealt round-robin.
    kind
        What the data are: `features` always makes `auto` an mlp, `tokens` a language model.
    shape
        Shape of one example; `auto` is a cnn for images larger than 8×8.
    clients
        Number of clients.
    next_token
        Whether tokens are labels too, so that `hf` is a causal language model, and no classifier.

    Raises
    ------
    UserError
        If a name is not known, or `model.extra`, `model.checkpoint` or `model.checkpoints` would go unused.
    """
    if config.pool is not None and not config.pool:
        raise UserError("model.pool=[] is empty: name at least one architecture, or leave it out")
    named = [language_of(name, kind, next_token) for name in config.pool or [config.name]]
    pool = [_resolve(name, config, kind, shape) for name in named]
    if config.extra and not any(":" in name for name in pool):
        raise UserError(f"model.extra={dict(config.extra)} is for models by dotted path, not for {','.join(pool)}")
    if config.checkpoint and len(set(pool)) > 1:
        raise UserError(
            f"model.checkpoint={config.checkpoint} fits one architecture, the pool has {len(set(pool))}: "
            "use +model.checkpoints={architecture: path}"
        )
    if config.path and not {name.partition("@")[0] for name in pool} & set(LANGUAGE):
        raise UserError(f"model.path={config.path} is for {' and '.join(LANGUAGE)}, not for {','.join(pool)}")
    for name in config.checkpoints:
        if name not in pool:
            raise UserError(f"model.checkpoints names {name!r}, which no client has. {nearest(name, set(pool))}")
    return [pool[i % len(pool)] for i in range(clients)]


def language_of(name: str, kind: str, next_token: bool) -> str:
    """The language model that `hf`, and `auto` of tokens, stand for; other names as they are."""
    if name == "hf" or (name == "auto" and kind == "tokens"):
        return "causal_lm" if next_token else "text_classifier"
    return name


def build(
    name: str,
    *,
    shape: tuple[int, ...],
    classes: int,
    config: ModelConfig | None = None,
    seed: int,
    pad: int | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """Build a model on the CPU, in float32 but for `model.dtype`; equal (seed, name) give equal weights.

    Parameters
    ----------
    name
        A built-in name, `name@width`, `auto`, `custom`, or a dotted path `pkg.mod:fn` (own machine only).
    shape
        Shape of one example, (features,) or (channels, height, width).
    classes
        Number of logits.
    config
        Width, feature size, checkpoint, and what a dotted path is called with; default: as a model has them itself.
    seed
        The run's seed. The global generators are left as they were.
    pad
        The token that fills short texts, for language models; None: their own.
    vocabulary
        Tokens of texts to classify, which a language model without a directory has as many embeddings for.

    Raises
    ------
    UserError
        If the name is unknown, the images are too small, or a checkpoint or dotted path does not fit.
    """
    import torch

    from fedfuse.config.schema import ModelConfig
    from fedfuse.models import by_path, feedforward, residual, weights

    config = config or ModelConfig()
    shape = tuple(int(side) for side in shape)
    name = _resolve(name, config, "features" if len(shape) == 1 else "images", shape)
    if classes < 2:
        raise UserError(f"model={name} needs at least 2 classes, got {classes}")
    feature_dim = config.feature_dim
    if feature_dim is not None and feature_dim < 1:
        raise UserError(f"model.feature_dim={feature_dim} must be at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "model", name))
        if ":" in name:
            model = by_path.model(name, shape, classes, config)
        elif name.partition("@")[0] in LANGUAGE:
            from fedfuse.models import language

            config = replace(config, path=path_of(name, config))
            model = language.build(name.partition("@")[0], shape, classes, config, pad, vocabulary)
        else:
            base, width = _split(name)
            builders = {**feedforward.ARCHITECTURES, **residual.ARCHITECTURES}
            try:
                model = builders[base](shape, classes, width * config.width, feature_dim)
            except (MemoryError, OverflowError, RuntimeError, TypeError):  # torch refuses sizes in all four ways
                raise UserError(
                    f"model={name} with model.width={config.width:g} and model.feature_dim={feature_dim or 'null'} "
                    "does not fit this machine's memory"
                ) from None
    if config.dtype == "float32" or name.partition("@")[0] not in LANGUAGE:
        model.float()
    object.__setattr__(model, "input_shape", shape)  # for what follows an example through it (`parts.layers`)
    path = config.checkpoints.get(name, config.checkpoint)
    if path:
        weights.load(model, path, head=config.checkpoint_head)
    return model


def reads_tokens(name: str, shape: tuple[int, ...], classes: int, config: ModelConfig) -> bool:
    """Whether an architecture takes rows of tokens: a language model, or one by dotted path that takes int64."""
    if name.partition("@")[0] in LANGUAGE:
        return True
    if ":" not in name:
        return False
    return bool(getattr(build(name, shape=shape, classes=classes, config=config, seed=0), "reads_tokens", False))


def _resolve(name: str, config: ModelConfig, kind: str, shape: tuple[int, ...]) -> str:
    """Turn `auto` and `custom` into what they stand for and check the name."""
    if name == "custom":
        if not config.build:
            raise UserError("model=custom needs model.build=pkg.mod:fn, a function returning an nn.Module")
        name = config.build
        if ":" not in name:
            raise UserError(f"model.build={name!r} must be written pkg.mod:fn")
    if ":" in name:
        return name
    if name == "auto":
        return "mlp" if kind == "features" or len(shape) != 3 or max(shape[1:]) <= 8 else "cnn"
    if name.partition("@")[0] in LANGUAGE:
        path_of(name, config)
        return name
    base, width = _split(name)
    if base not in MODELS:
        raise UserError(f"model={name!r} is not known: {nearest(base, [*MODELS, 'auto', 'custom'])}, or pkg.mod:fn")
    for key, value in (("model.width", config.width), (f"the width in model={name!r}", width)):
        if not 0 < value < float("inf"):
            raise UserError(f"{key} is {value}: it must be positive")
    return name


def path_of(name: str, config: ModelConfig) -> str | None:
    """The directory of a language model: `model.path`, or for `causal_lm@<word>` that of `model.paths`.

    Raises
    ------
    UserError
        If there is no directory of that word.
    """
    _, at, word = name.partition("@")
    if at and word not in config.paths:
        raise UserError(f"model={name!r}: model.paths has no {word!r}; {nearest(word, config.paths)}")
    return config.paths[word] if at else config.path


def _split(name: str) -> tuple[str, float]:
    base, at, width = name.partition("@")
    try:
        return base, float(width) if at else 1.0
    except ValueError:
        raise UserError(f"model={name!r}: what follows @ must be a width, as in cnn@0.5") from None
