"""Let a teacher answer problems and keep the right answers as SFT rows: kitae sample TEACHER DATA --output rows.jsonl."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import Opened, UseSettings, open_model, warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import DataSettings, RewardSettings, require
from kitae.errors import ConfigError, DataError, EndpointError, RunDirError, StoppedError
from kitae.plugins import names_model
from kitae.settings import read

if TYPE_CHECKING:
    from kitae.data.sources import Dataset
    from kitae.evaluate.sample import Answer, Asked
    from kitae.recipes._rewards import Rewards
    from kitae.rewards.pool import RewardPool
    from kitae.rollout.http import HttpEngine
    from kitae.types import Problem

log = logging.getLogger(__name__)

LOCAL_ONLY = (
    "raw", "engine", "batch_size", "revision", "tokenizer", "dtype", "device", "quantization", "trust_remote_code",
    "template",
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
KEY_VARIABLE = "OPENAI_API_KEY"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "kitae_template.json")
"""What decides, besides the weights, how a local teacher is asked."""
WAVES = 8
"""A local model gets so many times batch_size completions at once: few enough to keep in memory, and enough that the
last ones, which run alone, cost little."""
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 10.0, 0.5


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
        raise DataError(f"no answer was kept, so {use.output} is empty: {_why_none(summary)}")
    return 0


_AFTER = "The same command again goes on where it was stopped; with other filters it keeps others of the same answers."


def sample(use: Settings) -> dict[str, Any]:
    """The summary of one rejection sampling; its files are written.

    Data, settings and files are seen to before any weights are read or anything is asked.
    """
    from kitae.data.sources import open_dataset
    from kitae.evaluate.sample import Asked

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
    teacher = _Remote(use, dataset) if use.base_url else _Local(use, dataset)
    plan = {"teacher": teacher.identity, "data": dataset.fingerprint, **_how(use)}
    _require_place(output, overwrite=use.overwrite)
    asked = Asked(_asked(output), anew=use.overwrite)
    try:
        started = _begin(output, plan, overwrite=use.overwrite)
        _ask(teacher, asked, started=started, output=output)
        summary = {"output": str(output), "rows": len(dataset), "too_long": teacher.opened["too_long"]}
        summary |= _keep(use, dataset, teacher, asked, output=output)
        write_json(_description(output), {**started, "state": "complete", "summary": summary})
    finally:
        asked.close()
    _show(use, summary)
    return summary


def _ask(teacher: _Local | _Remote, asked: Asked, *, started: dict[str, Any], output: Path) -> None:
    """Ask what is missing; whatever ends that, the message says what is kept and how to go on."""

    def on_open() -> None:
        """What only the opened teacher knows; when all is answered, it need not be opened again."""
        started["opened"] = teacher.opened
        write_json(_description(output), {**started, "state": "asking"})

    if started.get("opened", {}).get("answers") == len(asked.places):
        teacher.opened = started["opened"]
        return
    try:
        teacher.ask(asked, on_open=on_open)
    except StoppedError as error:
        raise StoppedError(f"{error}; {_kept(asked)}", signal_number=error.exit_code - 128) from error
    except EndpointError as error:
        raise EndpointError(f"{error}; {_kept(asked)}") from error
    except RunDirError as error:  # a full disk: there is no --resume here
        raise RunDirError(f"{str(error).replace(' with --resume', '')}; {_kept(asked)}") from error


def _keep(
    use: Settings, dataset: Dataset, teacher: _Local | _Remote, asked: Asked, *, output: Path
) -> dict[str, Any]:
    """Write the rows; what became of all answers."""
    from kitae.evaluate.sample import Filter, right_reward, select

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


# files --------------------------------------------------------------------------------------------------------


def _description(output: Path) -> Path:
    return output.with_name(f"{output.name}.sampling.json")


def _asked(output: Path) -> Path:
    return output.with_name(f"{output.name}.asked.jsonl")


def _require_place(output: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written to, and files that are not ours."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make {output.parent} for the rows: {error.strerror or error}") from error
    if not os.access(output.parent, os.W_OK):
        raise RunDirError(f"{output.parent} cannot be written to; name another file with --output")
    if overwrite or _description(output).exists():
        return
    asked = _asked(output)
    for path in (output, asked):
        # An empty asked.jsonl is what a kill before the description leaves.
        if path.exists() and (path == output or path.stat().st_size > 0):
            raise RunDirError(
                f"{path} exists and was not written by kitae sample; name another file with --output, or add --overwrite"
            )


def _begin(output: Path, plan: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Make sure that what is there belongs to this plan; returns what the description says."""
    import kitae
    from kitae.train.files import read_json
    from kitae.train.identity import differences

    description = _description(output)
    if overwrite:  # the answers have gone already: they must not be found under another plan
        output.unlink(missing_ok=True)
        description.unlink(missing_ok=True)
    before = read_json(description)
    if before is None:
        started = {"kitae_version": kitae.__version__, "started": round(time.time(), 3), "plan": plan}
        write_json(description, {**started, "state": "asking"})
        return started
    differing = differences(before.get("plan", {}), plan)
    if differing:
        raise ConfigError(
            f"{description} belongs to another sampling than this one (then -> now: {'; '.join(differing)}); undo "
            "these changes, name another file with --output, or add --overwrite to begin anew"
        )
    return {name: before[name] for name in ("kitae_version", "started", "plan", "opened") if name in before}


def _kept(asked: Asked) -> str:
    return f"all {len(asked.places):,} answers so far are kept in {asked.path}; the same command again goes on from there"


# teachers -----------------------------------------------------------------------------------------------------


class _Local:
    """A model that is loaded here. It answers whole groups; a problem that lacks an answer is sampled again, alike."""

    def __init__(self, use: Settings, dataset: Dataset) -> None:
        from kitae.models.files import find_model
        from kitae.models.fingerprint import model_fingerprint
        from kitae.train.files import content_hash

        self._use, self._dataset = use, dataset
        found = find_model(use.model, revision=use.revision, with_code=use.trust_remote_code)
        self.provenance = {"model": found.name if found.adapter is None else str(found.adapter.resolve())}
        self.provenance["fingerprint"] = model_fingerprint(found)
        own = ("system_prompt", "template", "raw", "engine", "tokenizer", "dtype", "quantization")
        self.identity = {"fingerprint": self.provenance["fingerprint"]} | {
            name: getattr(use, name) for name in own
        }
        folder = found.adapter or found.folder
        self.identity |= {n: content_hash(folder / n) for n in TEXT_FILES if (folder / n).is_file()}
        self.opened: dict[str, Any] = {}

    def ask(self, asked: Asked, *, on_open: Callable[[], None]) -> None:
        """Load the model, and ask what is not answered yet."""
        from kitae.data.problems import RenderedProblems
        from kitae.evaluate.sample import ask_engine

        use = self._use
        opened = open_model(use, default_system_prompt=_form_instruction(use, self._dataset))
        longest = (opened.context or sys.maxsize) - use.max_new_tokens
        require(
            longest > 0,
            f"max_new_tokens is {use.max_new_tokens}, but the model's context is {opened.context}; lower it",
        )
        problems = RenderedProblems(
            self._dataset,
            template=opened.template,
            max_prompt_length=longest,
            skip_bad=use.on_bad_row == "skip",
        )
        self.opened = {
            "system_prompt": None if use.raw else opened.template.system_prompt,
            "too_long": problems.num_dropped,
            "answers": len(problems) * use.n,
        }
        on_open()
        missing = [
            i
            for i, index in enumerate(problems.indices)
            if any((index, sample) not in asked.places for sample in range(use.n))
        ]
        view = _View(total=len(problems) * use.n, done=len(problems) * use.n - len(missing) * use.n)
        with _pool(use) as pool, _stopping():
            ask_engine(
                opened.engine,
                _Chosen(problems, missing, opened if use.raw else None),
                n=use.n,
                sampling=use.sampling(),
                seed=use.seed,
                pool=pool,
                on_answers=lambda answers: view.update(asked.append(answers)),
                on_token=view.on_token,
                problems_at_once=max(1, WAVES * use.batch_size // use.n),
            )
        view.close()


class _Chosen(Sequence["Problem"]):
    """Some of the problems by their place, rendered when they are taken; raw ones without the chat template."""

    def __init__(self, problems: Sequence[Problem], places: Sequence[int], raw: Opened | None) -> None:
        self._problems, self._places, self._raw = problems, places, raw

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        from dataclasses import replace

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        problem = self._problems[self._places[index]]
        if self._raw is None:
            return problem
        return replace(problem, token_ids=self._raw.ask_raw(problem.prompt).token_ids, prefill="")


class _Remote:
    """A model behind an address. It answers one request at a time, and only what is missing is asked."""

    def __init__(self, use: Settings, dataset: Dataset) -> None:
        self._use, self._dataset = use, dataset
        asked_for = _form_instruction(use, dataset) if use.system_prompt is None else use.system_prompt
        self.system_prompt = asked_for or None
        self.opened: dict[str, Any] = {
            "system_prompt": self.system_prompt,
            "too_long": 0,
            "answers": len(dataset) * use.n,
        }
        self._engine = self._make_engine()
        self.provenance = {"model": use.model, "base_url": str(use.base_url)}
        self.identity = {**self.provenance, "system_prompt": self.system_prompt, "extra_body": use.extra_body}

    def _make_engine(self) -> HttpEngine:
        from kitae.rollout.http import Endpoint, HttpEngine, is_loopback

        use = self._use
        endpoint = Endpoint(
            base_url=str(use.base_url),
            model=use.model,
            api_key=_key(use),
            timeout_s=use.timeout_s,
            max_attempts=use.max_attempts,
            retry_wait_s=use.retry_wait_s,
            longest_wait_s=use.longest_wait_s,
            extra_body=_extra(use.extra_body),
        )
        engine = HttpEngine(endpoint, messages_of=self._messages, concurrency=use.concurrency)
        if endpoint.api_key and engine.url.startswith("http://") and not is_loopback(engine.url):
            log.warning(
                "the key goes to %s unencrypted; use https:// where others share the network", use.base_url
            )
        return engine

    def _messages(self, problem: Problem) -> list[dict[str, str]]:
        turns = [{"role": t["role"], "content": t["content"]} for t in self._dataset[problem.index].question]
        if self.system_prompt and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def ask(self, asked: Asked, *, on_open: Callable[[], None]) -> None:
        """Ask what is not answered yet."""
        from kitae.evaluate.sample import ask_endpoint

        use = self._use
        on_open()
        view = _View(total=self.opened["answers"], done=len(asked.places))
        with _pool(use) as pool, _stopping():
            ask_endpoint(
                self._engine,
                self._missing(asked),
                sampling=use.sampling(),
                seed=use.seed,
                pool=pool,
                on_answers=lambda answers: view.update(asked.append(answers)),
                skips_refused=use.on_bad_row == "skip",
            )
        view.close()

    def _missing(self, asked: Asked) -> Iterator[tuple[Problem, int]]:
        from kitae.types import Problem

        answered = set(asked.places)  # those of earlier: asked.places grows while this is read
        for index in range(len(self._dataset)):
            samples = [s for s in range(self._use.n) if (index, s) not in answered]
            if samples:
                example = self._dataset[index]
                problem = Problem(
                    prompt=example.question[-1]["content"],
                    token_ids=[],
                    answer=example.answer,
                    columns=example.columns,
                    index=index,
                )
                yield from ((problem, s) for s in samples)


def _form_instruction(use: Settings, dataset: Dataset) -> str | None:
    """What a teacher is told so that its answers can have the form that is rewarded."""
    from kitae.data.instructions import form_instruction

    if use.reward != "reasoning":
        return None
    texts = (dataset[i].question[-1]["content"] for i in range(min(200, len(dataset))))
    return form_instruction(texts, form=use.form)


def _key(use: Settings) -> str | None:
    key = os.environ.get(use.api_key_env or KEY_VARIABLE)
    require(
        key is not None or use.api_key_env is None,
        f"api_key_env is {use.api_key_env}, but there is no such environment variable; set it to the key",
    )
    return key


def _extra(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"extra_body is {text!r}, which is no JSON: {error}") from error
    require(
        isinstance(value, dict), f"extra_body is {text!r}; it is a JSON object, such as '{{\"top_k\": 20}}'"
    )
    found: dict[str, Any] = value
    return found


def _pool(use: Settings) -> RewardPool | Rewards:
    from kitae.recipes._rewards import open_rewards

    return open_rewards(
        RewardSettings(
            function=use.reward,
            form=use.form,
            strict_form=use.strict_form,
            timeout_s=use.reward_timeout_s,
            on_error="mask",
        )
    )


# what is seen -------------------------------------------------------------------------------------------------


@contextmanager
def _stopping() -> Iterator[None]:
    """Inside it, a signal that ends the process ends the asking first, so that it can say how to go on."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(f"stopped by {signal.Signals(number).name}", signal_number=number)

    numbers = [
        n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN
    ]
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # outside the main thread Python allows no handlers
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _View:
    """Progress on standard error: one line rewritten on a terminal, else a line now and then."""

    def __init__(self, *, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._right = self._judged = self._tokens = self._live_tokens = 0
        self._is_terminal = sys.stderr.isatty()
        self._began, self._due = time.monotonic(), 0.0
        if done:
            print(f"{done:,} of {total:,} answers are there already", file=sys.stderr)

    def on_token(self) -> None:
        self._live_tokens += 1
        if self._is_terminal and time.monotonic() >= self._due:
            self._show()

    def update(self, answers: Sequence[Answer]) -> None:
        self._done += len(answers)
        self._judged += len(answers)
        self._right += sum(answer["label"] is True for answer in answers)
        self._tokens += sum(answer["num_tokens"] for answer in answers)
        if time.monotonic() >= self._due:
            self._show()

    def close(self) -> None:
        if self._judged:
            self._show(end="\n")

    def _show(self, end: str = "") -> None:
        from kitae.train.progress import duration

        wait = SECONDS_BETWEEN_LOOKS if self._is_terminal else SECONDS_BETWEEN_LINES
        self._due = time.monotonic() + wait
        spent = time.monotonic() - self._began
        tokens = max(self._tokens, self._live_tokens)
        parts = [f"{self._done:,} of {self._total:,} answers"]
        if self._judged:
            parts.append(f"{self._right / self._judged:.1%} right")
        if spent > 0:
            parts.append(f"{tokens / spent:,.0f} tokens/s")
        answered = self._done - self._before
        if answered and self._done < self._total:
            parts.append(f"{duration(spent / answered * (self._total - self._done))} left")
        start = "\r\x1b[K" if self._is_terminal else ""
        print(start + ", ".join(parts), end=end if self._is_terminal else "\n", file=sys.stderr, flush=True)


def _show(use: Settings, summary: dict[str, Any]) -> None:
    """The summary as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"{summary['output']}: {summary['kept']:,} rows"), title_justify="left", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    too_long = f" ({summary['too_long']} too long)" if summary["too_long"] else ""
    rows = [
        ("problems asked", f"{summary['problems']:,} of {summary['rows']:,}{too_long}"),
        ("answers", f"{summary['answers']:,}"),
        ("right", f"{summary['right']:,} ({summary['right_share']:.1%})"),
        ("problems solved at least once", f"{summary['solved']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        *((f"judged: {reason}", f"{count:,}") for reason, count in list(summary["reasons"].items())[:8]),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in summary["dropped"].items()),
        ("kept", f"{summary['kept']:,} rows of {summary['problems_kept']:,} problems"),
    ]
    for name, value in rows:
        table.add_row(Text(name), value)  # a reason is a user's text, not markup
    Console().print(table)
    if summary["kept"]:
        print(f"teach them: kitae train sft --model_name_or_path STUDENT --dataset_name {use.output}")


def _why_none(summary: dict[str, Any]) -> str:
    parts = [f"{count} {reason}" for reason, count in list(summary["dropped"].items())[:3]]
    kinds = [f"{count} {reason}" for reason, count in list(summary["reasons"].items())[:3]]
    return (
        f"of {summary['answers']} answers {', '.join(parts) or 'none came'} (judged: {', '.join(kinds)}); look at "
        f"{summary['output']}.asked.jsonl, and at the reward's form, min_reward and the teacher's system_prompt"
    )
