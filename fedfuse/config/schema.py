"""The configuration of a run: one dataclass per Hydra group, checked before anything is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedfuse.config.clock_keys import ON, ClockConfig, ScheduleConfig, UntilConfig
from fedfuse.config.keys import Key, key, keys_of


@dataclass
class DataConfig:
    """Where the examples come from (`data=<name>`)."""

    name: str = key("digits", "data set or layout: fedfuse list datasets")
    root: str | None = key(
        None,
        "directory; else $FEDFUSE_DATA/<name>, else the user's cache",
        only="data!=digits|custom",
    )
    limit: int | None = key(None, "use at most this many training examples", only="data!=pfllib|leaf")
    test_limit: int | None = key(None, "use at most this many global test examples", only="data!=pfllib|leaf")
    validation: float = key(
        0.1,
        "share of each client's examples kept for early stop and tuning",
        only="data!=pfllib|leaf",
    )
    personal_test: float = key(0.2, "share of each client's examples kept for its own test", only="data!=pfllib|leaf")
    download: bool = key(False, "allow the Hugging Face hub, through flwr-datasets", only="data!=digits|custom|mixed")
    hub: str | None = key(None, "name of the data set on the hub", only="data.download=true")
    layout: str = key(
        "builtin",
        "builtin | parquet | npz | images | jsonl | csv | text | instruct | pfllib | leaf | custom | mixed",
    )
    inputs: str | None = key(
        None,
        "column or array of the inputs; csv, parquet: [a,b] takes several of numbers; csv: * all but the labels'",
        only="data.layout=parquet|npz|jsonl|csv|text",
    )
    targets: str | None = key(
        None,
        "column or array of the labels; `text`, `instruct`: a topic to deal by",
        only="data.layout=parquet|npz|jsonl|csv|text|instruct",
    )
    groups: str | None = key(
        None,
        "column or array of natural client ids or domains; `text`, `instruct`: also file; plain text: file or role",
        only="data.layout=parquet|npz|jsonl|csv|images|text|instruct",
    )
    target: str | None = key(
        None,
        "a domain whose labels nobody has: its train split is the transfer set, its test split the global one",
        only="data!=digits|pfllib|leaf",
    )
    test_fraction: float = key(
        0.2,
        "global test share where a directory brings no test split",
        only="data.layout=parquet|npz|jsonl|csv|images|roles|text|instruct",
    )
    packing: bool = key(
        False,
        "a batch's texts stand one after the other in rows, nothing looks across: less padding to compute",
        only="data.layout=text|instruct",
    )
    load: str | None = key(
        None,
        "`data=custom`: dotted path pkg.mod:fn returning a fedfuse.data.Dataset, a torch Dataset or arrays",
        only="data.layout=custom",
    )
    extra: dict[str, Any] = key({}, "what only one layout knows: see own_data.md")


@dataclass
class PartitionConfig:
    """How examples are dealt to clients (`partition=<name>`)."""

    name: str = key("dirichlet", "how: fedfuse list partitions")
    alpha: float = key(
        0.5,
        "Dirichlet concentration; smaller is more skewed",
        only="partition=dirichlet|prior|clustered or partition=size with partition.sizes=dirichlet",
    )
    min_size: int = key(10, "`dirichlet`, `size`: least examples per client", only="partition=dirichlet|size")
    sizes: str = key("dirichlet", "`size`: dirichlet | linear", only="partition=size")
    examples: int | None = key(
        None,
        "`prior`, `clustered`: examples per client; null: half of an equal share",
        only="partition=prior|clustered",
    )
    shards_per_client: int = key(2, "label-sorted shards that a client gets", only="partition=shards")
    classes_per_client: int = key(2, "classes that a client holds", only="partition=pathological")
    groups: int = key(3, "`clustered`: groups of clients that share a class prior", only="partition=clustered")
    clients_per_domain: int = key(
        1,
        "`domain`: clients among whom each domain is dealt evenly",
        only="partition=domain",
    )


@dataclass
class TransferConfig:
    """The shared set on which clients exchange soft labels."""

    source: str = key("holdout", "holdout | noise | <name of a data set> (out of domain)")
    root: str | None = key(
        None,
        "directory of that data set; else found as data sets are",
        only="transfer.source!=holdout|noise",
    )
    size: int | None = key(None, "default min(1000, 10 % of the training split)")
    labelled: bool = key(
        False,
        "strategies that must not see labels never get them",
        only="a strategy with a transfer set",
    )
    subset: int | None = key(None, "rows used per round; default all", only="a strategy with a transfer set")
    redraw: bool = key(
        True,
        "draw that subset anew each round",
        only="a subset of the transfer set (transfer.subset, strategy.subset)",
    )


@dataclass
class ModelConfig:
    """Architecture(s) of the clients (`model=<name>` or `model.pool=[a,b,c]`, round-robin)."""

    name: str = key(
        "auto",
        "architecture: fedfuse list models; auto: mlp for features and 8×8 images, cnn for "
        "images, text_classifier or causal_lm for tokens",
        only="model.pool=null",
    )
    pool: list[str] | None = key(None, "architectures, dealt to clients round-robin; null: all alike")
    feature_dim: int | None = key(
        None,
        "common size of `features(x)` across a pool",
        only="model!=hf|causal_lm|text_classifier",
    )
    width: float = key(1.0, "scales the number of channels", only="model!=custom|hf|causal_lm|text_classifier")
    build: str | None = key(None, "`model=custom`: dotted path pkg.mod:fn returning an nn.Module", only="model=custom")
    path: str | None = key(None, "`hf`, `causal_lm`, `text_classifier`: directory of a Hugging Face model")
    paths: dict[str, str] = key(
        {}, "in a pool: directories by word; `causal_lm@<word>` is the model there (docs/tokenisers.md)"
    )
    dtype: str = key(
        "float32",
        "of a frozen base: float32 | bf16 (half the memory; what is trained stays float32)",
        only="model=hf|causal_lm|text_classifier",
    )
    quantize: str = key(
        "none",
        "a frozen base in fewer bits: none | 8bit | 4bit (bitsandbytes, on a GPU; adapters stay float32)",
        only="model=hf|causal_lm|text_classifier",
    )
    gradient_checkpointing: bool = key(
        False,
        "compute activations again on the way back instead of keeping them: less memory, about a third more time",
        only="model=hf|causal_lm|text_classifier",
    )
    lora_rank: int | None = key(
        None,
        "r of LoRA over a frozen base, for strategies without adapters of their own: these and the head are trained",
        only="a strategy without adapters of its own",
    )
    lora_alpha: float | None = key(None, "α in the scale α/r; null: r", only="model.lora_rank")
    lora_targets: str = key(
        "auto", "adapted layers, patterns of dotted names; auto: every linear layer but heads", only="model.lora_rank"
    )
    lora_dropout: float = key(0.0, "dropout of the adapters' inputs", only="model.lora_rank")
    checkpoint: str | None = key(None, "weights to start from: torch (weights only) or safetensors")
    checkpoints: dict[str, str] = key({}, "in a pool: architecture to checkpoint")
    checkpoint_head: bool = key(
        True,
        "false: `head` keeps its initial weights (data with other classes)",
        only="model.checkpoint or model.checkpoints",
    )
    extra: dict[str, Any] = key({}, "keyword arguments of `build`")


@dataclass
class TrainConfig:
    """Local training."""

    epochs: int = key(5, "passes over a client's examples a round", only="train.max_steps=null")
    max_steps: int | None = key(None, "steps a round, in place of passes: as many passes as they take")
    batch_size: int = key(32, "examples a step")
    micro_batch: int | None = key(
        None,
        "examples whose activations are held at once, gradients add up to the batch's; null: the whole batch",
        only="no privacy of examples (there: privacy.chunk)",
    )
    lr: float = key(0.05, "learning rate", only="an optimiser without a rate of its own (train.pool)")
    optimizer: str = key("sgd", "sgd | adam | adamw", only="train.pool=null")
    momentum: float = key(
        0.9,
        "momentum of sgd",
        only="train.optimizer=sgd with a strategy without a momentum of its own (strategy.local_momentum)",
    )
    betas: list[float] = key([0.9, 0.999], "β₁ and β₂ of adam and adamw", only="train.optimizer=adam|adamw")
    schedule: str = key("constant", "of the learning rate over the run: constant | linear | cosine")
    warmup: float = key(0.0, "share of the run in which the rate rises from 0")
    lr_floor: float = key(0.0, "share of the rate that a schedule ends at", only="train.schedule=linear|cosine")
    clip: float | None = key(
        None, "largest norm of a step's gradient", only="no privacy of examples (there: privacy.clip)"
    )
    weight_decay: float = key(0.0, "weight decay of the optimiser")
    optimizer_state: str = key("fresh", "fresh | keep (only where the whole model is each client's own)")
    precision: str = key("float32", "float32 | bf16: forward and backward by torch.autocast, weights stay float32")
    pool: list[str] | None = key(None, "the clients' optimisers, round-robin: [sgd@0.05, adam@0.001]; null: all alike")


@dataclass
class LabelsConfig:
    """Labelled and unlabelled pools of each client, and the annotator's budget."""

    initial: float = key(
        0.1, "share of a client's training examples that is labelled at first", only="a strategy that asks for labels"
    )
    budget: float = key(
        0.05,
        "share of a client's training examples that the annotator labels each cycle",
        only="a strategy that asks for labels",
    )
    rounds: int = key(5, "rounds of a cycle; at its end labels are asked for", only="a strategy that asks for labels")


@dataclass
class EvaluateConfig:
    """When clients and server models are scored. It never changes a result, but for the last bits by `batch_size`."""

    every: int = key(1, "rounds between evaluations; the last is always evaluated")
    batch_size: int = key(512, "examples scored, or predicted for what a client shares, at once")
    moment: str = key(
        "received",
        "clients that digest a round's lesson in their next are scored after it, or as training left them (trained)",
        only="a strategy whose clients train on what they receive",
    )
    samples: int = key(
        0,
        "held-out prompts that the server's model answers at each evaluation, for the report",
        only="data.layout=text|instruct|roles",
    )
    max_tokens: int = key(32, "tokens of such an answer, at most", only="evaluate.samples!=0")
    panel: int | None = key(
        None,
        "clients, drawn once, that score their own models on the global test, where the server has none; null: all",
    )
    validation: bool = key(False, "also score the clients' validation split (early stop and tuning turn it on)")
    seconds: float | None = key(None, "virtual seconds between evaluations, in place of `every`", only=ON)


@dataclass
class RuntimeConfig:
    """Where clients run (`runtime=inline|ray|flower`)."""

    name: str = key("ray", "inline: one after another in this process; ray: actors; flower: Flower's simulator")
    workers: int | None = key(None, "default min(cores, clients)", only="runtime=ray|flower")
    device: str = key("auto", "auto | cpu | cuda")
    server_device: str | None = key(
        None,
        "where the server trains its networks: auto | cpu | cuda | cuda:<i>; null: device",
    )
    gpu_fraction: float = key(1.0, "share of a GPU each actor takes on cuda", only="runtime=ray or a sweep")
    memory: int | None = key(None, "MB for what grows: object store, waiting replies, caches; default: Ray's own")
    address: str | None = key(None, "join this Ray cluster", only="runtime=ray")
    vectorize: str = key(
        "off",
        "off | auto: clients whose trainings fit together train as one stacked computation",
        only="runtime=inline|ray with runtime.client_timeout=null",
    )
    retries: int = key(2, "times a client that fails is tried again, from its committed state")
    client_timeout: float | None = key(None, "seconds; off by default", only="runtime=ray")
    reverse: bool = key(
        False,
        "run clients in reversed order (a check: the digest must not change)",
        only="runtime=inline",
    )
    state_dir: str | None = key(None, "shared directory for client state, seen by every node; null: with the driver")
    parallel: int | None = key(None, "runs of a sweep at once; default as many as have a core each", only="a sweep")


@dataclass
class TrackingConfig:
    """Where metrics go beside the run directory (`tracking=none|csv|tensorboard|mlflow|wandb`)."""

    name: str = key("none", "none, csv, tensorboard, mlflow or wandb")
    uri: str | None = key(
        None,
        "`mlflow`: server or database; default $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db",
        only="tracking=mlflow",
    )
    experiment: str = key("fedfuse", "`mlflow`, `wandb`: name of the group of runs", only="tracking=mlflow|wandb")


@dataclass
class LossConfig:
    """Distillation objective (`loss=<name>`); null leaves each strategy its paper's own."""

    name: str | None = key(
        None,
        "which: fedfuse list losses; null: the strategy's own",
        only="a strategy that trains on soft labels",
    )
    temperature: float | None = key(None, "T; null: the loss's own default")
    options: dict[str, Any] = key({}, "the loss's other options, by name")
    build: str | None = key(None, "`loss=custom`: dotted path pkg.mod:Class of a torch.nn.Module", only="loss=custom")


@dataclass
class DistilConfig:
    """Training on soft labels, at clients and server; null leaves each strategy its paper's own (`strategy.*`)."""

    epochs: int | None = key(
        None,
        "passes over the round's rows of the transfer set, or over the features that clients send in their place",
        only="a strategy that distils",
    )
    steps: int | None = key(
        None,
        "mini-batches in place of passes: the same effort whatever the set's size",
        only="a strategy that distils",
    )
    batch_size: int | None = key(None, "rows of the transfer set a step", only="a distillation of some passes")
    lr: float | None = key(
        None,
        "null: the strategy's own, else train.lr; another optimiser than theirs: its usual rate",
        only="a distillation of some passes",
    )
    optimizer: str | None = key(None, "sgd | adam | adamw", only="a distillation of some passes")


@dataclass
class StopConfig:
    """Early stop on the clients' validation split (never on test)."""

    patience: int | None = key(None, "evaluations (every `evaluate.every` rounds) without improvement; null: off")
    seconds: float | None = key(None, "virtual seconds without improvement; null: off", only=ON)

    @property
    def on(self) -> bool:
        """Whether a run may end before its last round for want of improvement."""
        return self.patience is not None or self.seconds is not None


@dataclass
class SearchConfig:
    """How a sweep tuned its strategies, each with the same budget, on the clients' validation split."""

    trials: int | None = key(None, "trials of each strategy; null: no search", only="a sweep")
    keys: list[str] = key([], "what was tuned; the search writes it down")
    edges: list[str] = key([], "of these, whose value is the least or the largest allowed; the search writes it down")


@dataclass
class PrivacyConfig:
    """Differential privacy, off unless `epsilon` or `noise` is set: of examples by DP-SGD, or of whole clients."""

    epsilon: float | None = key(None, "ε that a client may spend in a run, at δ")
    level: str = key(
        "example",
        "whose presence is hidden: example (each client by DP-SGD), or client (the server by noise on clipped updates)",
        only="privacy.epsilon or privacy.noise",
    )
    delta: float | None = key(
        None,
        "null: min(1e-5, 1/(10 N)), N the client's own training examples (level client: clients); above 1/N: refused",
        only="privacy.epsilon or privacy.noise",
    )
    clip: float = key(
        1.0,
        "C, largest norm of an example's gradient over all that is trained (level client: of a client's update)",
        only="privacy.epsilon or privacy.noise",
    )
    clipping: str = key(
        "ghost",
        "ghost (norms first, a second pass) | plain (a gradient for each example; so at sites that require privacy)",
        only="privacy.epsilon with privacy.level=example or privacy.noise with privacy.level=example",
    )
    noise: float | None = key(None, "σ, noise's deviation over C; null: the least that `epsilon` allows")
    trainings: int | None = key(
        None,
        "rounds of a client's training that σ is planned for; null: all",
        only="privacy.epsilon with privacy.noise=null",
    )
    chunk: int | None = key(
        None,
        "examples whose gradients are held at once; null: the whole batch, and with plain clipping what 1 GiB holds",
        only="privacy.epsilon with privacy.level=example or privacy.noise with privacy.level=example",
    )

    @property
    def on(self) -> bool:
        """Whether anything is hidden."""
        return self.epsilon is not None or self.noise is not None

    @property
    def by_example(self) -> bool:
        """Whether private examples are trained on by DP-SGD."""
        return self.on and self.level == "example"

    @property
    def by_client(self) -> bool:
        """Whether updates are clipped and their sum is noised."""
        return self.on and self.level == "client"


@dataclass
class SecureConfig:
    """Secure aggregation (`secure=on|off`): of records that a strategy sums, the server learns the sums only."""

    name: str = key(
        "off", "off | on: quantise sums, and mask them in a deployment", only="a strategy that sums records"
    )
    clipping_range: float = key(8.0, "c, values are clipped to ±c before they are summed", only="secure=on")
    quantization_range: int = key(4194304, "T, steps from -c to c; clients·T is at most 2³²", only="secure=on")
    num_shares: int | None = key(
        None,
        "clients that hold shares of one's secrets, itself included, made odd; null: all of the round",
        only="secure=on",
    )
    reconstruction_threshold: float = key(
        0.6,
        "of these, how many a sum needs: a share of them up to 1, else a number; more than half, and 2 or more",
        only="secure=on",
    )

    @property
    def on(self) -> bool:
        """Whether sums are quantised, and masked where clients are sites."""
        return self.name == "on"


@dataclass
class AttackConfig:
    """Clients that lie (`attack=<name>`), in simulations only."""

    name: str = key("off", "off, or the lie: fedfuse help attack")
    fraction: float = key(
        0.2, "share of all clients that lie, drawn by the seed, halves up", only="attack!=off with attack.clients=[]"
    )
    clients: list[int] = key([], "who lies, by number; empty: drawn", only="attack!=off")
    scale: float | None = key(
        None,
        "`noise`: σ over an array's root mean square (3); `sign_flip`: the flipped update's length (1); `scale`: an "
        "update's factor (10); `pcfdla`: s (10); null: the number in brackets",
        only="attack=noise|sign_flip|scale|pcfdla",
    )
    knows: str = key(
        "own",
        "what a liar knows: own (what it made itself) | honest (what the honest share; all liars tell one lie)",
        only="attack=lma|cpa",
    )

    @property
    def on(self) -> bool:
        """Whether anybody lies."""
        return self.name != "off"

    @property
    def colludes(self) -> bool:
        """Whether liars know what the honest share, and agree."""
        return self.name == "hips" or (self.name in ("lma", "cpa") and self.knows == "honest")


@dataclass
class DefenceConfig:
    """What the server puts in the place of a mean (`defence=<name>`)."""

    name: str = key("off", "off, or the rule: fedfuse help defence")
    fraction: float = key(
        0.2,
        "α, share of a round's clients that may lie, below one half; counted up to whole clients f",
        only="defence=trimmed_mean|krum|multi_krum|bulyan|cronus",
    )
    around: str = key(
        "median", "distances are from the clients' mean | median | geometric_median", only="defence=expguard"
    )
    rate: float = key(1.0, "η, how fast a client far off loses weight", only="defence=expguard")

    @property
    def on(self) -> bool:
        """Whether a mean is replaced."""
        return self.name != "off"


@dataclass
class Config:
    """Everything a run depends on."""

    strategy: Any = key(None, "algorithm and its hyper-parameters: fedfuse list strategies, fedfuse list NAME")
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    clock: ClockConfig = field(default_factory=ClockConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    until: UntilConfig = field(default_factory=UntilConfig)
    clients: int | None = key(None, "default 10, or what the data says where it comes partitioned")
    participation: float = key(1.0, "share of the clients drawn for each round", only="a strategy whose clients train")
    rounds: int = key(10, "rounds of training and fusing")
    audit: list[str] = key([], "attacks on privacy, made once the run is over: fedfuse help audit; a,b makes both")
    seed: int = key(0, "every random choice follows from it")
    out: str | None = key(None, "run directory; null: runs/<time>-<strategy>-<data>-s<seed>")
    overwrite: bool = key(False, "replace what a run left in `out`")


GONE = ("stop.metric",)  # keys of earlier versions that nothing reads any more


def without_gone(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version wrote, nested by group, without the keys that are gone."""
    kept = {group: dict(inside) if isinstance(inside, Mapping) else inside for group, inside in values.items()}
    for name in GONE:
        group, _, leaf = name.partition(".")
        if isinstance(inside := kept.get(group), dict):
            inside.pop(leaf, None)
    return kept


@functools.cache
def known() -> dict[str, Key]:
    """Every key of a run but the strategies' own, by name."""
    return {found.name: found for found in keys_of(Config)}


def valued(config: Config, name: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, name.split("."), config)
