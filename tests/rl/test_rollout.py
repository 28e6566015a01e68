"""Rollouts: what is drawn for whom, what a row holds, and that no prompt is ever cut off."""

import numpy as np
import pytest

from dsv3.rl.logprobs import token_logprobs
from dsv3.rl.rollout import (
    Prompt,
    draw_samples,
    fit_rollouts,
    join_rollouts,
    rollout,
    sample_seed,
    take_rollouts,
)
from dsv3.serve import Request
from tests.compare import PLAIN
from tests.more import LONG
from tests.rl.model import engine, model, prompts

HOW = {"group_size": 3, "max_new_tokens": 6, "temperature": 0.9, "bucket": 16, "stop_tokens": (1, 4)}


def asked(*numbers, lengths=(3, 9, 5)):
    return [Prompt(ids, number) for ids, number in zip(prompts(*lengths), numbers)]


def rows_of(got):
    """Each row without padding: tokens, log-probabilities, experts."""
    for i in range(len(got.finish)):
        end = int(got.mask[i].nonzero()[0].max()) + 2
        yield got.tokens[i, :end].tolist(), got.logprobs[i, : end - 1], got.experts[:, i, : end - 1]


def assert_same_rows(got, want):
    assert len(got.finish) == len(want.finish)
    for (tokens, logprobs, experts), (tokens2, logprobs2, experts2) in zip(rows_of(got), rows_of(want)):
        assert tokens == tokens2
        np.testing.assert_allclose(logprobs, logprobs2, atol=2e-5)  # batches of other sizes add up in another order
        np.testing.assert_array_equal(experts, experts2)


def test_a_row_holds_prompt_and_answer_and_its_mask_ends_with_the_stop_token():
    cfg, params, router = model()
    given = asked(7, 8, 9)
    got = rollout(engine(speculative=2), given, seed=5, step=2, **HOW)
    assert got.tokens.shape == (9, 17) and got.mask.shape == got.logprobs.shape == (9, 16)
    assert got.numbers.tolist() == [7] * 3 + [8] * 3 + [9] * 3 and got.samples.tolist() == [0, 1, 2] * 3
    assert set(got.finish) == {"stop_token", "length"}, "want both, or other settings here"
    np.testing.assert_array_equal(got.truncated, [reason == "length" for reason in got.finish])
    trained = token_logprobs(params, router, got.tokens, got.mask, cfg=cfg, temperature=0.9, policy=PLAIN)
    np.testing.assert_allclose(got.logprobs, trained.logprobs * got.mask, atol=2e-5)
    for i, (tokens, logprobs, experts) in enumerate(rows_of(got)):
        prompt = given[i // 3].ids
        assert tokens[: len(prompt)] == prompt
        answer = tokens[len(prompt) :]
        assert got.mask[i].nonzero()[0].tolist() == list(range(len(prompt) - 1, len(tokens) - 1))
        assert got.lengths[i] == len(answer) <= 6
        ends = [token in (1, 4) for token in answer]
        assert ends[:-1] == [False] * (len(answer) - 1) and ends[-1] == (got.finish[i] == "stop_token")
        assert (logprobs[: len(prompt) - 1] == 0).all() and (logprobs[len(prompt) - 1 :] < 0).all()
        np.testing.assert_array_equal(experts, trained.experts[:, i, : len(tokens) - 1])
        assert got.texts[i] == (" ".join(map(str, answer)),) and got.answer(i) == got.texts[i][0]
    assert 0 < got.accepted.sum() < got.drafted.sum() and (got.steps > 0).all()
    assert (got.tokens[:, 16] == 0).all() and (np.sort(got.experts, -1)[..., 0] != np.sort(got.experts, -1)[..., 1]).all()


def test_a_sample_follows_from_seed_step_problem_and_its_number_alone():
    run = engine(speculative=2)
    want = rollout(run, asked(7, 8, 9), seed=5, step=2, **HOW)
    alone = [rollout(run, [prompt], seed=5, step=2, **HOW) for prompt in asked(7, 8, 9)]
    assert_same_rows(join_rollouts(alone[::-1]), take_rollouts(want, [6, 7, 8, 3, 4, 5, 0, 1, 2]))
    for other in ({"seed": 6, "step": 2}, {"seed": 5, "step": 3}):
        assert rollout(run, asked(7, 8, 9), **other, **HOW).tokens.tolist() != want.tokens.tolist()
    moved = rollout(run, asked(6, 8, 9), seed=5, step=2, **HOW)
    assert moved.tokens[:3].tolist() != want.tokens[:3].tolist() and moved.tokens[3:].tolist() == want.tokens[3:].tolist()


def test_seeds_are_64_bits_and_unlike():
    seeds = {sample_seed(*key) for key in np.ndindex(2, 3, 4, 5, 2)}
    assert len(seeds) == 240 and max(seeds) >= 2**60 and min(seeds) >= 0


def test_prompts_of_several_turns_go_on_after_each_answer():
    """The second answer is what the engine says of the whole conversation; the user's turn is no part of the mask."""
    cfg, params, router = model()
    run, (first, second) = engine(speculative=2), prompts(3, 4)
    how = HOW | {"stop_tokens": tuple(range(2, 16, 2)), "max_new_tokens": 8}
    given = [Prompt(first, 1, (second, [9])), Prompt(second, 2)]
    got = rollout(run, given, **how)
    assert {len(texts) for texts in got.texts[:3]} == {3} and {len(texts) for texts in got.texts[3:]} == {1}
    trained = token_logprobs(
        params, router, got.tokens, got.mask, cfg=cfg, temperature=0.9, experts=got.experts, policy=PLAIN
    )
    np.testing.assert_allclose(got.logprobs, trained.logprobs * got.mask, atol=2e-5)
    settings = {name: how[name] for name in ("max_new_tokens", "temperature", "stop_tokens")}
    later, wanted = [], []
    for i, (tokens, _, _) in enumerate(rows_of(got)):
        answers = [list(map(int, text.split())) for text in got.texts[i]]
        prompt = given[i // 3]
        want = [*prompt.ids, *answers[0]]
        drawn = [0] * (len(prompt.ids) - 1) + [1] * len(answers[0])
        for turn, (text, answer) in enumerate(zip(prompt.turns, answers[1:]), 1):
            want += text
            later.append(Request(list(want), seed=sample_seed(0, 0, prompt.number, i % 3, turn), **settings))
            wanted.append(tuple(answer))
            want += answer
            drawn += [0] * len(text) + [1] * len(answer)
        assert tokens == want
        assert got.mask[i, : len(drawn)].tolist() == drawn and got.mask[i].sum() == sum(drawn)
    assert [done.tokens for done in run.generate(later)] == wanted and len(wanted) == 6
    assert got.answer(0) == "\n".join(got.texts[0])


def test_an_answer_that_is_truncated_is_the_last():
    (first, second) = prompts(3, 4)
    got = rollout(engine(speculative=2), [Prompt(first, 1, (second,))], **(HOW | {"stop_tokens": ()}))
    assert got.truncated.all() and [len(texts) for texts in got.texts] == [1] * 3 and got.lengths.tolist() == [6] * 3


@pytest.mark.parametrize(
    "given, how, message",
    [
        ([], {}, "`prompts` is empty"),
        ([Prompt([3], 4), Prompt([], 5)], {}, r"prompt 1 \(problem 5\) is empty"),
        ([Prompt([3], 4), Prompt([3] * 59, 5)], {},
         r"prompt 1 \(problem 5\) has 59 tokens and wants room for 1 answer of 6, that is 65, want at most max_length, "
         "which is 64: no prompt is cut off"),
        ([Prompt([3] * 20, 4, ([5] * 20, [2] * 10))], {},
         r"prompt 0 \(problem 4\) has 50 tokens and wants room for 3 answers of 6, that is 68"),
        ([Prompt([3] * 59, 5, name="p.jsonl:7")], {}, "p.jsonl:7 has 59 tokens and wants room for 1 answer of 6"),
        ([Prompt([3])], {"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ([Prompt([3])], {"group_size": 0}, "`group_size` is 0, want > 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_number(given, how, message):
    run = engine(speculative=2)
    traces = run.traces()
    with pytest.raises(ValueError, match=f"rollout: {message}") as caught:
        rollout(run, given, **HOW | how)
    assert run.traces() == traces and "\n" not in str(caught.value)


def test_an_engine_must_keep_a_record():
    with pytest.raises(ValueError, match="rollout: `engine` keeps no record"):
        rollout(engine(record=False), asked(1), **HOW)


@LONG
def test_samples_are_drawn_without_a_record_too():
    given = [Prompt(prompts(5)[0], 3, ([4, 5],)), Prompt(prompts(4)[0], 8)]
    how = {name: value for name, value in HOW.items() if name != "bucket"}
    want = rollout(engine(), given, **HOW)
    rows = draw_samples(engine(record=False), given, **how)
    assert [(row.prompt.number, row.sample) for row in rows] == list(zip(want.numbers.tolist(), want.samples.tolist()))
    assert tuple(tuple(row.texts) for row in rows) == want.texts and tuple(row.finish for row in rows) == want.finish
    assert [row.length for row in rows] == want.lengths.tolist()


def test_the_longest_prompt_that_fits_is_whole():
    prompt = prompts(58)[0]
    got = rollout(engine(speculative=2), [Prompt(prompt)], **HOW | {"stop_tokens": ()})
    assert got.tokens.shape[1] == 64 and got.tokens[:, :58].tolist() == [prompt] * 3 and got.lengths.tolist() == [6] * 3


def test_padding_is_added_and_taken_away_without_a_loss():
    got = rollout(engine(speculative=2), asked(7, 8), **HOW)
    wide = fit_rollouts(got, 40)
    assert wide.tokens.shape == (6, 41) and wide.experts.shape == (2, 6, 40, 2) and wide.mask.sum() == got.mask.sum()
    assert (wide.experts[..., 0] != wide.experts[..., 1]).all()
    assert_same_rows(fit_rollouts(wide, 16), got)
    with pytest.raises(ValueError, match="fit_rollouts: `size` is 8, want at least"):
        fit_rollouts(got, 8)
    both = join_rollouts([got, wide])
    assert both.tokens.shape == (12, 41) and both.finish == got.finish * 2
    assert_same_rows(take_rollouts(both, range(6, 12)), got)
