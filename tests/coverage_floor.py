"""Check a coverage report: 95 % of all lines, and 98 % in every file where a mistake would cost a result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOTAL, CRITICAL = 95.0, 98.0
FILES = (
    "utils/training/",
    "utils/attacks/",
    "utils/run/",
    "utils/statistics/",
    "utils/slurm/",
    "utils/verify/",
    "utils/models/constraints.py",
    "utils/models/certificate.py",
)


def main(report: str) -> int:
    stored = json.loads(Path(report).read_text())
    total = stored["totals"]["percent_covered"]
    each = {name: facts["summary"]["percent_covered"] for name, facts in stored["files"].items() if name.startswith(FILES)}
    low = [f"{name}: {share:.1f} %" for name, share in each.items() if share < CRITICAL]
    print(
        f"line coverage {total:.1f} % (floor {TOTAL:g}); {len(each)} critical files, lowest {min(each.values()):.1f} % (floor {CRITICAL:g})"
    )
    print(*low, sep="\n", end="\n" if low else "")
    return int(total < TOTAL or bool(low))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
