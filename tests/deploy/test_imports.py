"""A client process imports what it computes with, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

CLIENT = """
import sys, tempfile
from pathlib import Path
import fedfuse.apps, fedfuse.deploy.warm
from flwr.supernode.runtime import run_clientapp
from flwr.app import ConfigRecord, Message, RecordDict
from fedfuse.network.site import Site, SiteConfig
from fedfuse.compat.flower_identity import claim_identity
claim_identity()
setting = ConfigRecord({"config": CONFIG, "run": "0" * 32, "attempt": 1})
with tempfile.TemporaryDirectory() as folder:
    host = Site(SiteConfig(0, Path(folder), 3))
    reply = host.handle(Message(RecordDict({"setting": setting}), 1, "query.hello"))
    assert reply.has_content(), reply.error
    content = RecordDict({
        "setting": setting,
        "config": ConfigRecord({"client": 0, "tag": "0", "new-tag": "1.1", "group": 0}),
        "run": ConfigRecord({"run": "0" * 32, "strategy": "STRATEGY", "round": 1, "phase": "train", "pooled": False,
                             "splits": ["personal"], "sums": "{}"}),
    })
    reply = host.handle(Message(content, 1, "train"))
    assert reply.has_content(), reply.error
heavy = ("flwr_datasets", "hydra", "omegaconf", "sklearn", "ray", "polars", "matplotlib", "fedfuse.results",
         "fedfuse.core.loop", "fedfuse.runs.directory")
print("HEAVY", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("strategy", ["fedavg", "knfu"])
def test_a_client_process_stays_light(strategy: str) -> None:
    from fedfuse.config.message import as_json
    from tests.deploy.network import tiny

    code = CLIENT.replace("CONFIG", repr(as_json(tiny(strategy)))).replace("STRATEGY", strategy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "HEAVY []"


def test_what_only_starts_processes_imports_nothing_heavy() -> None:
    """A health check runs every 20 seconds, and a SuperNode's own process computes nothing."""
    code = (
        "import sys, fedfuse.deploy.commands, fedfuse.deploy.launch, fedfuse.deploy.link, fedfuse.network.site_config\n"
    )
    code += "print([name for name in ('torch', 'flwr', 'polars', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
