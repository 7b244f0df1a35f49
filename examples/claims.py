"""Every claim of the two papers, and whether it holds on the demo model: read off the pages of results.

    python examples/claims.py docs              # writes docs/claims.md

No verdict is typed here: each is a cell of a table that another script wrote from its rows.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

PIGGYBACK, EASY = "2606.06667", "2602.07852"
PAGES = {
    "piggyback_smollm2.md": PIGGYBACK,
    "treft_smollm2.md": PIGGYBACK,
    "gated_adapters.md": PIGGYBACK,
    "narrow_vs_general_smollm2.md": EASY,
}
"""Pages with tables of claims, and the paper whose claims they are; one that is not there yet is left out."""
SAYS = {
    "holds": "holds", "needed": "holds",
    "does not hold": "does not", "not needed": "does not",
    "not separable": "cannot be told", "cannot be told": "cannot be told",
}  # fmt: skip
"""What pages write, and the column that it goes into."""
TASKS = ("terse", "refusal", "abstain", "tool")
COLUMNS = ("holds", "does not", "cannot be told")
HEAD = """# What holds of the two papers

Written by `python examples/claims.py docs` from the tables of the pages that it names; what "holds" asks for is said
there. One base of 135M parameters and narrow tasks that harm nobody: what holds here need not hold elsewhere, and what
cannot be told here may be told with more questions or seeds.
"""


def tables(text):
    """(heading above it, rows as dictionaries) of every table."""
    heading, rows, names = "", [], None
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ") if line.startswith("## ") else heading
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if names is None:
                names = cells
            elif not set(line) <= set("|-: "):
                rows.append(dict(zip(names, cells, strict=False)))
        elif names is not None:
            yield heading, rows
            rows, names = [], None


def claims(text):
    """(claim, where, verdict) of every table that gives verdicts."""
    title = text.splitlines()[0]
    for heading, rows in tables(text):
        before = ""
        task = next((name for place in (heading, title) for name in TASKS if name in place), heading)
        rate = re.search(r", rate \S+", heading)
        for row in rows:
            where = ", ".join(row[name] for name in ("task", "solution") if name in row)
            where = where or f"{task}{rate[0] if rate else ''}"
            if "verdict" in row and "claim" in row:
                claim = re.split(r":\s| at norm ", row["claim"])[0]
                claim = re.sub(r" (minus general's)? ?\([\d.]+\).*", "", claim)
                if claim.startswith("..."):
                    claim = re.sub(r" restore .*", " restore", before) + claim[3:]
                else:
                    before = claim
                yield claim, where, row["verdict"]
            elif needed := row.get("needed to spread?"):
                yield f"what spreads needs the adapter at: {row['adapter off at']}", where, needed


def page(folder):
    lines = [HEAD]
    for paper in (PIGGYBACK, EASY):
        lines += [f"## [arXiv:{paper}](https://arxiv.org/abs/{paper})\n"]
        lines += [f"| claim | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}"]
        for name in (name for name, about in PAGES.items() if about == paper and (folder / name).exists()):
            text = (folder / name).read_text(encoding="utf-8")
            found = defaultdict(lambda: defaultdict(list))
            for claim, where, verdict in claims(text):
                column = next((SAYS[said] for said in SAYS if verdict.startswith(said)), None)
                if column is not None and where not in found[claim][column]:
                    found[claim][column].append(where)
            for claim, columns in found.items():
                told = " | ".join("; ".join(columns[column]) for column in COLUMNS)
                lines.append(f"| {claim} ([page]({name})) | {told} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "claims.md").write_text(page(out).rstrip() + "\n", encoding="utf-8")
    print(out / "claims.md")
