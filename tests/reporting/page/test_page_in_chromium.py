"""The page in a real browser: no errors, filters and keys work, and axe-core finds nothing to complain of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from pages import report

from mergeid.reporting.page import render

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]

STEPS = """
const errors = []; window.addEventListener("error", e => errors.push(e.message));
const one = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
const key = (e, k) => e.dispatchEvent(new KeyboardEvent("keydown", { key: k, bubbles: true }));
const seen = () => all(".space").filter(s => getComputedStyle(s).display !== "none").map(s => s.dataset.kind);
const out = {};
addEventListener("load", () => setTimeout(() => {
  out.before = seen();
  one(".filter.match").click(); out.filtered = seen(); out.count = one("#shown").textContent;
  one(".filter.match").click(); out.again = seen();
  one("#search").value = "no such name"; one("#search").dispatchEvent(new Event("input")); out.searched = seen();
  key(one("#search"), "Escape"); out.escaped = seen();
  all(".space")[0].focus(); key(document.activeElement, "ArrowRight"); out.focus = document.activeElement.dataset.id;
  out.detail = all("#detail article").filter(a => !a.hidden).map(a => a.id);
  key(one(".area"), "ArrowLeft"); out.readout = one(".readout").textContent;
  one("#theme").click(); out.theme = document.documentElement.dataset.theme;
  out.wide = document.documentElement.scrollWidth <= innerWidth;
  out.errors = errors;
  document.body.dataset.out = JSON.stringify(out);
}, 50));
"""


def run(page: str, script: str, folder: Path, size: str = "1100,900") -> dict[str, object]:
    """What a script leaves in the page's `data-out`."""
    file = folder / "page.html"
    file.write_text(page.replace("<head>", f"<head><script>{script}</script>", 1), encoding="utf-8")
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
    words += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", "--dump-dom", file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-out="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("size", ["1100,900", "500,900"])
def test_filters_and_keys(tmp_path: Path, size: str) -> None:
    out = run(render(report()), STEPS, tmp_path, size)
    assert out["errors"] == []
    assert out["before"] == out["again"] == out["escaped"] == ["direct", "match"]
    assert out["filtered"] == ["direct"] and out["count"] == "1 of 2 shown" and out["searched"] == []
    assert out["detail"] == [f"d-{out['focus']}"]
    assert str(out["readout"]).startswith("30 % of B: solved ")
    assert out["theme"] == "dark" and out["wide"] is True


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation_of_wcag_aa(tmp_path: Path, theme: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm on this machine, which brings axe-core")
    words = [npm, "install", "--prefix", str(tmp_path), "--no-audit", "--no-fund", "axe-core@4"]
    if subprocess.run(words, capture_output=True, timeout=300).returncode:
        pytest.skip("npm cannot reach its registry for axe-core")
    axe = (tmp_path / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    tags = '["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]'
    script = f"""{axe};
    document.documentElement.dataset.theme = "{theme}";
    addEventListener("load", () => {{
      document.querySelectorAll(".space")[1].click();
      document.querySelectorAll("details").forEach(d => d.open = true);
      axe.run({{ runOnly: {{ type: "tag", values: {tags} }} }}).then(r => {{
        document.body.dataset.out = JSON.stringify({{ bad: r.violations.map(v => [v.id, v.nodes[0].html]) }});
      }});
    }});"""
    assert run(render(report()), script, tmp_path)["bad"] == []
