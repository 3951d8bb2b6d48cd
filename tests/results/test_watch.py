"""`fedfuse watch`: what it answers, what it refuses, and a live run seen in a browser."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from starlette.testclient import TestClient
from synthetic import write_run, write_sweep

from fedfuse.errors import UserError
from fedfuse.results import watch
from fedfuse.results.run_data import load

FEDFUSE = [sys.executable, "-c", "import sys; from fedfuse.cli import main; sys.exit(main())"]


@pytest.fixture
def client(tmp_path):
    write_sweep(tmp_path, ["local", "knfu"], 2)
    write_run(tmp_path / "late", "fedavg", rounds=9, done=3)
    return TestClient(watch.application([tmp_path]), base_url="http://127.0.0.1")


def test_strip_and_body(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "connect-src &#39;self&#39;" in page.text
    strip = client.get("/live")
    assert "status-interrupted" in strip.text
    assert "3 of 9" in strip.text
    assert "Clients of late" in strip.text
    # who is under way stands first, and once; then those that have finished
    assert re.findall(r"status-(\w+)", strip.text) == ["interrupted"] + ["finished"] * 4
    body = client.get("/body")
    assert body.headers["X-Version"] == strip.headers["X-Version"]
    assert body.text.count("<svg") >= 7
    assert body.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/live", "/body"])
def test_read_only(client, path):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, path).status_code == 405
    assert client.get("/../config.yaml").status_code == 404


def test_other_names_are_refused(client):
    assert client.get("/body", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/live", headers={"Host": "localhost:8642"}).status_code == 200


def test_an_address_of_version_6_is_served(tmp_path):
    """Starlette reads `[::1]:8000` as the host `[`."""
    client = TestClient(watch.application([tmp_path], "::1"))
    assert client.get("/", headers={"Host": "[::1]:8642"}).status_code == 200
    assert client.get("/", headers={"Host": "evil.example:8642"}).status_code == 400


def test_version_moves_with_the_run(tmp_path):
    path = write_run(tmp_path / "a", rounds=9, done=3)
    seen = watch.Watch([tmp_path])
    first = seen.look()[2]
    (path / "checkpoint" / "round.json").write_text('{"round": 2, "rounds": 9, "run_id": "a"}')
    time.sleep(0.6)  # it looks twice a second at most
    assert seen.look()[2] != first
    with open(path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load(path).status == "running"


def test_empty_directory_and_torn_files(tmp_path):
    client = TestClient(watch.application([tmp_path]), base_url="http://127.0.0.1")
    assert "No run here yet" in client.get("/live").text
    assert client.get("/body").status_code == 200
    path = write_run(tmp_path / "a", rounds=9, done=3)
    (path / "checkpoint" / "rows" / "metrics-000002.parquet").write_bytes(b"torn")
    time.sleep(2.2)  # a body is made every two seconds at most
    assert client.get("/live").status_code == 200
    assert "corrupt" in client.get("/body").text


def test_hostile_names(tmp_path):
    write_run(tmp_path / "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", rounds=9, done=3)
    client = TestClient(watch.application([tmp_path]), base_url="http://127.0.0.1")
    for path in ("/live", "/body"):
        text = client.get(path).text
        assert "<img" not in text
        assert "<script" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "needs at least one"),
        (["/no/such/place"], "no such directory"),
        ([".", "--nope"], "--nope: unknown"),
        ([".", "--port", "x"], "0 to 65535"),
        ([".", "--port"], "needs a value"),
        ([".", "--host", "203.0.113.1"], "cannot be used"),
    ],
)
def test_wrong_words(words, says):
    with pytest.raises(UserError, match=says):
        watch.command(words)


TOKEN = "t0ken" * 9


@pytest.fixture
def far(tmp_path):
    """What another machine sees: `--host 0.0.0.0`."""
    write_run(tmp_path / "late", "fedavg", rounds=9, done=3)
    app = watch.application([tmp_path], "0.0.0.0", TOKEN)
    return TestClient(app, base_url="http://192.0.2.7:8642", follow_redirects=False)


CLOSED = ("/", "/live", "/body", "/docs", "/openapi.json", "/redoc", "/../config.yaml", "/late/config.yaml")


def test_without_the_token_nothing_is_read(far):
    wrong = ("", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é", "\ud800", "%00")
    for path in CLOSED:
        for token in wrong:
            answers = [
                far.get(path),
                far.get(path, params={"token": token}) if token != "\ud800" else far.get(path + "?token=%ed%a0%80"),
                far.get(path, headers={"Cookie": f"{watch.COOKIE}={token}".encode("utf-8", "replace")}),
                far.post(path, params={"token": TOKEN[1:]}),
            ]
            for answer in answers:
                assert answer.status_code == 401, (path, token)
                assert "late" not in answer.text
                assert "set-cookie" not in answer.headers


def test_the_token_is_asked_once_and_then_there_is_a_page(far):
    answer = far.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert far.get("/").status_code == 200
    assert "3 of 9" in far.get("/live").text
    for path in ("/docs", "/openapi.json", "/redoc", "/late/config.yaml"):
        assert far.get(path).status_code == 404
    assert TOKEN not in far.get("/").text + far.get("/live").text + far.get("/body").text


def test_no_page_of_others_can_be_served_without_a_token(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org", "::ffff:0.0.0.0"):
        with pytest.raises(UserError, match="nobody is asked for a token"):
            watch.application([tmp_path], host)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        watch.application([tmp_path], host)


def test_loopback_needs_no_login_and_has_no_other_pages(client):
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404


def test_a_server_for_all_addresses_prints_its_token(tmp_path):
    import httpx

    write_run(tmp_path / "late", "fedavg", rounds=9, done=3)
    words = [*FEDFUSE, "watch", str(tmp_path), "--host=0.0.0.0", "--port=0"]
    serving = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        found = re.search(r"http://0\.0\.0\.0:(\d+)/\?token=([\w-]{43}) ", serving.stdout.readline())
        assert found is not None
        home = f"http://127.0.0.1:{found[1]}/"
        with httpx.Client(follow_redirects=True, transport=httpx.HTTPTransport(retries=20)) as reader:
            assert reader.get(home + "live").status_code == 401
            assert reader.get(home, params={"token": found[2]}).url == home
            assert "3 of 9" in reader.get(home + "live").text
    finally:
        serving.terminate()
        said = serving.communicate(timeout=20)[0]
    assert found[2] not in said  # no log of what was asked


def test_loopback_by_default():
    assert watch.arguments(["."])[1] == "127.0.0.1"


def test_live_run_in_a_browser(tmp_path):
    """The round counter moves; a killed run is shown as interrupted; nothing is asked of anybody else."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("FEDFUSE_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    from test_browser import ARGUMENTS

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["strategy=fedavg", "data=digits", "clients=5", "rounds=100000", "runtime=inline", f"out={tmp_path}/live"]
    serving = subprocess.Popen(
        [*FEDFUSE, "watch", str(tmp_path), "--port=0"], stdout=subprocess.PIPE, text=True, env=environment
    )
    running = subprocess.Popen([*FEDFUSE, "run", *words], stdout=subprocess.DEVNULL, env=environment)
    try:
        assert serving.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", serving.stdout.readline())
        assert found is not None
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            complaints, asked = [], []
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(found[0])
            page.wait_for_selector("#live .status-running", timeout=120_000)
            page.wait_for_selector("#page figure svg", timeout=120_000)
            counter = "parseInt(document.querySelector('#live .round').textContent)"
            first = page.evaluate(counter)
            deadline = time.monotonic() + 30  # the page's policy forbids Playwright's own waiting for an expression
            while page.evaluate(counter) <= first:
                assert time.monotonic() < deadline
                page.wait_for_timeout(200)
            page.locator("#live summary").click()
            os.kill(running.pid, signal.SIGKILL)
            page.wait_for_selector("#live .status-interrupted", timeout=60_000)
            assert page.evaluate("document.querySelector('#live details').open")
            kept = os.environ.get("FEDFUSE_SCREENSHOTS")
            page.screenshot(path=f"{kept or tmp_path}/watch.png", full_page=True)
            assert complaints == []
            assert all(url.startswith((found[0], "data:")) for url in asked)
            browser.close()
    finally:
        for process in (running, serving):
            process.kill()
            process.wait()
