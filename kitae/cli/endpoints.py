"""What kitae deploy started: kitae endpoints list, info NAME (URL and token), log NAME, stop NAME, remove NAME."""

from __future__ import annotations

import json
import sys

from kitae.errors import ConfigError
from kitae.plugins import did_you_mean

USAGE = """usage: kitae endpoints list [--json]          all of them, also those that have ended
       kitae endpoints info NAME [--json]     state, URL and token
       kitae endpoints log NAME               the last lines that it printed
       kitae endpoints stop NAME [...]        end it; answers under way have --grace_s to finish
       kitae endpoints remove NAME [...]      forget one that has ended, with its token and log"""
VERBS = ("list", "info", "log", "stop", "remove")


def main(argv: list[str]) -> int:
    """Look at, stop or forget endpoints."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    verb, *names = argv or ["list"]
    is_json = "--json" in names
    names = [name for name in names if name != "--json"]
    if verb not in VERBS:
        raise ConfigError(f"there is no kitae endpoints {verb}; {did_you_mean(verb, VERBS)}")
    unknown = next((name for name in names if name.startswith("-")), None)
    if unknown:
        raise ConfigError(f"kitae endpoints {verb} has no flag {unknown}")
    if is_json and verb not in ("list", "info"):
        raise ConfigError(f"kitae endpoints {verb} has no flag --json")
    if verb == "list":
        return _list(names, is_json=is_json)
    if not names:
        raise ConfigError(
            f"kitae endpoints {verb} needs the name of an endpoint; kitae endpoints list shows them"
        )
    if verb in ("info", "log") and len(names) > 1:
        raise ConfigError(f"kitae endpoints {verb} takes one name, not {len(names)}")
    return _each(verb, names, is_json=is_json)


def _list(names: list[str], *, is_json: bool) -> int:
    from kitae.cli._endpoint import table_of
    from kitae.jobs import endpoints

    if names:
        raise ConfigError(
            f"kitae endpoints list takes no name; did you mean kitae endpoints info {names[0]}?"
        )
    found = endpoints.everything()
    print(json.dumps([endpoint.info() for endpoint in found], indent=2) if is_json else table_of(found))
    return 0


def _each(verb: str, names: list[str], *, is_json: bool) -> int:
    from kitae.cli._endpoint import text_of
    from kitae.jobs import endpoints

    for endpoint in [endpoints.find(name) for name in names]:  # all are there before the first is touched
        if verb == "info":
            info = endpoint.info() | {"token": endpoint.token} if is_json else None
            print(text_of(endpoint) if info is None else json.dumps(info, indent=2))
        elif verb == "log":
            print("\n".join(endpoint.job.log_tail(200)))
        elif verb == "stop":
            print(f"{endpoint.name} {endpoint.job.stop()}", file=sys.stderr)
        else:
            endpoints.remove(endpoint)
            print(f"{endpoint.name} removed", file=sys.stderr)
    return 0
