"""What is read together, from queues of every kind."""

from hypothesis import given
from hypothesis import strategies as st

from sarm.serve.batching import Waiting, rows_of, take_batch


def waiting(arrived: float, prompt: int, prompt_tokens: int, own_tokens: int) -> Waiting:
    ids = [prompt] * prompt_tokens + [1000 + int(arrived)] * own_tokens
    return Waiting(ids, prompt_tokens, prompt, arrived)


queues = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=30).map(
    # One prompt has one length.
    lambda rows: [waiting(float(place), prompt, 3 + prompt, own) for place, (prompt, _, own) in enumerate(rows)]
)


def cost(batch: list[Waiting]) -> int:
    shared = {one.prompt: one.prompt_tokens for one in batch}
    return sum(shared.values()) + sum(len(one.ids) - one.prompt_tokens for one in batch)


@given(queues, st.integers(4, 40))
def test_batches_keep_to_their_budget_and_lose_and_repeat_nothing(queue, budget):
    everything, taken = list(queue), []
    while queue:
        oldest = queue[0]
        kept_out = [one for one in queue if one.passed_over >= 2]
        batch = take_batch(queue, budget)
        assert len(batch) == 1 or cost(batch) <= budget
        assert (kept_out or [oldest])[0] in batch
        taken += batch
    assert sorted(map(id, taken)) == sorted(map(id, everything))


def test_an_answer_is_kept_out_twice_by_younger_ones_and_not_a_third_time():
    """Of ten prompts whose answers never end, each would else hold up the last answer for a batch."""
    queue = [waiting(float(n), n, 8, 2) for n in range(10)]
    queue.append(waiting(10, 99, 8, 2))
    arrived = 11.0
    batches: list[list[float]] = []
    while not batches or 10 not in batches[-1]:
        for prompt in [n for n in range(10) for _ in range(20)]:
            queue.append(waiting(arrived, prompt, 8, 2))
            arrived += 1
        batches.append([one.arrived for one in take_batch(queue, 40)])
    assert [batch[0] for batch in batches[:2]] == [0, 1]
    assert batches[2:] == [[2, 3, 4, 5], [6, 7, 8, 9], batches[4]]
    assert batches[4][0] == 10


def test_answers_to_the_oldest_prompt_come_from_wherever_they_stand():
    queue = [waiting(0, 1, 8, 2), waiting(1, 2, 8, 2), waiting(2, 1, 8, 2), waiting(3, 1, 8, 2)]
    batch = take_batch(queue, 14)
    assert [one.arrived for one in batch] == [0, 2, 3]
    assert queue[0].passed_over == 1
    (row,) = rows_of(batch, 100)
    assert len(row.ids) == 8 + 3 * 2, "the prompt is read once"
    assert {key for key, _ in row.taken} == {0, 1, 2}


def test_an_answer_above_the_budget_is_read_alone():
    queue = [waiting(0, 1, 50, 50), waiting(1, 2, 1, 1)]
    assert [one.arrived for one in take_batch(queue, 10)] == [0]
    assert [one.arrived for one in queue] == [1]
