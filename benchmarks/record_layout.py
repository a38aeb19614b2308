"""What the size of a user's record is worth: forecast quality by ring, slow profile and hidden width.

    python benchmarks/record_layout.py EVENTS.csv.gz --map user=user,interest=category,time=time [--limit 42000]

The three lengths are constants of compiled code, so each layout runs `driftline evaluate` from a copy of the packages
in which they are changed. One pass each, the second half of the events counts; a byte is 1 MB a million users.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ((16, 32, 64), (8, 32, 64), (32, 32, 64), (16, 16, 64), (16, 48, 64), (16, 32, 32), (16, 32, 96))
TIMEOUT_S = 1_800


def copy_with(folder: Path, ring: int, profile: int, hidden: int) -> None:
    """The packages with other lengths."""
    for package in ("models", "stream"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    walk = folder / "models/walk.py"
    text = walk.read_text()
    for name, value in (("RING", ring), ("PROFILE", profile), ("HIDDEN", hidden)):
        text, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", text)
        if found != 1:
            raise SystemExit(f"models/walk.py no longer sets {name} in one place")
    walk.write_text(text)


def measure(layout: tuple[int, int, int], arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes of a record, and MRR on all events and on those that do not repeat the last interest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_with(folder, *layout)
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        size = "from models.profile import USER; print(USER.itemsize)"
        run = [
            sys.executable,
            "-m",
            "stream.cli",
            "evaluate",
            str(Path(arguments.file).resolve()),
            "--map",
            arguments.map,
        ]
        run += ["--limit", str(arguments.limit), "--models", "driftline", "--horizon", "1", "--json"]
        output = [
            subprocess.run(
                command, cwd=folder, env=environment, check=True, timeout=TIMEOUT_S, text=True, stdout=subprocess.PIPE
            ).stdout
            for command in ([sys.executable, "-c", size], run)
        ]
    rows = {row["stratum"]: row for row in json.loads(output[1].splitlines()[-1])["rows"]}
    return {"bytes": int(output[0]), "mrr": rows["all"]["mrr"], "mrr_moves": rows["non_repeat"]["mrr"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--map", required=True)
    parser.add_argument("--limit", type=int, default=42_000)
    arguments = parser.parse_args()
    print("ring  profile  hidden  bytes    MRR  MRR of moves")
    for layout in LAYOUTS:
        found = measure(layout, arguments)
        print(
            "{:4}  {:7}  {:6}  {:5}  {:.4f}  {:.4f}".format(*layout, *found.values()),
            flush=True,
        )


if __name__ == "__main__":
    main()
