"""Differential privacy of a client's training examples: DP-SGD by Opacus, and what it has cost so far.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133): each step takes every example with probability q (Poisson), clips each
example's gradient to norm C and adds noise of deviation σ·C. The privacy unit is one example (for language models one
row of tokens: a text, or a window where texts were joined and cut), neighbours differ by adding or removing one, N is
the client's own number of examples. ε is the upper bound of the PRV accountant (Gopi et al. 2021, arXiv 2106.02848)
over everything a client has released in a run, at δ ≤ 1/N. Needs the extra `privacy` (Opacus).
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.compat.opacus_clipping import HELD, ghost_sum, hooks_on, plain_sum
from fedfuse.compat.opacus_noise import noised_by
from fedfuse.compat.torch_norms import BATCH_NORMS
from fedfuse.config.schema import PrivacyConfig, TrainConfig
from fedfuse.errors import UserError
from fedfuse.train import training, work
from fedfuse.train.accounting import History, epsilon, joined, noise_for
from fedfuse.train.allowance import passes
from fedfuse.train.batch import only, rates
from fedfuse.train.entropy import Keystream, Source, gaussian, uniform
from fedfuse.train.ledger import USUAL, Ledger
from fedfuse.train.task import task_losses, trimmed

PRIVATE = frozenset({"epochs", "batch_size", "params", "lr", "optimizer", "after_backward"})  # options of `train`


def check_installed() -> None:
    """Refuse privacy without Opacus, which computes gradients by example and what releases cost.

    Raises
    ------
    UserError
        Naming what to install.
    """
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise UserError("privacy needs Opacus: pip install 'fedfuse[privacy]'") from error


def check(model: nn.Module, architecture: str) -> None:
    """Refuse what DP-SGD cannot be done with.

    Raises
    ------
    UserError
        If Opacus is not installed, or the model's layers mix examples.
    """
    check_installed()
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise UserError(
                f"privacy with model={architecture}: {name} is a BatchNorm, which mixes the examples of a batch; "
                "allowed are models without it (GroupNorm, LayerNorm)"
            )


def private_notes(start: str, deployed: bool, tokens: bool = False, spent: Sequence[float] = ()) -> list[str]:
    """What a private run says of itself.

    Parameters
    ----------
    start : str
        What version 0 was made from.
    deployed : bool
    tokens : bool
        Whether examples are rows of tokens.
    spent : sequence of float
        ε of clients, as they told it in all rounds.
    """
    most = [f"dp: epsilon {max(spent):.4g} at most, of the client who spent most, at its delta"] if spent else []
    unit = ["dp: an example is one row of tokens; a text that was cut into windows is several, and protected less"]
    own = "from each site's own entropy; sites that require privacy clip plain, whatever privacy.clipping says"
    noise = own if deployed else "seeded, so that whoever knows the seed can take it off"
    return [
        f"dp: noise is {noise}; dropout is off",
        f"dp: the start is {start}",
        "dp: epsilon in the metrics is by example, per client, of what it trains on; its validation and test figures, "
        "and how many examples it has, are not covered",
        *(unit if tokens else ()),
        *most,
    ]


class Budget:
    """What one client may spend in a run, and has spent.

    Parameters
    ----------
    config : PrivacyConfig
    train : TrainConfig
    rounds : int
        Rounds of the run.
    examples : int
        N.
    state : dict
        The client's private state; `state["privacy"]` holds σ and the history.
    ledger : Ledger or None
        Where a deployed site notes every release as it happens, also those whose reply never counted.
    name : str
        The client, for messages.

    Raises
    ------
    UserError
        If δ exceeds 1/N.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        train: TrainConfig,
        rounds: int,
        examples: int,
        state: dict[str, Any],
        ledger: Ledger | None = None,
        name: str = "client",
    ) -> None:
        self.config, self.train, self.rounds, self.examples = config, train, rounds, examples
        self.ledger, self.name = ledger, name
        self.kept = state.setdefault("privacy", {"noise": 0.0, "history": "[]"})
        self.delta = delta_of(examples) if config.delta is None else config.delta
        if self.delta > 1 / examples:
            raise UserError(f"privacy.delta={self.delta:g}: {name} has {examples} examples; allowed is at most 1/N")

    @property
    def history(self) -> History:
        """Everything released so far."""
        if self.ledger is not None:
            return joined((), self.ledger.history)
        return tuple((n, q, s) for n, q, s in json.loads(self.kept["history"]))

    @property
    def epsilon(self) -> float:
        """ε spent so far."""
        return epsilon(self.history, self.delta) if self.history else 0.0

    def steps(self, epochs: int | None = None, batch_size: int | None = None) -> tuple[float, int]:
        """Sampling rate q and steps of one training: on average, `epochs` passes in batches of `batch_size`.

        Without `epochs`, the run's `train.max_steps` or `train.epochs`.
        """
        size = self.train.batch_size if batch_size is None else batch_size
        a_pass = max(1, -(-self.examples // size))
        if epochs is None and self.train.max_steps is not None:
            return 1 / a_pass, self.train.max_steps
        return 1 / a_pass, a_pass * (self.train.epochs if epochs is None else epochs)

    def noise(self, round: Sequence[tuple[float, int]], *before: tuple[float, int]) -> float:
        """σ, fixed before the first release: for each round's trainings to come, and what comes `before` them."""
        if self.config.noise is not None:
            return self.config.noise
        if not self.kept["noise"]:
            assert self.config.epsilon is not None
            times = self.config.trainings or self.rounds
            plan = (*before, *((rate, steps * times) for rate, steps in round if steps))
            self.kept["noise"] = noise_for(self.config.epsilon, self.delta, plan)
        return float(self.kept["noise"])

    def spend(self, noise: float, rate: float, steps: int) -> None:
        """Enter a release, before it is made.

        Raises
        ------
        UserError
            If the budget does not last.
        Refused
            If the site's policy does not allow it.
        """
        assert noise > 0
        after = joined(self.history, ((noise, rate, steps),))
        cost = epsilon(after, self.delta)
        if self.config.epsilon is not None and cost > self.config.epsilon:
            raise UserError(
                f"{self.name}: privacy.epsilon={self.config.epsilon:g} is spent ({self.epsilon:.3g} so far, "
                f"{cost:.3g} with this training); plan for more by privacy.trainings"
            )
        if self.ledger is not None:
            self.ledger.enter((noise, rate, steps), self.delta)
        self.kept["history"] = json.dumps(after)

    def metrics(self) -> dict[str, float]:
        """ε so far, its δ, and σ."""
        return {"epsilon": self.epsilon, "delta": self.delta, "noise": self.history[-1][0]}


def delta_of(examples: int) -> float:
    """δ where nobody says one: 10⁻⁵, and at most a tenth of 1/N, at which a whole example might be told."""
    return min(USUAL, 1 / (10 * examples))


# --- training ---------------------------------------------------------------------------------------------


def own_entropy() -> Keystream:
    """What to draw from where nobody else may be able to repeat it."""
    return Keystream()


def drawn(examples: int, rate: float, source: Source) -> Tensor:
    """Rows of a Poisson sample: each with probability `rate`; possibly none."""
    return (uniform(examples, source) < rate).nonzero().flatten()


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    privacy: PrivacyConfig,
    release: tuple[float, float, int],
    sampling: Source,
    noising: Source,
    *,
    seed_parts: tuple[object, ...] = (),
    params: Iterable[nn.Parameter] | None = None,
    lr: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    after_backward: Callable[[nn.Module], None] | None = None,
    rate_of: Callable[[int, int], float] | None = None,
) -> None:
    """Train by DP-SGD on the task's loss, in place; whatever is trained is clipped and noised together.

    Parameters
    ----------
    release
        σ, q and the number of steps, as entered in the budget. The sum of gradients is divided by q·N.
    sampling, noising
        What batches and noise are drawn from.
    seed_parts
        What layers draw from that draw in evaluation mode too; dropout is off.
    after_backward
        Called between the noised gradient and the step; it may use only what is public or was released.
    rate_of
        Factor on the learning rate in step k of K, from 0.

    Raises
    ------
    UserError
        If Opacus cannot give gradients by example of this model.
    """
    from opacus.optimizers import DPOptimizerFastGradientClipping  # takes sums that are clipped already

    noise, rate, steps = release
    chosen = [p for p in (model.parameters() if params is None else params) if p.requires_grad]
    inner = training.optimizer(chosen, config) if optimizer is None else optimizer
    if lr is not None:
        for group in inner.param_groups:
            group["lr"] = lr
    ghost = privacy.clipping == "ghost"
    passes(steps * rate)
    kind: type[Any] = DPOptimizerFastGradientClipping
    drawn_here = isinstance(noising, Keystream) or x.is_cuda  # a generator of the CPU's draws for no other device
    if drawn_here:
        kind = noised_by(kind, lambda like, deviation: gaussian(like, deviation, noising))
    wrapped: Any = kind(
        inner,
        noise_multiplier=noise,
        max_grad_norm=privacy.clip,
        expected_batch_size=rate * len(x),  # type: ignore[arg-type]
        generator=None if drawn_here else noising,
    )
    held = privacy.chunk or (len(x) if ghost else max(1, HELD // sum(p.numel() for p in chosen)))

    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        return task_losses(model(inputs), labels)

    training.training_mode(model)
    _undrawn(model)
    passed = 0
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # tokens, and data, need no gradient
    try:
        fork = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
        with only(model, chosen), _by_example(model, privacy) as hooks, rates(inner, rate_of) as put, fork:
            training.seed(x.device, *seed_parts, "layers")
            for step in range(steps):
                put(step, steps)
                rows = drawn(len(x), rate, sampling).to(x.device)
                passed += len(rows)
                chunks = rows.split(held) if len(rows) else (rows,)
                for i, part in enumerate(chunks):
                    wrapped.zero_grad()
                    if len(part):
                        labels, texts = trimmed(y[part], x[part])
                        if ghost:
                            ghost_sum(losses, hooks, chosen, texts, labels, privacy.clip)
                        else:
                            plain_sum(losses, chosen, texts, labels, privacy.clip)
                    else:  # nobody was drawn: the step is noise alone
                        for p in chosen:
                            p.grad = torch.zeros_like(p)
                    wrapped.signal_skip_step(i + 1 < len(chunks))
                    wrapped.pre_step()
                if after_backward is not None:
                    after_backward(model)
                inner.step()
    except NotImplementedError as error:
        words = " ".join(str(error).split())[:160]
        raise UserError(f"privacy.clipping={privacy.clipping}: Opacus refuses this model ({words})") from error
    finally:
        inner.zero_grad()
    # whom chance drew is no release: what is told is what was to be expected
    work.note(model, x, passed, True, examples=round(steps * rate * len(x)))


def _undrawn(model: nn.Module) -> None:
    """Leave dropout out: its masks go by place, so that one example more would change what all after it add.

    Opacus looks at layers in training mode. Those have parameters; dropout has none, nor has attention that drops out.
    """
    for module in model.modules():
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = False


@contextlib.contextmanager
def _by_example(model: nn.Module, privacy: PrivacyConfig) -> Iterator[Any]:
    """Opacus's hooks on a model, which find gradients by example; nothing of them is left behind."""
    hooks = hooks_on(model, privacy.clipping == "ghost")
    try:
        yield hooks
    finally:
        hooks.cleanup()
        for module in model.modules():
            for name in ("activations", "max_batch_len"):
                module.__dict__.pop(name, None)
