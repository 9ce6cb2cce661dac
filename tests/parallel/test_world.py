"""A World of one, and what the environment may say; several ranks are in test_data_parallel.py."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from kitae import backends
from kitae.errors import ConfigError
from kitae.parallel.launch import launch
from kitae.parallel.world import World, start_world


def test_a_world_of_one_needs_no_process_group():
    world = start_world(device="cpu")
    assert (world.rank, world.world_size, world.is_main, world.device.type) == (0, 1, True, "cpu")
    assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert world.gather_json({"a": 1}) == [{"a": 1}]
    assert world.broadcast_json([None]) == [None]
    world.barrier()
    world.close()
    assert not torch.distributed.is_initialized()


def test_an_accelerator_is_prepared_before_it_is_touched(monkeypatch):
    """torch reads the allocator's settings once, when the device is first touched."""
    done = []
    backend = backends.of(torch.device("cpu"))
    monkeypatch.setattr(type(backend), "prepare", lambda self: done.append("prepare"))
    monkeypatch.setattr(backends, "pick_device", lambda name, *, local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(backends, "of", lambda device: backend)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: done.append(str(device)))
    assert start_world(device="auto").device == torch.device("cuda:0")
    assert done == ["prepare", "cuda:0"]


def test_only_rank_0_is_main():
    assert World(rank=0, world_size=2).is_main
    assert not World(rank=1, world_size=2).is_main


def test_a_rank_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="RANK is 'one', not a number"):
        start_world(device="cpu")


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads the kernel's table of sockets")
def test_the_ranks_listen_on_the_loopback_interface_only(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from kitae.parallel.world import start_world
            world = start_world(device="cpu", timeout_s=60)
            world.barrier()
            own = {os.readlink(f"/proc/self/fd/{fd}")[8:-1] for fd in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")
                   if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")}
            listening = []
            for table in ("/proc/net/tcp", "/proc/net/tcp6"):
                for line in open(table).readlines()[1:]:
                    address, state, inode = line.split()[1], line.split()[3], line.split()[9]
                    if state == "0A" and inode in own:
                        listening.append(address.partition(":")[0])
            world.barrier()
            world.close()
            loopback = {"0100007F", "00000000000000000000000001000000"}
            assert listening and set(listening) <= loopback, listening
            """
        )
    )
    assert launch([], nproc_per_node=2, program=[sys.executable, str(script)]) == 0


def test_ranks_of_torchrun_meet_at_its_address(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import torch
            from kitae.parallel.world import start_world
            world = start_world(device="cpu", timeout_s=60)
            total = world.sum(torch.tensor([1.0 + world.rank]))
            open(f"{tmp_path}/sum{{world.rank}}", "w").write(str(total.item()))
            world.close()
            """
        )
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert [(tmp_path / f"sum{rank}").read_text() for rank in (0, 1)] == ["3.0", "3.0"]
