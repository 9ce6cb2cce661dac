"""A user's reward function that fails in the way its data row asks for."""

import os
import time


def reward(completion, *, prompt, answer, case, **columns):
    return CASES[case]()


def never_end():
    while True:
        pass


def call_itself():
    return call_itself()


CASES = {
    "works": lambda: 1,
    "divides by zero": lambda: 1 / 0,
    "misses a key": lambda: {}["level"],
    "returns nan": lambda: float("nan"),
    "returns -inf": lambda: float("-inf"),
    "returns text": lambda: "5",
    "returns a list": lambda: [1.0],
    "leaves": lambda: os._exit(3),
    "crashes": lambda: os.kill(os.getpid(), 11),
    "never ends": never_end,
    "sleeps": lambda: time.sleep(60),
    "takes memory": lambda: len(bytearray(3 << 30)),
    "calls itself": call_itself,
}
