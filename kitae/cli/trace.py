"""Follow one row of data to its gradient, station by station: kitae trace run.toml --row 0."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kitae.cli import _help
from kitae.cli._open import warn_on_stderr
from kitae.cli._output import write_json
from kitae.errors import ConfigError, DataError
from kitae.plugins import names_in
from kitae.settings import resolve, settings_class

if TYPE_CHECKING:
    from kitae.data.chat import Template
    from kitae.data.formats import Example
    from kitae.train.learner import Learner
    from kitae.types import Batch, Problem, Row

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
TRACED = ("sft", "grpo")
SHOWN_TOKENS = 300
"""Tokens of a row that are listed one by one."""


class Prepared(NamedTuple):
    """What a recipe makes of one data row: training rows, and how their loss is taken."""

    rows: list[Row]
    denominator: float
    loss_fn: Any  # a loss of kitae/algos/losses.py with its settings bound
    temperature: float
    rows_per_forward: int


def main(argv: list[str]) -> int:
    """Print every station; nothing is written but the file of --json."""
    parser = argparse.ArgumentParser(prog="kitae trace", allow_abbrev=False, add_help=False)
    parser.add_argument("--row", default="0")
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--json", default=None)
    own, rest = parser.parse_known_args(argv)
    recipe = own.recipe or _recipe_of(rest)
    if recipe not in TRACED:
        raise ConfigError(
            f"kitae trace follows rows of {' and '.join(TRACED)}, not of {recipe}; see --recipe"
        )
    if _help.is_asked(argv):
        after = "Also: --row N (which data row, from 0), --recipe sft|grpo (default: by the file's tables), --json FILE."
        _help.show(settings_class(recipe), prog="kitae trace [run.toml] [--row N]", after=after)
        return 0
    if not own.row.isdigit():
        raise ConfigError(f"--row is {own.row!r}; it is the number of a data row, from 0")
    cfg, notes = resolve(recipe, rest)
    warn_on_stderr(notes.warnings)
    found = _Trace(recipe, cfg, number=int(own.row)).run()
    if own.json:
        write_json(own.json, found)
    return 0


def _recipe_of(words: Sequence[str]) -> str:
    """The recipe whose own table the settings file has; grpo where it only has tables of sampling, else sft."""
    files = [Path(word) for word in words if word.endswith(".toml") and Path(word).is_file()]
    try:
        tables = tomllib.loads(files[0].read_text(encoding="utf-8")) if files else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return "sft"  # resolve reads the file again, and says what is wrong with it
    named = next((name for name in names_in("kitae.recipes") if name in tables), None)
    return named or ("grpo" if {"rollout", "reward"} & set(tables) else "sft")


class _Trace:
    """Walks one data row through the parts a run uses, and says what each makes of it."""

    def __init__(self, recipe: str, cfg: Any, *, number: int) -> None:
        # cfg is Any: each recipe has its own Settings class.
        self._recipe, self._cfg, self._number = recipe, cfg, number
        self._found: dict[str, Any] = {"recipe": recipe, "row": number}
        self._has_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._station = 0

    def run(self) -> dict[str, Any]:
        """Print all stations and return them as JSON values."""
        from kitae.data.chat import Template
        from kitae.data.collate import collate
        from kitae.models.load import load_policy, load_tokenizer
        from kitae.parallel.world import start_world
        from kitae.recipes._run import default_system_prompt, seed_everything
        from kitae.train.learner import Learner

        cfg = self._cfg
        seed_everything(cfg.train.seed)
        example = self._read_example()
        default_prompt = default_system_prompt(cfg)
        template = Template.load(
            load_tokenizer(cfg.model), data=cfg.data, default_system_prompt=default_prompt
        )
        world = start_world(device=cfg.model.device)
        policy = load_policy(cfg.model, lora=cfg.lora)
        learner = Learner(policy, optim=cfg.optim, total_steps=1, world=world)
        prepare = self._prepare_grpo if self._recipe == "grpo" else self._prepare_sft
        prepared = prepare(example, template, learner)
        batches = collate(
            prepared.rows, rows_per_forward=prepared.rows_per_forward, temperature=prepared.temperature
        )
        self._show_rows(prepared, batches, template, learner)
        self._show_gradient(prepared, batches, learner)
        return self._found

    def _say(self, title: str, text: str) -> None:
        self._station += 1
        print(f"--- {self._station}. {title}\n{text}\n")

    def _read_example(self) -> Example:
        """The raw row, and what it is recognised as."""
        from kitae.data.formats import RowError, to_example

        data = self._cfg.data
        record, where = self._record()
        self._found |= {
            "source": where,
            "record": record if not isinstance(record, RowError) else str(record),
        }
        try:
            if isinstance(record, RowError):
                raise record
            purpose: Any = "rl" if self._recipe == "grpo" else "sft"
            example = to_example(record, data=data, purpose=purpose, source=where)
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
        self._say(f"the row as it is: {where}", json.dumps(record, ensure_ascii=False, default=str))
        turns = "\n".join(json.dumps(turn, ensure_ascii=False) for turn in example.messages)
        self._say(
            "normalised (sources, formats)",
            f"{turns}\nanswer: {example.answer!r}; columns: {example.columns}",
        )
        self._found |= {"messages": example.messages, "answer": example.answer}
        return example

    def _record(self) -> tuple[Any, str]:
        """The row of this number over all files (any JSON value, or why it cannot be read), and its file:line."""
        from kitae.data.files import expand
        from kitae.data.readers import read_records

        data, count = self._cfg.data, 0
        for file in expand(data.train, split=data.split):
            for record, where in read_records(file.path, name=file.name):
                if count == self._number:
                    return record, where
                count += 1
        raise DataError(
            f"--row is {self._number}, but {' '.join(data.train)} has {count} rows, numbered from 0"
        )

    def _prepare_sft(self, example: Example, template: Template, learner: Learner) -> Prepared:
        from kitae.algos import averaging, losses
        from kitae.recipes._losses import chosen_loss

        cfg = self._cfg
        rows = template.rows(example, max_length=cfg.data.max_length)
        if not rows:
            raise DataError(
                f"{example.source}: no target lies within data.max_length = {cfg.data.max_length} tokens"
            )
        weighed, denominator = averaging.weigh(rows, cfg.train.average)
        loss_fn = chosen_loss(cfg.loss, default=losses.cross_entropy, produces=[])
        return Prepared(weighed, denominator, loss_fn, 1.0, cfg.train.per_device_train_batch_size)

    def _prepare_grpo(self, example: Example, template: Template, learner: Learner) -> Prepared:
        """The rows of a group that is sampled and judged, as in the run's first round."""
        from kitae.algos import averaging
        from kitae.data.collate import collate
        from kitae.recipes import _variants as variants
        from kitae.recipes._losses import chosen_loss
        from kitae.recipes._reference import Reference

        cfg, temperature = self._cfg, self._cfg.rollout.initial_temperature
        problem = self._question(example, template)
        rows = [self._judged_group(problem, template, learner)]
        lay_out = partial(collate, rows_per_forward=cfg.rollout.rows_per_forward)
        if cfg.grpo.kl_coef:
            # Before the first step a full model is its own reference.
            scorer = learner if learner.policy.peft is None else learner.without_adapter()
            reference = Reference(scorer, collate=lay_out)
            rows = reference.annotate(rows, temperature=temperature)
        if cfg.grpo.is_cap:
            own = variants.OwnLogprobs(learner, collate=lay_out, cap=cfg.grpo.is_cap)
            rows, _ = own.annotate(rows, temperature=temperature)
        weighed, denominator = averaging.weigh(
            rows[0], cfg.grpo.average, max_tokens=cfg.rollout.max_new_tokens
        )
        loss_fn = chosen_loss(
            cfg.loss, default=variants.loss_of(cfg.grpo), produces=variants.streams_of(cfg.grpo)
        )
        return Prepared(weighed, denominator, loss_fn, temperature, cfg.rollout.rows_per_forward)

    def _question(self, example: Example, template: Template) -> Problem:
        cfg = self._cfg
        problem = template.problem(example, index=self._number, max_length=cfg.rollout.max_prompt_length)
        if problem is None:
            raise DataError(
                f"{example.source}: the prompt is longer than rollout.max_prompt_length = "
                f"{cfg.rollout.max_prompt_length} tokens; a run drops it"
            )
        self._say(
            "the question, rendered",
            f"{template.tokenizer.decode(problem.token_ids)}\nprefill: {problem.prefill!r}",
        )
        return problem

    def _judged_group(self, problem: Problem, template: Template, learner: Learner) -> list[Row]:
        """A group's rows, with its advantages."""
        from kitae.recipes import _variants as variants
        from kitae.recipes._judging import Judge
        from kitae.recipes._rewards import open_rewards
        from kitae.recipes._sampling import Sampler, rewards_of
        from kitae.recipes.grpo import to_rows
        from kitae.rollout.generic import GenericEngine

        cfg = self._cfg
        temperature, n = cfg.rollout.initial_temperature, cfg.rollout.num_generations
        engine = GenericEngine(
            learner.policy,
            stop_ids=template.stop_ids,
            decode=template.decode,
            max_rows=cfg.rollout.inference_batch_size,
        )
        sampler = Sampler(engine, learner=learner, rollout=cfg.rollout, seed=cfg.train.seed)
        groups = sampler.sample([problem], n=n, temperature=temperature, step=1)
        with open_rewards(cfg.reward, device=cfg.model.device, dtype=cfg.model.dtype) as rewards:
            scores = Judge(rewards).score(groups)
        rewards_PG = rewards_of(scores, num_generations=n)
        rewards_PG, _ = variants.shaped(rewards_PG, groups, cfg.rollout, world=learner.world)
        advantages_PG = variants.advantages_of(rewards_PG, cfg.grpo, world=learner.world)
        judged = zip(groups[0], scores[0], advantages_PG[0].tolist(), strict=True)
        lines = [
            f"{i}: reward {score.value} ({score.reason}), advantage {advantage:+.4f}, {rollout.finish_reason}: "
            f"{rollout.text!r}"
            for i, (rollout, score, advantage) in enumerate(judged)
        ]
        self._say(f"a group of {n} completions at temperature {temperature}, judged", "\n".join(lines))
        self._found["rewards"] = [score.value for score in scores[0]]
        self._found["advantages"] = advantages_PG[0].tolist()
        return to_rows(groups[0], scores[0], advantages_G=advantages_PG[0], rollout=cfg.rollout)

    def _show_rows(
        self, prepared: Prepared, batches: Sequence[Batch], template: Template, learner: Learner
    ) -> None:
        """Text, tokens, packing and the model's log-probabilities."""
        decode = template.tokenizer.decode
        mark = "green" if self._has_color else "between [[ and ]]"
        for number, row in enumerate(prepared.rows):
            first = row.prompt_length if number else 0  # rows of a group share their prompt
            text = "".join(
                self._marked(decode(ids), is_taught=is_taught) for is_taught, ids in _runs(row, first)
            )
            shared = f", the first {first} as above" if first else ""
            self._say(
                f"row {number}: {len(row.token_ids)} tokens{shared}, {row.num_taught} taught ({mark})", text
            )
        packed = [
            f"forward {number}: {b.packing.num_real_tokens} tokens padded to {b.packing.num_tokens}, "
            f"{len(b.source_N)} predictions; segments (start, length, prefix): "
            + ", ".join(f"({s.start}, {s.length}, {s.prefix_length})" for s in b.packing.segments)
            for number, b in enumerate(batches)
        ]
        self._say("packed (collate)", "\n".join(packed))
        logprobs = [value for logprobs_N in learner.logprobs(batches) for value in logprobs_N.tolist()]
        positions = [p for b in batches for p in b.positions_T[b.source_N.cpu()].tolist()]
        predictions = iter(zip(logprobs, positions, strict=True))
        self._found["rows"] = []
        for number, row in enumerate(prepared.rows):
            tokens = list(_tokens(row, decode=decode, predictions=predictions))
            self._found["rows"].append({"weight": row.weight, "tokens": tokens})
            self._say(f"row {number}, token by token", _table(tokens[row.prompt_length if number else 0 :]))

    def _show_gradient(self, prepared: Prepared, batches: list[Batch], learner: Learner) -> None:
        """Loss, gradient, and where the result would be kept."""
        from kitae.train.checkpoint import name_of

        metrics = learner.forward_backward(batches, prepared.loss_fn, denominator=prepared.denominator)
        loss = metrics["loss"]
        total = loss * prepared.denominator
        self._say(
            "loss",
            f"sum {total:.6f} / denominator {prepared.denominator:g} = {loss:.6f}\n"
            "(a step's denominator counts all its rows, on all ranks; here this row is alone)",
        )
        stepped = learner.optim_step()
        cfg = self._cfg
        limit = cfg.optim.max_grad_norm
        clipped = f"clipped to {limit:g}" if limit and stepped["grad_norm"] > limit else "not clipped"
        self._say(
            "gradient",
            f"norm {stepped['grad_norm']:.6f} over {learner.flat.grad.numel():,} numbers, {clipped}",
        )
        checkpoint = Path(cfg.output_dir) / "checkpoints" / name_of(cfg.save.steps or 1)
        when = f"every {cfg.save.steps} steps" if cfg.save.steps else "when the run ends or is interrupted"
        self._say("kept in", f"{checkpoint} ({when}); the final model lies in {cfg.output_dir}")
        self._found |= {
            "loss_sum": total,
            "denominator": prepared.denominator,
            "loss": loss,
            "grad_norm": stepped["grad_norm"],
            "checkpoint": str(checkpoint),
        }

    def _marked(self, text: str, *, is_taught: bool) -> str:
        if not is_taught:
            return text
        return f"{GREEN}{text}{PLAIN}" if self._has_color else f"[[{text}]]"


def _runs(row: Row, start: int) -> Iterator[tuple[bool, list[int]]]:
    """Stretches of tokens, from `start` on, that are all taught or all not."""
    for i in range(start + 1, len(row.token_ids) + 1):
        if i == len(row.token_ids) or row.loss_mask[i] != row.loss_mask[start]:
            yield row.loss_mask[start], row.token_ids[start:i]
            start = i


def _tokens(row: Row, *, decode: Any, predictions: Iterator[tuple[float, int]]) -> Iterator[dict[str, Any]]:
    """One record per token; a taught one with the position it is predicted from, and its log-probability.

    `decode` is the tokenizer's. Cross-entropy has a loss per token; other losses show the numbers they are made of.
    """
    for place, (token_id, is_taught) in enumerate(zip(row.token_ids, row.loss_mask, strict=True)):
        record: dict[str, Any] = {
            "place": place,
            "id": token_id,
            "text": decode([token_id]),
            "taught": is_taught,
        }
        if is_taught:
            logprob, position = next(predictions)
            record |= {"from": position, "logprob": logprob, "weight": row.weight}
            if not row.streams:
                record["loss"] = -logprob * row.weight
            record |= {name: values[place] for name, values in row.streams.items()}
        yield record


def _table(tokens: list[dict[str, Any]]) -> str:
    """Tokens as lines; of a long row the beginning and the end."""
    extra = next(
        ([k for k in t if k not in ("place", "id", "text", "taught")] for t in tokens if t["taught"]), []
    )
    lines = [f"{'place':>5} {'id':>7}  {'text':<14} " + " ".join(f"{name:>13}" for name in extra)]
    half = SHOWN_TOKENS // 2
    for i, token in enumerate(tokens):
        if len(tokens) > SHOWN_TOKENS and half <= i < len(tokens) - half:
            if i == half:
                lines.append(f"      ... {len(tokens) - 2 * half} more ...")
            continue
        numbers = " ".join(f"{token[name]:>13.5g}" for name in extra) if token["taught"] else ""
        lines.append(f"{token['place']:>5} {token['id']:>7}  {token['text']!r:<14} {numbers}".rstrip())
    return "\n".join(lines)
