"""Print what the named pyproject.toml files need from elsewhere, one requirement a line: for an image's first layer."""

import sys
import tomllib
from pathlib import Path

if __name__ == "__main__":
    found = {need for path in sys.argv[1:] for need in tomllib.loads(Path(path).read_text())["project"]["dependencies"]}
    sys.stdout.write("\n".join(sorted(found - {"medhive"})) + "\n")
