"""Final models of a run: as a safetensors file with architecture and preprocessing, or rebuilt in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.errors import UserError
from fedfuse.results.run_data import not_a_run

if TYPE_CHECKING:
    from torch import Tensor, nn


def final_file(path: Path, client: int | None, allow_code: bool = False) -> Path:
    """Find the file of the server's model, or of a client's own.

    Raises
    ------
    UserError
        If the run is not finished, or has no such model.
    """
    if not (path / "config.yaml").exists():
        raise UserError(not_a_run(path))
    if not (path / "summary.json").exists():
        raise UserError(f"{path}: not a finished run; `fedfuse resume {path}` ends it")
    final = path / "final"
    if client is not None:
        own = final / f"client-{client}.safetensors"
        if own.exists():
            return own
        clients = json.loads((path / "summary.json").read_text())["clients"]
        if not 0 <= client < clients:
            raise UserError(f"client={client}: the run has clients 0 to {clients - 1}")
        # a client without a model of its own uses the server's
    servers = sorted(final.glob("server-*.safetensors"))
    if len(servers) == 1:
        return servers[0]
    if (common := final / "server-model.safetensors") in servers:  # what clients are sent; the others are views of it
        return common
    if servers and client is not None:
        from fedfuse.core.scenario import prepare_scenario
        from fedfuse.runs.configuration import known_config

        wanted = prepare_scenario(known_config(path, allow_code)).architectures[client]
        for file in servers:
            if _read(file)[1].get("architecture") == wanted:
                return file
    if servers:
        raise UserError(f"{path}: has one model per architecture; say which client's: --client i (Python: client=i)")
    raise UserError(f"{path}: the server has no model of its own; say which client's: --client i (Python: client=i)")


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Arrays and notes of a final model's file."""
    from safetensors import safe_open

    from fedfuse.config.files import checked

    try:
        with safe_open(checked(source), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source}: cannot be read: {error}") from error


def export(path: Path, client: int | None = None, out: str | None = None, allow_code: bool = False) -> Path:
    """Write a final model with what is needed to use it.

    Metadata: architecture, data set, input shape, classes, preprocessing, strategy, seed, digest, and the model's
    configuration.

    Parameters
    ----------
    path : Path
        A run directory, maybe a stranger's.
    client : int or None
    out : str or None
    allow_code : bool
        Whether code that its configuration names may run.

    Raises
    ------
    UserError
        If there is no such model, `out` cannot be written, or the directory names code that is not allowed.
    """
    from fedfuse.config.dotted import code

    with code(allow_code):
        return _exported(path, client, out, allow_code)


def _exported(path: Path, client: int | None, out: str | None, allow_code: bool) -> Path:
    from dataclasses import asdict

    from safetensors.torch import save_file

    from fedfuse.config.schema import ModelConfig
    from fedfuse.core.scenario import prepare_scenario
    from fedfuse.runs.configuration import known_config

    source = final_file(path, client, allow_code)
    config = known_config(path, allow_code)
    scenario = prepare_scenario(config)
    dataset, summary = scenario.data.dataset, json.loads((path / "summary.json").read_text())
    arrays, about = _read(source)
    half = "shape" in about  # a network of the server behind the clients': it takes their features
    about |= {
        "data": config.data.name,
        "shape": about.get("shape", json.dumps(list(dataset.shape))),
        "classes": json.dumps(list(dataset.classes)),
        "preprocessing": "the features of a client's network" if half else dataset.preprocessing(),
        "strategy": config.strategy.name,
        "seed": str(config.seed),
        "digest": str(summary["digest"]),
        "model": json.dumps(asdict(ModelConfig() if half else config.model)),
    }
    target = Path(out) if out else path / f"{source.stem}-export.safetensors"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, target, metadata=about)
    except Exception as error:
        raise UserError(f"--out={target}: cannot be written ({error})") from error
    return target


def rebuild(path: Path, client: int | None = None, allow_code: bool = False) -> tuple[nn.Module, Any]:
    """Build a final model with its weights; parameters as `export`'s.

    Returns
    -------
    model : nn.Module
        In evaluation mode; a client's own with the server's half behind it, where a strategy splits them.
    scenario : Scenario
        What it was trained in.
    """
    from fedfuse.config.dotted import code

    with code(allow_code):
        return _rebuilt(path, client, allow_code)


def _rebuilt(path: Path, client: int | None, allow_code: bool) -> tuple[nn.Module, Any]:
    from fedfuse import models
    from fedfuse.config import registry
    from fedfuse.config.schema import ModelConfig
    from fedfuse.core.scenario import prepare_scenario
    from fedfuse.core.workspace import Workspace
    from fedfuse.models.pair import Split
    from fedfuse.runs.configuration import known_config

    source = final_file(path, client, allow_code)
    config = known_config(path, allow_code)
    config.model.quantize = "none"  # adapters are the same over the whole base, which needs no GPU
    scenario = prepare_scenario(config)
    chosen = registry.entry(config.strategy.name)
    workspace = Workspace(scenario, lambda model, build: chosen.client.equip(model, config.strategy, build))

    def half(arrays: dict[str, Tensor], about: dict[str, str]) -> nn.Module:
        shape = tuple(json.loads(about["shape"]))
        built = models.build(
            about["architecture"], shape=shape, classes=scenario.classes, config=ModelConfig(), seed=config.seed
        )
        built.load_state_dict(arrays)
        return built

    arrays, about = _read(source)
    if "shape" in about:
        return half(arrays, about).eval(), scenario
    model = (workspace.bare if "bare" in about else workspace.loaded)(about["architecture"], arrays)
    for file in sorted((path / "final").glob("server-*.safetensors")):
        behind = _read(file)
        if "shape" in behind[1]:
            model = Split(model, half(*behind))
    return model.eval(), scenario
