"""`python -m kitae`, which is also what torchrun starts: `torchrun --nproc_per_node 8 -m kitae train sft ...`."""

import sys

from kitae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
