"""A page in headless Chromium, for tests.

Chromium's window is at least 500 pixels wide, so the page is loaded into a frame of the wanted width; a probe added to
the page acts in it and posts what it found to the outer document, which `--dump-dom` prints.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")  # fmt: skip

CATCH_ERRORS = "<script>window.problems = []; addEventListener('error', (e) => problems.push(e.message));</script>"
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const $ = (selector) => document.querySelector(selector);
  const rows = () => [...document.querySelectorAll("#tensors-table tbody tr:not([hidden]) th")];
  const shown = () => rows().map((th) => th.textContent);
  const found = {};
  try { %s } catch (error) { problems.push(String(error)); }
  parent.postMessage({ ...found, problems, width: innerWidth, content: document.documentElement.scrollWidth }, "*");
}, 50));</script>"""
OUTER = """<!doctype html><body><iframe src="%s" style="width:%dpx;height:900px;border:0"></iframe>
<pre></pre><script>
onmessage = (event) => { document.querySelector("pre").textContent = "FOUND" + JSON.stringify(event.data) + "DNUOF"; };
</script>"""


def chromium(folder, *arguments):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def probe(html, folder, script="", width=1280, fragment="", flags=()):
    """Load the page `width` pixels wide, run `script` in it, and return what it put into `found`."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', CATCH_ERRORS, html, count=1)
    (folder / "page.html").write_text(html.replace("</body>", PROBE % script + "</body>"))
    outer = folder / "outer.html"
    outer.write_text(OUTER % ("page.html" + fragment, width))
    dump = chromium(folder, "--window-size=1400,1000", "--virtual-time-budget=3000", "--dump-dom", *flags,
                    outer.as_uri()).stdout  # fmt: skip
    text = re.search(r"FOUND(.*)DNUOF", dump).group(1)
    found = json.loads(unescape(text))
    assert found["problems"] == []
    return found
