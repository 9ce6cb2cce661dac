"""The command lines people bring along: each flag maps, warns or is refused as docs/flags.md says."""

import shlex

import pytest

from kitae.errors import ConfigError
from kitae.settings import resolve

SFT_GUIDE = """--model_name_or_path ./models/DeepSeek-V3 --dataset_name qwedsacf/competition_math --output_dir ./output/sft
    --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --learning_rate 2e-5
    --warmup_steps 100 --logging_steps 10 --save_steps 500"""
GRPO_GUIDE = """--model_name_or_path ./output/sft --dataset_name qwedsacf/competition_math --output_dir ./output/grpo
    --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --num_generations 8
    --inference_batch_size 4 --logits_forward_batch_size 1 --initial_temperature 1.0 --final_temperature 0.1
    --learning_rate 1e-6 --warmup_steps 100 --logging_steps 10 --save_steps 500 --evaluation_strategy steps
    --eval_steps 500 --report_to wandb"""
LORA_FINETUNE = """--pretrained DeepSeek-R1-bf16 --dataset DATA.jsonl --plugin moe --lr 2e-5 --max_length 256 -g
    --batch_size 24 --lora_rank 8 --lora_alpha 32 --num_epochs 2 --warmup_steps 8 --tensorboard_dir logs
    --save_dir DeepSeek-R1-bf16-lora"""
TRAIN_GRPO = """--pretrain MODEL --tokenizer_dir MODEL --prompt_dataset DATA
    --conversation_template_config Qwen_Qwen2.5-3B.json --reward_functions math_competition_reward_fn
    --plugin zero2_cpu --num_episodes 100 --num_collect_steps 8 --num_update_steps 1 --num_generations 8
    --experience_batch_size 1 --train_batch_size 4 --inference_batch_size 8 --logits_forward_batch_size 2
    --accumulation_steps 4 --lr 1e-6 --kl_coef 0.01 --initial_temperature 1.0 --final_temperature 0.9 --grad_clip 0.1
    --weight_decay 0.01 --warmup_steps 40 --max_length 2000 --max_seq_len 1700 --save_path OUT --log_dir LOGS
    --use_wandb"""
RL_EXAMPLE = """-m M -d D -e 2 -g 4 -ibs 64 -imbs 8 -tbs 32 -tMbs 8 -tmbs 2 -tp 1 -pp 1 -zero 0 -b transformers -temp 0.9
    -topk None -topp 0.9 -s think -mnt 100 -mpt 50 -a GRPO -lr 1e-6 -kl 0.1 -rt boxed -ei -1 -nb 0 -si 100 -sd out
    -t 2 -i 2"""


def settings(recipe, line, **kwargs):
    return resolve(recipe, shlex.split(line), world_size=kwargs.pop("world_size", 1), **kwargs)


def chosen(cfg, *names):
    """The values of dotted names, in order."""
    values = []
    for name in names:
        value = cfg
        for part in name.split("."):
            value = getattr(value, part)
        values.append(value)
    return values


def test_the_guides_sft_line_means_what_it_says():
    cfg, notes = settings("sft", SFT_GUIDE)
    assert chosen(cfg, "model.name_or_path", "data.train", "output_dir") == [
        "./models/DeepSeek-V3", ["qwedsacf/competition_math"], "./output/sft",
    ]  # fmt: skip
    assert chosen(cfg, "train.num_train_epochs", "train.per_device_train_batch_size") == [3.0, 2]
    assert chosen(cfg, "train.gradient_accumulation_steps", "optim.learning_rate") == [4, 2e-5]
    assert chosen(cfg, "optim.warmup_steps", "log.steps", "save.steps", "eval.steps") == [100, 10, 500, 0]
    assert notes.warnings == []


def test_the_guides_distributed_sft_line_adds_evaluation_and_wandb():
    cfg, notes = settings(
        "sft", f"{SFT_GUIDE} --evaluation_strategy steps --eval_steps 500 --report_to wandb"
    )
    assert chosen(cfg, "eval.steps", "log.report_to") == [500, ["wandb"]]
    assert notes.warnings == []


def test_the_guides_further_flags_map_or_warn_by_name():
    cfg, notes = settings(
        "sft",
        f"{SFT_GUIDE} --resume_from_checkpoint ./output/sft/checkpoints/step_000100 --max_steps 7 --tf32 True "
        "--dataloader_num_workers 4 --dataloader_pin_memory True --dataloader_prefetch_factor 2 --torch_compile True "
        "--fp16 True --gradient_checkpointing True --optim adafactor --lr_scheduler_type cosine --eval_strategy no "
        "--report_to none",
    )
    assert chosen(cfg, "resume", "train.max_steps", "model.torch_compile") == [True, 7, True]
    assert chosen(cfg, "model.gradient_checkpointing", "optim.name", "optim.lr_scheduler") == [
        True,
        "adafactor",
        "cosine",
    ]
    assert chosen(cfg, "log.report_to", "eval.steps") == [["none"], 0]
    assert notes.dtype_wish == ("--fp16", "float16")
    assert [w.split()[0] for w in notes.warnings] == [
        "--tf32", "--dataloader_num_workers", "--dataloader_pin_memory", "--dataloader_prefetch_factor",
        "--resume_from_checkpoint:",
    ]  # fmt: skip


@pytest.mark.parametrize(("ranks", "prompts"), [(1, 1), (8, 8), (2, 2)])
def test_the_guides_grpo_line_counts_completions(ranks, prompts):
    cfg, notes = settings("grpo", GRPO_GUIDE, world_size=ranks)
    assert chosen(cfg, "rollout.prompts_per_round", "rollout.num_generations") == [prompts, 8]
    assert chosen(cfg, "rollout.inference_batch_size", "rollout.rows_per_forward") == [4, 1]
    assert chosen(cfg, "rollout.initial_temperature", "rollout.final_temperature") == [1.0, 0.1]
    assert chosen(cfg, "train.num_train_epochs", "optim.learning_rate", "eval.steps") == [3.0, 1e-6, 500]
    assert notes.warnings == []


def test_completions_that_num_generations_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"12 completions .* 4 x .* 3 x 1 ranks.* multiple of 8"):
        settings("grpo", "--model_name_or_path m --dataset_name d --per_device_train_batch_size 4 "
                         "--gradient_accumulation_steps 3")  # fmt: skip


def test_the_batch_is_rows_per_forward_where_no_logits_batch_is_named():
    cfg, _ = settings("grpo", "--model_name_or_path m --dataset_name d --per_device_train_batch_size 16")
    assert chosen(cfg, "rollout.rows_per_forward", "rollout.prompts_per_round") == [16, 2]


def test_several_updates_a_round_sample_as_many_times_more_prompts():
    cfg, _ = settings(
        "grpo",
        "--model_name_or_path m --dataset_name d --per_device_train_batch_size 16 --steps_per_generation 3",
    )
    assert chosen(cfg, "rollout.updates_per_round", "rollout.prompts_per_round") == [3, 6]


def test_colossals_lora_line_runs_without_its_parallel_flags():
    cfg, notes = settings("sft", LORA_FINETUNE)
    assert chosen(cfg, "model.name_or_path", "data.train", "output_dir") == [
        "DeepSeek-R1-bf16", ["DATA.jsonl"], "DeepSeek-R1-bf16-lora",
    ]  # fmt: skip
    assert chosen(cfg, "model.gradient_checkpointing", "data.max_length", "optim.learning_rate") == [
        True,
        256,
        2e-5,
    ]
    assert chosen(cfg, "train.per_device_train_batch_size", "train.num_train_epochs") == [24, 2.0]
    assert chosen(cfg, "lora.rank", "lora.alpha", "optim.warmup_steps") == [8, 32.0, 8]
    assert cfg.log.tensorboard_dir == "logs"
    assert notes.warnings == ["--plugin moe has no effect: ranks shard by FSDP2 by themselves"]


@pytest.mark.parametrize(
    "flag", ["--ep 8", "--pp 3", "--tp 2", "--sp 2", "--zero_cpu_offload", "--hostfile hosts"]
)
@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_what_is_not_there_yet_is_refused_by_name(recipe, flag):
    with pytest.raises(ConfigError, match=rf"^{flag}: .* is not there yet; leave the flag out$"):
        settings(recipe, f"--model_name_or_path m --dataset d {flag}")


def test_parallel_flags_of_one_change_nothing():
    cfg, notes = settings("sft", f"{LORA_FINETUNE} --ep 1 --pp 1 --tp 1 --sp 1")
    assert cfg == settings("sft", LORA_FINETUNE)[0]
    assert len(notes.warnings) == 1


def test_colossals_grpo_line_keeps_its_rounds_updates_and_steps():
    cfg, notes = settings("grpo", TRAIN_GRPO)
    assert chosen(cfg, "model.name_or_path", "model.tokenizer", "data.train", "data.template") == [
        "MODEL", "MODEL", ["DATA"], "Qwen_Qwen2.5-3B.json",
    ]  # fmt: skip
    # 8 collect steps of 1 prompt; their 64 completions in batches of 4 x 4: 4 updates a round, 100 rounds.
    assert chosen(
        cfg, "rollout.prompts_per_round", "rollout.updates_per_round", "rollout.epochs_per_round"
    ) == [8, 4, 1]
    assert cfg.train.max_steps == 400
    assert chosen(cfg, "rollout.rows_per_forward", "rollout.inference_batch_size") == [2, 8]
    assert chosen(cfg, "rollout.max_new_tokens", "rollout.max_prompt_length") == [2000, 1700]
    assert chosen(cfg, "reward.function", "grpo.kl_coef", "optim.max_grad_norm") == ["reasoning", 0.01, 0.1]
    assert chosen(cfg, "log.report_to", "log.tensorboard_dir", "output_dir") == [
        ["tensorboard", "wandb"],
        "LOGS",
        "OUT",
    ]
    assert [w.split()[:2] for w in notes.warnings] == [["--plugin", "zero2_cpu"]]
    assert "CPU offload is not there yet" in notes.warnings[0]


def test_rl_examples_short_flags_count_prompts():
    cfg, notes = settings("grpo", RL_EXAMPLE)
    assert chosen(
        cfg, "rollout.num_generations", "rollout.prompts_per_round", "rollout.updates_per_round"
    ) == [4, 32, 4]
    assert chosen(cfg, "rollout.rows_per_forward", "rollout.inference_batch_size") == [2, 32]
    assert chosen(cfg, "rollout.initial_temperature", "rollout.top_p", "rollout.top_k") == [0.9, 0.9, 0]
    assert chosen(cfg, "rollout.max_new_tokens", "rollout.max_prompt_length") == [100, 50]
    assert chosen(cfg, "reward.form", "grpo.kl_coef", "train.num_train_epochs", "data.system_prompt") == [
        "boxed", 0.1, 2.0, "think",
    ]  # fmt: skip
    assert chosen(cfg, "save.steps", "output_dir", "eval.steps") == [100, "out", 0]
    assert {w.split()[0] for w in notes.warnings} == {"-ibs", "-zero", "-b", "-nb", "-t", "-i"}


def test_dapo_is_a_preset_that_gives_way_to_what_is_said():
    cfg, _ = settings("grpo", "-m M -d D -a DAPO --grpo.clip_high 0.3")
    assert chosen(cfg, "grpo.clip_high", "grpo.average", "rollout.mask_truncated") == [0.3, "token", True]
    assert chosen(cfg, "rollout.refill", "rollout.overlong_buffer", "rollout.overlong_factor") == [
        3,
        128,
        1.0,
    ]
    cfg, _ = settings("grpo", "-m M -d D -a DAPO -mnt 8192 --rollout.refill 0")
    assert chosen(cfg, "rollout.refill", "rollout.overlong_buffer") == [0, 1024]


@pytest.mark.parametrize(
    ("word", "advantage"), [("RLOO", "rloo"), ("REINFORCE_PPB", "reinforce++"), ("GRPO", "group")]
)
def test_the_other_algorithms_of_rl_example_choose_the_advantage(word, advantage):
    cfg, _ = settings("grpo", f"-m M -d D -a {word} -kl 0.02")
    assert chosen(cfg, "grpo.advantage", "grpo.average", "grpo.kl_coef") == [advantage, "sequence", 0.02]
    assert cfg.rollout.refill == 0


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="-a is 'PPO'; choose one of GRPO, RLOO, REINFORCE_PPB, DAPO"):
        settings("grpo", "-m M -d D -a PPO")


def test_g_is_checkpointing_for_sft_and_generations_for_grpo():
    assert settings("sft", "-m M -d D -g")[0].model.gradient_checkpointing
    assert settings("grpo", "-m M -d D -g 4")[0].rollout.num_generations == 4


def test_trls_grpo_flags_map():
    cfg, notes = settings(
        "grpo",
        "--model_name_or_path m --dataset_name d --beta 0.04 --epsilon 0.1 --epsilon_high 0.3 --loss_type dr_grpo "
        "--scale_rewards False --num_iterations 2 --max_completion_length 99 --temperature 0.7 --use_vllm True "
        "--mask_truncated_completions",
    )
    assert chosen(cfg, "grpo.kl_coef", "grpo.clip_low", "grpo.clip_high") == [0.04, 0.1, 0.3]
    assert chosen(cfg, "grpo.average", "grpo.scale_by_std", "rollout.epochs_per_round") == [
        "constant",
        "none",
        2,
    ]
    assert chosen(cfg, "rollout.max_new_tokens", "rollout.initial_temperature") == [99, 0.7]
    assert cfg.rollout.mask_truncated
    assert notes.warnings == ["--use_vllm has no effect: kitae has nothing like it"]


def test_trls_variants_map():
    base = "--model_name_or_path m --dataset_name d "
    cfg, notes = settings(
        "grpo", base + "--importance_sampling_level sequence --loss_type grpo --epsilon 3e-4 --epsilon_high 4e-4 "
        "--delta 2 --entropy_coef 0.01 --scale_rewards batch --beta 0.04 --sync_ref_model True "
        "--ref_model_sync_steps 64 --num_iterations 2 --steps_per_generation 4",
    )  # fmt: skip
    assert chosen(cfg, "grpo.ratio", "grpo.average", "grpo.clip_low", "grpo.clip_high") == [
        "sequence", "sequence", 3e-4, 4e-4,
    ]  # fmt: skip
    assert chosen(cfg, "grpo.dual_clip", "grpo.entropy_coef", "grpo.scale_by_std") == [2, 0.01, "batch"]
    assert cfg.grpo.ref_refresh_rounds == 8
    assert notes.warnings == []


def test_trls_cispo_takes_the_largest_weight():
    cfg, notes = settings(
        "grpo", "--model_name_or_path m --dataset_name d --loss_type cispo --epsilon_high 5 --epsilon 0.1"
    )
    assert chosen(cfg, "grpo.objective", "grpo.average", "grpo.clip_high") == ["cispo", "token", 4]
    assert notes.warnings == ["--epsilon has no effect: cispo bounds weights above only, by --epsilon_high"]
    with pytest.raises(ConfigError, match="with cispo it is the largest weight"):
        settings("grpo", "--model_name_or_path m --dataset_name d --loss_type cispo --epsilon_high 0.3")


def test_a_loss_type_kitae_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"sapo.*choose one of grpo, dapo, bnpo, dr_grpo, cispo"):
        settings("grpo", "--model_name_or_path m --dataset_name d --loss_type sapo")


def test_a_reference_is_refreshed_in_whole_rounds():
    base = "--model_name_or_path m --dataset_name d --beta 0.1 --num_iterations 3 "
    cfg, notes = settings("grpo", base + "--sync_ref_model --ref_model_sync_steps 10")
    assert cfg.grpo.ref_refresh_rounds == 3
    assert notes.warnings == ["the reference is refreshed every 9 steps, not 10: in whole rounds of 3"]
    cfg, notes = settings("grpo", base + "--ref_model_sync_steps 10")
    assert cfg.grpo.ref_refresh_rounds == 0
    assert notes.warnings == ["--ref_model_sync_steps has no effect: --sync_ref_model is missing"]


def test_peft_flags_map_and_use_peft_brings_a_rank():
    cfg, _ = settings("sft", "--model_name_or_path m --dataset_name d --use_peft")
    assert chosen(cfg, "lora.rank", "lora.alpha") == [16, 32]
    cfg, _ = settings(
        "sft",
        "--model_name_or_path m --dataset_name d --use_peft --lora_r 4 --lora_target_modules q_proj v_proj",
    )
    assert chosen(cfg, "lora.rank", "lora.target_modules") == [4, ["q_proj", "v_proj"]]
    with pytest.raises(ConfigError, match="contradict"):
        settings("sft", "--model_name_or_path m --dataset_name d --use_peft False --lora_r 4")


def test_a_notebooks_dict_maps():
    cfg, notes = resolve(
        "sft",
        {
            "model_name": "R1-Distill-Llama-8B-unsloth-bnb-4bit", "max_seq_length": 2048, "load_in_4bit": True, "r": 16,
            "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none",
            "use_gradient_checkpointing": "unsloth", "data_files": {"train": "a.jsonl", "test": "b.jsonl"},
        },
    )  # fmt: skip
    assert chosen(cfg, "data.train", "data.eval", "data.max_length") == [["a.jsonl"], ["b.jsonl"], 2048]
    assert chosen(cfg, "lora.rank", "lora.alpha", "lora.dropout", "lora.bias") == [16, 32.0, 0.05, "none"]
    assert chosen(cfg, "lora.target_modules", "model.quantization") == [["q_proj", "v_proj"], "nf4"]
    assert cfg.model.gradient_checkpointing
    assert notes.warnings == []


def test_data_files_of_a_command_line_are_json_text():
    line = ["--model_name_or_path", "m", "--data_files"]
    cfg, _ = resolve("sft", [*line, '{"train": "a.jsonl", "test": ["b.jsonl", "c.jsonl"]}'])
    assert chosen(cfg, "data.train", "data.eval") == [["a.jsonl"], ["b.jsonl", "c.jsonl"]]
    with pytest.raises(ConfigError, match=r"--data_files is '\{train: a\}', which is not JSON"):
        resolve("sft", [*line, "{train: a}"])


def test_evaluation_asked_for_without_an_interval_goes_with_the_log():
    cfg, _ = settings(
        "sft", "--model_name_or_path m --dataset_name d --eval_strategy steps --logging_steps 10"
    )
    assert cfg.eval.steps == 10
    with pytest.raises(ConfigError, match="--eval_strategy steps: how many"):
        settings("sft", "--model_name_or_path m --dataset_name d --eval_strategy steps")
    with pytest.raises(ConfigError, match=r"--eval_strategy epoch is not there; .*--eval.steps 100"):
        settings("sft", "--model_name_or_path m --dataset_name d --eval_strategy epoch")


def test_resuming_from_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="not inside output_dir"):
        settings(
            "sft",
            "--model_name_or_path m --dataset_name d --output_dir a --resume_from_checkpoint b/checkpoints/1",
        )
    cfg, _ = settings("sft", "--model_name_or_path m --dataset_name d --resume_from_checkpoint False")
    assert not cfg.resume


def test_a_flag_of_another_program_warns_once_where_ours_is_refused():
    cfg, notes = settings(
        "sft", "--model_name_or_path m --dataset_name d --lora_alpha 8 --tf32 True --tf32 True"
    )
    assert cfg.lora.rank == 0
    assert notes.warnings == [
        "--tf32 has no effect: kitae leaves float32 matrix products at full precision",
        "--lora_alpha has no effect: lora.rank is 0, so there are no adapters",
    ]
    with pytest.raises(
        ConfigError, match=r"lora.alpha \(--lora.alpha\) would have no effect: lora.rank is 0"
    ):
        settings("sft", "--model_name_or_path m --dataset_name d --lora.alpha 8")


STOPS = [
    ("grpo", ["--stop", "</answer>", "END"], ["</answer>", "END"]),
    ("grpo", ["--stop_strings", "</answer>"], ["</answer>"]),
    ("ppo", ["--stop_words", "a,b"], ["a,b"]),
    (
        "grpo",
        ["--generation_kwargs", '{"stop": "</answer>", "top_p": 0.9, "temperature": 0.7}'],
        ["</answer>"],
    ),
    ("grpo", {"generation_kwargs": {"stop_strings": ["x", "y"]}}, ["x", "y"]),
    ("distill", ["--teacher_model", "T", "--rollout.stop", "x"], ["x"]),
]


@pytest.mark.parametrize(("recipe", "given", "stop"), STOPS)
def test_stop_strings_are_given_under_any_of_their_names(recipe, given, stop):
    needed = ["--model_name_or_path", "M", "--dataset_name", "D"]
    if isinstance(given, dict):
        given |= {"model_name_or_path": "M", "dataset_name": "D"}
    cfg, _ = resolve(recipe, given if isinstance(given, dict) else [*needed, *given], world_size=1)
    assert cfg.rollout.stop == stop
    if "top_p" in str(given):
        assert (cfg.rollout.top_p, cfg.rollout.initial_temperature) == (0.9, 0.7)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ('{"num_beams": 4}', "'num_beams'; it takes temperature, top_p"),
        ("stop", "it takes a JSON object"),
        ("{stop", "which is not JSON"),
        ('{"stop": ""}', "an empty string is in every text"),
    ],
)
def test_generation_kwargs_that_rollouts_do_not_have_are_refused(value, error):
    with pytest.raises(ConfigError, match=error):
        settings("grpo", f"--model_name_or_path M --dataset_name D --generation_kwargs {shlex.quote(value)}")


LLAMA_FACTORY_FILE = """### model
model_name_or_path: ./m
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: rows.jsonl
cutoff_len: 2048
val_size: 0.1
max_samples: 1000
overwrite_cache: true
resume_from_checkpoint: null
output_dir: saves/x
learning_rate: 1e-4
per_device_train_batch_size: 2
"""


def test_a_llama_factory_yaml_file_trains_a_lora(tmp_path):
    file = tmp_path / "lora_sft.yaml"
    file.write_text(LLAMA_FACTORY_FILE)
    cfg, notes = resolve("sft", [str(file), "--max_samples", "50"])
    assert chosen(cfg, "lora.rank", "lora.alpha", "lora.target_modules") == [8, 16, "all-linear"]
    assert chosen(cfg, "data.train", "data.max_length", "data.hold_out", "data.max_rows") == [
        ["rows.jsonl"], 2048, 0.1, 50,
    ]  # fmt: skip
    assert cfg.optim.learning_rate == 1e-4 and not cfg.resume
    assert f"{file} line 3 has no effect: the recipe's name says which stage it is" in notes.warnings
    assert (
        resolve("sft", ["--max_samples", "50", "--config", str(file), "--max_steps", "2"])[0].data.max_rows
        == 50
    )
    assert resolve("sft", [f"--config={file}"])[0].data.max_rows == 1000
    cfg, _ = settings("sft", f"{file} --lora_rank 32 --lora_target q_proj,v_proj")
    assert chosen(cfg, "lora.rank", "lora.alpha", "lora.target_modules") == [32, 64, ["q_proj", "v_proj"]]
    with pytest.raises(ConfigError, match="--finetuning_type full and --lora_rank 4 contradict each other"):
        settings("sft", "--model_name_or_path m --dataset_name d --finetuning_type full --lora_rank 4")
    with pytest.raises(ConfigError, match="choose lora or full"):
        settings("sft", "--model_name_or_path m --dataset_name d --finetuning_type freeze")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML: while parsing"),
        ("just words", "holds no settings"),
        ("learning_rat: 1", "unknown setting learning_rat \\(.*bad.yaml line 1\\); did you mean"),
    ],
)
def test_a_yaml_file_that_is_none_says_where(text, said, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        resolve("sft", [str(tmp_path / "bad.yaml")])
