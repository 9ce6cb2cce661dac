"""lm-evaluation-harness over the server, with task files over local data, beside its own Hugging Face model."""

import json
import os

import pytest
from serving import KEY

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'kitae[parity]'")
pytest.importorskip("lm_eval.tasks")

CHOICE_TASK = """
task: sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
ANSWER_TASK = """
task: sums_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"{i}+{i}=", "choices": [f" {2 * i}", f" {i}", " 7"], "label": 0, "answer": "4"}
        for i in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE_TASK, "answer": ANSWER_TASK}.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    return lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(tasks, name, **kwargs):
    return lm_eval.simple_evaluate(
        tasks=[name], task_manager=tasks, log_samples=True, bootstrap_iters=0, **kwargs
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_are_those_of_its_own_model(running, thinker, tasks, batch_size):
    args = {
        "model": "tiny",
        "base_url": f"{running.url}/v1/completions",
        "tokenizer": str(thinker),
        "tokenizer_backend": "huggingface",
        "batch_size": batch_size,
        "max_length": 512,
    }
    served = evaluate(tasks, "sums_choice", model="local-completions", model_args=args)
    own = evaluate(
        tasks,
        "sums_choice",
        model="hf",
        model_args={"pretrained": str(thinker), "dtype": "float32", "device": "cpu"},
    )

    def scores(found):
        samples = sorted(found["samples"]["sums_choice"], key=lambda sample: sample["doc_id"])
        return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]

    assert len(scores(served)) == 6
    for mine, theirs in zip(scores(served), scores(own), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert served["results"]["sums_choice"]["acc,none"] == own["results"]["sums_choice"]["acc,none"]


def test_chat_completions_answer_its_questions(running, tasks):
    args = {"model": "tiny", "base_url": f"{running.url}/v1/chat/completions", "num_concurrent": 2}
    found = evaluate(
        tasks, "sums_answer", model="local-chat-completions", model_args=args, apply_chat_template=True
    )
    answers = {sample["doc_id"]: sample["resps"][0][0] for sample in found["samples"]["sums_answer"]}
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0, "seed": 1234, "stop": ["\n"]}
    for number, answer in answers.items():
        messages = [{"role": "user", "content": f"{number}+{number}="}]
        assert (
            answer
            == running.client().chat.completions.create(**ask, messages=messages).choices[0].message.content
        )
    assert len(answers) == 6 and os.environ["OPENAI_API_KEY"] == KEY
