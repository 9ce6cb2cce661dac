"""Settings sections: pydantic models with a docstring under each field.

One source for `--help`, the settings page, error messages and forms. A recipe composes the sections it needs
(kitae/recipes/*.py); kitae/settings reads TOML, flags and the vocabularies users bring into them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kitae.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: unknown names are refused, values are checked, docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        """Descriptions become one line each, which help pages break where the terminal ends."""
        for field in cls.model_fields.values():
            field.description = " ".join(field.description.split()) if field.description else None


class RunSettings(Section):
    """What the settings of every recipe begin with."""

    resume: bool = False
    """Go on from the newest complete checkpoint in output_dir."""
    overwrite: bool = False
    """Replace a run that is already in output_dir."""
    allow_inexact: bool = False
    """Resume although settings, data or machine differ from the interrupted run; the run is marked inexact."""


class SeamSettings(Section):
    """The extension points that make the unmodified model fast; each equals the plain module when off."""

    attention: bool = True
    """Packed rows: no padding is computed. Off: every row is run by itself with the model's own attention."""
    head: bool = True
    """Log-probs of only the tokens that count, in chunks. Off: full [tokens, vocabulary] logits."""
    experts: bool = True
    """Routed experts as sorted slices. Off: the model's own expert loop."""
    rmsnorm: bool = True
    """RMSNorm in one operation. Off: the model's own."""
    flex: bool = True
    """On a GPU, packed attention in training by torch's FlexAttention: compiled when the model is loaded, and used if it
    then gives what padded rows give. Off, and elsewhere: padded rows, or the kernels below."""
    kernels: bool = True
    """On a CPU, what a layer does beside its matrix products in C++ kernels, and in bfloat16 those too; the machine's
    compiler makes them when they are first needed (seconds, once). On a GPU, rotary embedding and gates in Triton. Off,
    without a compiler and under model.torch_compile: torch's operations."""


class ModelSettings(Section):
    """Which model, in what precision, on which device."""

    name_or_path: str
    """A Hugging Face model folder, a hub id, a kitae run directory, or an adapter folder."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute precision; auto takes bfloat16 where the device is fast in it, else float16 on a GPU and float32 on a CPU.
    Masters stay float32."""
    device: str = "auto"
    """auto, cpu, or a device of an available backend, such as cuda or npu."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 stores frozen linear weights in 4 bits (QLoRA); needs lora.rank > 0."""
    gradient_checkpointing: bool | Literal["offload", "auto"] = False
    """true recomputes each layer in the backward: less memory, about a third more time. offload also keeps what it
    recomputes from in the host's memory, which only an accelerator has apart. auto takes the first of false, true and
    offload whose largest pass is estimated to fit."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders whose code you have read."""
    torch_compile: bool = False
    """Compile the layers with torch.compile; the first step then takes half a minute or more, see time/compile_s. On a CPU
    it needs g++, and takes the place of model.seams.kernels."""
    seams: SeamSettings = SeamSettings()


class LoraSettings(Section):
    """Low-rank adapters, saved in peft's format. Rank 0 trains all weights instead."""

    rank: int = Field(0, ge=0, le=4096)
    """Rank of the adapters; larger learns more and costs more memory. 0 trains the full model."""
    alpha: float = Field(16.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Module names to adapt, such as q_proj and v_proj; all-linear takes every linear but the head, experts included."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train too, as in peft."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    init_seed: int = 0
    """Seed of the adapters' start values, which depend on each parameter's name only."""


class DataSettings(Section):
    """Where rows come from and how they become text."""

    train: list[str] = []
    """Files, globs, folders or hub names of the training rows (JSONL, JSON, CSV, Parquet)."""
    eval: list[str] = []
    """The same for evaluation rows; empty cuts hold_out rows from the training rows when evaluation is on."""
    split: str = "train"
    """Split of a hub data set, for training rows."""
    eval_split: str | None = None
    """Split of a hub data set, for evaluation rows."""
    weights: list[float] = []
    """One weight per entry of train: how often each source is drawn from. Empty: every row once per epoch."""
    columns: dict[str, str] = {}
    """Column mapping, ours = yours, such as prompt = "frage"; see the data page for our names."""
    target: Literal["auto", "think_answer", "as_is"] = "auto"
    """Teach worked solutions as <think>…</think><answer>…</answer> (think_answer) or as written; auto decides per row."""
    system_prompt: str | None = None
    """System turn put before every conversation without one; "" removes the form instruction of GRPO."""
    template: str | None = None
    """Chat template: a .jinja file, a Colossal-AI conversation template .json, or alpaca; default: the model's own."""
    max_length: int = Field(2048, ge=2)
    """Longest row in tokens; what is cut off is counted and logged."""
    hold_out: float = Field(0.05, ge=0, lt=1)
    """Share of training rows set apart for evaluation (at most 500 rows) when no evaluation data is given."""
    shuffle: bool = True
    """Draw rows in an order that depends on the seed and the epoch only."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error lists up to 100 bad rows and stops; skip counts them and goes on."""
    max_rows: int | None = Field(None, ge=1)
    """Use only the first rows of the training data."""


class PreferenceDataSettings(DataSettings):
    """Where rows come from and how they become text, for recipes that learn what is preferred."""

    max_prompt_length: int | None = Field(None, ge=1)
    """Rows with a longer prompt, in tokens, are dropped and counted. none: only those whose prompt leaves no room for a
    completion within max_length."""


class OptimSettings(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw keeps two float32 moments, adamw_8bit two in 8 bits, adafactor a factored second one."""
    learning_rate: float = Field(2e-5, ge=0)
    """Step size at the top of the schedule."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """The same as a share of all steps; warmup_steps wins where both are given."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """The schedule ends at this share of learning_rate."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient stops the run (exit 70), or skips that step, at most max_skipped times in a row."""
    max_skipped: int = Field(5, ge=1)
    """How many steps in a row on_nonfinite = skip may skip."""


class TrainSettings(Section):
    """How long to train, and what makes a run repeatable."""

    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training rows; max_steps wins where given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps to take."""
    seed: int = 42
    """Seed of everything random in the run."""
    early_stopping_patience: int = Field(0, ge=0)
    """Stop after this many evaluations without a better save.metric; 0 never stops early."""
    num_threads: int = Field(0, ge=0)
    """CPU threads for tensor work; 0 takes all cores this process may use. Part of exact reproducibility."""


class BatchTrainSettings(TrainSettings):
    """How long to train, on how many rows at a time, and what makes a run repeatable."""

    per_device_train_batch_size: int = Field(8, ge=1)
    """Most rows per forward pass and rank; a CPU also takes no more than 2,048 tokens at once. The result depends on rows
    per step only."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step; rows per step = this x per_device_train_batch_size x ranks."""
    average: Literal["token", "sequence"] = "token"
    """What a step averages over: every taught token alike, or every row alike."""


class PairTrainSettings(TrainSettings):
    """How long to train, on how many pairs at a time, and what makes a run repeatable."""

    per_device_train_batch_size: int = Field(8, ge=1)
    """Most pairs (kto: completions) per forward pass and rank; a CPU also takes no more than 2,048 tokens at once. The
    result depends on pairs per step only."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimizer step; pairs per step = this x per_device_train_batch_size x ranks."""


class EvalSettings(Section):
    """Evaluation during the run."""

    steps: int = Field(0, ge=0)
    """Evaluate every so many optimizer steps; 0 only at the end, and only where data.eval is given."""
    at_start: bool = False
    """Evaluate before the first step too."""
    batch_size: int = Field(8, ge=1)
    """Rows per forward pass in evaluation."""
    max_rows: int = Field(512, ge=1)
    """Evaluate on at most this many rows."""


class SaveSettings(Section):
    """Checkpoints and the final model."""

    steps: int = Field(0, ge=0)
    """Write a checkpoint every so many optimizer steps; 0 only when the run is interrupted or ends."""
    keep: int = Field(2, ge=1)
    """Complete checkpoints kept; older ones are removed."""
    final: Literal["last", "best"] = "last"
    """Which weights end at the top of the output directory: the last, or the best by save.metric."""
    metric: str = "eval/loss"
    """What "best" means: a metric name; see metric_mode."""
    metric_mode: Literal["auto", "min", "max"] = "auto"
    """Whether a smaller or a larger metric is better; auto: max for accuracy, reward and margin, else min."""
    max_shard_gib: float = Field(5.0, gt=0)
    """Size of the final model's safetensors shards."""


class LogSettings(Section):
    """What is written while the run goes on."""

    steps: int = Field(1, ge=1)
    """Write metrics every so many optimizer steps."""
    report_to: list[Literal["tensorboard", "wandb", "none"]] = ["tensorboard"]
    """Besides metrics.jsonl, which is always written."""
    tensorboard_dir: str | None = None
    """Where TensorBoard files go; default: tensorboard/ in the output directory."""
    wandb_project: str = "kitae"
    """Project name for Weights & Biases."""
    run_name: str | None = None
    """Name shown for this run; default: the output directory's name."""
    level: Literal["debug", "info", "warning"] = "info"
    """How much the log says."""
    health: bool = True
    """Say in one sentence what the numbers show to be going wrong, and which setting to change; see docs/health.md."""


def _non_empty(stop: list[str]) -> list[str]:
    if "" in stop:
        raise ValueError("an empty string is in every text; leave it out")
    return stop


class SamplingSettings(Section):
    """How one completion is sampled."""

    keeps_stop: ClassVar[bool] = False
    """Whether the text of a finished completion still has the string that ended it."""

    temperature: float = Field(1.0, ge=0, le=10)
    """Logits are divided by it; 0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens less likely than this share of the likeliest."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest completion in tokens."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens that already occurred less likely (arXiv:1909.05858)."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """Never repeat an n-gram of this many tokens; 0 allows it."""
    stop: list[str] = []
    """Strings that end a completion, wherever they occur in its text; they are not part of it. More of them end more."""

    _stop_is_text = field_validator("stop")(_non_empty)


class RolloutSampling(SamplingSettings):
    """How a recipe samples: what is judged ends with the stop string, as the tokens that are trained on do."""

    keeps_stop: ClassVar[bool] = True


class CompletionSettings(Section):
    """How completions are sampled on the way, in any recipe that samples."""

    max_prompt_length: int = Field(1024, ge=1)
    """Longer prompts are dropped and counted."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest completion in tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens whose probability reaches this; the learner scores the same set."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Drop tokens less likely than this share of the likeliest."""
    stop: list[str] = []
    """Strings that end a completion, wherever they occur in its text, such as </answer>. What is judged ends with the
    string, and what is trained on with the token that completes it. More of them end more; empty: only end tokens do."""
    inference_batch_size: int = Field(128, ge=1)
    """Completions sampled at the same time on each rank."""
    engine: Literal["auto", "generic", "native", "paged"] = "auto"
    """What samples: native is kitae's own C++ for Qwen, Llama and DeepSeek models on a CPU, compiled on first use, with a
    second copy of the weights; paged runs any model through transformers on one GPU, keys and values in pages, steps
    recorded as CUDA graphs; generic runs any model anywhere; auto takes paged on such a device, and native where it can run
    and the run is long enough for the compiling to pay."""
    quantization: Literal["none", "int8"] = "none"
    """int8 samples with linear weights and their inputs rounded to 8 bits, by the native engine: faster, and the copy of the
    weights is smaller, but log-probabilities are off by some hundredths. GRPO corrects for that by grpo.is_cap."""
    kv_cache_tokens: int | None = Field(None, ge=16)
    """Tokens whose keys and values the native or paged engine keeps at a time on each rank, of all completions under way, a
    group's prompt counted once. More of them need more memory and let more completions run side by side; the others wait,
    and the result does not depend on it. Default: what half of the memory that is free when sampling begins can hold."""

    _stop_is_text = field_validator("stop")(_non_empty)


class RolloutSettings(CompletionSettings):
    """One sampling phase of reinforcement learning (a round)."""

    prompts_per_round: int = Field(8, ge=1)
    """Distinct prompts sampled in each round, over all ranks."""
    num_generations: int = Field(8, ge=2)
    """Completions per prompt; their mean reward is the baseline."""
    initial_temperature: float = Field(1.0, gt=0, le=10)
    """Sampling temperature of the first round."""
    final_temperature: float | None = Field(None, gt=0, le=10)
    """Temperature of the last round, reached linearly; default: as initial_temperature."""
    updates_per_round: int = Field(1, ge=1)
    """Optimizer steps each pass over a round's rollouts is cut into."""
    epochs_per_round: int = Field(1, ge=1)
    """Passes over a round's rollouts."""
    rows_per_forward: int = Field(64, ge=1)
    """Most completions per forward pass of the update; a CPU also takes no more than 2,048 tokens at once. The result does
    not depend on it."""
    mask_truncated: bool = False
    """Take completions cut at max_new_tokens out of the loss; their reward counts in the group's mean all the same."""


class GroupRolloutSettings(RolloutSettings):
    """One sampling phase of GRPO (a round). A group of completions whose rewards are all equal is dead: nothing to learn."""

    refill: int = Field(0, ge=0, le=100)
    """Replace dead groups by groups of other prompts, in at most this many further sampling passes a round (DAPO's dynamic
    sampling). More passes leave fewer dead groups and take longer."""
    curriculum: Literal["none", "pass_rate"] = "none"
    """pass_rate leaves out, three times of four, prompts that were right in under 10 % or over 90 % of their completions so
    far, and takes others for them."""
    overlong_buffer: int = Field(0, ge=0)
    """Tokens before max_new_tokens over which a completion's reward falls, in a straight line, by overlong_factor (DAPO);
    0 leaves rewards as they are."""
    overlong_factor: float = Field(1.0, gt=0)
    """What a completion of max_new_tokens loses, in the unit of the reward: 1 is what the right form earns in the
    reasoning reward, 10 what a right answer does."""
    rounds_ahead: int = Field(0, ge=0, le=1)
    """1 samples the next round while this one trains, with the weights from before this round's updates and a second copy of
    them in memory; needs grpo.is_cap, which corrects for the older weights. Pays where sampling and training do not compete
    for the same cores. 0 always samples from the present weights."""


class RewardSettings(Section):
    """How completions are judged."""

    function: str = "reasoning"
    """A built-in reward, your own as file.py:function or package.module:function, or a reward model's folder."""
    weight: float = 1.0
    """Its reward is multiplied by this; a larger one counts for more beside those of reward.extra."""
    extra: dict[str, float] = {}
    """More rewards added to function's, each named in the same way, with its weight; 0 only logs it."""
    form: Literal["answer_tags", "boxed"] = "answer_tags"
    """Form of the reasoning reward: think and answer blocks, or a closed think block and a last \\boxed{}."""
    strict_form: bool = True
    """Nothing but white space around and between the blocks; false allows other text there."""
    timeout_s: float = Field(1.0, gt=0)
    """CPU seconds for judging one completion, the threads of its process added up, and at most five times as long in all,
    for what waits. Beyond it a built-in reward counts the answer as wrong; your own function: see on_error."""
    num_workers: int = Field(2, ge=1)
    """Worker processes per rank."""
    on_error: Literal["stop", "mask"] = "stop"
    """When a user's function raises, or exceeds its limits: stop the run, or take that completion out of the loss and count
    it."""


def require(condition: bool, message: str) -> None:
    """Refuse a contradiction between settings."""
    if not condition:
        raise ConfigError(message)


def as_json(config: Section) -> dict[str, Any]:
    """The resolved settings as JSON values, as run.json stores them."""
    return config.model_dump(mode="json")


def home() -> Path:
    """Where kitae keeps what outlives a command: $KITAE_HOME, or ~/.kitae. RuntimeError without a home directory."""
    return Path(os.environ.get("KITAE_HOME") or Path.home() / ".kitae")
