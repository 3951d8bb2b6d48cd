"""What data sets and partitions there are, known without importing anything heavy."""

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


LAYOUTS = ("parquet", "npz", "images", "jsonl", "pfllib", "leaf", "custom", "mixed")

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
    "pfllib": Source("PFLlib/HtFLlib per-client train/ and test/ .npz, splits as given", "pfllib"),
    "leaf": Source("LEAF per-user train/ and test/ JSON, splits as given", "leaf"),
    "custom": Source("your own: data.load=pkg.mod:fn returning a fedfuse.data.Dataset", "custom"),
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


def names() -> dict[str, str]:
    """Return the known data sets, each with a one-line description."""
    return {name: source.line for name, source in SOURCES.items()}


def partition_names() -> dict[str, str]:
    """Return the known partitions, each with a one-line description."""
    return dict(PARTITIONS)
