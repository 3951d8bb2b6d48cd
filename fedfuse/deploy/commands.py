"""The commands of `fedfuse deploy`: their words, and what carries them out.

Each command imports what it needs when it is carried out, so that `--help` and `health` are quick.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.deploy.processes import QUOTA
from fedfuse.errors import UserError, WorldError
from fedfuse.results.wording import digest_line

if TYPE_CHECKING:
    from fedfuse.deploy.link import Link
    from fedfuse.deploy.submit import Order


def parser() -> argparse.ArgumentParser:
    """Describe all subcommands."""
    top = argparse.ArgumentParser(
        prog="fedfuse deploy", description="The same strategy file as real processes over TLS with authenticated nodes."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    certs = commands.add_parser(
        "certs", help="make a local CA, a server certificate and node keys; keeps what is there"
    )
    certs.add_argument("directory", type=Path)
    certs.add_argument("--name", action="append", default=[], help="DNS name or IP address of the server (repeatable)")
    certs.add_argument("--node", action="append", default=[], help="node to make a key pair for (repeatable)")
    certs.add_argument("--nodes", type=int, default=0, help="make node-0 … node-(N-1)")
    certs.add_argument(
        "--operator", action="append", default=[], metavar="NAME[=ROLE,…]",
        help="certificate for an operator; roles: read, submit, register (default all)",
    )  # fmt: skip
    certs.add_argument("--server-to", type=Path, metavar="DIR", help="copy the server's key and certificates there")
    certs.add_argument("--operator-to", type=Path, metavar="DIR", help="copy operators' keys and certificates there")
    certs.add_argument("--public-to", type=Path, metavar="DIR", help="copy the CA's certificate there")
    certs.add_argument("--days", type=int, default=365, help="validity of the server's certificate")

    server = commands.add_parser("server", help="run the server (SuperLink) with TLS and node authentication")
    server.add_argument("--certs", type=Path, help="directory with ca.crt, server.pem and server.key")
    server.add_argument("--host", default="0.0.0.0")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--control-host", help="where operators reach it; default: --host")
    server.add_argument("--control-port", type=int, help="operators' port; default: the one after --port")
    server.add_argument("--state-dir", type=Path, default=Path("fedfuse-server"), help="database and Flower's home")
    server.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories lie")
    server.add_argument("--insecure", action="store_true", help="plain HTTP, no authentication: only for trying out")
    server.add_argument(
        "--memory", type=int, metavar="MB", help="that a run's process may take; default: the machine's"
    )
    server.add_argument(
        "--quota", type=int, default=QUOTA, metavar="MB", help=f"that one node may have lying here; default: {QUOTA}"
    )
    server.add_argument(
        "--data", type=Path, action="append", metavar="DIR",
        help="below which an order's data.root may lie (repeatable); default: $FEDFUSE_DATA",
    )  # fmt: skip
    server.add_argument("--allow-code", action="store_true", help="let orders name code and files of this machine")

    request = commands.add_parser("request", help="at a site: make this site's key and a request to be registered")
    request.add_argument("directory", type=Path, help="gets NAME.key, which stays here, NAME.pub and NAME.request")
    request.add_argument("name")
    request.add_argument("--client-id", type=int, help="which client this site is")
    request.add_argument("--partition", metavar="I/N", help="act as every N-th simulated client from I on")
    request.add_argument("--examples", metavar="A:B", help="how many training examples it will have")
    request.add_argument(
        "--passphrase", action="store_true", help="put a new key under one: asked for, or $FEDFUSE_PASSPHRASE"
    )
    request.add_argument("--out", type=Path, help="where NAME.request is written, if not beside the key")

    audit = commands.add_parser(
        "audit", help="verify and print the log of what was asked of this machine and what left"
    )
    audit.add_argument("state_dir", type=Path, help="--state-dir of the node or server")
    audit.add_argument("--head", help="the head that an earlier call printed: must still be in the log")

    node = commands.add_parser("node", help="run a node (SuperNode) on this site's data")
    _reach(node)
    node.add_argument("--key", type=Path, help="this node's private key, registered with the server")
    node.add_argument("--no-key", action="store_true", help="join a server that asks for none")
    node.add_argument("--data", help="folder of this site's data")
    node.add_argument("--client-id", type=int, help="which client this site is")
    node.add_argument("--partition", metavar="I/N", help="act as every N-th simulated client from I on")
    node.add_argument("--state-dir", type=Path, required=True, help="this site's memory; keep it across restarts")
    node.add_argument("--policy", type=Path, help="site policy (TOML)")
    node.add_argument("--port", type=int, default=9094, help="local port between node and executor")
    node.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    node.add_argument("--memory", type=int, metavar="MB", help="that a task's process may take; default: the machine's")
    node.add_argument("--poll", type=float, default=1.0, metavar="S", help="seconds between asking for work")

    for sub in (server, node):
        sub.add_argument("--follow", type=int, help=argparse.SUPPRESS)  # end when this process ends

    for name, what in (("register", "let a site join: which clients its key may be"), ("unregister", "revoke a node")):
        sub = commands.add_parser(name, help=what)
        _reach(sub, operator=True)
        sub.add_argument("which", nargs="+", metavar="NAME.request" if name == "register" else "NAME|NODE_ID")
        if name == "register":
            sub.add_argument("--client-id", type=int, help="which client it may be, in place of what a request says")
            sub.add_argument("--partition", metavar="I/N", help="the same, for simulated clients")
            sub.add_argument("--examples", metavar="A:B", help="how many training examples it may say it has")

    health = commands.add_parser("health", help="exit code 0 if the server answers and the CA vouches for it")
    _reach(health)

    run = commands.add_parser("run", help="submit a run, stream its log, fetch its run directory")
    _reach(run, operator=True)
    _patience(run)
    run.add_argument("keys", nargs="*", metavar="key=value")
    run.add_argument("--own-data", action="store_true", help="clients are sites with data of their own, not partitions")

    resume = commands.add_parser("resume", help="continue a run whose server was lost")
    _reach(resume, operator=True)
    resume.add_argument("directory", type=Path, help="the directory that `deploy run` was writing")

    status = commands.add_parser("status", help="runs and nodes of a server")
    _reach(status, operator=True)
    stop = commands.add_parser("stop", help="stop a run (it can be resumed)")
    _reach(stop, operator=True)
    stop.add_argument("run", help="Flower's run id, from `status`")

    local = commands.add_parser("local", help="server and nodes as real processes on this machine, one run, all ended")
    local.add_argument("--nodes", type=int, default=3)
    local.add_argument("--work", type=Path, help="keep certificates, states and logs here")
    local.add_argument("--policy", type=Path, help="site policy of every node (TOML)")
    _patience(local)
    local.add_argument("keys", nargs="*", metavar="key=value")

    bench = commands.add_parser("bench", help="a round against a plain Flower app's, and bytes on the wire")
    bench.add_argument("--rounds", type=int, default=6, help="of a block")
    bench.add_argument("--blocks", type=int, default=2, help="of each side, in turns")
    bench.add_argument("--out", type=Path, default=Path("bench"), help="where deploy.json is written")
    return top


def _reach(sub: argparse.ArgumentParser, operator: bool = False) -> None:
    sub.add_argument("--server", default=f"127.0.0.1:{8001 if operator else 8000}", metavar="HOST:PORT")
    if operator:
        sub.add_argument(
            "--operator", type=Path, metavar="NAME.pem", help="the operator's certificate, its key beside it"
        )
    sub.add_argument("--ca", type=Path, help="certificate of the CA that signed the server's")
    sub.add_argument("--insecure", action="store_true", help="plain HTTP, no authentication: only for trying out")


def _patience(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--join", type=float, default=300.0, metavar="S", help="seconds until all clients must be there")
    sub.add_argument(
        "--deadline", type=float, metavar="S", help="seconds a round waits for stragglers; default: always"
    )
    sub.add_argument("--absence", type=float, default=180.0, metavar="S", help="seconds a lost node may be away")
    sub.add_argument(
        "--min-clients", type=int, metavar="K", help="begin with so many if others do not join; default: all"
    )
    sub.add_argument("--min-replies", type=int, default=1, metavar="K", help="fewer good replies: again, then stop")


def main(argv: list[str]) -> int:
    """Carry out one command.

    Parameters
    ----------
    argv : list of str
        What stands behind `fedfuse deploy`.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    UserError
        If a word or its value is wrong.
    WorldError
        If what was asked for fails.
    """
    try:
        args, rest = parser().parse_known_args(argv)
    except SystemExit as end:
        return int(end.code or 0) if isinstance(end.code, int | None) else 2
    keys = [*getattr(args, "keys", []), *rest]
    if rest and (not hasattr(args, "keys") or any(word.startswith("-") for word in rest)):
        raise UserError(
            f"deploy {args.command}: {rest[0]}: no such word; fedfuse deploy {args.command} --help says which"
        )
    return COMMANDS[args.command](args, keys)


def _certs(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.certs import hand_out, write_certificates

    _at_least(0, args, "nodes")
    names = [*args.node, *(f"node-{i}" for i in range(args.nodes))]
    for path in write_certificates(args.directory, args.name, names, args.days, args.operator):
        print(path)
    hand_out(args.directory, args.server_to, args.operator_to, args.public_to)
    return 0


def _server(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.launch import follow, run_server

    follow(args.follow)
    _at_least(1, args, "quota")
    shared = os.environ.get("FEDFUSE_DATA")
    data = args.data if args.data is not None else [Path(shared)] if shared else []
    return run_server(
        host=args.host,
        port=args.port,
        certs=args.certs,
        state=args.state_dir,
        runs=args.runs,
        insecure=args.insecure,
        allow_code=args.allow_code,
        memory=_memory(args),
        control=(args.control_host or args.host, args.control_port or args.port + 1),
        quota=args.quota,
        data=data,
    )


def _memory(args: argparse.Namespace) -> int:
    """MB that a task's process may take: as said, else what the machine has."""
    if args.memory is not None and args.memory < 1024:
        raise UserError(f"--memory {args.memory}: at least 1024 MB are needed")
    return args.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20


def _node(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.launch import follow, run_node
    from fedfuse.network.policy import read_policy
    from fedfuse.network.site_config import SiteConfig

    follow(args.follow)
    _at_least(0, args, "client_id")
    if (args.partition is None) == (args.client_id is None):
        raise UserError("deploy node: one of --client-id I (own data) and --partition I/N (simulated) is needed")
    if not 0.05 <= args.poll <= 60:
        raise UserError(f"--poll {args.poll:g}: allowed are 0.05 to 60 seconds")
    client, clients = args.client_id, None
    if args.partition is not None:
        client, clients = _partition(args.partition)
    elif args.data is None:
        raise UserError("--client-id needs --data, the folder of this site's own data")
    if args.data is not None and not Path(args.data).is_dir():
        raise UserError(f"--data {args.data}: no such folder")
    policy = read_policy(args.policy)
    if clients is None:
        _ = policy.classes  # a policy without them is refused now, and not at the first message
    seat = SiteConfig(client, args.state_dir, clients, args.data, policy, device=args.device)
    return run_node(
        seat,
        server=args.server,
        ca=args.ca,
        key=args.key,
        insecure=args.insecure,
        port=args.port,
        no_key=args.no_key,
        poll=args.poll,
        memory=_memory(args),
    )


def _at_least(least: int, args: argparse.Namespace, *words: str) -> None:
    """Refuse numbers below the least; a word that was not said has none."""
    for word in words:
        value = getattr(args, word)
        if value is not None and not least <= value < math.inf:  # nor NaN
            raise UserError(f"--{word.replace('_', '-')} {value}: allowed is {least} or more")


def _partition(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
        raise UserError(f"--partition {text}: I/N with 0 ≤ I < N is needed, for example 0/3")
    return int(parts[0]), int(parts[1])


def _place(args: argparse.Namespace) -> dict[str, int]:
    """Which clients a command says a site may be, and how many examples it may have.

    Raises
    ------
    UserError
        If a value has another form than its command shows.
    """
    found: dict[str, int] = {}
    _at_least(0, args, "client_id")
    if args.partition is not None:
        found["client"], found["every"] = _partition(args.partition)
    elif args.client_id is not None:
        found["client"] = args.client_id
    if args.examples is not None:
        least, colon, most = args.examples.partition(":")
        if not (colon and least.isdecimal() and most.isdecimal() and int(least) <= int(most)):
            raise UserError(f"--examples {args.examples}: A:B with A ≤ B is needed, for example 100:5000")
        found["least"], found["most"] = int(least), int(most)
    return found


def _request(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.registration import write_request

    for path in write_request(args.directory, args.name, _place(args), args.out, args.passphrase):
        print(path)
    return 0


def _register(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.registration import register

    for which in args.which:
        print(register(_link(args), Path(which), _place(args)))
    return 0


def _unregister(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.registration import node_of

    link = _link(args)
    for which in args.which:
        print(link.flwr("supernode", "unregister", node_of(link, which), "fedfuse").strip())
    return 0


def _audit(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.network.audit import show

    return show(args.state_dir, args.head)


def _health(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.launch import greet, there

    if greet(args.server, None if args.insecure else there(args.ca, "--ca")):
        return 0
    raise WorldError(f"no server answers at {args.server}")


def _link(args: argparse.Namespace) -> Link:
    """The server's control address, as an operator reaches it."""
    from fedfuse.deploy.link import Link

    return Link(args.server, args.ca, args.insecure, args.operator)


def _order(args: argparse.Namespace, keys: list[str]) -> tuple[Order, Path]:
    """The order of a run, and the directory that it will be written to.

    Raises
    ------
    UserError
        If a key is wrong, or the directory holds something that may not be overwritten.
    """
    from fedfuse.config.compose import compose
    from fedfuse.deploy.submit import order_of
    from fedfuse.network.exchange import Patience
    from fedfuse.runs.experiment import default_out

    _at_least(0, args, "join", "deadline", "absence", "min_replies")
    _at_least(1, args, "min_clients")
    config = compose(keys)
    out = Path(config.out) if config.out else default_out(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not config.overwrite:
        raise UserError(f"out={out}: holds something already; choose another or say overwrite=true")
    patience = Patience(
        args.join, args.deadline, args.absence, args.min_replies, config.runtime.retries, args.min_clients
    )
    return order_of(config, patience, getattr(args, "own_data", False)), out


def _run(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.submit import submit

    order, out = _order(args, keys)
    with _leaving(out):
        return _told(submit(_link(args), order, out), out)


def _resume(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.submit import Order, submit

    with _leaving(args.directory):
        return _told(submit(_link(args), Order.read(args.directory), args.directory, resume=True), args.directory)


@contextmanager
def _leaving(out: Path) -> Iterator[None]:
    """Tell whoever stops watching by Ctrl-C that the run goes on, and how to fetch it."""
    try:
        yield
    except KeyboardInterrupt as end:
        told = f"a run that has begun goes on at the server; once it has ended: fedfuse deploy resume {out}"
        raise KeyboardInterrupt(told) from end


def _told(summary: dict[str, Any] | None, out: Path) -> int:
    """Print how a run ended, and return the exit code: 1 where its end was not seen."""
    if summary is None:
        print(f"fedfuse: the log ended before the run did; go on with: fedfuse deploy resume {out}")
        return 1
    print(f"{digest_line(summary)}\nrun directory: {out}")
    return 0


def _status(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.registration import sites

    link = _link(args)
    print(link.flwr("list", "fedfuse").strip())
    names = ("site", "clients", "node", "status", "since")
    lines = [names, *(tuple(one[name] or "–" for name in names) for one in sites(link))]
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # ids are there to be copied, so no line is cut at the screen's edge
        print("  ".join(word.ljust(width) for word, width in zip(line, wide, strict=True)).rstrip())
    return 0


def _stop(args: argparse.Namespace, keys: list[str]) -> int:
    print(_link(args).flwr("stop", args.run, "fedfuse").strip())
    return 0


def _local(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.local import play_locally

    order, out = _order(args, keys)
    return _told(play_locally(order, args.nodes, out, args.work, args.policy), out)


def _bench(args: argparse.Namespace, keys: list[str]) -> int:
    from fedfuse.deploy.bench import bench

    _at_least(1, args, "rounds", "blocks")
    return bench(args.rounds, args.blocks, args.out)


COMMANDS = {
    "certs": _certs,
    "server": _server,
    "node": _node,
    "health": _health,
    "request": _request,
    "register": _register,
    "unregister": _unregister,
    "audit": _audit,
    "run": _run,
    "resume": _resume,
    "status": _status,
    "stop": _stop,
    "local": _local,
    "bench": _bench,
}
