"""Let a teacher answer problems and keep the right answers as SFT rows: kitae sample TEACHER DATA --output rows.jsonl."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import UseSettings, warn_on_stderr
from kitae.cli._output import write_json
from kitae.cli._sample_files import asked_of, begin, description_of, kept, require_place
from kitae.cli._sample_view import show, why_none
from kitae.cli._teachers import Local, Remote
from kitae.config import DataSettings, require
from kitae.errors import DataError, EndpointError, RunDirError, StoppedError
from kitae.plugins import names_model
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.data.sources import Dataset
    from kitae.evaluate.answers import Asked

LOCAL_ONLY = (
    "raw", "engine", "batch_size", "revision", "tokenizer", "dtype", "device", "quantization", "trust_remote_code",
    "template", "kv_cache_tokens",
)  # fmt: skip
ENDPOINT_ONLY = (
    "api_key_env",
    "concurrency",
    "timeout_s",
    "max_attempts",
    "retry_wait_s",
    "longest_wait_s",
    "extra_body",
)


class Settings(UseSettings):
    """Rejection sampling: a teacher answers problems, a reward judges, the right answers become SFT rows."""

    model: str
    """The teacher: a model folder, hub id, run directory or adapter folder; with base_url the model's name there."""
    dataset_name: list[str]
    """Files, globs, folders or hub names of the problems."""
    output: str
    """File of the SFT rows. Every answer is in OUTPUT.asked.jsonl beside it, what was asked in OUTPUT.sampling.json."""
    overwrite: bool = False
    """Begin anew: remove what an earlier sampling wrote to output and beside it."""
    temperature: float = Field(0.7, ge=0, le=10)
    """Logits are divided by it; 0 is greedy, and gives one answer only."""
    max_new_tokens: int = Field(2048, ge=1)
    """Longest answer in tokens; answers cut there are never kept."""
    system_prompt: str | None = None
    """System turn put before every problem without one; default: the one a model was trained with by kitae, else the
    instruction that asks for the form of the reasoning reward. "" asks without any."""
    split: str = "train"
    """Split of a hub data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column mapping, ours = yours, such as prompt = "frage"; see the data page for our names."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error lists up to 100 bad rows and stops; skip counts them and goes on, also problems that the server refuses."""
    max_rows: int | None = Field(None, ge=1)
    """Use only the first rows."""
    n: int = Field(4, ge=1)
    """Answers to each problem; more find a right one to harder problems, and cost as much more."""
    reward: str = "reasoning"
    """What judges the answers: a built-in reward, file.py:function, or a reward model's folder."""
    form: Literal["answer_tags", "boxed"] = "answer_tags"
    """Form of the reasoning reward; boxed is what most teachers write."""
    strict_form: bool = True
    """Nothing but white space around and between the blocks; false allows other text there."""
    reward_timeout_s: float = Field(1.0, gt=0)
    """Limit for judging one answer, as reward.timeout_s of GRPO."""
    min_reward: float | None = None
    """Keep answers that earn this or more; default: a right answer, 10 for the reasoning reward and 1 for any other
    function. A reward model needs it said."""
    keep: int = Field(1, ge=1)
    """At most so many answers to one problem become rows."""
    choose: Literal["first", "shortest", "random"] = "first"
    """Which of them: the first ones, those with the fewest characters, or some drawn by the seed."""
    min_pass_rate: float = Field(0.0, ge=0, le=1)
    """Drop problems of whose answers a smaller share is right: one right among many wrong may be luck."""
    max_pass_rate: float = Field(1.0, ge=0, le=1)
    """Drop problems of whose answers a larger share is right: below 1, those that are always solved."""
    with_system_prompt: bool = False
    """Write the system prompt the teacher was asked with into the rows; without it, the student learns to do without."""
    base_url: str | None = None
    """Ask an OpenAI-compatible server there instead of loading a model, such as http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Environment variable with the server's key; default: OPENAI_API_KEY, where it is set. The key is written nowhere."""
    concurrency: int = Field(16, ge=1, le=1024)
    """Requests that are under way at the same time."""
    timeout_s: float = Field(600.0, gt=0)
    """Limit for one whole answer of the server."""
    max_attempts: int = Field(6, ge=1)
    """How often a request is tried while the server is busy, fails, or cannot be reached; then the sampling stops."""
    retry_wait_s: float = Field(1.0, ge=0)
    """Wait after the first failed attempt; it doubles each time, up to a minute, give or take a half."""
    longest_wait_s: float = Field(300.0, ge=0)
    """A server that asks to be left alone for longer (Retry-After) stops the sampling."""
    extra_body: str | None = None
    """More fields of each request as a JSON object, over ours; null leaves one of ours out."""
    json_file: str | None = None
    """Also write the summary to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Ask, judge, keep, and say what became of all answers."""
    if _help.is_asked(argv):
        _help.show(Settings, prog="kitae sample TEACHER DATA --output rows.jsonl", after=_AFTER)
        return 0
    is_named = any(word.partition("=")[0] in ("--model", "--model_name_or_path") for word in argv)
    words = ("dataset_name",) if is_named else ("model", "dataset_name")
    use, notes = read("sample", Settings, argv, positional=words)
    warn_on_stderr(notes.warnings)
    summary = sample(use)
    if use.json_file:
        write_json(use.json_file, summary)
    if not summary["kept"]:
        raise DataError(f"no answer was kept, so {use.output} is empty: {why_none(summary)}")
    return 0


_AFTER = "The same command again goes on where it was stopped; with other filters it keeps others of the same answers."


def sample(use: Settings) -> dict[str, Any]:
    """The summary of one rejection sampling; its files are written.

    Data, settings and files are seen to before any weights are read or anything is asked.
    """
    from kitae.data.sources import open_dataset
    from kitae.evaluate.answers import Asked

    require_sense(use)
    output = Path(use.output).expanduser()
    dataset = open_dataset(
        use.dataset_name,
        data=DataSettings(columns=use.columns, on_bad_row=use.on_bad_row),
        purpose="rl",
        need_answer=use.reward in ("reasoning", "math"),
        split=use.split,
        max_rows=use.max_rows,
    )
    teacher = Remote(use, dataset) if use.base_url else Local(use, dataset)
    plan = {"teacher": teacher.identity, "data": dataset.fingerprint, **_how(use)}
    require_place(output, overwrite=use.overwrite)
    asked = Asked(asked_of(output), anew=use.overwrite)
    try:
        started = begin(output, plan, overwrite=use.overwrite)
        _ask(teacher, asked, started=started, output=output)
        summary = {"output": str(output), "rows": len(dataset), "too_long": teacher.opened["too_long"]}
        summary |= _keep(use, dataset, teacher, asked, output=output)
        write_json(description_of(output), {**started, "state": "complete", "summary": summary})
    finally:
        asked.close()
    show(use, summary)
    return summary


def _ask(teacher: Local | Remote, asked: Asked, *, started: dict[str, Any], output: Path) -> None:
    """Ask what is missing; whatever ends that, the message says what is kept and how to go on."""

    def on_open() -> None:
        """What only the opened teacher knows; when all is answered, it need not be opened again."""
        started["opened"] = teacher.opened
        write_json(description_of(output), {**started, "state": "asking"})

    if started.get("opened", {}).get("answers") == len(asked.places):
        teacher.opened = started["opened"]
        return
    try:
        teacher.ask(asked, on_open=on_open)
    except StoppedError as error:
        raise StoppedError(f"{error}; {kept(asked)}", signal_number=error.exit_code - 128) from error
    except EndpointError as error:
        raise EndpointError(f"{error}; {kept(asked)}") from error
    except RunDirError as error:  # a full disk: there is no --resume here
        raise RunDirError(f"{str(error).replace(' with --resume', '')}; {kept(asked)}") from error


def _keep(
    use: Settings, dataset: Dataset, teacher: Local | Remote, asked: Asked, *, output: Path
) -> dict[str, Any]:
    """Write the rows; what became of all answers."""
    from kitae.evaluate.rejection import Filter, select
    from kitae.evaluate.sample import right_reward

    by = Filter(
        min_reward=right_reward(use.reward) if use.min_reward is None else use.min_reward,
        keep=use.keep,
        choose=use.choose,
        min_pass_rate=use.min_pass_rate,
        max_pass_rate=use.max_pass_rate,
        seed=use.seed,
    )
    system_prompt = teacher.opened["system_prompt"]
    source = {
        "teacher": teacher.provenance,
        "system_prompt": system_prompt,
        "sampling": use.sampling().model_dump(),
        "seed": use.seed,
        "reward_function": use.reward,
    }
    return select(
        asked.path,
        dataset,
        by=by,
        source=source,
        system_prompt=system_prompt if use.with_system_prompt else None,
        output=output,
    )


def require_sense(use: Settings) -> None:
    """Refuse settings that contradict each other or would have no effect."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    require(
        ranks == "1",
        f"kitae sample is one process, and was started as {ranks} (WORLD_SIZE); start it without launcher",
    )
    require(
        use.n == 1 or use.temperature > 0,
        f"n is {use.n} and temperature 0, which gives the same answer {use.n} times; set --temperature, such as 0.7",
    )
    require(
        use.min_pass_rate <= use.max_pass_rate,
        f"min_pass_rate {use.min_pass_rate} is above max_pass_rate {use.max_pass_rate}: no problem can be kept",
    )
    require(
        use.keep <= use.n,
        f"keep is {use.keep}, but each problem has only n = {use.n} answers; lower it or raise n",
    )
    idle = LOCAL_ONLY if use.base_url else ENDPOINT_ONLY
    reason = f"the model is asked at {use.base_url}" if use.base_url else "there is no base_url"
    for name in idle:
        require(
            getattr(use, name) == Settings.model_fields[name].get_default(),
            f"{name} would have no effect: {reason}; leave it out",
        )
    require(
        use.reward == "reasoning" or (use.form == "answer_tags" and use.strict_form),
        f"form and strict_form would have no effect: reward is {use.reward}; leave them out",
    )
    require(
        use.min_reward is not None or not names_model(use.reward),
        f"reward is the model {use.reward}, whose scores have no fixed scale; say with --min_reward what is good enough",
    )


def _how(use: Settings) -> dict[str, Any]:
    """What the answers and their judgement depend on, besides teacher and data."""
    return {
        "sampling": use.sampling().model_dump(),
        "n": use.n,
        "seed": use.seed,
        "reward": {
            "function": use.reward,
            "form": use.form,
            "strict_form": use.strict_form,
            "timeout_s": use.reward_timeout_s,
            "code": _reward_hash(use.reward),
        },
    }


def _reward_hash(name: str) -> str | None:
    """Of the file a function is in, or of a reward model's weights."""
    if names_model(name):
        from kitae.models.files import find_model
        from kitae.models.fingerprint import model_fingerprint

        return model_fingerprint(find_model(name))
    from kitae.train.files import content_hash

    code = Path(name.rpartition(":")[0]).expanduser()
    return content_hash(code) if code.suffix == ".py" and code.is_file() else None
