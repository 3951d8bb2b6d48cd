"""The configuration of a run: one dataclass per Hydra group, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DataConfig:
    """Where the examples come from (`data=<name>`)."""

    name: str = "digits"
    root: str | None = None  # directory; else $FEDFUSE_DATA/<name>, else the user's cache
    limit: int | None = None  # use at most this many training examples
    test_limit: int | None = None  # use at most this many global test examples
    validation: float = 0.1  # share of each client's examples kept for early stop and tuning
    personal_test: float = 0.2  # share of each client's examples kept for its own test
    download: bool = False  # allow the Hugging Face hub, through flwr-datasets
    hub: str | None = None  # name of the data set on the hub
    layout: str = "builtin"  # builtin | parquet | npz | images | jsonl | pfllib | leaf | custom | mixed
    inputs: str | None = None  # column or array of the inputs
    targets: str | None = None  # column or array of the labels
    groups: str | None = None  # column or array of natural client ids or domains
    test_fraction: float = 0.2  # global test share where a directory brings no test split
    load: str | None = None  # `data=custom`: dotted path pkg.mod:fn returning a fedfuse.data.Dataset
    extra: dict[str, Any] = field(default_factory=dict)  # what only one layout knows


@dataclass
class PartitionConfig:
    """How examples are dealt to clients (`partition=<name>`)."""

    name: str = "dirichlet"
    alpha: float = 0.5  # Dirichlet concentration; smaller is more skewed
    min_size: int = 10  # `dirichlet`, `size`: least examples per client
    sizes: str = "dirichlet"  # `size`: dirichlet | linear
    examples: int | None = None  # `prior`, `clustered`: examples per client; null: half of an equal share
    shards_per_client: int = 2
    classes_per_client: int = 2
    groups: int = 3  # `clustered`: groups of clients that share a class prior
    clients_per_domain: int = 1  # `domain`: clients among whom each domain is dealt evenly


@dataclass
class TransferConfig:
    """The shared set on which clients exchange soft labels."""

    source: str = "holdout"  # holdout | noise | <name of a data set> (out of domain)
    root: str | None = None  # directory of that data set; else found as data sets are
    size: int | None = None  # default min(1000, 10 % of the training split)
    labelled: bool = False  # strategies that must not see labels never get them
    subset: int | None = None  # rows used per round; default all
    redraw: bool = True  # draw that subset anew each round


@dataclass
class ModelConfig:
    """Architecture(s) of the clients (`model=<name>` or `model.pool=[a,b,c]`, round-robin)."""

    name: str = "auto"  # mlp for feature vectors and 8×8 images, cnn for images
    pool: list[str] | None = None
    feature_dim: int | None = None  # common size of `features(x)` across a pool
    width: float = 1.0  # scales the number of channels
    build: str | None = None  # `model=custom`: dotted path pkg.mod:fn returning an nn.Module
    path: str | None = None  # `causal_lm`, `text_classifier`: directory of a Hugging Face model
    checkpoint: str | None = None  # weights to start from: torch (weights only) or safetensors
    checkpoints: dict[str, str] = field(default_factory=dict)  # in a pool: architecture to checkpoint
    checkpoint_head: bool = True  # false: `head` keeps its initial weights (data with other classes)
    extra: dict[str, Any] = field(default_factory=dict)  # keyword arguments of `build`


@dataclass
class TrainConfig:
    """Local training."""

    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.05
    optimizer: str = "sgd"  # sgd | adam | adamw
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer_state: str = "fresh"  # fresh | keep (only for strategies with private state)
    precision: str = "float32"  # float32 | bf16: forward and backward by torch.autocast, weights stay float32
    pool: list[str] | None = None  # the clients' optimisers, round-robin: [sgd@0.05, adam@0.001]; null: all alike


@dataclass
class EvaluateConfig:
    """When clients and server models are scored. It never changes a result."""

    every: int = 1
    batch_size: int = 512
    validation: bool = False  # also score the clients' validation split (early stop and tuning turn it on)


@dataclass
class RuntimeConfig:
    """Where clients run (`runtime=inline|ray|flower`)."""

    name: str = "ray"
    workers: int | None = None  # default min(cores, clients)
    device: str = "auto"  # auto | cpu | cuda
    server_device: str | None = None  # where the server trains its networks: auto | cpu | cuda | cuda:<i>; null: device
    gpu_fraction: float = 1.0  # share of a GPU each actor takes on cuda
    memory: int | None = None  # MB for what grows: object store, waiting replies, caches; default: Ray's own
    address: str | None = None  # join this Ray cluster
    retries: int = 2
    client_timeout: float | None = None  # seconds; off by default
    reverse: bool = False  # run clients in reversed order (a check: the digest must not change)
    state_dir: str | None = None  # shared directory for client state, seen by every node; null: with the driver
    parallel: int | None = None  # runs of a sweep at once; default as many as have a core each


@dataclass
class TrackingConfig:
    """Where metrics go beside the run directory (`tracking=none|csv|tensorboard|mlflow`)."""

    name: str = "none"
    uri: str | None = None  # `mlflow`: server or database; default $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db
    experiment: str = "fedfuse"  # `mlflow`: name of the group of runs


@dataclass
class LossConfig:
    """Distillation objective (`loss=<name>`); null leaves each strategy its paper's own."""

    name: str | None = None
    temperature: float | None = None  # T; null: the loss's own default
    options: dict[str, Any] = field(default_factory=dict)  # the loss's other options, by name
    build: str | None = None  # `loss=custom`: dotted path pkg.mod:Class of a torch.nn.Module


@dataclass
class DistilConfig:
    """Training on soft labels, at clients and server; null leaves each strategy its paper's own (`strategy.*`)."""

    epochs: int | None = None  # passes over the round's rows of the transfer set
    steps: int | None = None  # mini-batches in place of passes: the same effort whatever the set's size
    batch_size: int | None = None
    lr: float | None = None  # null: the strategy's own, else train.lr; another optimiser than theirs: its usual rate
    optimizer: str | None = None  # sgd | adam | adamw


@dataclass
class StopConfig:
    """Early stop on the clients' validation split (never on test)."""

    patience: int | None = None  # rounds without improvement; null: off
    metric: str = "accuracy"


@dataclass
class SearchConfig:
    """How a sweep tuned its strategies, each with the same budget, on the clients' validation split."""

    trials: int | None = None  # trials of each strategy; null: no search
    keys: list[str] = field(default_factory=list)  # what was tuned; the search writes it down


@dataclass
class PrivacyConfig:
    """Differential privacy of the clients' training examples, by DP-SGD; off unless `epsilon` or `noise` is set."""

    epsilon: float | None = None  # ε that a client may spend in a run, at δ
    delta: float | None = None  # null: 1/N, N the client's own training examples; larger is refused
    clip: float = 1.0  # C, largest norm of an example's gradient over all that is trained
    clipping: str = "ghost"  # ghost (norms first, a second pass) | plain (a gradient for each example)
    noise: float | None = None  # σ, noise's deviation over C; null: the least that `epsilon` allows
    trainings: int | None = None  # trainings of a client that σ is planned for; null: one a round
    chunk: int | None = None  # examples whose gradients are held at once; null: the whole batch

    @property
    def on(self) -> bool:
        """Whether private examples are trained on by DP-SGD."""
        return self.epsilon is not None or self.noise is not None


@dataclass
class Config:
    """Everything a run depends on."""

    strategy: Any = None  # name and hyper-parameters, from the strategy's own dataclass
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    clients: int | None = None  # default 10, or what the data says where it comes partitioned
    participation: float = 1.0
    rounds: int = 10
    seed: int = 0
    out: str | None = None
    overwrite: bool = False
