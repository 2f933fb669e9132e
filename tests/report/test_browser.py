"""The page in a real browser: no console messages, no requests, phone width, light and dark, on paper."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from nestify.file.class_accuracy import ClassAccuracy, LevelClasses, SavedAccuracy
from nestify.report.html.page import html_page
from tests.report import reports

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

ACCURACY = ClassAccuracy(
    header_sha256="ab" * 32,
    data="photos/" + "a-long-name" * 10,
    date="2026-01-31T12:00:00Z",
    levels=[
        LevelClasses(level=1, name="level1", images=[1_000_000, 5], correct=[999_999, 0]),
        LevelClasses(level=2, name="level2", images=[2, 3, 0, 3], correct=[2, 3, 0, 0]),
    ],
)
PAGES = {
    "classes": html_page(
        reports.with_classes(), history=reports.history(2), evaluated=SavedAccuracy(ACCURACY)
    ),
    "hostile": html_page(reports.hostile()),
    "large": html_page(reports.large()),
}
PHONE = 360
"""Width of a phone's window, in pixels."""
MEASURE = """
for (const frame of document.querySelectorAll("iframe")) {
  frame.contentDocument.querySelectorAll("details").forEach(part => part.open = true);
}
const frames = [...document.querySelectorAll("iframe")];
const widths = frames.map(frame => frame.contentDocument.documentElement.scrollWidth);
const cells = frames.map(frame => frame.contentDocument.querySelectorAll("#levels td[data-title='top-1 %']"));
const ends = cells.map(found => [...found].map(cell => Math.ceil(cell.getBoundingClientRect().right)));
document.getElementById("widths").textContent = JSON.stringify([widths, ends]);
"""


def browse(folder: Path, address: str, *options: str) -> tuple[str, str]:
    """Open an address without a window; return standard output and standard error."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-sandbox", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-proxy-server"]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", *options, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


@contextmanager
def served(page: str) -> Iterator[tuple[int, list[str]]]:
    """Serve one page; yields the port and the list of requested addresses."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Host']}{self.path}")
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def seen(folder: Path, page: str) -> tuple[list[str], list[str]]:
    """Return the lines of the console, and the requested addresses of servers below `.test`."""
    with served(page) as (port, asked):
        _, log = browse(
            folder,
            "http://report.test/page",
            *("--enable-logging=stderr", "--v=0", "--dump-dom"),
            f"--host-resolver-rules=MAP *.test 127.0.0.1:{port}",
        )
    return [line for line in log.splitlines() if "CONSOLE" in line], asked


@pytest.mark.parametrize("name", ["classes", "hostile", pytest.param("large", marks=pytest.mark.long)])
def test_no_console_messages_and_no_requests(name: str, tmp_path: Path) -> None:
    assert seen(tmp_path, PAGES[name]) == ([], ["report.test/page"])


def test_scripts_and_requests_would_be_noticed(tmp_path: Path) -> None:
    markup = "</h1><script>alert(1)</script><img src='http://x.test/image'>"
    changed = PAGES["classes"].replace("</h1>", markup)
    console, asked = seen(tmp_path, changed)
    assert len(console) == 2  # the policy blocks both
    assert asked == ["report.test/page"]
    without = re.sub(r"<meta http-equiv[^>]*>", "", changed).replace("<script>alert(1)</script>", "")
    assert "x.test/image" in seen(tmp_path, without)[1]


def test_it_fits_a_phone(tmp_path: Path) -> None:
    wide = "<!DOCTYPE html><p style='width:700px'>wide"
    frames = [
        f'<iframe style="width:{PHONE}px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page in (*PAGES.values(), wide)
    ]
    wrapper = tmp_path / "wrapper.html"
    script = f"<pre id=widths></pre><script>onload = () => {{{MEASURE}}}</script>"
    wrapper.write_text(f"<!DOCTYPE html>{''.join(frames)}{script}")
    shown, _ = browse(tmp_path, wrapper.as_uri(), "--dump-dom", "--window-size=1000,4000")
    found = re.search(r'<pre id="widths">(.*?)</pre>', shown)
    assert found
    [*widths, control], [*ends, _] = json.loads(html.unescape(found[1]))
    assert widths == [PHONE] * len(PAGES)
    assert control > PHONE
    assert [len(cells) for cells in ends] == [2, 2, 12]
    assert max(map(max, ends)) <= PHONE  # top-1 of every level is visible without scrolling sideways


def test_light_and_dark(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(PAGES["classes"])
    corners = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        options = f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={scheme}"
        browse(tmp_path, page.as_uri(), *options, "--window-size=800,600")
        corners.append(Image.open(picture).convert("RGB").getpixel((2, 2)))
    assert corners == [(0xFF, 0xFF, 0xFF), (0x14, 0x17, 0x1B)]


def test_on_paper(tmp_path: Path) -> None:
    pages = {}
    for name in ("classes", "large"):
        page, printed = tmp_path / f"{name}.html", tmp_path / f"{name}.pdf"
        page.write_text(PAGES[name])
        browse(tmp_path, page.as_uri(), f"--print-to-pdf={printed}", "--no-pdf-header-footer")
        content = printed.read_bytes()
        pages[name] = len(re.findall(rb"/Type /Page\b", content))
        [(width, height)] = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content))
        assert (float(width), float(height)) == pytest.approx((595.3, 841.9), abs=1)  # A4, in points
    assert 1 <= pages["classes"] <= 4
    assert pages["large"] > 5  # all of the 400 layers, not only those that a window shows
