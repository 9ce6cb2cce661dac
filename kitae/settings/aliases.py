"""The one alias table: flags of other programs, and what each means here.

Five vocabularies: Hugging Face's (with TRL's), Colossal-AI's programs for each recipe, the consumer-GPU notebook's,
and LLaMA-Factory's. Where two programs give one flag different meanings, the recipe or the companions
of the flag decide: `-g` is gradient checkpointing for `sft` (lora_finetune.py) and generations for `grpo`
(rl_example.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kitae.settings.conversions import (
    DTYPES,
    LOG_LEVELS,
    OPTIMIZERS,
    SCHEDULES,
    Convert,
    cached,
    checkpointing,
    choice,
    metric,
    paths_of,
    separated,
    sequence_level,
    switch,
    texts_of,
    unless,
)

Effect = Literal["maps", "together", "warns", "limited"]

HF, NOTEBOOK, KITAE = "Hugging Face", "notebook", "kitae"
TRAIN_DPO = "train_dpo.py, train_kto.py, train_orpo.py, train_rm.py"
LLAMA_FACTORY = "LLaMA-Factory"
LORA_FINETUNE, TRAIN_GRPO, RL_EXAMPLE = "lora_finetune.py", "train_grpo.py", "rl_example.py"
TRAIN_PPO = "train_ppo.py"
SFT, GRPO, PPO, DISTILL, REWARD_MODEL = ("sft",), ("grpo",), ("ppo",), ("distill",), ("reward_model",)
PREFERENCE = ("dpo", "simpo", "kto", "orpo")
ROUNDS = (*GRPO, *PPO)
RECIPES = (*SFT, *ROUNDS, *DISTILL, *PREFERENCE, *REWARD_MODEL)
USE = ("evaluate", "generate", "chat", "serve", "sample")


PLUGIN = "warns: ranks shard by FSDP2 by themselves, nothing to choose; zero2_cpu: offload is not there yet"


@dataclass(frozen=True, kw_only=True)
class Alias:
    """One flag of another program, in all its spellings."""

    flags: tuple[str, ...]
    source: str
    commands: tuple[str, ...]
    effect: Effect
    to: str = ""
    """maps: our setting. together: the setting or settings it decides with its companions. Else empty."""
    note: str = ""
    """What a reader of the table should know; for warns and limited, the reason that is shown."""
    convert: Convert | None = None
    is_switch: bool = False
    """Takes no value, or true or false."""

    @property
    def names(self) -> tuple[str, ...]:
        """As words.Flag.name has them: without the dashes of a long flag."""
        return tuple(f[2:].replace("-", "_") if f.startswith("--") else f for f in self.flags)

    @property
    def key(self) -> str:
        """The name rules know it by: its first long spelling."""
        return next((n for n in self.names if not n.startswith("-")), self.names[0])


def for_command(command: str) -> dict[str, Alias]:
    """Every alias of a recipe or command by name; the earlier of TABLE wins."""
    found: dict[str, Alias] = {}
    for alias in TABLE:
        if command in alias.commands:
            for name in alias.names:
                found.setdefault(name, alias)
    return found


# how a table is written --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """Makes the entries of one vocabulary. `flags` lists all spellings of one flag with blanks between."""

    source: str
    commands: tuple[str, ...]

    def maps(
        self, flags: str, to: str, convert: Convert | None = None, *, note: str = "", is_switch: bool = False
    ) -> Alias:
        return self._make(flags, "maps", to=to, convert=convert, note=note, is_switch=is_switch)

    def switch(self, flags: str, to: str, *, on: str | bool = True, off: str | bool = False) -> Alias:
        """A switch, and what our setting becomes by it."""
        return self.maps(flags, to, lambda value: on if switch(value) else off, is_switch=True)

    def together(self, flags: str, to: str, note: str, *, is_switch: bool = False) -> Alias:
        """Its meaning depends on other flags or on the machine: see rules.py and rl_rules.py."""
        return self._make(flags, "together", to=to, note=note, is_switch=is_switch)

    def warns(self, flags: str, reason: str, *, is_switch: bool = False) -> Iterable[Alias]:
        """Flags without effect here, for one reason."""
        return [self._make(flag, "warns", note=reason, is_switch=is_switch) for flag in flags.split()]

    def limited(self, flags: str, what: str, *, is_switch: bool = False) -> Alias:
        """Only 1 (or false) can be had; more is refused."""
        return self._make(flags, "limited", note=what, is_switch=is_switch)

    def _make(self, flags: str, effect: Effect, **rest: Any) -> Alias:
        return Alias(
            flags=tuple(flags.split()), source=self.source, commands=self.commands, effect=effect, **rest
        )


def _hugging_face() -> list[Alias]:
    a = _Writer(HF, RECIPES)
    return [
        a.maps("--model_name_or_path", "model.name_or_path"),
        a.maps("--tokenizer_name --tokenizer_name_or_path", "model.tokenizer"),
        a.maps("--model_revision", "model.revision"),
        a.maps("--torch_dtype --dtype", "model.dtype", choice(DTYPES)),
        a.switch("--load_in_4bit", "model.quantization", on="nf4", off="none"),
        a.limited("--load_in_8bit", "8-bit base weights", is_switch=True),
        a.maps("--gradient_checkpointing", "model.gradient_checkpointing", checkpointing, is_switch=True),
        a.together(
            "--activation_offloading",
            "model.gradient_checkpointing",
            "offload, also beside --gradient_checkpointing true",
            is_switch=True,
        ),
        a.switch("--torch_compile", "model.torch_compile"),
        a.maps("--dataset_name --train_file", "data.train", paths_of),
        a.maps("--validation_file --eval_file", "data.eval", paths_of),
        a.maps("--dataset_train_split --split", "data.split"),
        a.maps("--dataset_test_split", "data.eval_split"),
        a.maps("--max_train_samples", "data.max_rows"),
        a.maps("--max_eval_samples", "eval.max_rows"),
        a.maps("--chat_template_path", "data.template"),
        a.switch("--overwrite_output_dir", "overwrite"),
        a.together("--resume_from_checkpoint", "resume", "true, or a folder inside the output directory"),
        a.maps("--max_steps", "train.max_steps", unless("-1")),
        a.maps("--per_device_eval_batch_size", "eval.batch_size"),
        a.maps("--optim", "optim.name", choice(OPTIMIZERS)),
        a.maps("--adam_beta1", "optim.beta1"),
        a.maps("--adam_beta2", "optim.beta2"),
        a.maps("--adam_epsilon", "optim.epsilon"),
        a.maps("--lr_scheduler_type", "optim.lr_scheduler", choice(SCHEDULES)),
        a.together("--bf16", "model.dtype", "bfloat16 where the device is fast in it, else a warning", is_switch=True),
        a.together("--fp16", "model.dtype", "float16 where the device is fast in it, else a warning", is_switch=True),
        a.together("--use_peft", "lora.rank", "rank 16 and alpha 32 where none are given", is_switch=True),
        a.maps("--lora_r --lora_rank", "lora.rank"),
        a.maps("--lora_alpha", "lora.alpha"),
        a.maps("--lora_dropout", "lora.dropout"),
        a.maps("--lora_target_modules", "lora.target_modules", separated),
        a.switch("--use_rslora", "lora.use_rslora"),
        a.together("--logging_steps", "log.steps", "also how often to evaluate where eval_steps is missing"),
        a.maps("--logging_dir", "log.tensorboard_dir"),
        a.maps("--log_level", "log.level", choice(LOG_LEVELS)),
        a.maps("--run_name", "log.run_name"),
        a.together("--report_to", "log.report_to", "tensorboard, wandb, all or none"),
        a.together("--save_strategy", "save.steps", "steps, best or no; epoch is refused"),
        a.together("--save_steps", "save.steps", "every so many optimizer steps"),
        a.maps("--save_total_limit", "save.keep"),
        a.switch("--load_best_model_at_end", "save.final", on="best", off="last"),
        a.maps("--metric_for_best_model", "save.metric", metric),
        a.switch("--greater_is_better", "save.metric_mode", on="max", off="min"),
        a.together("--evaluation_strategy --eval_strategy", "eval.steps", "steps or no; epoch is refused"),
        a.together("--do_eval", "eval.steps", "as --eval_strategy steps", is_switch=True),
        a.together("--eval_steps", "eval.steps", "every so many optimizer steps"),
        a.switch("--eval_on_start", "eval.at_start"),
        *a.warns(
            "--dataloader_num_workers --dataloader_prefetch_factor",
            "rows are rendered once and kept on disk, no loader processes are needed",
        ),
        *a.warns(
            "--dataloader_pin_memory --dataloader_drop_last --remove_unused_columns --group_by_length",
            "rows are packed end to end and none is dropped",
            is_switch=True,
        ),
        *a.warns("--packing --padding_free", "rows are always packed", is_switch=True),
        *a.warns(
            "--completion_only_loss --assistant_only_loss",
            "assistant turns are always the only target",
            is_switch=True,
        ),
        *a.warns("--tf32", "kitae leaves float32 matrix products at full precision", is_switch=True),
        *a.warns("--attn_implementation --gradient_checkpointing_kwargs", "kitae has one way of its own"),
        *a.warns("--use_liger_kernel", "kitae has a chunked head of its own", is_switch=True),
        *a.warns(
            "--deepspeed --fsdp --fsdp_config --ddp_backend --ddp_find_unused_parameters --ddp_timeout",
            "ranks shard by FSDP2 by themselves",
        ),
        *a.warns("--local_rank --local-rank", "ranks are told by torchrun or kitae launch"),
        *a.warns(
            "--do_train --disable_tqdm --logging_first_step --log_completions --include_tokens_per_second",
            "kitae always does what suits it",
            is_switch=True,
        ),
        *a.warns("--logging_strategy", "logging goes by steps"),
        *a.warns("--push_to_hub --auto_find_batch_size --use_vllm", "kitae has nothing like it", is_switch=True),
        *a.warns("--hub_model_id --hub_token --neftune_noise_alpha --label_smoothing_factor", "kitae has nothing like it"),
        *a.warns("--bnb_4bit_quant_type --bnb_4bit_compute_dtype", "4-bit weights are nf4, computed in model.dtype"),
        *a.warns("--use_bnb_nested_quant", "4-bit scales are stored as they are", is_switch=True),
    ]  # fmt: skip


def _hugging_face_sft() -> list[Alias]:
    a = _Writer(HF, (*SFT, *DISTILL, *PREFERENCE, *REWARD_MODEL))
    return [a.maps("--max_seq_length --max_seq_len --model_max_length", "data.max_length")]


def _hugging_face_distill() -> list[Alias]:
    a = _Writer(HF, DISTILL)
    return [
        a.maps("--teacher_model_name_or_path --teacher_model", "teacher.name_or_path"),
        a.maps("--teacher_model_revision", "teacher.revision"),
        a.maps("--lmbda", "distill.on_policy_share"),
        a.together("--beta", "distill.divergence, distill.beta", "0 is forward_kl, 1 reverse_kl, between them jsd"),
        a.maps("--temperature", "rollout.temperature", note="TRL's GKD compares distributions at temperature 1"),
        a.maps("--stop_strings --stop_words", "rollout.stop", texts_of),
        a.maps("--max_completion_length", "rollout.max_new_tokens"),
        a.maps("--seq_kd", "teacher.name_or_path", sequence_level, note="false only: see kitae sample", is_switch=True),
        *a.warns("--teacher_model_init_kwargs", "settings of the teacher are teacher.*"),
        *a.warns("--disable_dropout", "dropout is that of the model and of lora.dropout", is_switch=True),
    ]  # fmt: skip


def _hugging_face_preference() -> list[Alias]:
    a = _Writer(HF, (*PREFERENCE, *REWARD_MODEL))
    with_reference = _Writer(HF, ("dpo", "kto"))
    return [
        _Writer(HF, REWARD_MODEL).maps("--center_rewards_coefficient", "reward_model.center_coef", unless("none")),
        _Writer(HF, ("dpo",)).maps("--rpo_alpha", "dpo.nll_coef"),
        _Writer(HF, ("simpo",)).maps("--cpo_alpha", "simpo.nll_coef"),
        _Writer(HF, ("simpo",)).maps("--simpo_gamma", "simpo.gamma"),
        _Writer(HF, ("orpo",)).maps("--beta --lambda", "orpo.odds_coef"),
        *(
            _Writer(HF, (recipe,)).maps(
                "--precompute_ref_log_probs", f"{recipe}.reference", cached, is_switch=True
            )
            for recipe in ("dpo", "kto")
        ),
        *with_reference.warns("--ref_model --ref_model_name_or_path", "the reference is the model the run starts from"),
        *with_reference.warns(
            "--precompute_ref_batch_size --ref_model_mixup_alpha --ref_model_sync_steps --f_divergence_type",
            "kitae has nothing like it",
        ),
        *with_reference.warns(
            "--sync_ref_model --reference_free --use_weighting --force_use_ref_model",
            "kitae has nothing like it",
            is_switch=True,
        ),
        *_Writer(HF, ("simpo", "kto", "orpo")).warns("--loss_type", "the recipe's name says which loss it is"),
        *a.warns("--truncation_mode", "completions lose their end, and too long prompts are dropped"),
        *a.warns("--max_completion_length", "data.max_length limits prompt and completion together"),
        *a.warns("--disable_dropout", "dropout is that of the model and of lora.dropout", is_switch=True),
        *a.warns("--generate_during_eval", "evaluation is on held-out pairs", is_switch=True),
    ]  # fmt: skip


def _llama_factory() -> list[Alias]:
    return [
        *(
            _Writer(LLAMA_FACTORY, (recipe,)).maps("--pref_beta", to)
            for recipe, to in (
                ("dpo", "dpo.beta"), ("simpo", "simpo.beta"), ("kto", "kto.beta"), ("orpo", "orpo.odds_coef"),
            )
        ),
        *(_Writer(LLAMA_FACTORY, (recipe,)).maps("--pref_ftx", f"{recipe}.nll_coef") for recipe in ("dpo", "simpo")),
        _Writer(LLAMA_FACTORY, ("dpo",)).maps("--dpo_label_smoothing", "dpo.label_smoothing"),
        _Writer(LLAMA_FACTORY, ("dpo",)).maps("--pref_loss", "dpo.loss_type"),
        *_Writer(LLAMA_FACTORY, ("simpo", "kto", "orpo")).warns("--pref_loss", "the recipe's name says which loss it is"),
        _Writer(LLAMA_FACTORY, ("kto",)).maps("--kto_chosen_weight", "kto.desirable_weight"),
        _Writer(LLAMA_FACTORY, ("kto",)).maps("--kto_rejected_weight", "kto.undesirable_weight"),
        _Writer(LLAMA_FACTORY, (*SFT, *PREFERENCE, *REWARD_MODEL)).maps("--cutoff_len", "data.max_length"),
        *_llama_factory_common(),
    ]  # fmt: skip


def _llama_factory_common() -> list[Alias]:
    a = _Writer(LLAMA_FACTORY, RECIPES)
    return [
        a.together(
            "--finetuning_type", "lora.rank", "lora: rank 8 where none is given, alpha twice the rank; full: all weights"
        ),
        a.maps("--lora_target", "lora.target_modules", lambda v: separated("all-linear" if v == "all" else v)),
        a.maps("--quantization_bit", "model.quantization", choice({"4": "nf4", "none": "none"}), note="4; not 8 or others"),
        a.maps("--val_size", "data.hold_out", note="a share of the rows"),
        a.maps("--max_samples", "data.max_rows"),
        *a.warns("--stage", "the recipe's name says which stage it is"),
        *a.warns("--dataset_dir", "name the files themselves, as in --dataset_name rows.jsonl"),
        *a.warns("--flash_attn", "packed attention is always on"),
        *a.warns("--preprocessing_num_workers", "rows are rendered once and kept on disk"),
        *a.warns("--overwrite_cache", "rows are rendered anew whenever they changed", is_switch=True),
        *a.warns("--plot_loss --save_only_model", "kitae always does what suits it", is_switch=True),
    ]  # fmt: skip


def _train_dpo() -> list[Alias]:
    a = _Writer(TRAIN_DPO, (*PREFERENCE, *REWARD_MODEL))
    return [
        a.maps("--pretrain", "model.name_or_path"),
        a.maps("--tokenizer_dir", "model.tokenizer"),
        a.maps("--dataset", "data.train", paths_of),
        a.maps("--eval_dataset", "data.eval", paths_of),
        a.together("--plugin", "", PLUGIN),
        a.maps("--save_dir", "output_dir"),
        a.maps("--log_dir", "log.tensorboard_dir"),
        a.maps("--max_epochs", "train.num_train_epochs"),
        a.maps("--batch_size", "train.per_device_train_batch_size"),
        a.maps("--accumulation_steps", "train.gradient_accumulation_steps"),
        a.maps("--lr", "optim.learning_rate"),
        a.maps("--grad_clip", "optim.max_grad_norm"),
        a.maps("--save_interval", "save.steps"),
        a.together("--use_wandb", "log.report_to", "adds wandb", is_switch=True),
        a.together("--mixed_precision", "model.dtype", "bf16 or fp16, as --bf16 and --fp16"),
        a.maps("--grad_checkpoint", "model.gradient_checkpointing", checkpointing, is_switch=True),
        a.maps("--lora_train_bias", "lora.bias"),
        _Writer(TRAIN_DPO, ("orpo",)).maps("--lam", "orpo.odds_coef"),
        *a.warns("--use_flash_attn", "packed attention is always on", is_switch=True),
        *a.warns("--merge_lora_weights", "adapters are saved as they are"),
        *a.warns("--model_type", "the model's folder says what it is"),
        *a.warns("--config_file", "the settings of a run are written to run.json in its folder"),
        *a.warns("--checkpoint_path --lora_config", "use --resume, and --lora_rank with its companions"),
        *a.warns("--enable_reference_model", "the recipe's name says whether there is a reference"),
        *a.warns("--disable_reference_model", "the recipe's name says whether there is a reference", is_switch=True),
        *_colossal_parallel(a),
    ]  # fmt: skip


def _hugging_face_rounds() -> list[Alias]:
    a = _Writer(HF, ROUNDS)
    batch = "rollout.prompts_per_round, rollout.rows_per_forward"
    return [
        a.together(
            "--per_device_train_batch_size", batch,
            "completions: x accumulation x ranks / num_generations (must divide) x updates_per_round = prompts per round; "
            "rows per forward where logits_forward_batch_size is missing",
        ),
        a.together("--gradient_accumulation_steps", batch, "see per_device_train_batch_size"),
        a.maps("--max_completion_length --response_length", "rollout.max_new_tokens"),
        a.maps("--temperature", "rollout.initial_temperature"),
        a.maps("--num_iterations --num_ppo_epochs --ppo_epochs", "rollout.epochs_per_round"),
        a.maps("--steps_per_generation --num_mini_batches", "rollout.updates_per_round"),
        a.maps("--logits_forward_batch_size --local_rollout_forward_batch_size", "rollout.rows_per_forward"),
        a.switch("--mask_truncated_completions", "rollout.mask_truncated"),
        a.together(
            "--reward_funcs --reward_functions", "reward.function, reward.extra",
            "the first is reward.function, others are added with their weights",
        ),
        a.together("--reward_weights", "reward.weight, reward.extra", "one per name in --reward_funcs; 1 where not given"),
        a.maps("--stop_strings --stop_words", "rollout.stop", texts_of),
        a.maps("--reward_model_path", "reward.function"),
        *a.warns("--max_seq_length", "rounds have max_prompt_length and max_completion_length"),
    ]  # fmt: skip


def _hugging_face_grpo() -> list[Alias]:
    a = _Writer(HF, GRPO)
    return [
        a.maps("--beta", "grpo.kl_coef"),
        a.together(
            "--generation_kwargs", "rollout.*", "JSON with temperature, top_p, top_k, min_p, and stop or stop_strings"
        ),
        a.together("--epsilon", "grpo.clip_low, grpo.clip_high", "both sides, unless epsilon_high is given"),
        a.together("--epsilon_high", "grpo.clip_high", "the upper side; with cispo the largest weight, 1 + clip_high"),
        a.together(
            "--loss_type", "grpo.average, grpo.objective", "grpo sequence; dapo, bnpo token; dr_grpo constant; cispo token"
        ),
        a.maps(
            "--scale_rewards", "grpo.scale_by_std",
            choice({"true": "group", "group": "group", "batch": "batch", "false": "none", "none": "none"}),
        ),
        a.maps("--importance_sampling_level", "grpo.ratio"),
        a.maps("--delta", "grpo.dual_clip", lambda v: 0.0 if str(v).lower() == "none" else v),
        a.maps("--entropy_coef", "grpo.entropy_coef"),
        a.together(
            "--sync_ref_model", "grpo.ref_refresh_rounds", "with ref_model_sync_steps (512), in whole rounds",
            is_switch=True,
        ),
        a.together("--ref_model_sync_steps", "grpo.ref_refresh_rounds", "see sync_ref_model"),
        *a.warns("--ref_model_mixup_alpha", "a refreshed reference is the policy, nothing is mixed"),
        *a.warns(
            "--vllm_importance_sampling_mode --vllm_importance_sampling_clip_max --vllm_importance_sampling_cap "
            "--vllm_importance_sampling_clip_min --vllm_importance_sampling_correction",
            "kitae samples itself; grpo.is_cap bounds token weights (token_truncate)",
        ),
        *a.warns(
            "--top_entropy_quantile --off_policy_mask_threshold --use_bias_correction_kl --multi_objective_aggregation",
            "kitae has nothing like it",
        ),
    ]  # fmt: skip


def _hugging_face_ppo() -> list[Alias]:
    a = _Writer(HF, PPO)
    return [
        a.maps("--sft_model_path", "model.name_or_path"),
        a.maps("--init_kl_coef", "ppo.kl_coef"),
        a.maps("--target", "ppo.target_kl"),
        a.maps("--horizon", "ppo.kl_horizon"),
        a.together("--cliprange", "ppo.clip_low, ppo.clip_high", "both sides"),
        a.maps("--cliprange_value", "ppo.value_clip"),
        a.maps("--vf_coef", "ppo.value_coef"),
        *a.warns("--stop_token", "completions end at the end tokens of model and template"),
        *a.warns("--kl_estimator", "the penalty in the reward is log pi - log pi_ref (k1)"),
        *a.warns("--total_episodes", "count in optimizer steps (max_steps) or passes over the prompts (num_train_epochs)"),
    ]  # fmt: skip


def _lora_finetune() -> list[Alias]:
    a = _Writer(LORA_FINETUNE, SFT)
    return [
        a.maps("-m --pretrained", "model.name_or_path"),
        a.maps("-d --dataset", "data.train", paths_of),
        a.together("-p --plugin", "", PLUGIN),
        a.maps("--save_dir", "output_dir"),
        a.maps("--tensorboard_dir", "log.tensorboard_dir"),
        a.maps("-n --num_epochs", "train.num_train_epochs"),
        a.maps("--accumulation_steps", "train.gradient_accumulation_steps"),
        a.maps("--batch_size", "train.per_device_train_batch_size"),
        a.maps("--lr", "optim.learning_rate"),
        a.maps("--grad_clip", "optim.max_grad_norm"),
        a.together("--mixed_precision", "model.dtype", "bf16 or fp16, as --bf16 and --fp16"),
        a.maps("-g --use_grad_checkpoint", "model.gradient_checkpointing", checkpointing, is_switch=True),
        *a.warns("--config_file", "the settings of a run are written to run.json in its folder"),
        *a.warns("-f --use_flash_attn", "packed attention is always on", is_switch=True),
        *a.warns("--microbatch_size", "it cuts a pipeline's batch, and there is no pipeline"),
        *_colossal_parallel(a),
    ]


def _train_grpo() -> list[Alias]:
    a = _Writer(TRAIN_GRPO, ROUNDS)
    return [
        a.maps("--pretrain", "model.name_or_path"),
        a.maps("--tokenizer_dir", "model.tokenizer"),
        a.maps("--prompt_dataset", "data.train", paths_of),
        a.maps("--conversation_template_config", "data.template"),
        a.together("--plugin", "", PLUGIN),
        a.together(
            "-e --num_episodes", "train.max_steps",
            "train_grpo.py: rounds. rl_example.py: passes over the data (train.num_train_epochs)",
        ),
        a.together("--num_collect_steps", "rollout.prompts_per_round", "sampling steps of a round (2)"),
        a.together("--num_update_steps", "rollout.epochs_per_round", "passes over a round (5)"),
        a.together("--experience_batch_size", "rollout.prompts_per_round", "prompts of one sampling step and rank (16)"),
        a.together(
            "-tbs --train_batch_size", "rollout.updates_per_round",
            "train_grpo.py: completions per forward (16). rl_example.py: prompts per update and rank",
        ),
        a.together("--accumulation_steps", "rollout.updates_per_round", "forwards per optimizer step (8)"),
        a.maps("--lr -lr", "optim.learning_rate"),
        a.maps("--grad_clip", "optim.max_grad_norm"),
        a.maps("--max_length", "rollout.max_new_tokens", note="longest completion; train_grpo.py counts the prompt in"),
        a.maps("--max_seq_len", "rollout.max_prompt_length"),
        a.maps("--save_path", "output_dir"),
        a.maps("--log_dir", "log.tensorboard_dir"),
        a.together("--use_wandb", "log.report_to", "adds wandb", is_switch=True),
        a.maps("-si --save_interval", "save.steps"),
        a.together("--mixed_precision", "model.dtype", "bf16 or fp16, as --bf16 and --fp16"),
        a.maps("--grad_checkpoint", "model.gradient_checkpointing", checkpointing, is_switch=True),
        *a.warns("--use_flash_attn", "packed attention is always on", is_switch=True),
        *a.warns("--disable_loss_mask", "only completions are ever in the loss", is_switch=True),
        *a.warns("--max_tokens_thinking", "max_new_tokens limits thinking and answer together"),
        *a.warns("--ptx_dataset --ptx_batch_size --ptx_coef", "there is no pretraining term"),
        a.maps("--rm_checkpoint_path", "reward.function"),
        *a.warns("--rm_pretrain", "the reward model's folder says what it is made of"),
        *a.warns("--checkpoint_path --lora_config", "use --resume, and --lora_rank with its companions"),
        *_colossal_parallel(a),
    ]  # fmt: skip


def _train_ppo() -> list[Alias]:
    a = _Writer(TRAIN_PPO, PPO)
    return [
        a.maps("--critic_lr", "critic.learning_rate"),
        *a.warns("--critic_checkpoint_path", "use --resume, or name a model with --critic.name_or_path"),
    ]


def _rl_example() -> list[Alias]:
    a = _Writer(RL_EXAMPLE, GRPO)
    return [
        a.maps("-m --model", "model.name_or_path"),
        a.maps("-d --dataset", "data.train", paths_of),
        a.maps("-ed --eval_dataset", "data.eval", paths_of, note="a path, or JSON name -> path"),
        a.maps("-p --project", "log.wandb_project"),
        a.maps("-g", "rollout.num_generations"),
        a.together(
            "-ibs --inference_batch_size", "rollout.inference_batch_size",
            "completions sampled at once; no effect beside flags of rl_example.py, whose rounds are sized by -tbs",
        ),
        a.together(
            "-imbs --inference_microbatch_size", "rollout.inference_batch_size", "x num_generations: -imbs counts prompts"
        ),
        a.together("-tMbs --train_minibatch_size", "rollout.updates_per_round", "-tbs / -tMbs updates a round"),
        a.together("-tmbs --train_microbatch_size", "rollout.rows_per_forward", "completions per forward"),
        a.maps("-temp", "rollout.initial_temperature"),
        a.maps("-topk", "rollout.top_k", unless("none", "-1")),
        a.maps("-topp", "rollout.top_p"),
        a.maps("-s", "data.system_prompt"),
        a.maps("-mnt", "rollout.max_new_tokens"),
        a.maps("-mpt --max_prompt_tokens", "rollout.max_prompt_length"),
        a.together(
            "-a --algo", "grpo.*, rollout.*",
            "GRPO, RLOO, REINFORCE_PPB: each completion alike, advantage group, rloo or reinforce++. DAPO: clip 0.2/0.28, "
            "token average, dead groups refilled, truncated masked, soft overlong punishment over a quarter (at most "
            "1,024) of the tokens, no KL term",
        ),
        a.maps("-kl --kl_coeff", "grpo.kl_coef"),
        a.maps(
            "-rt --reward_type", "reward.form", choice({"think_answer_tags": "answer_tags", "boxed": "boxed"}),
            note="code is not there yet",
        ),
        a.together("-ei --eval_interval", "eval.steps", "-1 is never"),
        a.maps("-sd --save_dir", "output_dir"),
        *a.warns("-esd --eval_save_dir -rsd --rollout_save_dir", "they are written to samples.jsonl in the run's folder"),
        *a.warns(
            "-t --num_trainers -i --num_inferencer -nb --n_behind --ray_dir --master_address --master_port -b --backend",
            "every rank samples and trains in turn; start ranks with kitae launch",
        ),
        *a.warns("-zero --zero", "ranks shard by FSDP2 by themselves"),
        *a.warns("-cp", "use --resume"),
        *a.warns("-cv --code_verifier_api_url", "there is no code reward yet"),
        *a.warns("--enable_profiling", "kitae has nothing like it", is_switch=True),
        a.limited("-tp", "tensor parallelism"),
        a.limited("-pp", "pipeline parallelism"),
        a.limited("-ptp --producer_tensor_parallel_size", "tensor parallelism"),
    ]  # fmt: skip


def _colossal_parallel(a: _Writer) -> list[Alias]:
    return [
        a.limited("--tp", "tensor parallelism"),
        a.limited("--pp", "pipeline parallelism"),
        a.limited("--sp", "sequence parallelism"),
        a.limited("--ep", "expert parallelism"),
        a.limited("--zero_cpu_offload", "CPU offload", is_switch=True),
        a.limited("--hostfile", "starting ranks on several machines"),
        *a.warns("--zero_stage --sp_mode", "ranks shard by FSDP2 by themselves"),
        *a.warns("--enable_sequence_parallelism", "ranks shard by FSDP2 by themselves", is_switch=True),
    ]


def _notebook() -> list[Alias]:
    a = _Writer(NOTEBOOK, RECIPES)
    return [
        a.maps("--model_name", "model.name_or_path"),
        a.together("--data_files", "data.train, data.eval", 'a path, or {"train": ..., "test": ...}'),
        a.maps("--train_dataset", "data.train", paths_of),
        a.maps("--eval_dataset", "data.eval", paths_of),
        a.maps("--r", "lora.rank"),
        a.maps("--target_modules", "lora.target_modules", separated),
        a.maps("--bias", "lora.bias"),
        a.maps("--use_gradient_checkpointing", "model.gradient_checkpointing", checkpointing, note='also "unsloth"'),
        a.maps("--random_state", "lora.init_seed"),
        *a.warns("--loftq_config", "adapters start from zero"),
        *a.warns("--use_exact_model_name", "names are always exact", is_switch=True),
    ]  # fmt: skip


def _use() -> list[Alias]:
    a = _Writer(HF, USE)
    return [
        _Writer(KITAE, ("evaluate", "generate", "compare", "sample", "reward", "export")).maps("--json", "json_file"),
        _Writer(HF, ("sample",)).maps("--num_generations --num_return_sequences", "n"),
        _Writer(HF, ("sample",)).maps("--output_file", "output"),
        a.maps("--model_name_or_path", "model"),
        a.maps("--model_revision", "revision"),
        a.maps("--tokenizer_name --tokenizer_name_or_path --tokenizer_dir", "tokenizer"),
        a.maps("--torch_dtype", "dtype", choice(DTYPES)),
        a.switch("--load_in_4bit", "quantization", on="nf4", off="none"),
        a.maps("--max_tokens --max_completion_tokens --max_completion_length", "max_new_tokens"),
        a.maps("--stop_strings --stop_words", "stop", texts_of),
        a.together("--do_sample", "temperature", "false is temperature 0; true is 1 where none is given", is_switch=True),
    ]  # fmt: skip


TABLE: list[Alias] = [
    *_train_grpo(), *_lora_finetune(), *_hugging_face(), *_hugging_face_sft(), *_hugging_face_distill(),
    *_hugging_face_rounds(),
    *_hugging_face_grpo(), *_hugging_face_ppo(), *_train_ppo(), *_rl_example(),
    *_train_dpo(), *_hugging_face_preference(), *_llama_factory(),
    *_notebook(), *_use(),
]  # fmt: skip
