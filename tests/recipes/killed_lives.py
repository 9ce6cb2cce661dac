"""A run in several lives: each is a fork that kills itself (SIGKILL) in the middle of a named method, or lives on.

Usage: python killed_lives.py RECIPE SETTINGS_JSON KILLS_JSON; KILLS is a list of [module, class, method, nth call] or
of seconds (a float: killed from outside after that time). The last life runs to the end; its exit code is ours.
"""

import importlib
import json
import os
import signal
import sys
import time

import torch

import kitae.recipes._run
from kitae.plugins import load

torch.set_num_threads(1)


def kill_self_at(module, owner, method, nth):
    """Make the nth call of a method the last thing this process does, half way: before its result is used."""
    cls = getattr(importlib.import_module(module), owner)
    original, calls = getattr(cls, method), [0]

    def dying(*args, **kwargs):
        result = original(*args, **kwargs)
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(cls, method, dying)


def life(recipe, settings, kill, *, is_first):
    pid = os.fork()
    if pid:
        if isinstance(kill, float):
            time.sleep(kill)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    try:
        if isinstance(kill, list):
            kill_self_at(*kill)
        values = {**settings, "resume": not is_first and os.path.isdir(settings["output_dir"])}
        kitae.recipes._run.run_recipe(
            recipe, load(f"kitae.recipes.{recipe}:Settings", package="", attribute="").model_validate(values)
        )
        os._exit(0)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        os._exit(getattr(error, "exit_code", 1))


def main():
    recipe, settings, kills = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for number, kill in enumerate(kills):
        code = life(recipe, settings, kill, is_first=number == 0)
        if code == 0:  # it was faster than the kill
            return 0
        if code != -signal.SIGKILL:
            return code
        print(f"life {number} was killed by {kill}", flush=True)
    return life(recipe, settings, None, is_first=not kills)


if __name__ == "__main__":
    sys.exit(main())
