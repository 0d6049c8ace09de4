"""A person opens the sampler in JupyterLab, presses buttons quickly, drags a slider and chooses a model."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pw = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
ROOT = Path(__file__).parents[1]
pw.expect.set_options(timeout=120_000)
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A Lab server on a copy of the notebooks, with its own settings and no news pop-up."""
    work = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", work / "nbs", ignore=shutil.ignore_patterns(".*", "_*"))
    settings = work / "_settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    port = free_port()
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(work / "_settings"), "JUPYTER_CONFIG_DIR": str(work / "_config"),
           "JUPYTERLAB_WORKSPACES_DIR": str(work / "_workspaces"), "IN_TEST": "1"}
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
           f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=test",
           f"--ServerApp.root_dir={work / 'nbs'}", "--LabApp.expose_app_in_browser=True"]
    with (work / "server.log").open("wb") as log:
        server = subprocess.Popen(cmd, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=test", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (work / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab):
    with pw.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=os.geteuid() != 0)
        page = browser.new_page(viewport={"width": 1200, "height": 1400})
        page.set_default_timeout(120_000)
        yield page
        browser.close()


def wait_idle(page):
    page.wait_for_function("""() => {
        const p = window.jupyterapp && window.jupyterapp.shell.currentWidget;
        return p && p.sessionContext && p.sessionContext.session?.kernel?.status === 'idle'; }""")



def picture(live):
    """The bytes that the browser shows."""
    return bytes(live.locator("img").first.evaluate("async img => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"))


def test_the_sampler(lab, page, tmp_path_factory):
    page.goto(f"{lab}/lab/tree/52_widgets.ipynb?reset&token=test")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    wait_idle(page)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    live = page.locator(".jp-OutputArea-output", has=page.locator("button", has_text="New seed"))
    live.scroll_into_view_if_needed()
    says = lambda *words: [pw.expect(live.locator(".widget-label", has_text=w)).to_be_visible() for w in words]  # noqa: E731
    seed = live.locator("input[type=number]").first
    says("n=8 seed=0")
    first = picture(live)
    assert first.startswith(b"\x89PNG")

    for _ in range(5):
        live.get_by_role("button", name="New seed").click()
    says("n=8 seed=5")
    fifth = picture(live)
    assert fifth != first
    for value, expected in ("0", first), ("5", fifth):  # the same seeds, slowly: the same pictures
        seed.fill(value)
        seed.press("Enter")
        says(f"n=8 seed={value}")
        assert picture(live) == expected

    live.get_by_role("button", name="Same seed, other temperature").click()
    says("seed=5 temperature=1.5")
    assert picture(live) != fifth

    slider = live.locator(".noUi-handle").first
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    live.get_by_role("button", name="New seed").click()
    says("n=11 seed=6")
    assert live.locator("img").count() == 1 and page.locator("text=Traceback").count() == 0
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    shots = Path(os.environ.get("SHOTS", tmp_path_factory.getbasetemp()))
    live.screenshot(path=str(shots / "sampler.png"))
    page.screenshot(path=str(shots / "lab.png"))
    assert (shots / "sampler.png").stat().st_size > 20_000
