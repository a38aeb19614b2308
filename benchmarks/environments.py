"""Environments of the peers: a virtual environment each, made by the benchmark that needs it, in `.build/peers`."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".build" / "peers"
INSTALL_TIMEOUT_S = 900

REQUIREMENTS = {
    "quix": ["quixstreams>=3.20,<4"],
    "alibi": ["alibi-detect==0.12.0"],
    "deep-river": ["deep-river>=0.3,<0.4", "pytest"],  # it imports pytest without asking for it
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; the environment is made the first time."""
    home = PEERS / peer
    python = home / "bin" / "python"
    stamp = home / "complete"
    wanted = "\n".join(REQUIREMENTS[peer])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making an environment for {peer} ...", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *REQUIREMENTS[peer]],
        check=True,
        timeout=INSTALL_TIMEOUT_S,
        stdout=sys.stderr,
    )
    stamp.write_text(wanted)
    return python
