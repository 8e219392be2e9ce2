from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from doge_lm.training.order import StreamSampler


def steps_of(rows, length, seed, sequences, micro, world):
    """The rows of every step, as accelerate deals the micro-batches to `world` processes."""
    shares = [
        list(BatchSamplerShard(BatchSampler(StreamSampler(rows, length, seed), micro, drop_last=False), world, rank))
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
    reference = steps_of(rows=50, length=96, seed=233, sequences=8, micro=8, world=1)
    steps = steps_of(rows=50, length=96, seed=233, sequences=8, micro=micro, world=world)
    assert steps == reference
    assert sum(map(len, steps)) == 96


def test_every_row_is_read_before_any_is_read_again():
    order = list(StreamSampler(50, 120, 233))
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert set(Counter(order).values()) == {2, 3}


def test_data_larger_than_the_run_is_a_random_part_without_repeats():
    order = list(StreamSampler(1000, 96, 233))
    assert len(set(order)) == 96
    assert max(order) > 900
    assert min(order) < 100


def test_the_order_is_shuffled_anew_in_every_pass_and_by_the_seed_alone():
    order = list(StreamSampler(50, 100, 233))
    assert order[:50] != list(range(50))
    assert order[:50] != order[50:]
    assert order == list(StreamSampler(50, 100, 233))
    assert order != list(StreamSampler(50, 100, 234))


def test_the_order_never_changes():
    """A resumed run depends on it, whatever versions it is resumed with."""
    assert list(StreamSampler(10, 12, 233)) == FROZEN


FROZEN = [9, 4, 5, 3, 2, 0, 8, 6, 1, 7, 1, 7]
