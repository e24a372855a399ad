"""Draw the README's picture from the demonstration's measured curves: python docs/picture.py mergeid-demo/demo.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "pages" / "images" / "barrier.svg"
LEFT, TOP, WIDTH, HEIGHT = 64, 64, 520, 210
STYLE = """<style>
text{font:14px system-ui,sans-serif;fill:#333}.soft{fill:#666;font-size:12px}.grid{stroke:#ddd}
.line{fill:none;stroke-width:3;stroke-linejoin:round}.d{stroke:#c2410c}.n{stroke:#1d4ed8}.dot{fill:#0b6b4f}
.dt{fill:#c2410c}.nt{fill:#1d4ed8}.mt{fill:#0b6b4f}.b{font-weight:600}
@media (prefers-color-scheme:dark){text{fill:#ddd}.soft{fill:#aaa}.grid{stroke:#444}.d{stroke:#fb923c}.dt{fill:#fb923c}
.n{stroke:#93c5fd}.nt{fill:#93c5fd}.dot,.mt{fill:#6fd3ae}}
</style>"""


def main(demo: Path) -> None:
    found = json.loads(demo.read_text(encoding="utf-8"))
    plain, _, matched = found["barriers"]
    merged = found["networks"][-1]["accuracy"]

    def x(share: float) -> float:
        return round(LEFT + WIDTH * share, 1)

    def y(accuracy: float) -> float:
        return round(TOP + HEIGHT * (1 - accuracy), 1)

    def path(curve: dict, kind: str) -> str:
        points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(curve["lambdas"], curve["accuracies"], strict=True))
        return f'<polyline class="line {kind}" points="{points}"/>'

    middle = len(plain["lambdas"]) // 2
    low, between, high = 100 * plain["accuracies"][middle], 100 * matched["accuracies"][middle], 100 * merged
    ends = [100 * plain["accuracies"][i] for i in (0, -1)]
    said = (
        f"Accuracy on the way from network A ({ends[0]:.1f} %) to network B ({ends[1]:.1f} %): a plain average drops "
        f"to {low:.1f} %, matched neurons bring it to {between:.1f} %, and mergeid's merge gets {high:.1f} %."
    )
    marks = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y(v)}" y2="{y(v)}"/>'
        f'<text class="soft" x="{LEFT - 8}" y="{y(v) + 4}" text-anchor="end">{v:.0%}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 324" role="img" aria-label="{said}">'
        f"<title>{said}</title>{STYLE}"
        f'<text x="{LEFT}" y="20" class="b">Accuracy on the way from network A to network B</text>{marks}'
        f"{path(plain, 'd')}{path(matched, 'n')}"
        f'<circle class="dot" cx="{x(0.5)}" cy="{y(merged)}" r="6"/>'
        f'<text x="{x(0.5)}" y="{y(0.1) - 12}" text-anchor="middle" class="dt b">plain average: {low:.0f} %</text>'
        f'<text x="{x(0.5)}" y="{y(matched["accuracies"][middle]) + 24}" text-anchor="middle" class="nt">'
        f"neurons matched: {between:.0f} %</text>"
        f'<text x="{x(0.5)}" y="{y(merged) - 12}" text-anchor="middle" class="mt b">mergeid: {high:.1f} %</text>'
        f'<text x="{x(0)}" y="{TOP + HEIGHT + 24}" text-anchor="middle">A</text>'
        f'<text x="{x(0.5)}" y="{TOP + HEIGHT + 24}" text-anchor="middle" class="soft">half of each</text>'
        f'<text x="{x(1)}" y="{TOP + HEIGHT + 24}" text-anchor="middle">B</text>'
        "</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
