"""llama.cpp's process: watched by what it says, so that one that hangs or dies does not take the export with it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from kitae.errors import PlanError
from kitae.export import verify_llama
from kitae.export.verify import compare
from kitae.export.verify_llama import run_llama_cpp, watch

CHATTY = "import time\nfor i in range(8): print(i, flush=True); time.sleep(0.5)"
SILENT = "import time; print('begun', flush=True); time.sleep(60)"
CLOSED = "import os, time; print('begun', flush=True); os.close(1); os.close(2); time.sleep(60)"


def test_a_process_that_says_something_now_and_then_may_take_its_time():
    code, output = watch([sys.executable, "-c", CHATTY], silent_s=3)
    assert code == 0 and output.split() == list("01234567")


@pytest.mark.parametrize("program", [SILENT, CLOSED])
def test_one_that_falls_silent_is_killed(program):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        watch([sys.executable, "-c", program], silent_s=0.5)
    assert time.monotonic() - began < 40


def test_how_it_ends_is_told():
    code, output = watch([sys.executable, "-c", "import sys; sys.exit('error: no')"], silent_s=20)
    assert (code, output) == (1, "error: no\n")


def test_a_hang_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    real = subprocess.Popen
    monkeypatch.setattr(verify_llama, "SILENT_S", 0.3)
    monkeypatch.setattr(
        verify_llama.subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", SILENT], **options)
    )
    with pytest.raises(
        PlanError, match=r"llama.cpp hangs with .*m.gguf: nothing came from it for .*--no_verify"
    ):
        run_llama_cpp({"path": str(file)})


def test_nan_which_json_has_as_null_is_a_difference_and_no_crash():
    wanted = torch.full((2, 4), 0.25).log()
    found = verify_llama._dense([[[3, 0, 1, 2], [None] * 4], [[0, 1, 2, 3], wanted[1].tolist()]])
    _, kl, _ = compare(wanted, found)
    assert kl[0].isnan() and kl[1] == 0
