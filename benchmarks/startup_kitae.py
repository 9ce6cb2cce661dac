"""kitae's side of startup.py: the command line as a user types it, or nothing but the imports that every side needs."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from startup_clock import process_began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--only-imports", action="store_true")
    options = parser.parse_args()
    ended = only_imports() if options.only_imports else first_step_ended(options)
    versions = {name: version(name) for name in ("kitae", "transformers", "torch")}
    print(json.dumps({"first_step_s": ended - process_began(), "versions": versions}))


def only_imports() -> float:
    """torch and the model's own file of transformers."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    return time.time()


def first_step_ended(options: argparse.Namespace) -> float:
    from kitae.cli.main import main

    output_dir = options.folder / "kitae"
    code = main(
        [
            "train", "sft", "--model.name_or_path", str(options.folder / "model"),
            "--data.train", str(options.folder / "rows.jsonl"), "--output_dir", str(output_dir), "--overwrite",
            "--per_device_train_batch_size", str(options.batch_size), "--max_steps", "1", "--model.device", "cpu",
        ]
    )  # fmt: skip
    assert code == 0, code
    first = json.loads((output_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1, first
    ended: float = first["time"]
    return ended


if __name__ == "__main__":
    main()
