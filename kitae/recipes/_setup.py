"""What every recipe needs around its loop: data, model, learner, sampler, judge, evaluators and reports.

A recipe asks for these in the order of its pipeline, so data errors come before any weights are read.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kitae import backends
from kitae.algos.losses import LossFn
from kitae.config import GroupRolloutSettings, ModelSettings, RewardSettings, RolloutSettings
from kitae.data.chat import Template
from kitae.data.collate import collate
from kitae.errors import NonFiniteError
from kitae.models import frozen, torch_compile
from kitae.models.estimate import MOMENT_BYTES
from kitae.models.load import load_policy
from kitae.models.lora import coverage, coverage_table, zero_gradient_adapters
from kitae.models.policy import Policy
from kitae.models.save import save_policy
from kitae.parallel import fsdp
from kitae.parallel.world import World
from kitae.recipes._data import RunData
from kitae.recipes._judging import Judge
from kitae.recipes._passes import most_tokens
from kitae.recipes._reference import FrozenModel, Reference, Scorer
from kitae.recipes._rewards import Rewards, open_rewards, part_means
from kitae.recipes._sampling import Groups, Sampler, Scores
from kitae.recipes._summary import sample_records, summarise
from kitae.rewards.pool import RewardPool
from kitae.rollout.background import BackgroundEngine
from kitae.rollout.choose import open_engine
from kitae.rollout.shapes import MODEL_TYPES
from kitae.train.learner import Learner
from kitae.train.progress import as_text
from kitae.train.run import Run
from kitae.types import Batch, Problem, Row

log = logging.getLogger(__name__)
Evaluate = Callable[[], dict[str, float]]


class Setup:
    """The parts of one run on this rank. Made by kitae/recipes/_run.py; `cfg` is the recipe's own Settings."""

    def __init__(self, cfg: Any, *, world: World, run: Run, template: Template) -> None:
        # cfg is Any: each recipe has its own Settings class, and shares the sections used here.
        self.cfg, self.world, self.run, self.template = cfg, world, run, template
        self.data = RunData(cfg, world=world, run=run, template=template)
        """Rows, pairs and prompts."""
        self._learner: Learner | None = None
        self._rewards: list[RewardPool | Rewards] = []
        self._background: BackgroundEngine | None = None
        self._also_saved: list[Callable[[Path], None]] = []
        self._seconds: dict[str, float] = {}
        self._step_began = 0.0
        self._compiled_s = 0.0
        self._context = math.inf
        self._checked: list[Policy] = []  # whose adapters were found to move

    def save_final(self, folder: Path) -> None:
        """Write the trained model, its tokenizer and template; every rank calls this, the first one writes."""
        assert self._learner is not None, "nothing was trained"
        tensors = self._learner.full_tensors()
        if self.world.is_main:
            save_policy(
                self._learner.policy, folder, tensors=tensors, max_shard_gib=self.cfg.save.max_shard_gib
            )
            self.template.save(folder)
        for save in self._also_saved:
            save(folder)

    def also_save(self, save: Callable[[Path], None]) -> None:
        """Something to be written beside the final model, in the same folder; every rank calls `save(folder)`."""
        self._also_saved.append(save)

    def close(self) -> None:
        """End what runs beside the recipe: the thread that samples ahead, and the reward processes."""
        if self._background is not None:
            self._background.close()
        for rewards in self._rewards:
            rewards.close()

    @property
    def _model(self) -> ModelSettings:
        return self.on_device(self.cfg.model)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest forward pass of an update."""
        return most_tokens(self.cfg, per_forward=backends.of(self.world.device).tokens_per_forward)

    def on_device(self, model: ModelSettings) -> ModelSettings:
        """A model's settings, on this rank's own device."""
        if self.world.device.type == "cpu":
            return model
        return model.model_copy(update={"device": str(self.world.device)})

    def total_steps(self, *, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run: train.max_steps, or the epochs' worth."""
        epochs = self.cfg.train.num_train_epochs
        return int(self.cfg.train.max_steps or max(1, round(steps_per_epoch * epochs)))

    # model ----------------------------------------------------------------------------------------------------

    def learner(self, *, total_steps: int, load: Callable[..., Policy] = load_policy) -> Learner:
        """Load the policy, spread it over the ranks, and give it an optimizer; part of every checkpoint.

        `load` is called as load_policy, for a model of another kind.
        """
        how: dict[str, Any] = {"optimizer": self.cfg.optim.name, "ranks": self.world.world_size}
        how["tokens_per_pass"] = self.most_tokens
        if getattr(getattr(self.cfg, "rollout", None), "engine", "generic") in ("auto", "native"):
            how["packed_types"] = MODEL_TYPES
        policy = load(self._model, lora=self.cfg.lora, **how)
        text = policy.causal_lm.config.get_text_config()
        self._context = getattr(text, "max_position_embeddings", None) or math.inf
        of_device = "native" if policy.device.type == "cpu" else "triton"
        kernels = of_device if policy.seams.kernels else "torch"
        self.run.identify(training_kernels=kernels, attention=policy.causal_lm.config._attn_implementation)
        if policy.peft is not None:
            log.info("%s", as_text(coverage_table(coverage(policy.causal_lm))))
        fsdp.shard(policy, self.world)
        self._learner = Learner(policy, optim=self.cfg.optim, total_steps=total_steps, world=self.world)
        moments = MOMENT_BYTES[self.cfg.optim.name] * self._learner.flat.grad.numel()
        self.run.track("learner", self._learner, grows_by=moments)
        if self.cfg.optim.warmup_steps >= total_steps:
            log.warning(
                "optim.warmup_steps is %d and the run has %d steps: the learning rate never reaches %g",
                self.cfg.optim.warmup_steps,
                total_steps,
                self.cfg.optim.learning_rate,
            )
        return self._learner

    def collate(
        self,
        rows: Sequence[Row],
        *,
        rows_per_forward: int,
        temperature: float = 1.0,
        rows_per_unit: int = 1,
    ) -> list[Batch]:
        """Rows as forward passes: of at most this many rows, and no more tokens than the device profits from."""
        if (longest := max((len(row.token_ids) for row in rows), default=0)) > self._context:
            log.warning(
                "a row has %s tokens, and the model's context is %s (max_position_embeddings): beyond it the model may "
                "know no positions; lower data.max_length",
                f"{longest:,}",
                f"{self._context:,}",
            )
            self._context = math.inf  # said once
        device = backends.of(self.world.device)
        return collate(
            rows,
            rows_per_forward=rows_per_forward,
            max_tokens=device.tokens_per_forward,
            temperature=temperature,
            rows_per_unit=rows_per_unit,
        )

    def update(
        self, learner: Learner, batches: Sequence[Batch], loss_fn: LossFn, *, denominator: float
    ) -> dict[str, float]:
        """One optimizer step on `batches`; the first that moves any adapter names those it does not move."""
        metrics = learner.forward_backward(batches, loss_fn, denominator=denominator)
        if learner.policy.peft is not None and learner.policy not in self._checked:
            self._check_adapters(learner.policy)
        try:
            return metrics | learner.optim_step()
        except NonFiniteError:
            self._dump(step=learner.step, batches=batches)
            raise

    def _check_adapters(self, policy: Policy) -> None:
        """Name the adapters that no rank has a gradient for, once some have one."""
        named = self.world.gather_json(zero_gradient_adapters(policy.causal_lm))
        still = sorted(set(named[0]).intersection(*named[1:]))
        if len(still) == sum(row.adapted for row in coverage(policy.causal_lm).rows):
            return
        self._checked.append(policy)
        if still:
            log.warning(
                "%d adapters got no gradient in the first step: %s", len(still), ", ".join(still[:20])
            )
            self.run.event("zero_gradient_adapters", names=still)

    def _dump(self, *, step: int, batches: Sequence[Batch]) -> None:
        """Write the rows of a step that broke, and the random state, to nonfinite-rank<r>.json."""
        rows = [row.token_ids for batch in batches for row in batch.rows]
        found = {
            "step": step,
            "rows": rows,
            "texts": [self.template.decode(ids) for ids in rows],
            "torch_rng_state": bytes(torch.get_rng_state().tolist()).hex(),
        }
        path = self.run.output_dir / f"nonfinite-rank{self.world.rank}.json"
        path.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
        log.error("the %d rows of step %d on rank %d are in %s", len(rows), step, self.world.rank, path)

    def reference(self, learner: Learner, *, rows_per_forward: int, is_renewed: bool = False) -> Reference:
        """The frozen start of the run: the adapter switched off, or for full fine-tuning a second copy.

        `is_renewed`: its renew() will be called, so its weights belong to checkpoints. A LoRA policy then was loaded with
        frozen.load_keeping_start.
        """
        policy = holder = learner.policy
        lay_out = partial(self.collate, rows_per_forward=rows_per_forward)
        scorer: Scorer = learner.without_adapter()
        if policy.peft is None:
            holder = load_policy(self._model, trainable=False, ranks=self.world.world_size)
            fsdp.shard(holder, self.world)
            scorer = FrozenModel(holder, world=self.world)
        if not is_renewed:
            return Reference(scorer, collate=lay_out)

        def pairs() -> list[frozen.Pair]:
            fsdp.drop_gathered(policy)
            fsdp.drop_gathered(holder)
            return frozen.adapter_pairs(policy) if holder is policy else frozen.model_pairs(holder, policy)

        weights = frozen.RenewedWeights(pairs)
        self.run.track("reference", weights)
        return Reference(scorer, collate=lay_out, renew=weights.renew)

    # sampling and judging -------------------------------------------------------------------------------------

    def sampler(self, learner: Learner, rollout: RolloutSettings) -> Sampler:
        """Samples from the learner's present weights; in a thread, with a copy of them, under rollout.rounds_ahead."""
        is_ahead = isinstance(rollout, GroupRolloutSettings) and rollout.rounds_ahead > 0
        rounds = learner.total_steps / (rollout.updates_per_round * rollout.epochs_per_round)
        completions = rollout.prompts_per_round * rollout.num_generations / self.world.world_size
        engine, name = open_engine(
            learner.policy,
            wanted=rollout.engine,
            setting="rollout.engine",
            expected_tokens=rounds * completions * rollout.max_new_tokens,
            stop_ids=self.template.stop_ids,
            decode=self.template.decode,
            max_rows=rollout.inference_batch_size,
            load_copy=partial(self._copy, learner.policy) if is_ahead else None,
            quantization=rollout.quantization,
            kv_cache_tokens=rollout.kv_cache_tokens,
        )
        self.run.identify(rollout_engine=name)
        how = {"learner": learner, "rollout": rollout, "seed": self.cfg.train.seed}
        if is_ahead:
            self._background = BackgroundEngine(engine, source=learner.policy)
        return Sampler(self._background or engine, **how)

    def _copy(self, policy: Policy) -> Policy:
        """A second policy with the parameters of this one, none of which trains."""
        has_adapter = policy.peft is not None
        ranks = self.world.world_size
        copy = load_policy(self._model, lora=self.cfg.lora, trainable=has_adapter, ranks=ranks)
        return copy.requires_grad_(False).eval()

    def judge(self, reward: RewardSettings) -> Judge:
        """What scores completions: worker processes for functions, and reward models on this rank's device."""
        model = self._model
        rewards = open_rewards(reward, device=model.device, dtype=model.dtype, ranks=self.world.world_size)
        self._rewards.append(rewards)
        return Judge(rewards)

    # evaluation -----------------------------------------------------------------------------------------------

    def loss_evaluator(self, learner: Learner, rows: Sequence[list[Row]] | None) -> Evaluate | None:
        """eval/loss and eval/perplexity of held-out rows; None where there are none."""
        if rows is None:
            return None
        mine = [row for item in rows[self.world.rank :: self.world.world_size] for row in item]

        def evaluate() -> dict[str, float]:
            batches = self.collate(mine, rows_per_forward=self.cfg.eval.batch_size)
            sums = torch.zeros(2, dtype=torch.float64)
            for logprobs_N in learner.logprobs(batches):
                sums += torch.tensor([-logprobs_N.double().sum(), len(logprobs_N)], dtype=torch.float64)
            total, tokens = self.world.sum(sums.to(self.world.device)).tolist()
            loss = total / tokens
            return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}

        return evaluate

    def accuracy_evaluator(
        self, sampler: Sampler, judge: Judge, problems: Sequence[Problem] | None
    ) -> Evaluate | None:
        """eval/accuracy (greedy), eval/reward and eval/format_rate of held-out problems; None where there are none."""
        if problems is None:
            return None
        mine = list(problems[self.world.rank :: self.world.world_size])

        def evaluate() -> dict[str, float]:
            judging = judge.begin()
            groups = sampler.greedy(mine, on_rollout=judging.see)
            found = summarise(
                groups, judging.scores(groups), world=self.world, is_reasoning=self._is_reasoning
            )
            right = torch.tensor(
                float(judge.num_right(groups)), dtype=torch.float64, device=self.world.device
            )
            found["accuracy"] = self.world.sum(right).item() / len(problems)
            shown = ("accuracy", "reward", "format_rate", "completion_length", "truncated")
            return {f"eval/{name}": found[name] for name in shown if name in found}

        return evaluate

    @property
    def _is_reasoning(self) -> bool:
        return bool(self.cfg.reward.function == "reasoning")

    # reports --------------------------------------------------------------------------------------------------

    def steps(self, total: int, *, evaluate: Evaluate | None) -> Iterator[int]:
        """run.steps, with a clock for tokens per second."""
        for step in self.run.steps(total, evaluate=evaluate):
            self._step_began, self._seconds = time.perf_counter(), {}
            self._compiled_s = torch_compile.seconds_spent() if self._model.torch_compile else 0.0
            yield step

    def report_round(self, step: int, groups: Groups, scores: Scores) -> dict[str, float]:
        """A round's metrics under rollout/; every completion of every rank goes to samples.jsonl."""
        gathered = self.world.gather_json(sample_records(groups, scores))
        records = [record for own in gathered for record in own]
        self.run.samples(step, records)
        if self.data.difficulty is not None:
            self.data.difficulty.see(step, records)
            if self.world.is_main:
                self.data.difficulty.write(self.run.output_dir / "difficulty.jsonl")
        found = summarise(groups, scores, world=self.world, is_reasoning=self._is_reasoning)
        found |= part_means(scores, world=self.world)
        if self.data.difficulty is not None and step == 1 and found["dead_groups"] == 1.0:
            log.warning(
                "nothing is learnt from the first round: in each of its groups all completions earned the same (mean %.3g); "
                "read samples.jsonl, and take easier problems, SFT first, or a higher rollout.initial_temperature",
                found["reward"],
            )
        return {f"rollout/{name}": value for name, value in found.items()}

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Log the seconds spent inside as time/<name>_s of this step."""
        began = time.perf_counter()
        yield
        key = f"time/{name}_s"
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - began

    def train_metrics(self, metrics: dict[str, float], batches: Sequence[Batch]) -> dict[str, float]:
        """The Learner's metrics under train/, with tokens per second and the share of padding, over all ranks."""
        counts = [
            sum(b.packing.num_real_tokens for b in batches),
            sum(b.packing.num_tokens for b in batches),
        ]
        real, padded = self.world.sum(
            torch.tensor(counts, dtype=torch.float64, device=self.world.device)
        ).tolist()
        elapsed = time.perf_counter() - self._step_began
        if self._model.torch_compile:
            self._seconds["time/compile_s"] = torch_compile.seconds_spent() - self._compiled_s
        named = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}
        return (
            named
            | self._seconds
            | {
                "perf/tokens_per_s": real / elapsed,
                "perf/padding_share": 1 - real / padded if padded else 0.0,
            }
        )
