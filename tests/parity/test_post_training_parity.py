"""What the programs of post-training leave: transformers opens it, and answers as `examples/generate.py --chat` does."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import dsv3  # noqa: E402
from dsv3.data import embedded_conversations, save_tokenizer, train_tokenizer  # noqa: E402
from dsv3.pretrained import save_pretrained  # noqa: E402
from tests.programs import EXAMPLES, run_programs  # noqa: E402

pytestmark = pytest.mark.parity
QUESTIONS = ["Write apple backwards.", "Hi <｜User｜>?"]
PLAIN_QUESTIONS = ["Write apple backwards.", "Make 12 from 4 7 9."]
SYSTEM = "Be brief."
NEW = 12
ASK = ["--chat", "--dtype=float32", f"--max_new_tokens={NEW}", "--temperature=0"]
TUNE = "--batch_size=2 --max_length=120 --lr=3e-3 --epochs=0.5 --samples=0".split()
GRPO = "--explorations=2 --prompts=4 --group_size=4 --max_new_tokens=8 --chat --lr=1e-3 --made=20 --heldout=4".split()
RECIPE = [f"--chat_template={EXAMPLES / 'plain_chat.jinja'}", "--data=plain.jsonl"]  # as `examples/reasoning.py` has it
RUNS = {  # in the order of the recipe
    "sft": [
        [*TUNE, "--data=rows.jsonl", "--model=model", "--out=sft"],
        [*TUNE, *RECIPE, "--model=model", "--out=cold"],
    ],
    "grpo": [[*GRPO, "--model=cold/export", "--out=grpo"]],
    "distill": [[*TUNE, "--model=model", "--teacher=grpo/export", *RECIPE, "--out=student"]],
}


# The recipe's template has no place for a system's message; transformers leaves control tokens out of a message there.
ASKED = {"sft": ([f"--system={SYSTEM}"], QUESTIONS)} | {name: ([], PLAIN_QUESTIONS) for name in ("cold", "grpo", "student")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    rows = embedded_conversations(60)
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row.messages], 330)
    cfg = dsv3.preset("tiny").replace(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, first_k_dense_replace=0)
    save_pretrained(folder / "model", cfg, dsv3.model_init([0, 1], cfg), dsv3.router_init(cfg))
    save_tokenizer(tokenizer, folder / "model")
    for name, some in (("rows", rows), ("plain", [row for row in rows if row.messages[0]["role"] == "user"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in some))
    made = run_programs(*RUNS.items(), folder=folder, seconds=300)
    assert [done.code for done in made] == [0] * 4, [done.err for done in made]
    asked = [[*ASK, f"{name}/export", *more, f"--prompt={text}"] for name, (more, texts) in ASKED.items() for text in texts]
    answers = iter(run_programs(("generate", asked), folder=folder, seconds=300))
    return folder, {name: [next(answers) for _ in texts] for name, (_, texts) in ASKED.items()}


@pytest.mark.parametrize("name", ASKED)
def test_transformers_answers_the_same(made, name):
    folder, answers = made[0], made[1][name]
    system, questions = [more.partition("=")[2] for more in ASKED[name][0]], ASKED[name][1]
    tokenizer = AutoTokenizer.from_pretrained(folder / name / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / name / "export")
    for question, answer in zip(questions, answers, strict=True):
        assert answer.code == 0, answer.err
        messages = [*({"role": "system", "content": text} for text in system), {"role": "user", "content": question}]
        asked = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "sanitize_control_tokens": True}
        given = tokenizer.apply_chat_template(messages, **asked)
        ids = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = ids[0, given["input_ids"].shape[1] :].tolist()
        assert 1 < len(said) <= NEW
        said = said[:-1] if said[-1] == tokenizer.eos_token_id else said
        assert answer.out == tokenizer.decode(said) + "\n"
