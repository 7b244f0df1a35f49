"""Write docs/performance.md from the tables that the other benchmarks left.

    make benchmarks BENCH="--shape 8b --device cuda --dtype bfloat16 --profile"      # or one by one:
    python benchmarks/foundation.py --threads 1 --clock cpu --out benchmarks/tables/threads-1-clock-cpu
    python benchmarks/performance.py docs/performance.md benchmarks/tables/*/*.json

Tables of one machine, shape and precision stand together. They are kept in the repository, so that a page with another
device's tables has those that are there still.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from setting import HEAD, line, told

INTRODUCTION = """# Performance

Written by `python benchmarks/performance.py docs/performance.md benchmarks/tables/*/*.json`, from tables that these
commands left:

{commands}

Each row does the same work twice in one run, in turns: as users of the peer write it, and as this library does it. The
numbers of both are compared first (to 1e-4 in float32 on the CPU, to 6 % in bfloat16). The ratio is the peer's seconds
over ours, median of the turns; only ratios are meant to travel. "target" is the ratio that is wanted.
"tokens x layers" is the ratio of what both sides compute, the most that saving work alone can give.
`make benchmarks BENCH="--shape 8b --device cuda --dtype bfloat16 --profile"` adds the tables of another device; what
has none was not measured there with this version.
"""


def page(tables):
    """docs/performance.md."""
    together = defaultdict(list)
    for table in tables:
        facts = table["facts"]
        together[facts["device"], facts["shape"], facts["dtype"]].append(table)
    commands = sorted({table["facts"]["command"] for table in tables})
    lines = [INTRODUCTION.format(commands="\n".join(f"- `{command}`" for command in commands))]
    for (device, shape, dtype), found in sorted(together.items()):
        lines += [f"## {shape}, {dtype}, {device}\n"]
        for table in sorted(
            found, key=lambda table: (table["facts"]["benchmark"], -len(table["rows"]), table["facts"]["command"])
        ):
            known = {"benchmark", "device", "shape", "dtype", "command"}
            versions = ", ".join(f"{name} {value}" for name, value in table["facts"].items() if name not in known)
            rows = [line(row) for row in table["rows"]]
            lines += [f"### {table['facts']['benchmark']}\n", f"{versions}.\n", HEAD, *rows, ""]
            spent = [f"- {work}: {told(parts)}." for work, parts in table.get("spent", {}).items()]
            lines += ["Where our time goes, the largest parts until they are 80 % of it:\n", *spent, ""] * bool(spent)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("tables", type=Path, nargs="+", help="JSON files that benchmarks wrote with --out")
    options = parser.parse_args()
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in options.tables]
    options.page.write_text(page([table for table in tables if "facts" in table]), encoding="utf-8")
    print(options.page)


if __name__ == "__main__":
    main()
