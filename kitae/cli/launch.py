"""Start several ranks on this machine: kitae launch --nproc_per_node 2 train sft ..."""

from __future__ import annotations

from kitae.errors import ConfigError
from kitae.parallel.launch import launch

USAGE = "usage: kitae launch --nproc_per_node N COMMAND ...    (such as train sft run.toml)"
SEVERAL_MACHINES = (
    "--hostfile",
    "--host",
    "--nnodes",
    "--node_rank",
    "--master_addr",
    "--master_port",
    "--rdzv_endpoint",
)


def main(argv: list[str]) -> int:
    """Split off the flags of launch itself; the rest goes to every rank."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{USAGE}\n\nA job over several machines starts with torchrun: torchrun ... -m kitae COMMAND ..."
        )
        return 0
    words, count = list(argv), None
    while words and words[0].startswith("-"):
        flag, equals, value = words.pop(0).partition("=")
        flag = flag.replace("-", "_").replace("__", "--", 1)
        if flag in SEVERAL_MACHINES:
            raise ConfigError(
                f"{flag}: starting ranks on several machines is not there yet; use torchrun on each of them"
            )
        if flag not in ("--nproc_per_node", "--nproc"):
            raise ConfigError(f"kitae launch has no flag {flag}; {USAGE}")
        if not equals:
            value = words.pop(0) if words else ""
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"--nproc_per_node is {value!r}; it is the number of processes to start, 1 or more"
            )
        count = int(value)
    if count is None or not words:
        raise ConfigError(
            f"{'--nproc_per_node is' if count is None else 'the command to run is'} missing; {USAGE}"
        )
    return launch(words, nproc_per_node=count)
