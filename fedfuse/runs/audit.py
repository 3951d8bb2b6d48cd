"""`fedfuse audit RUN --audit ldia,coop_lira`, and `audit=`: what a finished simulation's messages leak.

The run is played once more from its configuration, every reply is noted where the server gets it, and the attacks
(`fedfuse.audits`) are handed these messages alone; the truth comes in where they are scored. A replay that ends with
another digest than the run is refused: it would measure something else.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from fedfuse.audits import inversion, label_prior
from fedfuse.audits.adversary import Adversary
from fedfuse.audits.curious import CuriousClient, drawn
from fedfuse.audits.gradients import FedMIAGradient
from fedfuse.audits.membership import CoopLira, DistillLira, FedMIA
from fedfuse.audits.others import OthersLabels, OthersMembers
from fedfuse.audits.outcomes import EVERYONE, Row, of_membership
from fedfuse.audits.possible import OF_ANSWERS, OF_CLIENTS, OF_MEMBERS, OF_MODELS, check_audits, known
from fedfuse.audits.replay import Answers, Listening, asking
from fedfuse.audits.truth import Questions, mean_images, prior
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.config import registry
from fedfuse.config.catalogue import AUDITS
from fedfuse.config.dotted import code
from fedfuse.config.files import checked, replaced
from fedfuse.config.schema import Config
from fedfuse.core.build import build_strategy
from fedfuse.core.callbacks import Evaluation
from fedfuse.core.devices import device_of
from fedfuse.core.loop import Federation
from fedfuse.core.node import place
from fedfuse.core.scenario import Scenario, prepare_scenario
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.threads import single_thread
from fedfuse.core.timed import build_clock
from fedfuse.engines.inline import InlineGrid
from fedfuse.errors import UserError, WorldError
from fedfuse.runs.configuration import known_config
from fedfuse.runs.directory import RunDirectory

ATTACKS: dict[str, Any] = {
    "ldia": label_prior.LabelDistributions, "coop_lira": CoopLira, "distill_lira": DistillLira, "fedmia": FedMIA,
    "fedmia_gradient": FedMIAGradient, "pli": inversion.PairedLogits,
}  # fmt: skip
BY_CLIENTS: dict[str, Any] = {"client_ldia": OthersLabels, "client_lira": OthersMembers}
IMAGES = "audit_pli.npz"  # what `pli` painted, by client


def audit(path: Path, names: Sequence[str], allow_code: bool = False) -> str:
    """Replay a run, attack what its server saw, write `audit.parquet`, and say what was found.

    Audits of the run that were made before, of other names, are kept.

    Raises
    ------
    UserError
        If the audit or the run is none that can be made.
    WorldError
        If the replay is another run than was played.
    """
    known(names, "--audit ")
    config = known_config(path, allow_code)
    if not (path / "summary.json").exists():
        raise UserError(f"{path}: not a finished run; `fedfuse resume {path}` ends it")
    if (path / "attempt").exists() or (path / "order.json").exists():
        raise UserError(
            f"{path}: was played by a deployment, whose clients' labels are theirs alone; allowed are simulations"
        )
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    digest, rounds = summary["digest"], int(summary["rounds_done"])  # of fewer than planned, if it stopped early
    config.runtime.name, config.overwrite, config.evaluate.every = "inline", False, config.rounds
    config.audit = []
    with code(allow_code):
        scenario, attacks, questions, again = _replayed(path, config, names, rounds)
    if again != digest:
        raise WorldError(
            f"{path}: played again it ends with another digest ({again} for {digest}): nothing was measured"
        )
    rows = [row for name in names for row in _scored(path, name, attacks[name], scenario, questions)]
    _write(path / "audit.parquet", names, rows)
    return "\n\n".join(_told(name, [row for row in rows if row.audit == name]) for name in names)


def made(path: Path) -> set[str]:
    """The audits that a run directory has the figures of."""
    file = path / "audit.parquet"
    return set(pl.read_parquet(checked(file), columns=["audit"], glob=False)["audit"]) if file.exists() else set()


def _replayed(
    path: Path, config: Config, names: Sequence[str], rounds: int
) -> tuple[Scenario, dict[str, Any], Questions | None, str | None]:
    single_thread()
    claim_identity()
    scenario, entry = prepare_scenario(config), registry.entry(config.strategy.name)
    strategy = build_strategy(entry, scenario)
    check_audits(strategy, names, f"{path}: --audit ")
    clock = build_clock(strategy)
    questions = Questions(scenario) if set(names) & set(OF_MEMBERS) else None
    adversary = Adversary(entry, scenario, None if questions is None else questions.candidates)
    attacks = {name: ATTACKS[name](adversary) for name in names if name in ATTACKS}
    by_clients = [name for name in names if name in OF_CLIENTS]
    curious = clients_of(strategy, questions) if by_clients else {}
    attacks |= {name: {k: BY_CLIENTS[name](who) for k, who in curious.items()} for name in by_clients}
    answers = Answers([attacks[name] for name in OF_ANSWERS if name in names])
    if questions is not None and answers.listeners:
        entry = asking(entry, scenario, questions.asked, {1, rounds}, answers)
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder) / "replay", config, time.time())
        directory.create(False)
        clients = InlineGrid(place(entry, scenario, directory.clients, device=device_of(config)))
        clients.whole = True
        grid = Listening(
            clients,
            strategy,
            [a for a in attacks.values() if hasattr(a, "see")],
            curious,
            answers,
        )
        try:
            federation = Federation(strategy, grid, rounds, [Evaluation(rounds), directory], clock)  # type: ignore[arg-type]
            federation.run()
        finally:
            grid.close()
            directory.close()
    return scenario, attacks, questions, federation.digest


def _scored(path: Path, name: str, attack: Any, scenario: Scenario, questions: Questions | None) -> list[Row]:
    """An attack's guesses against the truth."""
    if name == "ldia":
        return label_prior.scored(attack.estimates, {k: prior(scenario, k) for k in range(scenario.clients)})
    if name == "pli":
        painted = attack.painted()
        _keep_images(path / IMAGES, painted, scenario)
        return inversion.scored(attack.round, painted, {k: mean_images(scenario, k) for k in painted})
    if name == "client_ldia":
        priors = {k: prior(scenario, k) for k in range(scenario.clients)}
        guesses = {(round, k): guess for k, one in attack.items() for round, guess in one.estimates.items()}
        truth = {k: label_prior.of_the_others(priors, k) for k in attack}
        blind = {k: label_prior.rest_of_alike(priors[k], scenario.clients) for k in attack}
        return label_prior.scored(guesses, truth, blind, (name, "client"))
    assert questions is not None
    if name == "client_lira":
        by_round: dict[int, dict[int, Tensor]] = {}
        for one in attack.values():
            for round, scores in one.scores().items():
                by_round.setdefault(round, {}).update(scores)
        members = questions.about_others(attack)[1]
        return [
            row for round, scores in by_round.items() for row in of_membership(name, "client", round, scores, members)
        ]
    who = "server" if name in OF_MODELS else "asking server"
    found = attack.scores()
    return [row for round, scores in found.items() for row in of_membership(name, who, round, scores, questions.truth)]


def clients_of(strategy: FusionStrategy, questions: Questions | None) -> dict[int, CuriousClient]:
    """The clients that are curious, each with what it has."""
    scenario, entry = strategy.scenario, registry.entry(strategy.name)
    clients = drawn(scenario)
    candidates = None
    if questions is not None:
        candidates = questions.candidates._replace(of=questions.about_others(clients)[0])
    config = scenario.config
    means = () if config.defence.on or config.secure.on else strategy.means  # a robust rule is none; masks hide a share
    return {k: CuriousClient(entry, scenario, k, candidates, means) for k in clients}


def _keep_images(path: Path, painted: dict[int, inversion.Painted], scenario: Scenario) -> None:
    """What was painted beside what is true, as pixels from 0 to 1: client, class, (painted, prior, own mean)."""
    kept = {}
    for client, one in painted.items():
        for label, mean in mean_images(scenario, client).items():
            three = np.stack([image.numpy() for image in (one.images[label], one.prior[label], mean)])
            low, high = three[2].min(), three[2].max()
            kept[f"{client}/{label}"] = ((three - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float16)
    with replaced(path, durable=True) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **kept)


def _write(path: Path, names: Sequence[str], rows: list[Row]) -> None:
    schema: dict[str, Any] = {
        name: pl.String if name in ("audit", "adversary", "metric") else pl.Float64 for name in Row._fields
    }
    schema |= {"round": pl.Int64, "client": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    if path.exists():
        before = pl.read_parquet(path, glob=False)
        if before.schema == frame.schema:
            frame = pl.concat([before.filter(~pl.col("audit").is_in(list(names))), frame])
    with replaced(path, durable=True) as partial:
        frame.write_parquet(partial)


# -- in words ------------------------------------------------------------------------------------------------


def _told(name: str, rows: list[Row]) -> str:
    """What an audit found, about all clients."""
    about = AUDITS[name]
    lines = [
        f"{name}: {about.line}",
        f"by {about.adversary}, which sees {about.sees}; nothing else (in a simulation the truth is known)",
    ]
    whole = {(row.round, row.metric, row.at): row for row in rows if row.client == EVERYONE}
    rounds = sorted({row.round for row in rows})
    if name.endswith("ldia"):
        lines.append("round   KL      TV      Chebyshev   TV of a blind guess   nearer than blind")
        for round in rounds:
            own = {(row.client, row.metric): row.value for row in rows if row.round == round}
            who = sorted({client for client, _ in own} - {EVERYONE})
            nearer = sum(own[c, "tv"] < own[c, "tv/blind"] for c in who)  # type: ignore[operator]
            kl, tv, chebyshev, blind = (whole[round, m, None].value for m in ("kl", "tv", "chebyshev", "tv/blind"))
            lines.append(
                f"{round:5d}   {kl:.3f}   {tv:.3f}   {chebyshev:.3f}       {blind:.3f}                 "
                f"{nearer} of {len(who)} clients"
            )
    elif name == "pli":
        for round in rounds:
            for metric, said in (
                ("ssim", "SSIM with the client's own mean images"),
                ("ssim/prior", "the same, of means of public images"),
                ("told", "paintings nearest to their own class"),
                ("told/chance", "by chance"),
            ):
                if (round, metric, None) in whole:
                    lines.append(f"round {round}: {said}: {_interval(whole[round, metric, None])}")
    else:
        for round in rounds:
            if (round, "auc", None) not in whole:
                lines.append(f"round {round}: too few candidates to say anything")
                continue
            count = int(whole[round, "members", None].value or 0)
            lines.append(
                f"round {round}: AUC {_interval(whole[round, 'auc', None])} of {count} members, as many others"
            )
            for (at_round, metric, rate), row in sorted(whole.items(), key=str, reverse=True):
                if at_round == round and metric == "tpr":
                    lines.append(f"    true positives at {100 * (rate or 0):g} % false ones: {_interval(row)}")
    return "\n".join(lines)


def _interval(row: Row) -> str:
    if row.value is None:
        return "not to be told from so few candidates"
    between = "" if row.low is None or row.high is None else f" [{row.low:.3f}, {row.high:.3f}]"
    return f"{row.value:.3f}{between}"
