"""Files, flags and dicts to one Settings, and what is refused on the way, in one line."""

import os

import pytest

from kitae.errors import ConfigError
from kitae.settings import Notes, fit_to_device, resolve

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]


def refused(recipe, given, **kwargs):
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, given, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def test_flags_lie_over_the_file_and_the_file_over_defaults(toml):
    path = toml(
        '[model]\nname_or_path = "m"\n[data]\ntrain = ["a", "b"]\n[optim]\nlearning_rate = 1e-3\nweight_decay = 0.5\n'
    )
    cfg, notes = resolve("sft", [str(path), "--optim.learning_rate", "2e-3"])
    assert (cfg.optim.learning_rate, cfg.optim.weight_decay, cfg.optim.beta1) == (2e-3, 0.5, 0.9)
    assert cfg.data.train == ["a", "b"]
    assert notes.origins["optim.learning_rate"] == "--optim.learning_rate"
    assert notes.origins["optim.weight_decay"] == f"{path} line 7"


def test_a_section_given_in_part_keeps_the_recipes_own_defaults():
    cfg, _ = resolve("grpo", [*NEEDED, "--weight_decay", "0.1"])
    assert (cfg.optim.learning_rate, cfg.optim.beta2, cfg.save.metric) == (1e-6, 0.95, "eval/accuracy")


def test_nested_dicts_flat_dicts_and_flags_mean_the_same():
    nested = {
        "model": {"name_or_path": "m"},
        "data": {"train": ["d.jsonl"]},
        "optim": {"learning_rate": 1e-3, "name": "adafactor"},
    }
    flat = {"model_name_or_path": "m", "data.train": "d.jsonl", "learning_rate": 1e-3, "optim": "adafactor"}
    flags = [*NEEDED, "--learning-rate=1e-3", "--optim.name", "adafactor"]
    assert resolve("sft", nested)[0] == resolve("sft", flat)[0] == resolve("sft", flags)[0]


def test_flat_and_foreign_names_are_understood_in_a_file_too(toml):
    path = toml(
        'pretrained = "m"\ndataset = "d.jsonl"\nlearning_rate = 5e-6\nlora_rank = 8\n[train]\nmax_steps = 3\n'
    )
    cfg, _ = resolve("sft", [], file=path)
    assert (cfg.model.name_or_path, cfg.data.train, cfg.optim.learning_rate) == ("m", ["d.jsonl"], 5e-6)
    assert (cfg.lora.rank, cfg.train.max_steps) == (8, 3)


def test_switches_need_no_value_and_do_not_swallow_the_file(toml):
    path = toml('[model]\nname_or_path = "m"\n[data]\ntrain = "d"\n')
    assert resolve("sft", ["--resume", str(path)])[0].resume
    assert not resolve("sft", ["--resume", "false", str(path)])[0].resume
    assert not resolve("sft", [str(path), "--data.shuffle=no"])[0].data.shuffle


def test_empty_text_negative_numbers_and_none_are_values():
    cfg, _ = resolve(
        "grpo", [*NEEDED, "--system_prompt", "", "--train.seed", "-5", "--train.max_steps", "none"]
    )
    assert (cfg.data.system_prompt, cfg.train.seed, cfg.train.max_steps) == ("", -5, None)


def test_table_settings_take_one_entry_a_flag():
    cfg, _ = resolve(
        "sft", [*NEEDED, "--data.columns.prompt", "frage", "--data.columns.completion", "antwort"]
    )
    assert cfg.data.columns == {"prompt": "frage", "completion": "antwort"}
    assert resolve(
        "sft", {"model_name_or_path": "m", "data": {"train": "d", "columns": {"prompt": "frage"}}}
    )[0].data.columns == {"prompt": "frage"}


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("--learnin_rate", "'--learning_rate'"),
        ("--optim.learning_rat", "'--optim.learning_rate'"),
        ("--model_name_or_pth", "'--model_name_or_path'"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(word, suggestion):
    assert refused("sft", [*NEEDED, word, "1"]) == f"unknown setting {word}; did you mean {suggestion}?"


def test_an_unknown_name_in_a_file_names_file_and_line(toml):
    path = toml('[model]\nname_or_path = "m"\n\n[optim]\nlearnig_rate = 1\n')
    message = refused("sft", [str(path)])
    assert (
        message == f"unknown setting optim.learnig_rate ({path} line 5); did you mean 'optim.learning_rate'?"
    )
    assert "unknown setting optimizer" in refused("sft", {"model_name_or_path": "m", "optimizer": {"lr": 1}})
    assert "--help lists all" in refused("sft", [*NEEDED, "--zzzz", "1"])


def test_a_leaf_that_several_sections_have_is_ambiguous():
    assert refused("sft", [*NEEDED, "--steps", "3"]).endswith(
        "write one of eval.steps, save.steps, log.steps"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--learning_rate", "fast"],
            "optim.learning_rate is 'fast' (--learning_rate): input should be a valid number",
        ),
        (
            ["--train.max_steps", "1.5"],
            "train.max_steps is '1.5' (--train.max_steps): input should be a valid integer",
        ),
        (
            ["--lora_rank", "-1"],
            "lora.rank is '-1' (--lora_rank): input should be greater than or equal to 0",
        ),
        (
            ["--optim.name", "sgd"],
            "optim.name is 'sgd' (--optim.name): input should be 'adamw', 'adamw_8bit' or 'adafactor'",
        ),
        (["--optim", "sgd"], "--optim is 'sgd'; choose one of adamw, adamw_torch"),
        (["--learning_rate"], "--learning_rate needs a value"),
        (["--learning_rate", "1", "2"], "--learning_rate takes one value, and got 2: 1 2"),
        (
            ["--learning_rate", "nan"],
            "optim.learning_rate is 'nan' (--learning_rate): input should be a finite number",
        ),
        (["--bf16=perhaps"], "--bf16 is 'perhaps'; it takes true or false"),
    ],
)
def test_wrong_values_name_the_setting_the_value_and_the_flag(flags, message):
    assert refused("sft", [*NEEDED, *flags]).startswith(message)


def test_all_wrong_values_are_told_at_once():
    message = refused("sft", [*NEEDED, "--learning_rate", "fast", "--max_length", "long"])
    assert "optim.learning_rate is 'fast'" in message and "data.max_length is 'long'" in message


def test_wrong_types_in_a_file_name_the_line(toml):
    path = toml('[model]\nname_or_path = 3\n[data]\ntrain = "d"\n')
    assert (
        refused("sft", [str(path)])
        == f"model.name_or_path is 3 ({path} line 2): input should be a valid string"
    )


def test_what_is_required_is_asked_for_with_the_words_to_give_it():
    assert "give --model_name_or_path MODEL" in refused("sft", ["--dataset_name", "d"])
    assert "name training rows with --dataset_name" in refused("sft", ["--model_name_or_path", "m"])


def test_broken_toml_names_the_place(toml):
    message = refused("sft", [str(toml("[model]\nname_or_path = m\n"))])
    assert "is not valid TOML" in message and "line 2" in message


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    assert "No such file" in refused("sft", [str(tmp_path / "absent.toml")])
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the settings file" in refused("sft", [str(binary)])
    if os.geteuid():
        binary.chmod(0)
        assert "Permission denied" in refused("sft", [str(binary)])


def test_words_that_belong_nowhere_are_refused(toml):
    assert refused("sft", ["oops", *NEEDED]).startswith("'oops' belongs to no flag")
    assert "one at most" in refused("sft", [str(toml("")), "b.toml"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lr", "1", "--learning_rate", "2"],
            "optim.learning_rate is given twice: --lr 1 and --learning_rate 2; keep one",
        ),
        (["--resume", "--overwrite"], "resume and overwrite are both on"),
        (["--quantization", "nf4"], "model.quantization is nf4 and lora.rank is 0"),
        (["--data.weights", "1", "2"], "data.weights has 2 entries and data.train 1"),
        (["--save.final", "best"], "save.final = best needs evaluation during the run"),
        (["--early_stopping_patience", "2"], "train.early_stopping_patience needs evaluation"),
        (["--eval.steps", "5", "--hold_out", "0"], "eval.steps is 5, but there are no evaluation rows"),
        (["--log.report_to", "none", "wandb"], "log.report_to is none wandb; none stands alone"),
        (["--bf16", "True", "--fp16", "True"], "--bf16 and --fp16 contradict each other"),
        (["--bf16", "--dtype", "float32"], "--bf16 and --dtype float32 contradict each other"),
    ],
)
def test_contradictions_are_refused(flags, message):
    assert refused("sft", [*NEEDED, *flags]).startswith(message)


@pytest.mark.parametrize(
    ("recipe", "metric", "message"),
    [
        (
            "sft",
            "eval/los",
            "save.metric is eval/los, which sft does not evaluate; did you mean 'eval/loss'?",
        ),
        (
            "grpo",
            "eval/loss",
            "save.metric is eval/loss, which grpo does not evaluate; known are: eval/accuracy,",
        ),
    ],
)
def test_a_metric_to_choose_by_that_is_never_evaluated_is_refused(recipe, metric, message):
    flags = ["--eval.steps", "5", "--save.final", "best", "--save.metric", metric]
    assert refused(recipe, [*NEEDED, *flags]).startswith(message)


def test_a_split_of_files_is_refused_because_files_have_none(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    line = ["--model_name_or_path", "m", "--dataset_name", str(rows)]
    message = refused("sft", [*line, "--dataset_test_split", "test"])
    assert message.startswith("data.eval_split is test, but data.train is files here, which have no splits")
    assert "data.split (--data.split) would have no effect" in refused("sft", [*line, "--data.split", "test"])
    _, notes = resolve("sft", [*line, "--eval_file", str(rows), "--dataset_test_split", "test"])
    assert notes.warnings == [
        "--dataset_test_split has no effect: data.eval is files here, which have no splits"
    ]


def test_more_updates_than_prompts_are_refused():
    message = refused("grpo", [*NEEDED, "--rollout.updates_per_round", "9"])
    assert message.startswith("rollout.updates_per_round is 9, but a round has only 8 prompts")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora.dropout", "0.1"],
        ["--optim.name", "adafactor", "--optim.beta1", "0.8"],
        ["--optim.name", "adafactor", "--optim.beta2", "0.9"],
        ["--optim.max_skipped", "3"],
        ["--save.metric", "eval/perplexity"],
        ["--log.wandb_project", "mine"],
        ["--log.report_to", "none", "--log.tensorboard_dir", "tb"],
        ["--eval.at_start", "true"],
        ["--allow_inexact"],
        ["--data.eval", "e.jsonl", "--data.hold_out", "0.2"],
    ],
)
def test_one_of_our_settings_without_effect_is_refused(flags):
    assert "would have no effect" in refused("sft", [*NEEDED, *flags])


@pytest.mark.parametrize(
    "number",
    ["dpo.beta", "dpo.nll_coef", "simpo.gamma", "orpo.odds_coef", "kto.desirable_weight", "ppo.clip_low"],
)
def test_numbers_of_the_recipes_own_objective_are_refused_beside_a_loss_of_ones_own(number):
    recipe = number.partition(".")[0]
    message = refused(recipe, [*NEEDED, "--loss", "own.py:loss", f"--{number}", "0.3"])
    assert f"{number} (--{number}) would have no effect: the" in message and "loss is your own" in message


def test_where_the_reference_comes_from_stays_a_setting_beside_a_loss_of_ones_own():
    cfg, _ = resolve("dpo", [*NEEDED, "--loss", "own.py:loss", "--dpo.reference", "cache"])
    assert cfg.dpo.reference == "cache"


def test_a_setting_at_its_default_may_always_be_written_down():
    cfg, _ = resolve("sft", [*NEEDED, "--lora.alpha", "16", "--optim.max_skipped", "5"])
    again, _ = resolve("sft", cfg.model_dump(mode="json"))
    assert again == cfg


def test_lengths_that_grpo_does_not_use_are_refused():
    assert "rollout.max_prompt_length" in refused("grpo", [*NEEDED, "--data.max_length", "100"])


def test_pasted_marks_are_named_with_the_corrected_line():
    message = refused("sft", ["\u2014lr", "2e-5", "--data\\_set", "d", "--save_dir", "\u201cout\u201d"])
    assert (
        "'\u2014' (U+2014) for '--'" in message and "'\\_' for '_'" in message and "a curly quote" in message
    )
    assert message.endswith('corrected: --lr 2e-5 --data_set d --save_dir "out"')


def test_curly_quotes_and_dashes_inside_a_sentence_are_text():
    text = "Say \u201chello\u201d \u2014 and think."
    assert resolve("sft", [*NEEDED, "--system_prompt", text])[0].data.system_prompt == text


def test_a_wish_for_a_precision_is_granted_or_named():
    cfg, notes = resolve("sft", [*NEEDED, "--bf16", "True"])
    assert notes == Notes(warnings=[], origins=notes.origins, dtype_wish=("--bf16", "bfloat16"))
    granted, _ = fit_to_device(cfg, notes, is_good_at=True, reason="")
    assert granted.model.dtype == "bfloat16"
    kept, said = fit_to_device(cfg, notes, is_good_at=False, reason="this CPU has no bfloat16 instructions")
    assert kept.model.dtype == "auto"
    assert said.warnings == ["--bf16 has no effect: this CPU has no bfloat16 instructions"]


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        resolve("gprpo", NEEDED)
