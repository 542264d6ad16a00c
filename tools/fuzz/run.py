"""`python -m tools.fuzz.run TARGET FOLDER CORPUS [libFuzzer options]`: one target in this process until something breaks.

FOLDER is for the files of one input; the process ends without leaving time to remove it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorasmith.services"]):
    from tools.fuzz.targets import TARGETS


def main() -> None:
    target, folder = TARGETS[sys.argv[1]], Path(sys.argv[2])
    atheris.Setup([sys.argv[0], *sys.argv[3:]], lambda data: target(data, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
