"""What recipes/distill.py is made of: its data, the teacher, the student's completions, and the evaluation.

teacher's tokenizer == student's? --> live: a frozen model beside the student, asked one forward pass at a time
                                  --> stored: what is missing is scored first, then the store answers
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from kitae.algos.distillation import Divergence, distillation
from kitae.algos.losses import LossFn
from kitae.config import ModelSettings, RolloutSettings
from kitae.data.collate import empty_batch
from kitae.data.loader import Loader
from kitae.errors import ConfigError, ModelError
from kitae.models.divergence import LiveTeacher
from kitae.models.files import find_model, read_config
from kitae.models.fingerprint import model_fingerprint, vocabulary_fingerprint
from kitae.models.load import load_policy, load_tokenizer
from kitae.parallel import fsdp
from kitae.recipes._losses import chosen_loss
from kitae.recipes._sampling import Groups, Sampler
from kitae.recipes._setup import Evaluate, Setup
from kitae.recipes._summary import sample_records, summarise
from kitae.recipes.distill import Settings
from kitae.train.files import human
from kitae.train.learner import Learner
from kitae.train.memory import Passes
from kitae.train.progress import Ticker
from kitae.train.teacher_store import StoredTeacher, StoreFacts, TeacherStore
from kitae.types import Batch, Problem, Row, Score, TokenOutputs

log = logging.getLogger(__name__)

ITEMS_PER_SHARD = 512
"""Items per rank that the teacher scores before the store is written: what a kill can lose."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the steps take from: either or both."""

    rows: Loader[list[Row]] | None
    """Items with their own completions."""
    prompts: Loader[Problem] | None
    all_rows: Sequence[list[Row]]
    held_out: Sequence[Any] | None
    """For evaluation: rows where there are any, else prompts (Problem)."""

    @property
    def steps_per_epoch(self) -> int:
        loader = self.rows or self.prompts
        assert loader is not None
        return loader.steps_per_epoch


def open_data(cfg: Settings, setup: Setup) -> Data:
    """Rows and prompts as on_policy_share needs them, from the same files with the same hold-out."""
    share = cfg.distill.on_policy_share
    per_step = rows_per_step(cfg, setup)
    rows: Loader[list[Row]] | None = None
    prompts: Loader[Problem] | None = None
    held_out: Sequence[Any] | None = None
    all_rows: Sequence[list[Row]] = []
    if share < 1:
        all_rows, held_out = setup.data.rendered_rows(max_length=cfg.data.max_length)
        rows = setup.data.loader(all_rows, items_per_step=per_step)
    if share > 0:
        problems, unseen = setup.data.problems(
            max_prompt_length=cfg.rollout.max_prompt_length, purpose="rl" if share == 1 else "sft"
        )
        prompts = setup.data.loader(problems, items_per_step=per_step, name="prompts")
        held_out = unseen if rows is None else held_out
    return Data(rows=rows, prompts=prompts, all_rows=all_rows, held_out=held_out)


def rows_per_step(cfg: Settings, setup: Setup) -> int:
    """Rows, or prompts, of one optimizer step over all ranks."""
    batch = cfg.train
    return batch.per_device_train_batch_size * batch.gradient_accumulation_steps * setup.world.world_size


# the teacher ------------------------------------------------------------------------------------------------------


class RunTeacher:
    """The teacher of a run: checked when it is made, in memory after load(), and asked by the batches it is attached to."""

    def __init__(self, cfg: Settings, setup: Setup, *, data: Data) -> None:
        self._cfg, self._setup = cfg, setup
        self._teacher: LiveTeacher | StoredTeacher | None = None
        spec = cfg.distill
        self.how = Divergence(
            kind=spec.divergence, beta=spec.beta, temperature=spec.temperature, top_k=spec.top_k
        )
        self.num_columns = 0
        """Token ids below this are compared; both models have them."""
        self.model = None if cfg.teacher.name_or_path is None else self._teacher_settings()
        if self.model is not None:
            require_same_tokenizer(setup.template.tokenizer, self.model)
        self._students = vocabulary_size(cfg.model)
        self._store = None if spec.store is None else self._open_store(spec.store)
        if self._store is not None:
            self._fill(self._store, data=data)
            fingerprint = self._store.teacher_fingerprint
        else:
            assert self.model is not None, "neither a teacher nor a store"
            self.num_columns = self._shared_columns(self.model)
            fingerprint = _fingerprint(self.model)
        setup.run.identify(teacher=fingerprint)

    def load(self) -> None:
        """Bring a live teacher into memory; a store needs none."""
        if self._store is not None:
            self._teacher = StoredTeacher(store=self._store, how=self.how)
        else:
            assert self.model is not None
            self._teacher = self._live(self.model, num_columns=self.num_columns)

    def attach(self, batches: Sequence[Batch], *, is_sampled: bool = False) -> list[Batch]:
        """The batches with their teacher. Ranks with fewer get empty ones: a sharded teacher is asked by all alike."""
        ce_coef = None if self._cfg.loss else 0.0 if is_sampled else self._cfg.distill.ce_coef
        if isinstance(self._teacher, StoredTeacher):
            stored = replace(self._teacher, ce_coef=ce_coef)
            return [replace(batch, teacher=stored) for batch in batches]
        assert self._teacher is not None, "the teacher is not loaded"
        with_logprobs = is_sampled or bool(self._cfg.loss)
        live = replace(self._teacher, ce_coef=ce_coef, with_logprobs=with_logprobs)
        return [replace(batch, teacher=live) for batch in self._even(batches)]

    def _even(self, batches: Sequence[Batch]) -> list[Batch]:
        most = max(self._setup.world.gather_json(len(batches)))
        return [*batches, *(empty_batch() for _ in range(most - len(batches)))]

    def _teacher_settings(self) -> ModelSettings:
        own = self._cfg.teacher
        assert own.name_or_path is not None
        return self._setup.on_device(
            ModelSettings(
                name_or_path=own.name_or_path,
                revision=own.revision,
                dtype=own.dtype,
                device=self._cfg.model.device,
                quantization=own.quantization,
                trust_remote_code=own.trust_remote_code,
                seams=self._cfg.model.seams,
            )
        )

    def _shared_columns(self, model: ModelSettings) -> int:
        """Token ids that both models have; the vocabularies of some are padded further than others'."""
        theirs = vocabulary_size(model)
        columns = min(self._students, theirs)
        if self.how.top_k >= columns:
            raise ConfigError(
                f"distill.top_k is {self.how.top_k}, and the vocabulary has {columns} tokens; 0 compares all of them"
            )
        if self._students != theirs:
            log.info(
                "the student's vocabulary has %d columns, the teacher's %d: the first %d are compared",
                self._students, theirs, columns,
            )  # fmt: skip
        return columns

    def _live(self, model: ModelSettings, *, num_columns: int) -> LiveTeacher:
        policy = load_policy(model, trainable=False, ranks=self._setup.world.world_size)
        fsdp.shard(policy, self._setup.world)
        register_fsdp_forward_method(policy, "predicting")
        return LiveTeacher(policy=policy, how=self.how, num_columns=num_columns)

    # stored -------------------------------------------------------------------------------------------------------

    def _open_store(self, folder: str) -> TeacherStore:
        is_here = self.model is not None and Path(self.model.name_or_path).expanduser().is_dir()
        spec, teacher = self._cfg.distill, self._cfg.teacher
        return TeacherStore(
            folder,
            StoreFacts(
                teacher=teacher.name_or_path,
                revision=teacher.revision,
                teacher_fingerprint=_fingerprint(self.model) if is_here and self.model is not None else None,
                tokenizer_fingerprint=vocabulary_fingerprint(self._setup.template.tokenizer),
                temperature=spec.temperature,
                top_k=spec.top_k,
                dtype=spec.store_dtype,
            ),
        )

    def _fill(self, store: TeacherStore, *, data: Data) -> None:
        """Score what the store lacks; afterwards it has every row of the run."""
        if self._students < store.num_columns:
            raise ConfigError(
                f"distill.store {store.folder} holds distributions over {store.num_columns} tokens, and the student's "
                f"vocabulary has {self._students}; name another folder"
            )
        sources = [data.all_rows] if data.held_out is None else [data.all_rows, data.held_out]
        missing = [store.missing(items) for items in sources]
        lacking = sum(part.num_rows for part in missing)
        if lacking:
            if self.model is None:
                raise ConfigError(
                    f"distill.store {store.folder} lacks {lacking} of this run's rows, and there is no teacher to score "
                    "them; set teacher.name_or_path"
                )
            store.require(replace(store.facts, teacher_fingerprint=_fingerprint(self.model)))
            columns = store.num_columns or self._shared_columns(self.model)
            needed = store.require_space(missing)
            log.info(
                "distill.store %s: the teacher scores %d rows, which take %s",
                store.folder,
                lacking,
                human(needed),
            )
            self._setup.world.barrier()
            if self._setup.world.is_main:
                store.create(num_columns=columns)
            self._setup.world.barrier()
            store.refresh()
            teacher = self._live(self.model, num_columns=columns)
            for items, part in zip(sources, missing, strict=True):
                self._score(items, part.items, store=store, teacher=teacher)
            del teacher
            gc.collect()
            self._setup.world.barrier()
            store.refresh()
        else:
            log.info("distill.store %s has every row: no teacher is loaded", store.folder)
        self.num_columns = store.num_columns

    def _score(
        self, items: Sequence[list[Row]], numbers: list[int], *, store: TeacherStore, teacher: LiveTeacher
    ) -> None:
        """Every rank scores its share of these items, shard by shard; all take the same number of passes."""
        world = self._setup.world
        mine = numbers[world.rank :: world.world_size]
        most = -(-len(numbers) // world.world_size)
        tick = Ticker("rows scored by the teacher", total=len(mine))
        passes = Passes(teacher.policy, world)
        for first in range(0, most, ITEMS_PER_SHARD):
            rows = [row for i in mine[first : first + ITEMS_PER_SHARD] for row in items[i]]
            batches = self._setup.collate(rows, rows_per_forward=self._cfg.train.per_device_train_batch_size)
            found = passes.run(self._even(batches), teacher.top_k)
            if rows:
                taught = sum(row.num_taught for row in rows)
                ids_NK, logp_NB = (torch.cat(parts)[:taught] for parts in zip(*found, strict=True))
                store.append(rows, ids_NK, logp_NB)
            tick(min(first + ITEMS_PER_SHARD, len(mine)))


def require_same_tokenizer(own: Any, model: ModelSettings) -> None:
    """Refuse a teacher whose tokens are not the student's, before its weights are read. Any: transformers tokenizers."""
    ours, theirs = own.get_vocab(), load_tokenizer(model).get_vocab()
    if ours == theirs:
        return
    here, there = ({i: token for token, i in vocabulary.items()} for vocabulary in (ours, theirs))
    first = min(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    said = [repr(tokens[first]) if first in tokens else "no token" for tokens in (there, here)]
    raise ModelError(
        f"teacher.name_or_path {model.name_or_path} has another tokenizer than the student: id {first} is {said[0]} there "
        f"and {said[1]} here, so their distributions cannot be compared; take a teacher of the student's family, or learn "
        "from its texts (kitae sample, then kitae train sft)"
    )


def vocabulary_size(model: ModelSettings) -> int:
    """Columns of a model's head, from its config.json."""
    found = find_model(model.name_or_path, revision=model.revision, with_code=model.trust_remote_code)
    config = read_config(found.folder)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(f"{found.folder}/config.json has no vocab_size")
    return size


def _fingerprint(model: ModelSettings) -> str:
    return model_fingerprint(find_model(model.name_or_path, revision=model.revision))


# the student's completions ----------------------------------------------------------------------------------------


def is_on_policy(cfg: Settings, *, step: int) -> bool:
    """Whether a step samples: a coin that depends on seed and step only (arXiv:2306.13649, alg. 1)."""
    return random.Random(f"{cfg.train.seed}/{step}").random() < cfg.distill.on_policy_share


def make_sampler(cfg: Settings, setup: Setup, learner: Learner) -> Sampler:
    """Samples from the student's present weights: every step is a round of its own."""
    own = cfg.rollout.model_dump(exclude={"temperature"}) | {"prompts_per_round": rows_per_step(cfg, setup)}
    return setup.sampler(learner, RolloutSettings().model_copy(update=own))


def sampled_rows(
    cfg: Settings,
    setup: Setup,
    sampler: Sampler,
    problems: Sequence[Problem],
    teacher: RunTeacher,
    *,
    step: int,
) -> tuple[list[Row], dict[str, float]]:
    """Completions of the prompts as rows, and what they amounted to; each is written to samples.jsonl."""
    own = cfg.rollout
    groups = sampler.sample(problems, n=own.num_generations, temperature=own.temperature, step=step)
    unjudged = [[Score(None)] * len(group) for group in groups]
    records = setup.world.gather_json(sample_records(groups, unjudged))
    setup.run.samples(step, [record for theirs in records for record in theirs])
    found = _shape_of(groups, setup)
    return to_rows(groups, num_columns=teacher.num_columns), {
        f"rollout/{name}": value for name, value in found.items()
    }


def _shape_of(groups: Groups, setup: Setup) -> dict[str, float]:
    unjudged = [[Score(None)] * len(group) for group in groups]
    found = summarise(groups, unjudged, world=setup.world, is_reasoning=False)
    return {name: found[name] for name in ("completion_length", "truncated", "entropy")}


def to_rows(groups: Groups, *, num_columns: int) -> list[Row]:
    """Completions as training rows, up to the first id that the teacher does not have (a padded vocabulary's)."""
    rows = []
    for completion in (rollout for group in groups for rollout in group):
        prompt, ids = completion.problem.token_ids, completion.token_ids
        known = ids[: next((i for i, token in enumerate(ids) if token >= num_columns), len(ids))]
        if known:
            mask = [False] * len(prompt) + [True] * len(known)
            rows.append(Row(token_ids=prompt + known, loss_mask=mask, prompt_length=len(prompt)))
    return rows


# loss and evaluation ----------------------------------------------------------------------------------------------


def loss_functions(cfg: Settings) -> dict[bool, LossFn]:
    """The loss of steps on sampled completions (True), and of those on the data's own (False)."""
    if cfg.loss:
        own = chosen_loss(cfg.loss, default=distillation, produces=[])
        return {True: own, False: own}
    return {
        True: partial(distillation, is_sampled=True),
        False: partial(distillation, ce_coef=cfg.distill.ce_coef),
    }


def evaluator(
    cfg: Settings,
    setup: Setup,
    *,
    learner: Learner,
    teacher: RunTeacher,
    sampler: Sampler | None,
    data: Data,
) -> Evaluate | None:
    """eval/divergence on held-out rows, with eval/loss and eval/perplexity; else on completions of held-out prompts."""
    if data.held_out is None:
        return None
    mine = data.held_out[setup.world.rank :: setup.world.world_size]

    def measured(rows: Sequence[Row]) -> tuple[float, float]:
        """Divergence and cross-entropy, each a mean over the tokens of all ranks."""
        batches = setup.collate(rows, rows_per_forward=cfg.eval.batch_size)
        scored = learner._score(teacher.attach(batches), _divergence_and_logprob)
        sums = torch.zeros(3, dtype=torch.float64)
        for said_N2 in scored[: len(batches)]:
            sums += torch.tensor([*said_N2.double().sum(0).tolist(), len(said_N2)], dtype=torch.float64)
        divergence, logprob, tokens = setup.world.sum(sums.to(setup.world.device)).tolist()
        return divergence / max(tokens, 1), -logprob / max(tokens, 1)

    def on_rows() -> dict[str, float]:
        divergence, loss = measured([row for item in mine for row in item])
        perplexity = math.exp(min(loss, 700.0))
        return {"eval/divergence": divergence, "eval/loss": loss, "eval/perplexity": perplexity}

    def on_samples() -> dict[str, float]:
        assert sampler is not None
        # Step 0 is no training step, and the same at every evaluation.
        groups = sampler.sample(mine, n=1, temperature=cfg.rollout.temperature, step=0)
        found = _shape_of(groups, setup)
        divergence, _ = measured(to_rows(groups, num_columns=teacher.num_columns))
        shown = {f"eval/{name}": found[name] for name in ("completion_length", "truncated")}
        return {"eval/divergence": divergence, **shown}

    return on_rows if data.rows is not None else on_samples


def _divergence_and_logprob(out: TokenOutputs) -> Tensor:
    assert out.divergence_N is not None
    return torch.stack((out.divergence_N, out.logprobs_N), 1)
