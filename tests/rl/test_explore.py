"""Which problems and groups an exploration takes, and how rewards are read."""

import numpy as np
import pytest

from dsv3.rl.explore import Task, evaluate, explore, grade, task_number
from dsv3.rl.report import transcript
from dsv3.rl.reward import Reward, make_reward
from dsv3.rl.rollout import Prompt
from dsv3.rl.settings import PUBLISHED, GrpoSettings
from tests.rl.fakes import FakeWorker

TASKS = [Task([1, 2, 3], f"problem {i}", i) for i in range(10)]


def settings(**fields):
    return GrpoSettings(**{"prompts": 4, "group_size": 3, "max_new_tokens": 4} | fields)


def by_sum(prompt, answer, reference):
    assert prompt == f"problem {reference}"
    return Reward(float(answer), {"accuracy": float(int(answer) % 2), "size": len(answer)})


def test_each_epoch_has_all_problems_in_an_order_of_its_own():
    orders = [[task_number(10 * epoch + i, 10, seed=1) for i in range(10)] for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [task_number(i, 10, seed=2) for i in range(10)] != orders[0]


def test_groups_come_in_the_order_of_the_run_and_rewards_belong_to_their_samples():
    worker = FakeWorker()
    first = explore(worker, TASKS, by_sum, settings=settings(seed=1), step=3)
    numbers = [task_number(i, 10, 1) for i in range(4)]
    asked, how = worker.asked[0]
    assert asked == numbers and first.position == 4 and first.drawn == 4
    assert how == {"group_size": 3, "max_new_tokens": 4, "temperature": 1.0, "stop_tokens": None, "stop": (), "bucket": 64,
                   "seed": 1, "step": 3}  # fmt: skip
    assert first.rollouts.numbers.tolist() == np.repeat(numbers, 3).tolist()
    for row in range(12):
        total = (first.rollouts.tokens[row, 1:] * first.rollouts.mask[row]).sum()
        assert first.graded.total[row] == total and first.graded.parts["accuracy"][row] == total % 2
    second = explore(worker, TASKS, by_sum, settings=settings(seed=1), step=4, position=first.position)
    assert worker.asked[1][0] == [task_number(i, 10, 1) for i in range(4, 8)] and second.position == 8
    again = explore(FakeWorker(), TASKS, by_sum, settings=settings(seed=1), step=4, position=4)
    np.testing.assert_array_equal(again.rollouts.tokens, second.rollouts.tokens)
    threaded = explore(FakeWorker(), TASKS, by_sum, settings=settings(seed=1), step=4, position=4, threads=3)
    np.testing.assert_array_equal(threaded.graded.total, second.graded.total)


def dull(numbers):
    """All the same for some problems."""
    return plain(lambda prompt, answer, reference: 1.0 if reference in numbers else float(answer))


def plain(function):
    return make_reward({"all": (function, 1.0)})


def test_saturated_groups_are_counted_and_by_default_kept():
    order = [task_number(i, 10, 0) for i in range(10)]
    found = explore(FakeWorker(), TASKS, dull(order[1:3]), settings=settings(), step=0)
    assert (found.drawn, found.saturated, found.filled, found.position) == (4, 2, 2, 4)
    assert found.rollouts.numbers[::3].tolist() == order[:4]


def test_saturated_groups_are_replaced_by_further_problems():
    order = [task_number(i, 10, 0) for i in range(10)]
    worker = FakeWorker()
    boring = {order[1], order[2], order[4]}
    found = explore(worker, TASKS, dull(boring), settings=settings(skip_saturated=True), step=0)
    assert [numbers for numbers, _ in worker.asked] == [order[:4], order[4:6], order[6:7]]
    assert found.rollouts.numbers[::3].tolist() == [order[0], order[3], order[5], order[6]]
    assert (found.drawn, found.saturated, found.filled, found.position) == (7, 3, 0, 7)
    for row in range(12):
        assert found.graded.total[row] == float(found.rollouts.answer(row))


def test_what_is_missing_after_so_many_draws_is_filled():
    order = [task_number(i, 10, 0) for i in range(10)]
    boring = set(order) - {order[2]}
    worker = FakeWorker()
    found = explore(worker, TASKS, dull(boring), settings=settings(skip_saturated=True, max_draws=2), step=0)
    assert [len(numbers) for numbers, _ in worker.asked] == [4, 3]
    assert found.rollouts.numbers[::3].tolist() == [order[2], order[0], order[1], order[3]]
    assert (found.drawn, found.saturated, found.filled) == (7, 6, 3)
    # With all problems dull and draws enough, each is drawn once and no more.
    worker = FakeWorker()
    found = explore(worker, TASKS, dull(set(order)), settings=settings(skip_saturated=True, max_draws=9), step=0, position=7)
    assert sorted(sum((numbers for numbers, _ in worker.asked), [])) == list(range(10))
    assert (found.drawn, found.saturated, found.filled) == (10, 10, 4) and len(found.rollouts.finish) == 12


@pytest.mark.parametrize(
    "reward, message",
    [
        (plain(lambda p, a, r: float("nan")), "reward: part 'all' is nan, want a finite number"),
        (plain(lambda p, a, r: np.inf), "reward: part 'all' is inf"),
        (plain(lambda p, a, r: "1"), "reward: part 'all' is '1' of type str, want a number"),
        (plain(lambda p, a, r: int("x")), "invalid literal"),
        (lambda p, a, r: 1.0, "is of type float, want a Reward, as of make_reward"),
        (lambda p, a, r: Reward(float("nan"), {}), "is nan, want a finite number"),
    ],
)
def test_a_bad_reward_is_one_clear_line(reward, message):
    worker = FakeWorker()
    rollouts = worker.rollout([Prompt([1], 4), Prompt([1], 5)], group_size=2)
    for threads in (1, 3):
        with pytest.raises(ValueError, match="row 0: the reward of problem 4, sample 0:? " + message) as caught:
            grade(rollouts, TASKS, reward, threads=threads)
        assert "\n" not in str(caught.value)


def test_a_bad_reward_is_named_by_its_problem():
    """In training, where problems are numbered after the split, as in evaluation."""
    tasks = [task._replace(name=f"p.jsonl:{2 * i}") for i, task in enumerate(TASKS)]
    bad = plain(lambda prompt, answer, reference: float("nan") if reference == 3 else float(answer))
    with pytest.raises(ValueError, match=r"the reward of p.jsonl:6, sample 0: reward: part 'all' is nan"):
        evaluate(FakeWorker(), tasks, bad, settings=settings())
    with pytest.raises(ValueError, match=r"the reward of p.jsonl:6, sample 0: reward: part 'all' is nan"):
        explore(FakeWorker(), tasks, bad, settings=settings(prompts=10), step=0)
    assert tasks[3].prompt(7) == Prompt([1, 2, 3], 7, (), "p.jsonl:6")


def test_rewards_have_always_the_same_parts():
    rollouts = FakeWorker().rollout([Prompt([1], 4), Prompt([1], 5)], group_size=2)
    with pytest.raises(ValueError, match=r"grade: sample 1 has the parts \["):
        grade(rollouts, TASKS, lambda prompt, answer, reference: Reward(1.0, {answer: 1.0}))


def test_evaluation_takes_the_best_token_once_a_problem():
    worker = FakeWorker()
    found = evaluate(worker, TASKS[:5], by_sum, settings=settings(stop_tokens=(3,)))
    asked, how = worker.asked[0]
    assert asked == [0, 1, 2, 3, 4] and how["temperature"] == 0.0 and how["group_size"] == 1 and how["stop_tokens"] == (3,)
    assert found["problems"] == 5 and found["accuracy"] == found["parts"]["accuracy"] != found["reward"]
    reward = make_reward({"odd": (lambda _, answer, __: int(answer) % 2, 0.1), "accuracy": (lambda *_: 0.5, 1.0)})
    other = evaluate(worker, TASKS[:5], reward, settings=settings())
    assert other["accuracy"] == other["parts"]["odd"] == found["accuracy"], "of the first part, as solve.py has it"


def test_rewards_and_transcripts_have_what_the_prompt_has_begun():
    tasks, heard = [task._replace(opening="<think>\n") for task in TASKS], []

    def reward(prompt, answer, reference):
        heard.append(answer)
        return Reward(float(answer.removeprefix("<think>\n")), {})

    found = explore(FakeWorker(), tasks, reward, settings=settings(), step=0)
    assert len(heard) == 12 and all(answer.startswith("<think>\n") for answer in heard)
    assert all(row["answer"] in heard for row in transcript(found, tasks, np.zeros(12), 3, 4))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group_size": 1}, "`group_size` is 1, want at least 2: samples of a prompt are held against each other"),
        ({"prompts": 0}, "`prompts` is 0, want at least 1"),
        ({"temperature": 0.0}, "`temperature` is 0.0, want above 0"),
        ({"std": "none?"}, "`std` is 'none"),
        ({"truncated": "drop"}, "`truncated` is 'drop', want one of 'count', 'mask'"),
        ({"old": "none"}, "`old` is 'none', want one of 'sampler', 'recomputed'"),
        ({"minibatches": 13}, "`minibatches` is 13, want at most the samples of an exploration, 12"),
        ({"reference_every": -1}, "`reference_every` is -1, want at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"GrpoSettings: {message}"):
        settings(**fields)


def test_more_problems_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="explore: 3 problems are fewer than an exploration's, which are 4"):
        explore(FakeWorker(), TASKS[:3], by_sum, settings=settings(), step=0)


def test_what_was_published():
    maths, r1 = PUBLISHED["deepseekmath"], PUBLISHED["r1"]
    assert (maths.kl_weight, maths.group_size, maths.learning_rate) == (0.04, 64, 1e-6)
    assert (maths.length, maths.batch) == (1024, 1024)
    assert maths.minibatches * maths.epochs == 1, "one update of the policy in an exploration"
    assert maths.clip is maths.prompts is maths.reference_every is None, "not told"
    assert (r1.kl_weight, r1.clip, r1.group_size, r1.learning_rate, r1.length) == (0.001, 10.0, 16, 3e-6, 32_768)
    assert r1.prompts * r1.group_size == r1.minibatches * r1.batch == 8192 and r1.batch == 32 * 16 and r1.epochs == 1
    assert r1.reference_every * r1.minibatches * r1.epochs == 400 and set(PUBLISHED) == {"deepseekmath", "r1"}
