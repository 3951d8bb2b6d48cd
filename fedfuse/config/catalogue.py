"""What there is by name: data sets, partitions, models, losses, runtimes, trackers; nothing heavy is imported for it.

Whoever builds one of them and whoever asks for one reads its names here. Hydra's groups are made of them, too, so a new
name is one new line; a file in `conf/<group>/` is needed only for a name that sets more than itself.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One named data set or layout.

    Attributes
    ----------
    line : str
        Description of at most one line.
    layout : str
        The reader, `fedfuse.data.read_<layout>`.
    mean, std : tuple of float, optional
        Per-channel constants of inputs / 255; where absent they are measured on the training split.
    hub : str, optional
        Default name on the Hugging Face hub.
    folder : str, optional
        Its directory under $FEDFUSE_DATA, where that is not its name.
    """

    line: str
    layout: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    hub: str | None = None
    folder: str | None = None


LAYOUTS = ("parquet", "npz", "images", "jsonl", "csv", "text", "instruct", "pfllib", "leaf", "custom", "mixed")

SOURCES: dict[str, Source] = {
    "digits": Source("scikit-learn's 1,797 handwritten digits of 8×8 (no file needed)", "digits", (0.3053,), (0.3759,)),
    "mnist": Source(
        "MNIST, 60,000/10,000 digits of 28×28 (MNIST/raw/*-ubyte.gz)",
        "idx",
        (0.1307,),
        (0.3081,),
        "ylecun/mnist",
    ),
    "cifar10": Source(
        "CIFAR-10, 50,000/10,000 colour images of 32×32 (HF parquet)",
        "parquet",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "uoft-cs/cifar10",
    ),
    "mnist_m": Source("MNIST-M, digits on colour photographs, 32×32 (HF parquet)", "parquet", hub="Mike0307/MNIST-M"),
    "usps": Source("USPS digits of 16×16 (HF parquet)", "parquet", hub="flwrlabs/usps"),
    "office_caltech10": Source("Office-Caltech-10, 10 classes in 4 domains (HF parquet per domain)", "parquet"),
    "tiny_shakespeare": Source(
        "lines of Shakespeare by speaking role, next-token task (roles.jsonl.gz, data.extra.tokenizer)", "roles"
    ),
    "sst2": Source("SST-2, sentiment of 67,349/872 sentences (GLUE, JSON lines)", "jsonl", folder="glue"),
    "trec": Source("TREC, 5,452/500 questions of 6 kinds; data.groups=fine: one client per intent", "jsonl"),
    "amazon_reviews": Source("sentiment of 8,000 product reviews in 4 domains (JSON lines)", "jsonl"),
    "newsgroups": Source("20 Newsgroups, 11,293/7,528 documents (experiments/adapters/prepare.py)", "jsonl"),
    "mixed": Source("several data sets of the same classes as domains (data.extra.sources=[…])", "mixed"),
    "parquet": Source("a directory of Hugging Face parquet files: images, numbers or text", "parquet"),
    "npz": Source("NumPy archives: inputs, labels and optionally group ids", "npz"),
    "images": Source("a folder of images per class", "images"),
    "jsonl": Source("JSON lines (also .gz): numbers, tokens or text", "jsonl"),
    "csv": Source("CSV or TSV with a header (also .gz): a column of texts or numbers, one of labels", "csv"),
    "text": Source("texts to model: a folder of .txt, or JSON lines; next tokens (data.extra.tokenizer)", "text"),
    "instruct": Source(
        "instructions: prompts with answers, or chats (JSON lines); only answers are learned", "instruct"
    ),
    "pfllib": Source("PFLlib/HtFLlib per-client train/ and test/ .npz, splits as given", "pfllib"),
    "leaf": Source("LEAF per-user train/ and test/ JSON, splits as given", "leaf"),
    "custom": Source("your own: data.load=pkg.mod:fn returning a Dataset (fedfuse's or torch's) or arrays", "custom"),
}

PARTITIONS: dict[str, str] = {
    "iid": "equal shares of the shuffled examples",
    "dirichlet": "each class dealt by Dir(alpha) proportions (flwr-datasets)",
    "shards": "label-sorted shards, shards_per_client each (flwr-datasets)",
    "pathological": "classes_per_client classes each (flwr-datasets)",
    "size": "unequal sizes, sizes=dirichlet by Dir(alpha) or sizes=linear; labels as they fall",
    "natural": "one client per natural id in the data",
    "domain": "clients_per_domain clients for each domain of the data",
    "prior": "each client's class prior from Dir(alpha), exactly `examples` examples each",
    "clustered": "`groups` groups of clients that share a class prior from Dir(alpha)",
}


MODELS: dict[str, str] = {
    "mlp": "two hidden layers (128, 64); any input",
    "mlp_small": "one hidden layer (32); any input",
    "mlp_wide": "two hidden layers (512, 128); any input",
    "cnn": "two 3×3 convolutions (8, 16) and a layer of 64; images",
    "cnn_large": "McMahan et al. 2017: two 5×5 convolutions (32, 64) and a layer of 512; images",
    "lenet": "LeCun et al. 1998: two 5×5 convolutions (6, 16) and layers of 120 and 84; images",
    "resnet8": "He et al. 2016 for CIFAR, 1 block per stage, GroupNorm; images",
    "resnet8_bn": "He et al. 2016 for CIFAR, 1 block per stage, BatchNorm; images",
    "resnet20": "He et al. 2016 for CIFAR, 3 blocks per stage, GroupNorm; images",
    "resnet20_bn": "He et al. 2016 for CIFAR, 3 blocks per stage, BatchNorm; images",
    "hf": "a Hugging Face model (model.path): causal_lm where data are next tokens, else text_classifier",
    "causal_lm": "a Hugging Face language model (model.path), next tokens; tokens",
    "text_classifier": "a Hugging Face encoder (model.path) with a head, a class per text; tokens",
}

LANGUAGE = ("causal_lm", "text_classifier")  # of these, the ones that are read from `model.path`

LOSSES: dict[str, str] = {
    "kl": "forward Kullback-Leibler divergence, T² scaled (Hinton et al. 2015)",
    "reverse_kl": "reverse Kullback-Leibler divergence, T² scaled; mode seeking",
    "js": "Jensen-Shannon divergence; symmetric, at most log 2",
    "mse": "mean squared difference of logits",
    "mae": "mean absolute difference of logits (FedMD's digest)",
    "soft_ce": "cross-entropy with soft labels (DS-FL)",
    "taid": "KL to a teacher interpolated from the student, adaptively (TAID, ICLR 2025)",
    "sinkhorn": "entropic transport between the batch's predictions (SinKD, LREC-COLING 2024)",
    "bdkd": "forward and reverse KL weighted per sample by the entropy gap (BD-KD; constants ours)",
    "rkd": "distances and angles between samples (RKD, CVPR 2019)",
    "dkd": "target and non-target parts of KL weighed apart; needs labels (DKD, CVPR 2022)",
    "ttm": "KL to a teacher flattened or sharpened by a power, the student at T = 1 (TTM, ICLR 2024)",
    "wttm": "ttm, each sample weighed by the sum of the teacher's powers (WTTM, ICLR 2024)",
    "nd": "pull along the class's direction up to the teacher's norm; needs labels (ND of KD++, 2023)",
    "ofa": "soft cross-entropy with the target class emphasised; needs labels (OFA-KD, NeurIPS 2023)",
    "dhkd": "binary KL of a second head's logits to the teacher's, off the cross-entropy's gradient (DHKD, 2024)",
    "uld": "difference of sorted probabilities, blind to names (ULD, arXiv 2402.12030)",
    "gold": "js over tokens of equal bytes, sorted differences over the rest (trl's GOLD; js in one vocabulary)",
    "xtoken": "kl of the student projected to the teacher's tokens (arXiv 2605.21699; kl in one vocabulary)",
}

ATTACKS: dict[str, str] = {
    "label_flip": "trains on labels C − 1 − y; everything it shares follows from that",
    "noise": "adds Gaussian noise to what it shares",
    "sign_flip": "shares the opposite of its update, or of its logits",
    "scale": "shares a multiple of its update, or of its logits",
    "fdla": "soft labels: the value of rank r goes to the class of rank r + 1 (FDLA, arXiv 2401.03685)",
    "pcfdla": "soft labels: the second class gets s, every other −s (PCFDLA, arXiv 2407.18039)",
    "lma": "soft labels: all on the least likely class (LMA, arXiv 2402.12265: attack.knows=honest)",
    "cpa": "soft labels: all on the class least like the likeliest (CPA, arXiv 2402.12265: attack.knows=honest)",
    "hips": "soft labels: per row the honest prediction that does most harm (HIPS, arXiv 2402.12265); liars agree",
}

DEFENCES: dict[str, str] = {
    "median": "median of each coordinate",
    "geometric_median": "the point of least sum of distances, by Weiszfeld's steps",
    "trimmed_mean": "mean of each coordinate without the f largest and the f smallest (Flower's rule)",
    "krum": "the client nearest to its neighbours (Blanchard et al. 2017; Flower's rule)",
    "multi_krum": "mean of the n − f clients nearest to their neighbours (Flower's rule)",
    "bulyan": "multi-Krum, then what is nearest to the median in each coordinate (Flower's rule)",
    "cronus": "mean without who lies farthest along the widest direction, twice (Cronus, arXiv 1912.11279)",
    "expguard": "mean weighed by e to the minus of past distances (ExpGuard, arXiv 2402.12265)",
}


@dataclass(frozen=True)
class Audit:
    """One attack on privacy.

    Attributes
    ----------
    line : str
        What it finds out.
    adversary : str
        Who attacks.
    sees : str
        What that is handed, and nothing else.
    """

    line: str
    adversary: str
    sees: str


AUDITS: dict[str, Audit] = {
    "ldia": Audit(
        "class priors of clients (label distribution inference, arXiv 2502.08001)",
        "a curious server",
        "each client's soft labels of the public rows (of weights, it computes them itself; of prototypes, the counts)",
    ),
    "coop_lira": Audit(
        "who trained on an example, the other clients as shadows (Co-op LiRA, arXiv 2502.08001)",
        "a curious server that chooses the public rows",
        "each client's soft labels of the examples in question, put once among a round's public rows",
    ),
    "distill_lira": Audit(
        "who trained on an example, 16 distilled shadows (distillation-based LiRA, arXiv 2502.08001)",
        "a curious server that chooses the public rows",
        "each client's soft labels of the public rows, and of the examples in question, put once among them",
    ),
    "fedmia": Audit(
        "who trained on an example, from weights or adapters of all rounds (FedMIA, CVPR 2025)",
        "a curious server",
        "each client's weights or adapters as they came, and the examples in question",
    ),
    "fedmia_gradient": Audit(
        "who trained on an example, from how its gradient lies to each round's update (FedMIA by cosine, CVPR 2025)",
        "a curious server",
        "each client's weights or adapters as they came, what it had published, and the examples in question",
    ),
    "pli": Audit(
        "what a client takes its classes to look like (paired-logits inversion, CVPR 2023)",
        "a curious server",
        "the public images, and each client's soft labels of them",
    ),
    "client_ldia": Audit(
        "the other clients' mean class prior (a reconstruction: no paper gives it)",
        "a curious client (each in turn)",
        "the soft labels or the model that it was sent, its own shares, its own examples, and the public rows",
    ),
    "client_lira": Audit(
        "whether any other client trained on an example, 16 shadows of its own (a reconstruction: no paper gives it)",
        "a curious client (each in turn)",
        "the soft labels or the model that it was sent, its own shares, its own examples, the public rows, and the "
        "examples in question",
    ),
}

RUNTIMES = ("inline", "ray", "flower")

TRACKERS = ("none", "csv", "tensorboard", "mlflow", "wandb")

CLOCKS: dict[str, str] = {
    "off": "rounds only; no time is kept",
    "devices": "devices drawn from a distribution or from tiers",
    "trace": "devices and availability from files: CSV, or FedScale's pickles",
}

SCHEDULES: dict[str, str] = {
    "sync": "waits for all of the cohort; who is lost is left out",
    "deadline": "fuses what arrives within T seconds",
    "overcommit": "invites more than are needed; the first n count",
    "semiasync": "fuses every W seconds whatever has arrived",
    "fedbuff": "fuses every K arrivals, weighted by staleness (arXiv 2106.06639)",
    "fedasync": "fuses every arrival, weighted by staleness (arXiv 1903.03934)",
}

# what a group's word may be: `data=<word>`
GROUPS: dict[str, tuple[str, ...]] = {
    "data": tuple(SOURCES),
    "partition": tuple(PARTITIONS),
    "model": ("auto", *MODELS, "custom"),
    "loss": ("default", *LOSSES, "custom"),
    "runtime": RUNTIMES,
    "secure": ("off", "on"),
    "attack": ("off", *ATTACKS),
    "defence": ("off", *DEFENCES),
    "tracking": TRACKERS,
    "clock": tuple(CLOCKS),
    "schedule": tuple(SCHEDULES),
}


def layout_of(name: str, layout: str) -> str:
    """How data lie that `data.name` and `data.layout` name: a built-in source has a layout of its own."""
    return SOURCES[name].layout if layout == "builtin" and name in SOURCES else layout


def names() -> dict[str, str]:
    """Return the known data sets, each with a one-line description."""
    return {name: source.line for name, source in SOURCES.items()}


def partition_names() -> dict[str, str]:
    """Return the known partitions, each with a one-line description."""
    return dict(PARTITIONS)
