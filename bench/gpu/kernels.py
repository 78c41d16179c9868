"""Part `kernels`: every shipped kernel compiled for this device; registers, spills and main loops from its code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pst_kernels.files import write_json

from . import exits
from .conditions import ROOT, conditions_or_why_not
from .processes import environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pst_kernels.cli", "kernels", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        rows = json.loads(done.stdout)
    except ValueError:
        print(f"`pst-kernels kernels` printed no report, status {done.returncode}; see above")
        return exits.FAILED
    write_json(options.output, {**conditions_or_why_not("cuda"), "rows": rows})
    wrong = [f"{row['kernel']}, {row['case']}: {'; '.join(row['problems'])}" for row in rows if row["problems"]]
    for line in wrong:
        print(line)
    print(f"{len(rows)} binaries, {len(wrong)} with problems")
    return exits.FAILED if wrong else exits.PASSED


if __name__ == "__main__":
    raise SystemExit(main())
