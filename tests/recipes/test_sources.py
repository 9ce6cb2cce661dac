"""How recipes take several sources apart: held-out rows of each, and numbers of their own."""

import json

from kitae.config import EvalSettings
from kitae.data.chat import Template
from kitae.models.load import load_tokenizer
from kitae.parallel.world import World
from kitae.recipes import grpo
from kitae.recipes._setup import Setup
from kitae.train.run import Run


def setup_for(tmp_path, model, *, weights, max_rows):
    paths = []
    for name, count in (("a", 60), ("b", 30)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"prompt": f"{name}{i}", "answer": str(i)}) + "\n" for i in range(count))
        )
        paths.append(str(path))
    cfg = grpo.Settings.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(model)},
            "data": {"train": paths, "weights": weights, "hold_out": 0.2, "system_prompt": ""},
            "eval": EvalSettings(steps=1, max_rows=max_rows),
        }
    )
    template = Template.load(load_tokenizer(cfg.model), data=cfg.data)
    run = Run.open(cfg.output_dir, config={})
    return Setup(cfg, world=World(), run=run, template=template)


def test_every_source_is_held_out_from_and_problems_have_numbers_of_their_own(tiny, tmp_path):
    setup = setup_for(tmp_path, tiny("qwen3"), weights=[1.0, 1.0], max_rows=8)
    with setup.run:
        problems, held_out = setup.data.problems(max_prompt_length=64)
    assert sorted(p.prompt[0] for p in held_out) == ["a"] * 4 + ["b"] * 4
    assert not {p.prompt for p in held_out} & {problems[i].prompt for i in range(len(problems))}
    numbers = [problems[i].index for i in range(len(problems))]
    assert len(set(numbers)) == len(numbers) == 90 - 8
