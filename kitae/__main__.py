"""`python -m kitae`, which is also what torchrun starts: `torchrun --nproc_per_node 8 -m kitae train sft ...`."""

import os
import sys

from kitae.cli.main import main

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of torch's process groups outlive them, and one that still holds a tensor while the interpreter is
        # taken down aborts the process: a rank that has done everything leaves without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
