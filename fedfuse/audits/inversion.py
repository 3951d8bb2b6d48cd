"""`pli`, paired-logits inversion (CVPR 2023): a curious server paints what a client takes a class to look like.

The server holds public images x and, for each, p_server(x), the mean of all clients' soft labels, and p_client(x), one
client's. It trains an inverter g to undo them,

    min_g Σ_x ‖x − g([p_server; p_client])‖² + 0.1·‖prior(x) − g([p_server; p_client])‖²

and then asks g for class j as only the client is sure of it: p_client = e_j, p_server = e^{1/α}/(n−1+e^{1/α}) at j and
1/(n−1+e^{1/α}) elsewhere, α = 3. The prior of an image is the mean of the public images that all clients together put
into the same class, which is what the server could paint without this client (the paper synthesises it by translation
between two domains). g is two layers of 128 and 512 (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.audits.adversary import Adversary, Sent, probabilities
from fedfuse.audits.outcomes import EVERYONE, Row, mean_interval, share_interval
from fedfuse.config.schema import TrainConfig
from fedfuse.seeding import seed_of
from fedfuse.train import training

ALPHA, PULL = 3.0, 0.1
EPOCHS, RATE, BATCH = 60, 1e-3, 32
WINDOW = 7  # pixels a side, of SSIM


class Painted(NamedTuple):
    """Of one client: its classes as g paints them, and the public means, both (C, channels, height, width)."""

    images: Tensor
    prior: Tensor


class PairedLogits:
    """Keeps the newest round's soft labels, and inverts them at the end."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.round = 0
        self._soft: dict[int, Tensor] = {}

    def see(self, sent: Sent) -> None:
        """Keep the soft labels of the newest round."""
        soft = self.adversary.soft(sent)
        if soft is None:
            return
        if sent.round != self.round:
            self.round, self._soft = sent.round, {}
        self._soft[sent.client] = probabilities(soft).float()

    def painted(self) -> dict[int, Painted]:
        """Every client's classes."""
        if not self._soft:
            return {}
        x = self.adversary.public(self.round)
        together = torch.stack([self._soft[client] for client in sorted(self._soft)]).mean(0)
        means = class_means(x, together)
        return {client: Painted(self._inverted(client, x, together, means), means) for client in sorted(self._soft)}

    def _inverted(self, client: int, x: Tensor, together: Tensor, means: Tensor) -> Tensor:
        classes, pixels = together.shape[1], x[0].numel()
        seeds = (self.adversary.scenario.seed, "pli", client)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(*seeds))
            g = nn.Sequential(
                nn.Linear(2 * classes, 128), nn.ReLU(), nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, pixels)
            )
        prior = means[together.argmax(1)].flatten(1)
        image = x.flatten(1)

        def loss(out: Tensor, _: Tensor | None, rows: Tensor) -> Tensor:
            return F.mse_loss(out, image[rows]) + PULL * F.mse_loss(out, prior[rows])

        config = TrainConfig(epochs=EPOCHS, batch_size=BATCH, lr=RATE, optimizer="adam")
        training.train(g, torch.cat([together, self._soft[client]], 1), None, loss, config, seeds)
        return training.predict(g, sure_of_each(classes)).detach().reshape(classes, *x.shape[1:])


def sure_of_each(classes: int) -> Tensor:
    """[p_server; p_client] (C × 2C) of a class that the client knows and the server half knows."""
    whole = classes - 1 + math.exp(1 / ALPHA)
    server = torch.full((classes, classes), 1 / whole).fill_diagonal_(math.exp(1 / ALPHA) / whole)
    return torch.cat([server, torch.eye(classes)], 1)


def class_means(x: Tensor, p: Tensor) -> Tensor:
    """Mean image of each class by argmax p; the mean of all where a class has none."""
    chosen = F.one_hot(p.argmax(1), p.shape[1]).to(x.dtype)
    counts = chosen.sum(0)
    sums = chosen.T @ x.flatten(1)
    means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), x.flatten(1).mean(0))
    return means.reshape(p.shape[1], *x.shape[1:])


def ssim(a: Tensor, b: Tensor, span: float) -> float:
    """Structural similarity (Wang et al. 2004) of two images (channels, height, width), over 7 × 7 windows.

    Parameters
    ----------
    span : float
        Range of the pixels, L; the constants are (0.01 L)² and (0.03 L)².
    """
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2

    def mean(v: Tensor) -> Tensor:
        return F.avg_pool2d(v[None], min(WINDOW, *v.shape[1:]), stride=1)

    a, b = a.double(), b.double()
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    found = ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(found.mean())


def scored(round: int, painted: Mapping[int, Painted], truth: Mapping[int, Mapping[int, Tensor]]) -> list[Row]:
    """Of each client and class it has: SSIM of the painting with the client's own mean image, and the prior's.

    `told` is the share of paintings that are nearer (in squares) to the mean image of their class than to that of any
    other class of the client's; by chance, one of as many as it has.

    Parameters
    ----------
    truth : dict of int to dict of int to Tensor
        Mean image of each class that a client has, by client and class.
    """
    rows: list[Row] = []
    similar: dict[str, list[float]] = {"ssim": [], "ssim/prior": []}
    told, trials, chance = 0, 0, 0.0
    for client, own in sorted(painted.items()):
        means = truth[client]
        if not means:
            continue
        everything = torch.stack(list(means.values()))
        span = float(everything.max() - everything.min()) or 1.0
        for label, mean in means.items():
            for metric, images in (("ssim", own.images), ("ssim/prior", own.prior)):
                value = ssim(images[label], mean, span)
                rows.append(Row("pli", "server", round, client, metric, label, value))
                similar[metric].append(value)
            if len(means) > 1:
                apart = (everything - own.images[label]).flatten(1).square().sum(1)
                told += list(means)[int(apart.argmin())] == label
                trials, chance = trials + 1, chance + 1 / len(means)
    for metric, values in similar.items():
        if values:
            rows.append(Row("pli", "server", round, EVERYONE, metric, None, *mean_interval(values)))
    if trials:
        rows.append(Row("pli", "server", round, EVERYONE, "told", None, *share_interval(told, trials)))
        rows.append(Row("pli", "server", round, EVERYONE, "told/chance", None, chance / trials))
    return rows
