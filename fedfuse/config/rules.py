"""What values a configuration's keys may have; which keys go together is `fedfuse.config.idle`'s."""

from __future__ import annotations

import re

from fedfuse.config import catalogue
from fedfuse.config.clock_rules import Rule, timed
from fedfuse.config.schema import Config, valued
from fedfuse.errors import UserError, nearest

LEAST = {  # where they are not null
    "clients": 1, "rounds": 1, "seed": 0, "train.epochs": 0, "train.max_steps": 1, "train.batch_size": 1,
    "train.micro_batch": 1, "train.weight_decay": 0, "model.lora_rank": 1, "labels.rounds": 1, "stop.patience": 1,
    "evaluate.every": 1, "evaluate.batch_size": 1, "evaluate.samples": 0, "evaluate.max_tokens": 1,
    "evaluate.panel": 1,
    "transfer.size": 0, "transfer.subset": 1, "distil.epochs": 0, "distil.steps": 0, "distil.batch_size": 1,
    "runtime.workers": 1, "runtime.retries": 0, "runtime.parallel": 1, "search.trials": 1,
    "runtime.memory": 320,  # MB: a quarter is Ray's object store, which takes no less than 80
    "privacy.trainings": 1, "privacy.chunk": 1, "secure.quantization_range": 2, "secure.num_shares": 2,
}  # fmt: skip

WORDS = {
    "train.optimizer": ("sgd", "adam", "adamw"),
    "train.optimizer_state": ("fresh", "keep"),
    "train.precision": ("float32", "bf16"),
    "train.schedule": ("constant", "linear", "cosine"),
    "model.dtype": ("float32", "bf16"),
    "model.quantize": ("none", "8bit", "4bit"),
    "runtime.device": ("auto", "cpu", "cuda"),
    "runtime.vectorize": ("off", "auto"),
    "privacy.clipping": ("ghost", "plain"),
    "privacy.level": ("example", "client"),
    "evaluate.moment": ("received", "trained"),
    "secure.name": ("off", "on"),
    "clock.name": tuple(catalogue.CLOCKS),
    "clock.speeds": ("lognormal", "tiers"),
    "clock.availability": ("always", "markov", "diurnal"),
    "clock.policy": ("whole", "end"),
    "schedule.name": tuple(catalogue.SCHEDULES),
    "schedule.staleness": ("constant", "polynomial", "hinge"),
    "attack.name": catalogue.GROUPS["attack"],
    "attack.knows": ("own", "honest"),
    "defence.name": catalogue.GROUPS["defence"],
    "defence.around": ("mean", "median", "geometric_median"),
}


def check(config: Config) -> None:
    """Refuse impossible values.

    Raises
    ------
    UserError
        Naming the key, the value and what is allowed.
    """
    for key, low in LEAST.items():
        value = valued(config, key)
        if value is not None and not low <= value < float("inf"):
            raise UserError(f"{key}={value}: allowed is at least {low}")
    for key, allowed_words in WORDS.items():
        value = valued(config, key)
        if value not in allowed_words:
            raise UserError(f"{key}={value}: {nearest(str(value), allowed_words)}")
    for name in config.audit:
        if name not in catalogue.AUDITS:
            raise UserError(f"audit={name}: {nearest(str(name), catalogue.AUDITS)}")
    if len(set(config.audit)) < len(config.audit):
        raise UserError(f"audit={','.join(config.audit)}: allowed is each once")
    for key, value, good, wanted in _rules(config):
        if not good:
            raise UserError(f"{key}={value}: allowed is {wanted}")


def allowed(key: str) -> str:
    """What a key may be, in words; empty where anything of its type goes."""
    if key in WORDS:
        return ", ".join(WORDS[key])
    told = [f"at least {LEAST[key]}"] if key in LEAST else []
    return "; ".join([*told, *(wanted for name, _, _, wanted in _rules(Config()) if name == key)])


def _rules(config: Config) -> list[Rule]:
    part, train, temperature, model = config.participation, config.train, config.loss.temperature, config.model
    labels, privacy, distil, optimizers = (
        config.labels,
        config.privacy,
        config.distil,
        ", ".join(WORDS["train.optimizer"]),
    )
    epsilon, noise, betas = privacy.epsilon, privacy.noise, train.betas
    least = 1e-3 if privacy.by_example else 0.0  # far above the 1e-6 by which norms are lengthened, and what rounds off
    short = "more than 0 (privacy.level=example: at least 0.001)"
    rules: list[Rule] = [
        ("participation", part, 0 < part <= 1, "more than 0 and at most 1"),
        ("seed", config.seed, abs(config.seed) < 2**63, "a whole number of at most 63 bits"),  # as reports read it
        ("train.lr", train.lr, 0 < train.lr < float("inf"), "more than 0"),
        ("train.momentum", train.momentum, 0 <= train.momentum < 1, "at least 0 and below 1"),
        ("model.lora_alpha", model.lora_alpha, model.lora_alpha is None or model.lora_alpha > 0, "more than 0"),
        ("model.lora_dropout", model.lora_dropout, 0 <= model.lora_dropout < 1, "at least 0 and below 1"),
        ("train.warmup", train.warmup, 0 <= train.warmup < 1, "at least 0 and below 1"),
        ("train.lr_floor", train.lr_floor, 0 <= train.lr_floor <= 1, "0 to 1"),
        ("train.clip", train.clip, train.clip is None or 0 < train.clip < float("inf"), "more than 0"),
        ("train.betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two, each at least 0 and below 1"),
        ("labels.initial", labels.initial, 0 < labels.initial <= 1, "more than 0 and at most 1"),
        ("labels.budget", labels.budget, 0 <= labels.budget <= 1, "0 to 1"),
        ("distil.lr", distil.lr, distil.lr is None or 0 < distil.lr < float("inf"), "more than 0"),
        (
            "distil.optimizer",
            distil.optimizer,
            distil.optimizer in (None, *WORDS["train.optimizer"]),
            "null, " + optimizers,
        ),
        ("distil.steps", distil.steps, None in (distil.steps, distil.epochs), "null beside distil.epochs"),
        ("loss.temperature", temperature, temperature is None or temperature > 0, "more than 0"),
        ("privacy.epsilon", epsilon, epsilon is None or 0 < epsilon < 1000, "more than 0 and below 1000"),
        ("privacy.delta", privacy.delta, privacy.delta is None or 0 < privacy.delta < 1, "more than 0 and below 1"),
        ("privacy.noise", noise, noise is None or 0 < noise < 1e4, "more than 0 and below 10,000"),
        ("privacy.clip", privacy.clip, least <= privacy.clip < float("inf") and privacy.clip > 0, short),
    ]
    exact = train.precision == "float32" or not privacy.by_example
    clip, needed = config.secure.clipping_range, config.secure.reconstruction_threshold
    rules.append(("secure.clipping_range", clip, 0 < clip < float("inf"), "more than 0"))
    good = 0.5 < needed <= 1 or (needed >= 2 and needed % 1 == 0)
    rules.append(("secure.reconstruction_threshold", needed, good, "above 0.5 up to 1, or a whole number from 2 on"))
    lies, defence = config.attack, config.defence
    rules.append(("attack.fraction", lies.fraction, 0 < lies.fraction <= 1, "more than 0 and at most 1"))
    rules.append(("attack.scale", lies.scale, lies.scale is None or 0 < lies.scale < float("inf"), "more than 0"))
    good = len(set(lies.clients)) == len(lies.clients) and min(lies.clients, default=0) >= 0
    rules.append(("attack.clients", lies.clients, good, "numbers of clients from 0 on, each once"))
    rules.append(("defence.fraction", defence.fraction, 0 < defence.fraction < 0.5, "more than 0 and below 0.5"))
    rules.append(("defence.rate", defence.rate, 0 < defence.rate < float("inf"), "more than 0"))
    rules.append(("train.precision", train.precision, exact, "float32 under privacy: its noise is exact there"))
    share, limit = config.runtime.gpu_fraction, config.runtime.client_timeout
    rules.append(("runtime.gpu_fraction", share, 0 < share <= 1, "more than 0 and at most 1"))
    rules.append(("runtime.client_timeout", limit, limit is None or 0 < limit < float("inf"), "more than 0 (seconds)"))
    rules += timed(config)
    held = config.data.validation > 0  # what an early stop looks at
    for name, value in (("stop.patience", config.stop.patience), ("stop.seconds", config.stop.seconds)):
        rules.append((name, value, value is None or held, "null with data.validation=0"))
    for word in config.train.pool or ():
        name, at, rate = word.partition("@")
        good = name in WORDS["train.optimizer"] and (not at or _positive(rate))
        wanted = " or ".join(", ".join(WORDS["train.optimizer"]).rsplit(", ", 1))
        rules.append(("train.pool", word, good, f"{wanted}, and a rate after @ as in adam@0.001"))
    server = config.runtime.server_device
    known = server is None or re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", server) is not None
    rules.append(("runtime.server_device", server, known, "null, auto, cpu, cuda or cuda:<number>"))
    return rules


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
