"""The programs of post-training on what is published: a directory as DeepSeek's are; files as of GSM8K, MATH, HumanEval."""

import json
import os
import shutil
import warnings

import pytest

import dsv3
from dsv3.data import find_chat_template, load_chat_template, load_tokenizer, save_tokenizer, special_ids, train_tokenizer
from dsv3.data.default_template import DEFAULT_CHAT_TEMPLATE
from dsv3.pretrained import load_pretrained, save_pretrained
from dsv3.train.records import read_rows
from tests.more import MORE
from tests.programs import run_programs
from tests.rl import isolations
from tests.small import model_config, random_params

pytestmark = pytest.mark.skipif(not MORE, reason="long cases: a dozen runs of programs")
# Another one than dsv3's own: a line break behind each turn, and a system prompt of its own.
TEMPLATE = """{{ bos_token }}Solve it.{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}\
<｜Assistant｜>{{ m.content + eos_token }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
GSM8K = [
    {"question": f"Ann has {a} hens and gets {a}. How many?", "answer": f"{a}+{a}=<<{a}+{a}={a + a}>>{a + a}\n#### {a + a}"}
    for a in range(2, 10)
]  # fmt: skip
MATH = [
    {"problem": f"Find $x$: $x+{a}=9$.", "level": "Level 1", "type": "Algebra", "solution": rf"It is $\boxed{{{9 - a}}}$."}
    for a in range(8)
]  # fmt: skip
CODE = [
    {"task_id": f"X/{a}", "prompt": f"def f(x):\n    \"Add {a}.\"\n", "canonical_solution": f"    return x + {a}\n",
     "test": f"def check(c):\n    assert c(1) == {a + 1}\n", "entry_point": "f"}
    for a in range(4)
]  # fmt: skip
FILES = {"gsm8k": "gsm8k/train.jsonl", "math": "math/train", "code": "code.jsonl"}
# A random model is never right: it is the language by which its answers differ.
REWARDS = {"gsm8k": "accuracy:1,language:0.1", "math": "accuracy:1,format:0.2,language:0.1", "code": "code:1,language:0.1"}
RUN = ("code",) if MORE and any(isolations.trouble(kind) is None for kind in isolations.KINDS) else ()  # in a sandbox
SOLVED, EXPLORED = ("math", "gsm8k", *RUN), ("math", *RUN)  # beside the exploration of GSM8K
TRAIN = "--lr=0.01 --max_new_tokens=4 --model=model".split()


def problems(kind):
    return [f"--problems={FILES[kind]}", f"--problems_format={kind}", f"--reward={REWARDS[kind]}"]


def calls():
    """Arguments of each program, by the name of the folder that it leaves."""
    tune = ["--model=model", "--lr=0.01", "--data=rows.jsonl", "--epochs=1", "--batch_size=2", "--samples=1"]
    solve = {
        f"solve_{kind}": ["--model=model", *problems(kind), "--chat", "--samples=2", "--max_new_tokens=4", "--speculative=0"]
        for kind in SOLVED
    }
    explore = ["--prompts=2", "--explorations=1", *TRAIN]
    grpo = ["--group_size=4", "--heldout=2", "--chat", "--measure_every=0", "--kl_weight=0", "--rows=4", *explore]
    grpos = {f"grpo_{kind}": [*problems(kind), *grpo] for kind in EXPLORED}
    bare = {"grpo_bare": [*problems("gsm8k"), *grpo, "--model=bare", "--speculative=0"]}
    policy = {
        f"policy_{kind}": [*problems(kind), *explore, "--on_policy", "--teacher=model", "--heldout=0.4", "--lr_end=0.001"]
        for kind in ("gsm8k", "math")
    }
    return {"sft": {"sft": tune}, "solve": solve, "grpo": grpos | bare, "distill": policy}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    rows = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in GSM8K
    ]
    tokenizer = train_tokenizer([json.dumps(row) for row in (*GSM8K, *MATH, *CODE)] * 3, 360)
    ids = special_ids(tokenizer)
    cfg = model_config(vocab_size=360, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
                       max_position_embeddings=256)  # fmt: skip
    cfg = cfg.replace(bos_id=ids.bos, eos_ids=(ids.eos,), pad_id=ids.pad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' reading of sizes that are no multiples of 128
        params = random_params(dsv3.model_specs(cfg), std=0.1)
        save_pretrained(folder / "model", cfg, params, dsv3.router_init(cfg), dtype="float8", max_shard_bytes=8000)
    shutil.copytree(folder / "model", folder / "bare")
    save_tokenizer(tokenizer, folder / "model", chat_template=TEMPLATE)
    shutil.copy(folder / "model" / "tokenizer.json", folder / "bare")
    for name in ("gsm8k", "math/train/algebra"):
        os.makedirs(folder / name)
    (folder / FILES["gsm8k"]).write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    (folder / FILES["code"]).write_text("".join(json.dumps(row) + "\n" for row in CODE))
    for number, row in enumerate(MATH):
        (folder / "math" / "train" / "algebra" / f"{number}.json").write_text(json.dumps(row, indent=2))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {program: each for program, each in calls().items() if each}
    done = run_programs(
        *((name, [[*given, f"--out={out}"] for out, given in each.items()]) for name, each in wanted.items()),
        folder=folder, seconds=600,
    )  # fmt: skip
    return folder, dict(zip([out for each in wanted.values() for out in each], done, strict=True))


@pytest.mark.parametrize("name", [out for each in calls().values() for out in each])
def test_programs_run_to_their_end(results, name):
    folder, found = results
    assert found[name].code == 0, found[name].err
    if name.startswith("solve"):
        return
    cfg, params, _ = load_pretrained(folder / name / "export", dtype="float32")
    before = load_pretrained(folder / "model", dtype="float32")[1]
    assert float(abs(params.embed - before.embed).numpy().max()) > 0 and cfg.num_mtp_layers == 1, "it has learned"
    asks = find_chat_template(folder / name / "export", load_tokenizer(folder / name / "export"))
    assert asks.source == (DEFAULT_CHAT_TEMPLATE if name == "grpo_bare" else TEMPLATE)


def test_the_directory_is_as_published(results):
    folder, found = results
    config = json.loads((folder / "model" / "config.json").read_text())
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128] and config["num_nextn_predict_layers"] == 1
    weights = index["weight_map"]
    assert len(set(weights.values())) > 2 and any(name.endswith("weight_scale_inv") for name in weights)
    assert json.loads((folder / "model" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert load_chat_template(folder / "bare") is None and found["sft"].code == 0


@pytest.mark.parametrize("kind", SOLVED)
def test_answers_have_the_files_questions_and_references(results, kind):
    folder, found = results
    rows = [json.loads(line) for line in (folder / f"solve_{kind}" / "answers.jsonl").read_text().splitlines()]
    source = {"gsm8k": GSM8K, "math": MATH, "code": CODE}[kind]
    field = {"gsm8k": "question", "math": "problem", "code": "prompt"}[kind]
    assert [row["prompt"] for row in rows] == [row[field] for row in source for _ in range(2)]
    assert list(rows[0]["parts"]) == [part.partition(":")[0] for part in REWARDS[kind].split(",")]
    if kind == "gsm8k":
        assert [row["reference"] for row in rows[::2]] == [str(a + a) for a in range(2, 10)]
        assert rows[2]["name"] == "gsm8k/train.jsonl:2"
    if kind == "math":
        assert [row["reference"] for row in rows[::2]] == [str(9 - a) for a in range(8)]
        assert rows[2]["name"] == "math/train/algebra/1.json"


@pytest.mark.parametrize("name", ["bare", *EXPLORED])
def test_explorations_are_of_the_files_problems(results, name):
    rows = read_rows(results[0] / f"grpo_{name}" / "log.jsonl")
    (asked,) = [row for row in rows if row["kind"] == "samples"]
    source, field = {"bare": (GSM8K, "question"), "math": (MATH, "problem"), "code": (CODE, "prompt")}[name]
    known = [row[field] for row in source]
    assert all(sample["prompt"] in known[:-2] for sample in asked["samples"]), "the last two are held out"
