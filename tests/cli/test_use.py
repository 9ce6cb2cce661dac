"""generate, chat, evaluate, compare and trace on tiny models."""

import io
import json
import subprocess
import sys

import pytest

import kitae as package
from kitae.cli._open import lookalikes, open_model
from kitae.cli._stream import DIM, PLAIN, Stream
from kitae.cli.chat import Conversation, LocalTalker, Settings
from kitae.errors import ConfigError


def test_generate_streams_one_completion_and_writes_several_as_json(kitae, files, tiny):
    model = tiny()
    code, streamed, _ = kitae("generate", model, "2+2", "--max_new_tokens", 6, "--seed", 3)
    assert code == 0
    code, printed, _ = kitae(
        "generate",
        model,
        "2+2",
        "3+3",
        "--n",
        2,
        "--max_new_tokens",
        6,
        "--seed",
        3,
        "--json",
        "out/found.json",
    )
    found = json.loads((files / "out" / "found.json").read_text())
    assert [len(r["completions"]) for r in found["results"]] == [2, 2]
    assert found["results"][0]["completions"][0] + "\n" == streamed
    assert printed == "".join(text + "\n" for r in found["results"] for text in r["completions"])


def test_several_completions_are_numbered_on_a_terminal_only(kitae, files, tiny, monkeypatch):
    asked = ("generate", tiny(), "2+2", "3+3", "--n", 2, "--max_new_tokens", 4)
    piped = kitae(*asked)[1]
    assert "completion" not in piped
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    lines = kitae(*asked)[1].splitlines()
    headings = [line for line in lines if "completion" in line]
    assert [f"prompt {p} of 2, completion {n} of 2" in line for p, n, line in zip(
        (1, 1, 2, 2), (1, 2, 1, 2), headings, strict=True)] == [True] * 4  # fmt: skip
    assert [line for line in lines if line not in headings] == piped.splitlines()


def test_generate_from_python_equals_the_command(kitae, files, tiny):
    model = str(tiny())
    _, streamed, _ = kitae(
        "generate", model, "2+2", "--max_new_tokens", 6, "--temperature", 0.1, "--do_sample", "True"
    )
    assert [streamed.rstrip("\n")] == package.generate(
        model, "2+2", max_new_tokens=6, temperature=0.1, do_sample=True
    )


def test_the_native_engine_says_what_the_generic_one_does(kitae, files, tiny, kernels):
    asked = ("generate", tiny("llama"), "2+2", "3+3", "--n", 2, "--max_new_tokens", 20, "--dtype", "float32")
    said = {name: kitae(*asked, "--engine", name) for name in ("native", "generic", "auto")}
    assert said["native"] == said["generic"] == said["auto"]
    assert said["native"][0] == 0
    code, _, complaint = kitae("generate", tiny("llama", hidden_act="gelu"), "2+2", "--engine", "native")
    assert code == 2
    assert "engine is native, but the native engine cannot sample from this model" in complaint


def test_prompts_come_from_a_file_too_and_none_is_an_error(kitae, files, tiny):
    (files / "prompts.txt").write_text("2+2\n\n3+3\n")
    code, out, _ = kitae(
        "generate", tiny(), "--prompts_file", "prompts.txt", "--max_new_tokens", 1, "--temperature", 0
    )
    assert code == 0 and out.count("\n") >= 2
    assert "there is no prompt" in kitae("generate", tiny())[2]
    assert (
        "cannot read prompts from absent.txt" in kitae("generate", tiny(), "--prompts_file", "absent.txt")[2]
    )


def test_prompts_that_are_not_utf_8_are_named(kitae, files, tiny, monkeypatch):
    typed = b"2+\xff2".decode(errors="surrogateescape")  # as Python hands over what a shell passed
    code, _, err = kitae("generate", tiny(), typed)
    assert code == 2 and "a prompt is not UTF-8 at character 3: '\\udcff'" in err
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"1\n2+\xff2\n"), "utf-8", errors))
        code, _, err = kitae("generate", tiny(), "--prompts_file", "-")
        said = "what - holds is not UTF-8" if errors == "surrogateescape" else "cannot read prompts from -"
        assert code == 2 and said in err


def test_do_sample_false_is_greedy(kitae, files, tiny):
    model = str(tiny())
    greedy = package.generate(model, "2+2", max_new_tokens=6, temperature=0.0)
    assert package.generate(model, "2+2", max_new_tokens=6, do_sample=False, seed=5) == greedy


def test_a_lookalike_of_a_control_token_is_named():
    tokens = ["<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<think>"]
    assert lookalikes("<|User|>Hi<|end of sentence|><think>", tokens) == [
        ("<|User|>", tokens[0]), ("<|end of sentence|>", tokens[1]),
    ]  # fmt: skip
    assert lookalikes("<|User|>", ["<|User|>", *tokens]) == []
    assert lookalikes("<\uff5cUser\uff5c>", tokens) == []


def test_the_real_tokenizers_bars_are_full_width(shared_data):
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "tokenizers" / "DeepSeek-R1-Distill-Qwen"
    tokens = list(PreTrainedTokenizerFast.from_pretrained(folder).get_added_vocab())
    found = lookalikes("<|User|>What is 1+1?<|Assistant|>", tokens)
    assert sorted(found) == [("<|Assistant|>", "<\uff5cAssistant\uff5c>"), ("<|User|>", "<\uff5cUser\uff5c>")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_thinking_is_dimmed_even_when_its_tags_come_in_pieces(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    pieces = ["a</", "think", ">b", "<think>c</think>d"]
    out = Terminal()
    stream = Stream(out, decode=lambda ids: "".join(pieces[i] for i in ids), prefill="<think>\n")
    for i in range(4):
        stream.on_tokens(0, 0, [i])
    stream.finish()
    assert out.getvalue() == f"{DIM}<think>\na</think>{PLAIN}b{DIM}<think>c</think>{PLAIN}d\n"


def test_folded_thinking_is_one_line_with_its_length(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    stream = Stream(out, prefill="<think>\n", folds=True)
    for piece in ("ab", "c</thi", "nk>d<think>e</think>f"):
        stream.add(piece)
    stream.finish()
    assert out.getvalue() == f"{DIM}[thinking, 19 characters]{PLAIN}d{DIM}[thinking, 16 characters]{PLAIN}f\n"
    open_end = io.StringIO()
    stream = Stream(open_end, prefill="<think>ab", folds=True)
    stream.finish()
    assert open_end.getvalue() == "[thinking, 9 characters]\n"


def test_colours_stay_out_of_files_and_half_characters_wait():
    out = io.StringIO()
    texts = {1: "\ufffd", 2: "\u3042"}
    stream = Stream(out, decode=lambda ids: texts.get(len(ids), ""), prefill="<think>")
    stream.on_tokens(0, 0, [0])
    assert out.getvalue() == "<think>"
    stream.on_tokens(0, 0, [1])
    stream.finish()
    assert out.getvalue() == "<think>\u3042\n"


def test_chat_remembers_resets_and_leaves(kitae, files, tiny, monkeypatch):
    def chat(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, out, _ = kitae("chat", tiny(), "--max_new_tokens", 4, "--temperature", 2)
        assert code == 0
        return out

    first = chat("2+2", "/exit", "never asked")
    twice = chat("2+2", "2+2")
    again = chat("2+2", "/reset", "2+2")
    assert twice.startswith(first) and again == first + first
    assert twice != again


def test_chat_keeps_history_by_the_template_and_caps_at_the_context(files, tiny):
    use = Settings(model=str(tiny(max_position_embeddings=64)), temperature=0.0, max_new_tokens=2048)
    opened = open_model(use)
    conversation = Conversation(LocalTalker(opened, use))
    text = conversation.send("1")
    assert conversation.messages == [{"role": "user", "content": "1"}, {"role": "assistant", "content": text}]
    turns = conversation.messages = conversation.messages * 9
    with pytest.raises(ConfigError, match="/reset forgets it"):
        conversation.send("1")
    assert conversation.messages is turns


def test_chat_wants_room_for_an_answer(kitae, tiny):
    code, _, err = kitae("chat", tiny(), "--max_new_tokens", 0)
    assert code == 2 and "max_new_tokens is '0'" in err


def test_evaluate_reports_intervals_groups_and_results(kitae, files, tiny):
    code, out, err = kitae(
        "evaluate", tiny(), "--dataset_name", "rl.jsonl", "--num_samples", 6, "--max_new_tokens", 4, "--by", "level",
        "--results", "found.jsonl", "--json", "summary.json",
    )  # fmt: skip
    assert code == 0
    assert "accuracy 0 (95 % 0.000 to 0.390)" in out and "level L2" in out and "results: found.jsonl" in out
    assert "6 of 6, accuracy 0.000" in err
    summary = json.loads((files / "summary.json").read_text())
    assert (summary["problems"], summary["accuracy"], sorted(summary["groups"])) == (
        6,
        0.0,
        ["L0", "L1", "L2"],
    )
    assert len((files / "found.jsonl").read_text().splitlines()) == 6
    code, _, err = kitae("evaluate", tiny(), "--dataset_name", "rl.jsonl", "--results", "found.jsonl")
    assert code == 2 and "found.jsonl exists already" in err


def test_evaluate_reads_rows_and_looks_at_its_results_files_before_the_weights(kitae, files, tiny):
    absent = "absent/model"
    by = kitae("evaluate", absent, "--dataset_name", "rl.jsonl", "--by", "levle")[2]
    assert "no row has a column 'levle' to report by; did you mean 'level'?" in by
    assert "nowhere.jsonl" in kitae("evaluate", absent, "--dataset_name", "nowhere.jsonl")[2]
    (files / "r-baseline.jsonl").write_text("")
    flags = ["--dataset_name", "rl.jsonl", "--baseline", absent, "--results", "r.jsonl"]
    assert "r-baseline.jsonl exists already" in kitae("evaluate", absent, *flags)[2]


@pytest.mark.parametrize("flag", [["--n", "2", "--temperature", "1"], ["--results", "r.jsonl"], ["--raw"]])
def test_what_perplexity_does_not_use_is_refused(kitae, files, flag):
    code, _, err = kitae("evaluate", "absent/model", "--dataset_name", "sft.jsonl", "--perplexity", *flag)
    assert code == 2 and f"{flag[0][2:]} would have no effect" in err


def test_evaluate_several_samples_needs_a_temperature(kitae, files, tiny):
    assert "set --temperature" in kitae("evaluate", tiny(), "--dataset_name", "rl.jsonl", "--n", 4)[2]
    _, out, _ = kitae(
        "evaluate", tiny(), "--dataset_name", "rl.jsonl", "--num_samples", 2, "--n", 2, "--temperature", 1,
        "--max_new_tokens", 3, "--raw",
    )  # fmt: skip
    assert "pass@1 0, pass@2 0; 2 problems" in out


def test_perplexity_is_the_exponential_of_the_loss_per_taught_token(files, tiny):
    import math

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny()
    found = package.evaluate(str(model), "sft.jsonl", dtype="float32", perplexity=True, num_samples=3)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total = count = 0
    for line in (files / "sft.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        prompt = tokenizer.encode(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        ids = prompt + tokenizer.encode(f"{row['completion']}<|im_end|>")
        with torch.no_grad():
            logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_two_results_files_are_compared_problem_by_problem(kitae, files, tiny):
    flags = ["--dataset_name", "rl.jsonl", "--num_samples", 5, "--max_new_tokens", 3]
    for name in ("a", "b"):
        kitae("evaluate", tiny(), *flags, "--results", f"{name}.jsonl")
    lines = [json.loads(line) for line in (files / "b.jsonl").read_text().splitlines()]
    lines[0]["correct"] = True
    (files / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = kitae("compare", "a.jsonl", "b.jsonl", "--json", "c.json")
    assert code == 0
    assert "difference +0.200" in out and "p = 1 (exact McNemar), 5 problems" in out
    assert json.loads((files / "c.json").read_text())["comparison"]["second_better"] == 1
    code, out, _ = kitae("compare", tiny(), tiny("llama"), *flags)
    assert code == 0 and "difference +0.000" in out


def test_trace_prints_every_station_with_the_numbers_of_the_run(kitae, files, tiny):
    import torch
    from transformers import AutoModelForCausalLM

    model = tiny()
    (files / "run.toml").write_text(
        f'[model]\nname_or_path = "{model}"\ndtype = "float32"\n[data]\ntrain = "sft.jsonl"\n'
    )
    code, out, _ = kitae("trace", "run.toml", "--row", 3, "--json", "trace.json", "--save.steps", 50)
    assert code == 0
    for station in (
        "the row as it is: sft.jsonl:4",
        "normalised",
        "taught",
        "packed",
        "token by token",
        "loss",
        "gradient",
    ):
        assert station in out
    assert "[[<think>x</think><answer>6</answer><|im_end|>]]" in out
    assert "runs/sft/checkpoints/step_000050 (every 50 steps)" in out
    found = json.loads((files / "trace.json").read_text())

    [row] = found["rows"]
    ids = torch.tensor([[token["id"] for token in row["tokens"]]])
    labels = torch.tensor([[token["id"] if token["taught"] else -100 for token in row["tokens"]]])
    plain = AutoModelForCausalLM.from_pretrained(model)
    loss = plain(ids, labels=labels).loss
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert found["loss_sum"] == pytest.approx(sum(t.get("loss", 0.0) for t in row["tokens"]), rel=1e-5)
    assert not (files / "runs").exists()


@pytest.mark.parametrize("rank", [0, 4])
def test_trace_of_grpo_samples_and_judges_a_group(kitae, files, tiny, rank):
    (files / "run.toml").write_text(
        f'[model]\nname_or_path = "{tiny()}"\ndtype = "float32"\n[data]\ntrain = "rl.jsonl"\nsystem_prompt = ""\n'
        f"[rollout]\nnum_generations = 3\nmax_new_tokens = 4\n[lora]\nrank = {rank}\n[grpo]\nkl_coef = 0.1\n"
    )
    code, out, _ = kitae("trace", "run.toml", "--json", "trace.json")
    assert code == 0
    assert "a group of 3 completions at temperature 1.0, judged" in out and "ref_logprobs" in out
    found = json.loads((files / "trace.json").read_text())
    assert found["rewards"] == [0.0, 0.0, 0.0] and found["advantages"] == [0.0, 0.0, 0.0]
    taught = [token for row in found["rows"] for token in row["tokens"] if token["taught"]]
    assert all(t["logprob"] == pytest.approx(t["old_logprobs"], abs=1e-5) for t in taught)


def test_trace_says_what_is_wrong_with_a_row(kitae, files, tiny):
    flags = ["--model_name_or_path", tiny(), "--dataset_name", "sft.jsonl"]
    assert "--row is 99, but sft.jsonl has 12 rows" in kitae("trace", *flags, "--row", 99)[2]
    assert "--row is 'x'" in kitae("trace", *flags, "--row", "x")[2]
    (files / "bad.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = kitae("trace", *flags[:2], "--dataset_name", "bad.jsonl")
    assert code == 2 and "bad.jsonl:1: nothing to teach" in err


def test_trace_says_which_recipes_it_follows(kitae, files):
    (files / "dpo.toml").write_text(
        '[model]\nname_or_path = "m"\n[data]\ntrain = ["pairs.jsonl"]\n[dpo]\nbeta = 0.2\n'
    )
    code, _, err = kitae("trace", "dpo.toml")
    assert code == 2 and "kitae trace follows rows of sft and grpo, not of dpo" in err


def test_warnings_of_other_libraries_are_not_said_in_our_name():
    code = (
        "import logging; from kitae.cli._open import warn_on_stderr; warn_on_stderr(['of ours'])\n"
        "logging.getLogger('other').warning('of theirs'); logging.getLogger('other').error('trouble')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "kitae: of ours\nkitae: trouble\n"
