"""Distillation runs: what they learn, that layout and interruptions change nothing, the store, and what is refused."""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kitae.algos.distillation import Divergence
from kitae.errors import ConfigError, DataError, ModelError, PlanError
from kitae.models.toy import make_model, make_tokenizer
from kitae.recipes import _distill, distill
from kitae.recipes._run import run_recipe
from kitae.settings import resolve
from kitae.train import teacher_store
from kitae.train.teacher_store import StoreFacts, TeacherStore, row_key
from kitae.types import Problem, Rollout, Row
from tests.recipes.test_resume import live, outcome
from tests.recipes.test_two_ranks import assert_same
from tests.recipes.test_two_ranks import train as train_in_ranks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
OFFLINE = {"distill": {"on_policy_share": 0, "top_k": 8, "divergence": "forward_kl"}, "rollout": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a student, and of a teacher of another architecture and width that is sure of what it says."""
    folder = tmp_path_factory.mktemp("distill")
    return {
        "student": make_model(folder / "student", "qwen3", initializer_range=0.2, **SIZES),
        "teacher": make_model(folder / "teacher", "llama", seed=1, hidden_size=48, initializer_range=0.5),
    }


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = []
    for _ in range(24):
        a, b = rng.randint(1, 99), rng.randint(1, 9)
        thinking = "so " * rng.randint(0, 4)
        rows.append(
            {"prompt": f"{a}+{b}", "completion": f"<think>{thinking}</think><answer>{a + b}</answer>"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def given(models, rows_file, tmp_path):
    """A function: settings of a run, sections laid over the usual ones (None takes a section away)."""

    def make(name="run", **over):
        settings = {
            "output_dir": str(tmp_path / name),
            "model": {"name_or_path": str(models["student"]), "dtype": "float32"},
            "teacher": {"name_or_path": str(models["teacher"]), "dtype": "float32"},
            "data": {"train": [str(rows_file)], "system_prompt": ""},
            "rollout": {"max_new_tokens": 8},
            "train": {"max_steps": 30, "num_threads": 1},
            "optim": {"learning_rate": 1e-2},
            "log": {"report_to": ["none"]},
        }
        for section, values in over.items():
            if values is None:
                del settings[section]
            elif isinstance(values, dict):
                settings[section] = {**settings.get(section, {}), **values}
            else:
                settings[section] = values
        return settings

    return make


def run(settings):
    resolved, notes = resolve("distill", settings)
    assert not notes.warnings
    return lines_of(run_recipe("distill", resolved))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines):
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/"))} for line in lines]


# learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_store_of_best_tokens_teaches_without_the_teacher(kind, given, models, tmp_path):
    store = {**OFFLINE["distill"], "store": str(tmp_path / "store")}
    run(given("first", distill=store, rollout=None, train={"max_steps": 1}))
    own = {
        "full": {},
        "lora": {"lora": {"rank": 8}, "optim": {"learning_rate": 2e-2}},
        "qlora": {"lora": {"rank": 8}, "optim": {"learning_rate": 2e-2}, "model": {"quantization": "nf4"}},
    }[kind]
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        own["model"]["name_or_path"] = str(models["student"])
    lines = run(given("second", distill=store, rollout=None, teacher=None, **own))
    first, last = lines[0]["train/divergence"], lines[-1]["train/divergence"]
    print(kind, first, last)
    assert last < first - 1.0
    assert lines[-1]["rollout/on_policy"] == 0 and "train/kl" not in lines[-1]


def test_rows_and_samples_take_turns_by_the_share_and_both_are_measured(given):
    lines = run(
        given(
            distill={
                "on_policy_share": 0.5,
                "divergence": "jsd",
                "beta": 0.3,
                "ce_coef": 0.02,
                "temperature": 1.5,
            },
            train={"max_steps": 40, "per_device_train_batch_size": 4},
            eval={"steps": 40, "at_start": True, "max_rows": 3},
        )
    )
    steps = [line for line in lines if "train/loss" in line]
    sampled = [line["rollout/on_policy"] for line in steps]
    assert 10 <= sum(sampled) <= 30
    for line in steps:
        has_samples = line["rollout/on_policy"] == 1
        assert has_samples == ("train/kl" in line) == ("rollout/completion_length" in line)
        added = 0 if has_samples else 0.02 * line["train/cross_entropy"]
        assert line["train/loss"] == pytest.approx(line["train/divergence"] + added, rel=1e-5)
    start, end = (line for line in lines if "eval/divergence" in line)
    assert end["eval/divergence"] < start["eval/divergence"]
    assert end["eval/loss"] < start["eval/loss"]


def test_the_sampled_tokens_estimate_the_divergence(given):
    settings = given(
        train={"max_steps": 1, "per_device_train_batch_size": 24},
        rollout={"num_generations": 20},
        optim={"learning_rate": 0},
    )
    [line] = run(settings)
    assert line["train/kl"] == pytest.approx(line["train/divergence"], rel=0.05)
    assert line["train/cross_entropy"] == pytest.approx(line["rollout/entropy"], rel=1e-4)


def test_evaluation_on_prompts_alone_compares_what_the_student_samples(given, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1"}) + "\n" for i in range(12)))
    lines = run(
        given(data={"train": [str(prompts)]}, train={"max_steps": 20}, eval={"steps": 10, "at_start": True})
    )
    found = [line for line in lines if "eval/divergence" in line]
    assert [line["step"] for line in found] == [0, 10, 20]
    assert found[-1]["eval/divergence"] < found[0]["eval/divergence"] - 0.5
    assert {"eval/completion_length", "eval/truncated"} <= set(found[0]) and "eval/loss" not in found[0]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["reward"] is None for sample in samples)


def test_a_loss_of_ones_own_sees_both_sides(given, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loss(out, weights_N):\n"
        "    gap_N = (out.logprobs_N - out.teacher_logprobs_N) ** 2\n"
        "    total = ((0.01 * gap_N + out.divergence_N) * weights_N).sum()\n"
        "    return total, {'apart': (out.divergence_N * weights_N).sum()}\n"
    )
    lines = run(given(loss=f"{tmp_path / 'mine.py'}:loss", train={"max_steps": 20}))
    assert lines[-1]["train/apart"] < lines[0]["train/apart"] - 0.4


# layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("seams", [{}, {"head": False}], ids=["chunked", "plain"])
def test_passes_of_any_size_give_the_same_steps(share, seams, given):
    own = {"rollout": {"max_new_tokens": 8, "num_generations": 2}} if share else {"rollout": None}
    found = []
    for rows, passes in ((6, 1), (2, 3)):
        batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "max_steps": 3}
        settings = given(f"of{rows}", train=batch, distill={"on_policy_share": share}, **own)
        settings["model"]["seams"] = seams
        found.append(without_speed(run(settings)))
    for a, b in zip(*found, strict=True):
        assert b == pytest.approx(a, rel=2e-4, abs=2e-6)


@pytest.mark.parametrize(("share", "lora"), [(1, 0), (0.5, 4)])
def test_two_ranks_give_what_one_gives(share, lora, models, rows_file, tmp_path):
    common = {
        "model_name_or_path": str(models["student"]), "teacher_model_name_or_path": str(models["teacher"]),
        "data.train": str(rows_file), "max_steps": 4, "lora.rank": lora, "learning_rate": 1e-3, "lmbda": share,
        "max_new_tokens": 6, "num_generations": 2, "eval.steps": 2, "eval.max_rows": 3, "log.report_to": "none",
        "beta": 0.5, "train.num_threads": 1, "model.dtype": "float32", "teacher.dtype": "float32",
    }  # fmt: skip
    assert_ranks_do_not_matter(common, tmp_path, rows=10)


def test_two_ranks_fill_one_store_and_teach_from_it(models, rows_file, tmp_path):
    common = {
        "model_name_or_path": str(models["student"]), "teacher.name_or_path": str(models["teacher"]),
        "data.train": str(rows_file), "data.max_rows": 21, "max_steps": 3, "learning_rate": 1e-3,
        "distill.on_policy_share": 0, "distill.top_k": 4, "log.report_to": "none", "eval.steps": 3, "train.num_threads": 1,
        "model.dtype": "float32", "teacher.dtype": "float32",
    }  # fmt: skip
    stores = {name: {"distill.store": str(tmp_path / f"store-{name}")} for name in ("one", "two")}
    assert_ranks_do_not_matter(common, tmp_path, rows=6, own=stores)
    assert len(list((tmp_path / "store-two").glob("shard-*"))) >= 2
    again = {
        **common,
        **stores["two"],
        "output_dir": str(tmp_path / "again"),
        "per_device_train_batch_size": 6,
    }
    del again["teacher.name_or_path"], again["teacher.dtype"]
    assert without_speed(run(again)) == without_speed(lines_of(tmp_path / "one"))


def assert_ranks_do_not_matter(common, folder, *, rows, own=None):
    """One rank with `rows` a step (in this process) and two with half of them give the same."""
    own = own or {"one": {}, "two": {}}
    run({**common, **own["one"], "output_dir": str(folder / "one"), "per_device_train_batch_size": rows})
    two = {
        **common,
        **own["two"],
        "output_dir": str(folder / "two"),
        "per_device_train_batch_size": rows // 2,
    }
    words = [word for name, value in two.items() for word in (f"--{name}", str(value))]
    train_in_ranks(["distill", *words], ranks=2, home=folder / "home")
    assert_same(folder / "one", folder / "two")


# interruptions ----------------------------------------------------------------------------------------------------


def test_killed_while_sampling_and_in_a_pass_equals_continuous(given):
    over = {
        "train": {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "distill": {"on_policy_share": 0.6},
        "save": {"steps": 1},
        "eval": {"steps": 3, "max_rows": 2},
        "lora": {"rank": 4, "dropout": 0.2},
    }
    kills = [
        ["kitae.rollout.generic", "PackedRows", "advance", 3],
        ["kitae.train.learner", "Learner", "_one_pass", 3],
        ["kitae.models.divergence", "LiveTeacher", "soft_targets", 5],
    ]
    whole, killed = given("whole", **over), given("killed", **over)
    live("distill", whole, [])
    assert live("distill", killed, kills) == len(kills)
    expected = outcome(whole["output_dir"])
    assert {line["rollout/on_policy"] for line in expected[0]} == {0.0, 1.0}
    assert outcome(killed["output_dir"]) == expected


def test_a_store_that_was_killed_goes_on_and_asks_for_no_row_twice(given, tmp_path, monkeypatch):
    over = {**OFFLINE, "train": {"max_steps": 2}, "eval": {"steps": 2}}

    def settings(name):
        made = given(name, **over)
        made["distill"] = {**made["distill"], "store": str(tmp_path / f"store-{name}")}
        return made

    monkeypatch.setattr(_distill, "ITEMS_PER_SHARD", 5)
    whole = settings("whole")
    run(whole)
    shards = sorted(path.name for path in (tmp_path / "store-whole").glob("shard-*"))
    assert len(shards) == 6

    asked = []
    append = TeacherStore.append

    def dying(self, rows, *found):
        asked.extend(map(row_key, rows))
        append(self, rows, *found)
        if len(asked) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(TeacherStore, "append", dying)
    killed = settings("killed")
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    run({**killed, "resume": True})
    assert len(asked) == len(set(asked)) == 24
    assert without_speed(lines_of(tmp_path / "killed")) == without_speed(lines_of(tmp_path / "whole"))


# the store --------------------------------------------------------------------------------------------------------

FACTS = StoreFacts(
    teacher="t", revision=None, teacher_fingerprint="w", tokenizer_fingerprint="v", temperature=1.0, top_k=2, dtype="float32"
)  # fmt: skip


def filled(folder, *, facts=FACTS):
    """A store of two rows, and what went into it."""
    rows = [
        Row(token_ids=[1, 2, 3, 4], loss_mask=[False, False, True, True]),
        Row(token_ids=[1, 2, 3, 4], loss_mask=[False, False, False, True]),
    ]
    store = TeacherStore(folder, facts)
    store.create(num_columns=9)
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    logp = torch.log_softmax(torch.tensor([[3.0, 1.0, 0.1], [0.0, -4.0, 2.0], [-9.0, 1.0, 1.5]]), -1)
    store.append(rows, ids, logp)
    store.refresh()
    return store, rows, ids, logp


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 4e-3)])
def test_a_store_gives_back_what_was_written_in_any_order(dtype, error, tmp_path):
    facts = replace(FACTS, dtype=dtype)
    _, rows, ids, logp = filled(tmp_path / "store", facts=facts)
    store = TeacherStore(tmp_path / "store", facts)
    assert (len(store), store.num_columns) == (2, 9)
    got_ids, got = store.read([rows[1], rows[0]])
    assert got_ids.tolist() == ids[[2, 0, 1]].tolist()
    assert (got - logp[[2, 0, 1]]).abs().max() <= error
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(3))
    missing = store.missing([rows, [Row(token_ids=[7, 8], loss_mask=[False, True])] * 2, rows[:1]])
    assert missing == ([1], 1, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperature": 2.0}, "another distill.temperature: 1.0 then, 2.0 now"),
        ({"top_k": 3}, "another distill.top_k: 2 then, 3 now"),
        ({"dtype": "float16"}, "another distill.store_dtype"),
        ({"tokenizer_fingerprint": "x"}, "another the tokenizer"),
        ({"teacher_fingerprint": "x"}, "another the teacher's weights"),
        ({"teacher": "u", "teacher_fingerprint": None}, 'another teacher.name_or_path: "t" then, "u" now'),
    ],
)
def test_a_store_made_from_something_else_is_refused(change, told, tmp_path):
    filled(tmp_path / "store")
    with pytest.raises(ConfigError, match=re.escape(told)):
        TeacherStore(tmp_path / "store", replace(FACTS, **change))


def test_the_same_weights_elsewhere_are_the_same_teacher(tmp_path):
    filled(tmp_path / "store")
    assert len(TeacherStore(tmp_path / "store", replace(FACTS, teacher="moved"))) == 2
    assert len(TeacherStore(tmp_path / "store", replace(FACTS, teacher=None, teacher_fingerprint=None))) == 2


def test_a_damaged_shard_and_a_folder_of_other_things_are_named(tmp_path):
    filled(tmp_path / "store")
    [shard] = (tmp_path / "store").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ConfigError, match=f"{shard.name} is damaged .*remove that file"):
        TeacherStore(tmp_path / "store", FACTS)
    (tmp_path / "store" / "manifest.json").unlink()
    shard.rename(tmp_path / "store" / "notes.txt")
    with pytest.raises(ConfigError, match="other things in it"):
        TeacherStore(tmp_path / "store", FACTS)


def test_a_disk_too_small_is_refused_before_the_teacher_is_asked(given, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_store, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(_distill, "load_policy", None)
    settings = given(**OFFLINE)
    settings["distill"]["store"] = str(tmp_path / "store")
    with pytest.raises(PlanError, match=r"24 rows with \d+ taught tokens need .* KiB .* 1000 bytes are free"):
        run(settings)
    assert not (tmp_path / "store").exists()


def test_rows_that_the_store_lacks_need_a_teacher(given, tmp_path):
    settings = given(**OFFLINE, teacher=None)
    settings["distill"]["store"] = str(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"lacks 24 of this run's rows, and there is no teacher"):
        run(settings)


def test_new_rows_join_a_store_and_a_teacher_that_changed_does_not(given, rows_file, models, tmp_path):
    store = {**OFFLINE["distill"], "store": str(tmp_path / "store")}
    few = {"train": [str(rows_file)], "system_prompt": "", "max_rows": 10}
    run(given("few", distill=store, rollout=None, data=few, train={"max_steps": 1}))
    run(given("all", distill=store, rollout=None, train={"max_steps": 1}))
    offline = run(given("offline", distill=store, rollout=None, teacher=None, train={"max_steps": 3}))
    direct = run(given("direct", **OFFLINE, train={"max_steps": 3}))
    for a, b in zip(without_speed(offline), without_speed(direct), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    changed = tmp_path / "changed-teacher"
    shutil.copytree(models["teacher"], changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="made with another teacher"):
        run(given("changed", distill=store, rollout=None, teacher={"name_or_path": str(changed)}))


# vocabularies -----------------------------------------------------------------------------------------------------


def test_a_teacher_with_other_tokens_is_refused_before_its_weights_are_read(given, tmp_path, monkeypatch):
    other = make_model(tmp_path / "other", "llama", tokenizer=make_tokenizer(extra="é"))
    monkeypatch.setattr(_distill, "load_policy", None)
    with pytest.raises(
        ModelError, match=r"another tokenizer than the student: id \d+ is 'é' there and no token here"
    ):
        run(given(teacher={"name_or_path": str(other)}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not lines_of(tmp_path / "run")


def padded(folder, size):
    """The model with rows of zeros at the end of its vocabulary."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name or "lm_head" in name:
            tensors[name] = torch.cat((tensor, torch.zeros(size - len(tensor), tensor.shape[1])))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
    return folder


@pytest.mark.parametrize(("student", "teacher"), [(128, 112), (112, 144)])
def test_vocabularies_padded_to_other_sizes_are_compared_where_both_have_tokens(
    student, teacher, given, tmp_path
):
    folders = {
        "student": padded(make_model(tmp_path / "s", "qwen3", initializer_range=0.2, **SIZES), student),
        "teacher": padded(make_model(tmp_path / "t", "llama", seed=1, initializer_range=0.5), teacher),
    }
    settings = given(train={"max_steps": 12})
    settings["model"]["name_or_path"], settings["teacher"]["name_or_path"] = map(str, folders.values())
    lines = run(settings)
    assert lines[-1]["train/divergence"] < lines[0]["train/divergence"] - 0.5


def test_a_completion_ends_before_the_first_token_its_teacher_does_not_have():
    problem = Problem(prompt="?", token_ids=[5, 6], index=0)
    groups = [
        [Rollout(problem=problem, text="", token_ids=ids, logprobs=[0.0] * len(ids))]
        for ids in ([7, 8], [7, 112, 8], [112])
    ]
    rows = _distill.to_rows(groups, num_columns=112)
    assert [row.token_ids for row in rows] == [[5, 6, 7, 8], [5, 6, 7]]
    assert rows[1].loss_mask == [False, False, True] and rows[1].prompt_length == 2


# settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ({"teacher": None}, "there is no teacher"),
        ({"distill": {"store": "s", "top_k": 4}}, "distill.on_policy_share 1 samples others"),
        ({"distill": {"store": "s", "on_policy_share": 0}, "rollout": None}, "distill.top_k is 0"),
        ({"distill": {"beta": 0.2}}, "distill.beta .*no effect.*reverse_kl"),
        ({"distill": {"ce_coef": 0.2}}, "distill.ce_coef .*no effect.*completions are not used"),
        ({"distill": {"on_policy_share": 0}}, "rollout.max_new_tokens .*no effect.*nothing is sampled"),
        ({"distill": {"store_dtype": "float16"}}, "distill.store_dtype .*no effect"),
        ({"distill": {"divergence": "jsd", "beta": 1.0}}, "less than 1"),
        ({"save": {"final": "best", "metric": "eval/loss"}, "eval": {"steps": 2}}, "take eval/divergence"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(over, told, given):
    with pytest.raises(ConfigError, match=told):
        resolve("distill", given(**over))


def test_rows_without_completions_are_refused_where_completions_are_taken(given, tmp_path, monkeypatch):
    monkeypatch.setattr(_distill, "load_policy", None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1"}) + "\n" for i in range(3)))
    with pytest.raises(DataError, match="nothing to teach"):
        run(given(data={"train": [str(prompts)]}, distill={"on_policy_share": 0.5}))


def test_a_store_over_more_tokens_than_the_student_has_is_refused(given, models, tmp_path, monkeypatch):
    store = {**OFFLINE["distill"], "store": str(tmp_path / "store")}
    run(given("first", distill=store, rollout=None, train={"max_steps": 1}))
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_columns": 113}))
    monkeypatch.setattr(_distill, "load_policy", None)
    with pytest.raises(
        ConfigError, match="distributions over 113 tokens, and the student's vocabulary has 112"
    ):
        run(given("second", distill=store, rollout=None, train={"max_steps": 1}))


def test_more_best_tokens_than_there_are_is_refused(given, monkeypatch):
    monkeypatch.setattr(_distill, "load_policy", None)
    with pytest.raises(ConfigError, match=r"distill.top_k is 500, and the vocabulary has 112 tokens"):
        run(given(distill={"top_k": 500}))


@pytest.mark.parametrize(
    ("beta", "divergence", "kept"), [("0", "forward_kl", 0.5), ("1", "reverse_kl", 0.5), ("0.2", "jsd", 0.2)]
)
def test_trls_line_is_understood(beta, divergence, kept):
    line = (
        "--model_name_or_path s --teacher_model_name_or_path t --dataset_name d --lmbda 0.5 --temperature 0.9 "
        f"--max_new_tokens 64 --seq_kd false --max_length 512 --beta {beta}"
    )
    cfg, notes = resolve("distill", line.split())
    assert not notes.warnings
    assert cfg.teacher.name_or_path == "t"
    assert (cfg.distill.on_policy_share, cfg.distill.divergence, cfg.distill.beta) == (0.5, divergence, kept)
    assert (cfg.rollout.temperature, cfg.rollout.max_new_tokens, cfg.data.max_length) == (0.9, 64, 512)
    assert cfg.distill.temperature == 1.0


def test_sequence_level_distillation_names_the_commands_that_do_it():
    with pytest.raises(ConfigError, match="kitae sample with the teacher, then kitae train sft"):
        resolve("distill", ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--seq_kd"])


def test_which_steps_sample_depends_on_seed_and_step_only():
    cfg = distill.Settings.model_validate(
        {"model": {"name_or_path": "m"}, "distill": {"on_policy_share": 0.25}}
    )
    chosen = [_distill.is_on_policy(cfg, step=step) for step in range(1, 2001)]
    assert chosen == [_distill.is_on_policy(cfg, step=step) for step in range(1, 2001)]
    assert 420 < sum(chosen) < 580
    for share, always in ((0.0, False), (1.0, True)):
        own = cfg.model_copy(update={"distill": distill.DistillSettings(on_policy_share=share)})
        assert {_distill.is_on_policy(own, step=step) for step in range(1, 500)} == {always}
    assert Divergence(kind="jsd").beta == cfg.distill.beta
