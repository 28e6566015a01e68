"""What `examples/sft.py` leaves: transformers opens it, and answers as `examples/generate.py --chat` does."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import dsv3  # noqa: E402
from dsv3.data import embedded_conversations, save_tokenizer, train_tokenizer  # noqa: E402
from dsv3.pretrained import save_pretrained  # noqa: E402
from tests.programs import run_programs  # noqa: E402

pytestmark = pytest.mark.parity
QUESTIONS = ["Write apple backwards.", "Hi <｜User｜>?"]
SYSTEM = "Be brief."
NEW = 12
TRAIN = "--model=model --data=rows.jsonl --batch_size=2 --max_length=120 --lr=3e-3 --epochs=0.5 --out=run".split()
ASK = ["run/export", "--chat", f"--system={SYSTEM}", "--dtype=float32", f"--max_new_tokens={NEW}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    rows = embedded_conversations(60)
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row.messages], 330)
    cfg = dsv3.preset("tiny").replace(vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, first_k_dense_replace=0)
    save_pretrained(folder / "model", cfg, dsv3.model_init([0, 1], cfg), dsv3.router_init(cfg))
    save_tokenizer(tokenizer, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in rows))
    return folder


def test_transformers_answers_the_same(folder):
    asked = [[*ASK, f"--prompt={question}"] for question in QUESTIONS]
    trained, *answers = run_programs(("sft", [[*TRAIN, "--samples=0"]]), ("generate", asked), folder=folder)
    assert trained.code == 0, trained.err
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "export")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        assert answer.code == 0, answer.err
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "sanitize_control_tokens": True}
        given = tokenizer.apply_chat_template(messages, **how)
        ids = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        said = ids[0, given["input_ids"].shape[1] :].tolist()
        assert 1 < len(said) <= NEW
        said = said[:-1] if said[-1] == tokenizer.eos_token_id else said
        assert answer.out == tokenizer.decode(said) + "\n"
