"""`deploy server` and `deploy node`: Flower's SuperLink and SuperNode with our executor beside each."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

from fedfuse.compat import flower_processes, superlink_doors
from fedfuse.compat.flower_log import in_one_line
from fedfuse.config.files import opened as opened_file
from fedfuse.deploy.certs import _write as write_private
from fedfuse.deploy.certs import check_server, secret
from fedfuse.deploy.doors import serve
from fedfuse.deploy.passphrase import opened
from fedfuse.deploy.processes import ALLOW_CODE, FOLDERS, KEYED, POST, RUNS, SURROUNDINGS, free_port
from fedfuse.deploy.quota import sites_door
from fedfuse.errors import UserError, WorldError
from fedfuse.network.site_config import MEMORY, SiteConfig

END = 20.0  # seconds that a process has to end by itself when its executor has
SKEW = 240  # seconds between clocks; Flower refuses signatures that are 300 s old, without a word of why
LOOK = {"client": "0.1", "server": "0.5"}  # seconds between an executor's looks for a task; Flower's own: 1


@contextmanager
def _writing(state: Path) -> Iterator[None]:
    """Say in a line what a disk does not let this process begin with."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--state-dir {state}: cannot be written ({error.strerror or error})") from error


def _home(state: Path, **more: str) -> None:
    """Prepare this process to become one of Flower's, and hold the folder against a second one."""
    with _writing(state):
        (state / "flwr").mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
        lock = opened_file(
            state / "lock", os.O_RDWR | os.O_CREAT
        )  # never closed: the kernel lets go of it on any death
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"--state-dir {state}: another server or node is running on it") from error
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    os.environ.update({"FLWR_HOME": str(state.resolve() / "flwr"), **more})


def _become(command: str, words: list[str], entry: Callable[[], None]) -> int:
    """Turn this process into a Flower command; its parents and signals see one process."""
    sys.argv = [command, *words]
    in_one_line()
    node = "--superlink" in words
    try:
        entry()
    except SystemExit as end:
        if node and end.code:
            print(
                "fedfuse: the server did not take this node; its key must be registered there and not revoked "
                "(fedfuse deploy register NAME.request), nor in use by another node that is running",
                flush=True,
            )
        return int(end.code or 0) if isinstance(end.code, int | None) else 1
    if not node:
        return 0
    print("fedfuse: the connection was lost for good; this node ends, to be started again", flush=True)
    threading.Timer(5.0, os._exit, [1]).start()  # Flower's own threads would keep it half alive
    return 1


def _executor(kind: str, address: str, tls: list[str], secret: Path) -> None:
    """Start our executor; it ends when this process does, and this process when it does."""
    words = [sys.executable, "-m", "fedfuse.deploy.executor", kind, "--runtime-api-address", address, *tls]
    words += ["--parent-pid", str(os.getpid()), "--superexec-auth-secret-file", str(secret)]
    child = subprocess.Popen(words, env={"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": LOOK[kind], **os.environ})

    def watch() -> None:
        child.wait()
        print(f"fedfuse: the executor ended (exit code {child.returncode}); so does this process", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END)
        os._exit(1)  # nothing here does any work without it: to be started again

    threading.Thread(target=watch, daemon=True).start()


def follow(parent: int | None) -> None:
    """End this process when another one (who started it) ends."""
    if parent is not None:
        flower_processes.end_with(parent)


def _secret(state: Path) -> Path:
    """A new secret shared by a Flower process and our executor beside it: no one else on the machine gets tasks."""
    with _writing(state):
        return write_private(state / "executor.secret", secrets.token_bytes(32), secret=True)


def unused(flag: str, host: str, port: int) -> None:
    """Look whether a port can be listened at, before anything is written or anybody signed off.

    Raises
    ------
    UserError
        If it cannot.
    """
    if not 0 < port < 2**16:
        raise UserError(f"{flag} {port}: allowed are 1 to {2**16 - 1}")
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: a port just left is free
            probe.bind(place)
    except OSError as error:
        raise UserError(f"{flag} {port}: cannot be listened at on {host} ({error.strerror or error})") from error


def there(path: Path | None, flag: str) -> Path:
    """A file that a flag names, in full.

    Raises
    ------
    UserError
        If the flag was not said, or no such file is there.
    """
    if path is None or not path.is_file():
        raise UserError(f"{flag} is needed" if path is None else f"{flag} {path}: no such file")
    return path.resolve()


def run_server(
    *,
    host: str,
    port: int,
    certs: Path | None,
    state: Path,
    runs: Path,
    insecure: bool,
    allow_code: bool,
    memory: int,
    control: tuple[str, int],
    quota: int,
    data: Sequence[Path],
) -> int:
    """Be the SuperLink, with TLS, node authentication and a port of their own for operators unless `insecure`.

    Raises
    ------
    UserError
        If certificates are missing or no good, a port is in use, or a directory cannot be written or is in use.
    """
    if insecure:
        tls, executor_tls = ["--insecure"], ["--insecure"]
    elif certs is None:
        raise UserError("--certs DIR is needed (fedfuse deploy certs DIR makes them), or an explicit --insecure")
    else:
        ca, pem, key = (there(certs / name, "--certs") for name in ("ca.crt", "server.pem", "server.key"))
        tls = ["--ssl-ca-certfile", str(ca), "--ssl-certfile", str(pem), "--ssl-keyfile", str(key)]
        tls.append("--enable-supernode-auth")
        executor_tls = ["--root-certificates", str(ca)]
        secret(key, "--certs")
        check_server(ca, pem, key)
    unused("--port", host, port)
    if not insecure:
        if control[1] == port:
            raise UserError(f"--control-port {port}: is --port too; sites and operators need one each")
        unused("--control-port", *control)
    post = state.resolve() / "post"
    told = {POST: str(post), KEYED: str(int(not insecure)), RUNS: str(runs.resolve())}
    told[FOLDERS] = json.dumps([str(folder.expanduser().resolve()) for folder in data])
    _home(state, **told, **{ALLOW_CODE: str(int(allow_code)), MEMORY: str(memory)})
    with _writing(state):
        post.mkdir(mode=0o700, exist_ok=True)
    near, shared = free_port(), _secret(state)
    sites = partial(sites_door, quota=quota)
    doors = partial(serve, control=control, near=near, ca=None if insecure else ca, post=post, sites=sites)
    superlink_doors.open_doors(doors)
    from fedfuse.compat.superlink_store import believe_contents  # imports Flower: not where nodes are started

    believe_contents()
    _executor("server", f"127.0.0.1:{near}", executor_tls, shared)
    words = [*tls, "--host", host, "--port", str(port), "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(shared), "--disable-runtime-dependency-installation"]
    words += ["--database", str(state.resolve() / "link.db")]
    return _become("flower-superlink", words, flower_processes.superlink())


def greet(server: str, ca: Path | None) -> bool:
    """Look whether the server speaks as this node was told, so that a refusal has a name; False if it is silent.

    Raises
    ------
    WorldError
        If the certificate is not the CA's, or one side speaks TLS and the other does not.
    """
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal():
        raise UserError(f"--server {server}: HOST:PORT is needed")
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    if ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain, server_hostname=host):
            secure = True
    except ssl.SSLCertVerificationError as error:
        raise WorldError(f"--ca {ca}: does not vouch for the server at {server}: {error.verify_message}") from error
    except ssl.SSLEOFError:
        return False  # a relay or balancer took the call, with no server behind it yet
    except ssl.SSLError as error:
        secure = False
        if ca is not None:
            raise WorldError(f"the server at {server} does not speak TLS ({error.reason}); nothing was sent") from error
    except OSError:
        return False
    if secure and ca is None:
        raise WorldError(f"the server at {server} speaks TLS only; --insecure is refused there")
    return True


def skew(server: str, ca: Path) -> float:
    """Seconds by which this machine's clock is ahead of the server's; 0 if it does not say."""
    import httpx

    try:
        answer = httpx.get(f"https://{server}/health", verify=ssl.create_default_context(cafile=str(ca)), timeout=10)
        return time.time() - parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (httpx.HTTPError, KeyError, ValueError):
        return 0.0


def broken_off(error: BaseException) -> bool:
    """Whether a connection ended in the midst of TLS; a refused certificate is something else."""
    return "EOF" in str(error) and "CERTIFICATE" not in str(error)


def run_node(
    seat: SiteConfig,
    *,
    server: str,
    ca: Path | None,
    key: Path | None,
    insecure: bool,
    port: int,
    no_key: bool = False,
    poll: float = 1.0,
    memory: int | None = None,
) -> int:
    """Be a SuperNode for one seat, which asks for work every `poll` seconds.

    Raises
    ------
    UserError
        If certificates are missing, the port is in use, or a directory cannot be written or is in use.
    """
    ca = None if insecure else there(ca, "--ca")
    if not greet(server, ca):
        print(f"fedfuse: nobody answers at {server} yet; trying on", flush=True)
    elif ca is not None and abs(ahead := skew(server, ca)) > SKEW:
        side = "ahead of" if ahead > 0 else "behind"
        raise WorldError(
            f"this machine's clock is {abs(ahead):.0f} s {side} the server's at {server}; over {SKEW} s are refused "
            "there: set it (NTP), then start again"
        )
    if ca is None:
        words = ["--insecure"]
    else:
        words = ["--root-certificates", str(ca)]
        if key is not None:
            key = opened(key, "--key")
            words += ["--auth-supernode-private-key", str(key)]
        elif not no_key:
            raise UserError("--key FILE is needed (fedfuse deploy certs DIR --node NAME makes it)")
    unused("--port", "127.0.0.1", port)
    state = seat.state
    _home(state, **{"FEDFUSE_SEAT": str(state.resolve() / "seat.json"), MEMORY: str(memory or "")})
    if seat.data is not None:
        seat = replace(seat, data=str(Path(seat.data).resolve()))
    seat = replace(seat, state=state.resolve() / "runs")
    with _writing(state):
        write_private(state / "seat.json", seat.as_json().encode(), secret=True)
    if ca is not None and key is not None:
        from fedfuse.deploy.successor import succeed

        succeed(server, ca, key, state)
    shared = _secret(state)
    flower_processes.be_patient(poll, broken_off)
    _executor("client", f"127.0.0.1:{port}", ["--insecure"], shared)
    words += ["--superlink", server, "--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
    words += ["--superexec-auth-secret-file", str(shared)]
    code = _become("flower-supernode", words, flower_processes.supernode())
    if ca is not None and key is not None and code == 0:
        from fedfuse.deploy.successor import revoked

        if revoked(server, ca, key, state):
            print("fedfuse: the server does not know this node's key any more: it was revoked", flush=True)
            return 1
    return code
