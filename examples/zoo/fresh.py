"""What the coefficients that ship say of pairs that were made after them: fresh.md.

    python examples/zoo/wider.py --minutes 9 && python examples/zoo/fresh.py

Nothing is fitted here. The pairs that the coefficients were fitted to are left out, and those made before `--since`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pairs_table as table
from fit import HERE, MODES, Case, cases, known, of
from validation import BAD, HEADER, TOLERATED, Said, figures, limit_of, markdown, parts, reliability

from mergeid.prediction.model import WAYS, Predictor, shipped


def said(predictor: Predictor, found: Sequence[Case], mode: str) -> list[Said]:
    """Every way that the predictor knows, asked as it is."""
    out = []
    for way in WAYS:
        model = predictor.model(mode, "nats", way)
        if model is None:
            continue
        for case in of(found, mode, "nats", way):
            each = [model.predict(case.features, tolerated=t) for t in TOLERATED]
            out.append(Said(case, each[0], tuple(0.0 if i.within is None else i.within for i in each)))
    return out


def written(predictor: Predictor, found: Sequence[Case], made: Sequence[str]) -> str:
    """All tables, as markdown."""
    pairs = {c.pair["pair"] for c in found}
    text = [
        "# Pairs that the coefficients were not fitted to\n",
        f"{len(pairs)} pairs of {len({c.pair['family'] for c in found})} families and "
        f"{len({c.pair['data'] for c in found})} data sets, made {min(made)} to {max(made)}, none of which predictor "
        f"{predictor.version} was fitted to. Columns as in validation.md; AUROC of solved merges: more than "
        f"{BAD['solved']:g} nats.\n",
    ]
    known = set(predictor.fitted_on["families"])
    for mode in MODES:
        rows = said(predictor, found, mode)
        new = [r for r in rows if r.case.pair["family"] not in known]
        named = {
            **parts(rows),
            **{f"new families: {name}": own for name, own in parts(new).items() if "family" not in name},
        }
        tables = [[name, *figures(own, limit_of(name))] for name, own in named.items()]
        text += [f"\n## Mode {mode}\n", markdown(HEADER, tables), "\n" + reliability(rows, "family")]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE / "wider")
    parser.add_argument("--since", default="", metavar="YYYY-MM-DD", help="only pairs made on that day or later")
    parser.add_argument("--out", type=Path, default=HERE / "fresh.md")
    options = parser.parse_args()
    made = {r["pair"]: r["made"] for r in table.read(options.folder / "midpoints.csv") if r["made"] >= options.since}
    fitted = {c.pair["pair"] for c in known().cases}
    made = {pair: day for pair, day in made.items() if pair not in fitted}
    found = [c for c in cases(options.folder) if c.pair["pair"] in made]
    if not found:
        parser.error(f"no pairs in {options.folder}; make some with wider.py")
    text = written(shipped(), found, list(made.values()))
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
