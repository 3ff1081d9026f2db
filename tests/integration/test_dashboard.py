"""What ``psl-flower run --dashboard`` shows in a browser while the run goes on, and that nothing of it stays."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flower_runs import processes, wait_until

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,1700",
    "--virtual-time-budget=30000",
    "--dump-dom",
]


def seen_in_a_browser(url, profile):
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium, chromium-browser or google-chrome")
def test_a_browser_shows_the_run_while_it_goes_on_and_the_page_ends_with_it(tmp_path):
    home, log = tmp_path / "home", tmp_path / "log"
    command = [sys.executable, "-m", "psl_flower", "run", str(ROOT), "--dashboard", "--num-supernodes", "2"]
    command += ["--home", str(home), "-c", f"num-server-rounds=100000 output-dir='{home / 'out'}'"]
    with log.open("w") as out:
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Dashboard: " in log.read_text(), 300, log.read_text)
        wait_until(lambda: "round 3/" in log.read_text(), 300, log.read_text)
        url = re.search(r"Dashboard: (http://127\.0\.0\.1:\d+/\S+)", log.read_text())[1]
        # the page that the address opens is made of shadow roots, whose content is not in what a browser prints
        page = seen_in_a_browser(url.replace("#custom_scalars", "#timeseries"), tmp_path / "browser")
        assert launcher.poll() is None
    finally:
        launcher.terminate()
        launcher.wait(120)
    shown = {text.strip() for text in re.findall(r">([^<>]+)<", page)}
    assert {"now", "time", "slowest", "train_step", "train_metrics_clientapp", "evaluate_metrics_serverapp"} <= shown
    assert any(re.fullmatch(r"0\.\d{4}", text) for text in shown)  # a value below its curve
    wait_until(lambda: not processes(home), 120, lambda: f"the end of {processes(home)}")
    assert "To look at it again: tensorboard --logdir" in log.read_text()
