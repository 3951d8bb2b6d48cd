"""Does Fed-SB improve over its start? Every seed, both runtimes, and once killed and resumed; a table, exit 1 if not.

python experiments/adapters/improves.py shakespeare    # stories260K on roles of Shakespeare, next-token loss
python experiments/adapters/improves.py sst2           # MiniLM on SST-2, cross-entropy (prepare.py first)
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from prepare import MINILM
from safetensors.torch import load_file

from fedfuse.config import registry
from fedfuse.config.compose import compose
from fedfuse.core.scenario import prepare_scenario
from fedfuse.results.run_data import load
from fedfuse.runs.experiment import build_strategy
from fedfuse.train.scores import scored
from fedfuse.train.task import task_loss

RUNS = Path("runs/adapters/improves")
STORIES = Path(os.environ.get("FEDFUSE_DATA", "../shared/data")).parent / "models" / "stories260K"
COMMON = [
    "strategy=fed_sb", "rounds=3", "evaluate.every=3", "transfer.size=4", "train.epochs=1", "train.optimizer=adamw",
    "data.validation=0", "data.personal_test=0", "runtime.workers=2",
]  # fmt: skip
TASKS = {
    "shakespeare": [
        "data=tiny_shakespeare", f"data.extra.tokenizer={STORIES}", "data.extra.length=32", "data.extra.roles=4",
        "data.extra.least=20", "partition=natural", "model=causal_lm", f"model.path={STORIES}", "data.limit=200",
        "data.test_limit=40", "strategy.rank=16", "train.batch_size=16", "train.lr=0.005",
    ],
    "sst2": [
        "data=sst2", f"data.extra.tokenizer={MINILM}", "data.extra.length=16", "partition=iid", "clients=3",
        "model=text_classifier", f"model.path={MINILM}", "data.limit=124", "data.test_limit=100", "strategy.rank=16",
        "train.batch_size=8", "train.lr=0.01", "evaluate.batch_size=32",
    ],
}  # fmt: skip


def losses(words: list[str], run: Path) -> tuple[float, float]:
    """Loss on the global test set of version 0 and of a run's final model."""
    scenario = prepare_scenario(compose(words))
    strategy = build_strategy(registry.entry("fed_sb"), scenario)
    strategy.ensure_begun()
    x, y = strategy.workspace.tensors("test")

    def loss(arrays: dict) -> float:
        model = strategy.workspace.loaded(strategy.architecture, arrays)
        if y.ndim > 1:
            return scored(lambda part: strategy.predict(model, part, 32), x, y, scenario.classes)["loss"]
        return float(task_loss(strategy.predict(model, x, 32), y))

    return loss(strategy.state_of_model()), loss(load_file(run / "final" / "server-model.safetensors"))


def fedfuse(*words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "fedfuse.cli", *words], stdout=subprocess.DEVNULL)


def killed_and_resumed(words: list[str], out: Path) -> None:
    """Kill a run once its first round is committed; resume it."""
    process = fedfuse("run", *words, f"out={out}")
    while not (out / "checkpoint" / "round.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print("killed after a round" if not (out / "summary.json").exists() else "ended before it could be killed")
    fedfuse("resume", str(out)).wait()


def main(task: str) -> int:
    bad = 0
    for seed in range(3):
        digests = {}
        for runtime in ("inline", "ray"):
            words = [*TASKS[task], *COMMON, f"seed={seed}", f"runtime={runtime}"]
            out = RUNS / task / f"{runtime}-{seed}"
            if not (out / "summary.json").exists():  # the same command goes on where it stopped
                shutil.rmtree(out, ignore_errors=True)
                if code := fedfuse("run", *words, f"out={out}").wait():
                    return code
            start, end = losses(words, out)
            digests[runtime] = (load(out).summary or {})["digest"]
            good = end < start and digests[runtime] == digests["inline"]
            bad += not good
            print(
                f"{task} seed {seed} {runtime:6} loss {start:.4f} -> {end:.4f}  {digests[runtime][:12]}  {good}",
                flush=True,
            )
        if seed == 0:
            again = RUNS / task / "resumed"
            if not (again / "summary.json").exists():
                shutil.rmtree(again, ignore_errors=True)
                killed_and_resumed([*words[:-1], "runtime=inline"], again)
            same = (load(again).summary or {})["digest"] == digests["inline"]
            bad += not same
            print(f"{task} seed 0 resumed: digest {'as undisturbed' if same else 'DIFFERS'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
