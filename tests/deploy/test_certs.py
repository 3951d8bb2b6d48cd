"""Certificates: what is made, what is kept, who may read it."""

from __future__ import annotations

import datetime
import socket
import ssl
import stat
import subprocess
import sys
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedfuse.deploy import launch
from fedfuse.deploy.certs import write_certificates
from fedfuse.deploy.commands import main as command
from fedfuse.deploy.processes import free_port
from fedfuse.errors import UserError, WorldError
from fedfuse.network.site_config import SiteConfig


def test_certs_are_made_once_and_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command(["certs", str(tmp_path / "c"), "--name", "server.example", "--name", "10.0.0.7", "--nodes", "2"]) == 0
    )
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert set(before) == {
        "ca.crt", "ca.key", "server.pem", "server.key", "node-0.key", "node-0.pub", "node-1.key", "node-1.pub",
    }  # fmt: skip
    for path in (tmp_path / "c").glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert command(["certs", str(tmp_path / "c"), "--node", "hospital-b"]) == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"hospital-b.key", "hospital-b.pub"}
    key = load_ssh_private_key(after["hospital-b.key"], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert load_ssh_public_key(after["hospital-b.pub"]) == key.public_key()


def test_a_key_is_private_where_a_file_of_its_name_was_not(tmp_path: Path) -> None:
    """The attack of an audit: an empty file of mode 644, made before, kept its mode with the key in it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    for name in ("ca.key", "server.key"):
        (tmp_path / name).touch(0o644)
    (tmp_path / "ann.pub").symlink_to(elsewhere)
    write_certificates(tmp_path, ["localhost"], ["ann"])
    for name in ("ca.key", "server.key", "ann.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        assert (tmp_path / name).stat().st_size > 0
    assert elsewhere.read_text() == ""


def test_the_server_certificate_names_the_server_and_verifies(tmp_path: Path) -> None:
    command(["certs", str(tmp_path), "--name", "server.example", "--name", "10.0.0.7"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes()))
    before = (tmp_path / "server.pem").read_bytes()
    command(["certs", str(tmp_path), "--name", "10.0.0.7"])
    with pytest.raises(UserError, match=r"--name other.example: .* is for server.example, 10.0.0.7, localhost, "):
        command(["certs", str(tmp_path), "--name", "other.example"])
    assert (tmp_path / "server.pem").read_bytes() == before


def test_a_server_whose_certificate_nobody_would_take_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starts(*replaced: str) -> None:
        for name in ("ca.crt", "server.pem", "server.key"):
            content = (tmp_path / ("b" if name in replaced else "a") / name).read_bytes()
            (tmp_path / name).write_bytes(content)
            (tmp_path / name).chmod(0o600)
        command(["server", "--certs", str(tmp_path), "--state-dir", str(tmp_path / "s"), "--port", "0"])

    for name in ("a", "b"):
        write_certificates(tmp_path / name, [], [], days=2)
    for replaced, why in (
        ((), r"--port 0: "),  # the next question
        (("ca.crt",), r"server.pem is not signed by .*ca.crt\Z"),
        (("server.key",), r"server.key is not the key of .*server.pem\Z"),
        (("server.pem", "server.key"), "is not signed by"),
    ):
        with pytest.raises(UserError, match=why):
            starts(*replaced)
    both = (tmp_path / "b" / "ca.crt").read_bytes() + (tmp_path / "a" / "ca.crt").read_bytes()
    (tmp_path / "a" / "ca.crt").write_bytes(both)  # while a CA is changed for another
    with pytest.raises(UserError, match="--port 0"):
        starts()

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(days=3)

    monkeypatch.setattr("fedfuse.deploy.certs.datetime", SimpleNamespace(datetime=Later, UTC=datetime.UTC))
    with pytest.raises(UserError, match=r"server.pem holds from .* to .* UTC, and here it is [^\n]*\Z"):
        starts()
    assert not (tmp_path / "s").exists()


def test_a_port_in_use_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second node on the first one's port ended in a traceback, after it had taken the first one's place."""
    monkeypatch.setattr("fedfuse.deploy.launch.greet", lambda server, ca: True)
    state = ["--state-dir", str(tmp_path / "s")]
    write_certificates(tmp_path, [], [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = str(taken.getsockname()[1]), str(free_port())
        server = ["server", "--certs", str(tmp_path), "--host", "127.0.0.1", *state]
        for words, why in (
            (
                ["node", "--insecure", "--partition", "0/1", "--port", port, *state],
                f"--port {port}: cannot be listened",
            ),
            ([*server, "--port", port], f"--port {port}: cannot be listened"),
            ([*server, "--port", free, "--control-port", port], f"--control-port {port}: cannot be listened"),
            ([*server, "--port", free, "--control-port", free], f"--control-port {free}: is --port too"),
            ([*server, "--port", "70000"], "--port 70000: allowed are 1 to 65535"),
        ):
            with pytest.raises(UserError, match=why):
                command(words)
    assert not (tmp_path / "s").exists()


def test_a_folder_is_one_processes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedfuse.deploy.launch.greet", lambda server, ca: True)
    holder = (
        "import sys; from pathlib import Path; from fedfuse.deploy.launch import _home\n"
        "_home(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", holder, str(tmp_path / "s")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
        node = [
            "node",
            "--insecure",
            "--partition",
            "0/1",
            "--state-dir",
            str(tmp_path / "s"),
            "--port",
            str(free_port()),
        ]
        with pytest.raises(UserError, match="another server or node is running on it"):
            command(node)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
        first.kill()
    monkeypatch.setattr("fedfuse.deploy.launch._become", lambda *_: 0)
    monkeypatch.setattr("fedfuse.deploy.launch._executor", lambda *_: None)
    monkeypatch.setattr("fedfuse.compat.flower_processes.be_patient", lambda *_: None)
    assert command(node) == 0  # the kernel has let go of a killed one's folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["certs", "{}", "--node", "../x"], "--node"),
        (["certs", "{}", "--days", "0"], "--days"),
        (["certs", "{}", "--days", "99999999"], "--days"),
        (["certs", "{}", "--name", ""], "--name"),
        (["server", "--state-dir", "{}"], "--certs"),
        (["server", "--state-dir", "{}", "--certs", "{}"], "ca.crt: no such file"),
        (["node", "--state-dir", "{}"], "one of --client-id"),
        (["node", "--state-dir", "{}", "--partition", "3/3"], "0/3"),
        (["node", "--state-dir", "{}", "--client-id", "0"], "--data"),
        (["node", "--state-dir", "{}", "--client-id", "0", "--data", "{}"], "no such folder"),
        (["node", "--state-dir", "{}", "--partition", "0/3"], "--ca is needed"),
        (["run", "rounds=2"], "--ca is needed unless --insecure is given"),
        (["run", "--ca", "{}", "nothing=2"], "nothing"),
        (["resume", "{}"], "not the directory of a run"),
        (["local", "--nodes", "0", "rounds=1"], "--nodes 0"),
        (["local", "--join", "-1", "rounds=1"], "--join -1.0: allowed is 0 or more"),
        (["local", "--absence", "nan", "rounds=1"], "--absence nan"),
        (["local", "--min-clients", "0", "rounds=1"], "--min-clients 0: allowed is 1 or more"),
        (["certs", "{}", "--nodes", "-1"], "--nodes -1: allowed is 0 or more"),
        (["request", "{}", "a", "--client-id", "-3"], "--client-id -3: allowed is 0 or more"),
        (["status", "--what"], "--what"),
        (["health"], "--ca is needed"),
        (["health", "--ca", "{}"], "--ca"),
    ],
)
def test_a_wrong_command_is_one_line(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\A[^\n]+\Z") as error:
        command([word.replace("{}", str(tmp_path / "d")) for word in words])
    assert reason in str(error.value)


@pytest.mark.parametrize(("seconds", "words"), [(400, "400 s ahead of"), (-301, "301 s behind")])
def test_a_clock_that_flower_would_refuse_without_a_word_is_named(
    seconds: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_certificates(tmp_path, [], ["a"])
    seat = SiteConfig(0, tmp_path / "state", 1)
    now = 1_800_000_000.0

    def joins(ahead: float, date: str | None = formatdate(now, usegmt=True)) -> None:
        headers = {} if date is None else {"date": date}
        monkeypatch.setattr("httpx.get", lambda url, **more: httpx.Response(401, headers=headers))
        monkeypatch.setattr("fedfuse.deploy.launch.greet", lambda server, ca: True)
        monkeypatch.setattr("time.time", lambda: now + ahead)
        launch.run_node(seat, server="s.org:8000", ca=tmp_path / "ca.crt", key=None, insecure=False, port=1)

    with pytest.raises(WorldError) as told:
        joins(seconds)
    assert str(told.value) == (
        f"this machine's clock is {words} the server's at s.org:8000; over 240 s are refused there: "
        "set it (NTP), then start again"
    )
    assert not (tmp_path / "state").exists()
    for ahead, date in ((239, formatdate(now)), (-239, formatdate(now)), (9999, None), (9999, "yesterday")):
        with pytest.raises(UserError, match="--key FILE is needed"):  # it goes on to the next question
            joins(ahead, date)
