"""The report as a browser shows it: wide and narrow, light and dark, nothing missing, cut off or complained about."""

import json
import re
import shutil
import subprocess

import pytest

from codesign import report, rundir
from tests.test_report import RESULT

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--allow-file-access-from-files",
    "--virtual-time-budget=5000",
)  # fmt: skip
# Scripts are forbidden inside the report, so a page around it measures; a frame can be narrower than a window.
FRAME = """\
<!DOCTYPE html><iframe id="frame" src="report.html" width="{width}" height="900" style="border: 0"></iframe><pre id="out"></pre>
<script>
document.getElementById("frame").onload = event => {{
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const style = view.getComputedStyle(page.body);
  document.getElementById("out").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    ink: style.color, paper: style.backgroundColor,
    figures: [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect()).map(box => [box.width, box.height]),
  }});
}};
</script>
"""


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)".

    Source: Web Content Accessibility Guidelines 2.1, "relative luminance".
    """
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    rundir.write_result(directory, RESULT)
    report.write_report(directory)
    return directory


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_report_in_chromium(page, tmp_path, width, dark):
    frame = page / f"frame-{width}-{dark}.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [
        CHROMIUM,
        *FLAGS,
        scheme,
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        f"--window-size={width + 100},900",
    ]
    shown = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    seen = json.loads(re.search(r'<pre id="out">(.*?)</pre>', shown.stdout, re.DOTALL)[1])
    assert seen["width"] <= width  # nothing makes the page scroll sideways
    assert len(seen["figures"]) == len(RESULT["figures"])
    assert all(w > min(350, 0.8 * width - 20) and h > 80 for w, h in seen["figures"])
    ink, paper = luminance(seen["ink"]), luminance(seen["paper"])
    assert (paper < ink) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # contrast of level AAA
