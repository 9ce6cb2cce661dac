"""Write golden traces anew: python tests/methods/make_golden.py NAME... (no name: all). Say in the commit why."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from methods import golden_trace, methods, read_method
from toy_task import make_files


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        files.mkdir()
        make_files(files)
        for name in names or methods():
            method = read_method(name)
            lines = golden_trace(method, files=files, output_dir=Path(folder) / name)
            method.trace.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
            print(f"wrote {method.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
