import itertools
import tracemalloc
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from doge_lm.training.order import StreamSampler, rows_from

SHARDS = (20, 0, 17, 13)  # 50 rows


def steps_of(length, seed, sequences, micro, world):
    """The rows of every step, as accelerate deals the micro-batches to `world` processes."""
    shares = [
        list(BatchSamplerShard(BatchSampler(StreamSampler(SHARDS, length, seed), micro, drop_last=False), world, rank))
        for rank in range(world)
    ]
    accumulate = sequences // micro // world
    steps = []
    for step in range(length // sequences):
        taken = [share[step * accumulate : (step + 1) * accumulate] for share in shares]
        steps.append(sorted(row for share in taken for batch in share for row in batch))
    return steps


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (8, 1), (1, 2), (4, 2), (2, 4), (1, 8)])
def test_a_step_takes_the_same_rows_for_any_batch_size_and_number_of_devices(micro, world):
    reference = steps_of(length=96, seed=233, sequences=8, micro=8, world=1)
    steps = steps_of(length=96, seed=233, sequences=8, micro=micro, world=world)
    assert steps == reference
    assert sum(map(len, steps)) == 96


def test_every_row_is_read_before_any_is_read_again():
    order = list(StreamSampler(SHARDS, 120, 233))
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert set(Counter(order).values()) == {2, 3}


def test_shards_and_batches_are_read_one_after_another_each_in_random_order():
    shards = [1000, 700, 300]
    order = list(StreamSampler(shards, 2 * sum(shards), 1))
    for number in (0, 1):
        rows = order[number * 2000 : (number + 1) * 2000]
        blocks = [(shard_of(row, shards), (row - first_of(row, shards)) // 256) for row in rows]
        runs = [block for block, _ in itertools.groupby(blocks)]
        assert len(runs) == len(set(runs)) == 4 + 3 + 2  # no batch is left and come back to
        assert len(list(itertools.groupby(runs, key=lambda block: block[0]))) == 3
        assert runs != sorted(runs)
        for _, batch in itertools.groupby(zip(blocks, rows, strict=True), key=lambda pair: pair[0]):
            found = [row for _, row in batch]
            assert found != sorted(found)
    assert order[:2000] != order[2000:]


def shard_of(row, shards):
    return next(index for index in range(len(shards)) if row < sum(shards[: index + 1]))


def first_of(row, shards):
    return sum(shards[: shard_of(row, shards)])


def test_the_order_is_shuffled_anew_in_every_pass_and_by_the_seed_alone():
    order = list(StreamSampler(SHARDS, 100, 233))
    assert order[:50] != list(range(50))
    assert order[:50] != order[50:]
    assert order == list(StreamSampler(SHARDS, 100, 233))
    assert order != list(StreamSampler(SHARDS, 100, 234))


@pytest.mark.parametrize("start", range(0, 131, 5))
def test_a_resumed_run_goes_on_anywhere(start):
    order = list(StreamSampler(SHARDS, 130, 233))
    resumed = list(StreamSampler(SHARDS, 130, 233, start=start))
    assert resumed == [0] * start + order[start:]


def test_the_memory_is_that_of_one_shard():
    """A billion rows; an index over them would have 8 GB."""
    shards = [10_000] * 100_000
    tracemalloc.start()
    try:
        rows = rows_from(shards, 233, 12_345_678_901)
        taken = list(itertools.islice(rows, 3))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert [len(each) for each in taken] == [1099, 10_000, 10_000]
    assert all(0 <= row < 10**9 for each in taken for row in (each.min(), each.max()))


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        StreamSampler([0], 1, 0)


def test_the_order_never_changes():
    """A resumed run depends on it, whatever versions it is resumed with. A new order needs another `ORDER`."""
    assert list(StreamSampler((6, 4), 12, 233)) == FROZEN
    assert list(StreamSampler((600,), 600, 233))[::100] == FROZEN_BATCHES


FROZEN = [8, 7, 9, 6, 1, 4, 3, 5, 2, 0, 0, 2]
FROZEN_BATCHES = [384, 316, 418, 570, 180, 188]
