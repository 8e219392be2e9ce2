"""The order in which a run reads its data: a function of the seed and of the sizes of the shards alone.

The rows of a run are one endless stream: a pass over all rows of the set, then another, and so on. A pass takes the
shards (the arrow files of the training set) in random order, within a shard its record batches of 256 rows, and
within a batch the rows. So the disk is read one shard after another, and no index over the whole set is ever made: the
memory is that of one shard's row numbers. It is no uniform permutation of all rows, and need not be: `merge_datasets`
has dealt the rows to the shards by one.

Step s takes the rows s·n to (s+1)·n of the stream, n being `sequences_per_step`. So neither the size of a
micro-batch, nor the number of devices, nor an interruption changes which rows a step is trained on; every row is
read as often as any other, give or take one; and the rows over after an epoch's last whole step open the next one.

A checkpoint's `run.json` names the order that its run reads in (`ORDER`). One that another version of this module
made is refused when it is resumed (`checkpoints.check_record`): going on in another order would repeat some rows of
the pass and leave out others.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
from torch.utils.data import Sampler

# The version of the order. To be raised with any change to which row stands where in the stream.
ORDER = 2
# Rows of a record batch in the files that `merge_datasets` writes. The order is defined by this number, whatever
# the batches of a file really are: they bear on the speed alone.
_BATCH_ROWS = 256


def rows_from(shards: Sequence[int], seed: int, position: int) -> Iterator[np.ndarray]:
    """The stream from a position on, without end: arrays of row numbers, the rest of a shard each.

    What lies before the position costs nothing but the order of the shards in its pass, and of the rows in its shard.
    All random numbers are of NumPy's legacy generator, whose stream is guaranteed never to change: a run resumed with
    another version of NumPy goes on in the same order.

    Args:
        shards: rows of each shard; row numbers count through them in this order.
        seed: below 2**32.
        position: rows of the stream to pass over.
    """
    sizes = np.asarray(shards, np.int64)
    firsts = np.cumsum(sizes) - sizes
    number, skip = divmod(position, int(sizes.sum()))
    while True:
        for shard in np.random.RandomState([seed, number]).permutation(len(sizes)).tolist():
            rows = int(sizes[shard])
            if skip < rows:
                yield firsts[shard] + _shard_order(rows, np.random.RandomState([seed, number, shard]))[skip:]
            skip = max(0, skip - rows)
        number += 1


def _shard_order(rows: int, random: np.random.RandomState) -> np.ndarray:
    """The rows of a shard: its batches in random order, and each batch's rows."""
    order = np.empty(rows, np.int64)
    done = 0
    for batch in random.permutation(-(-rows // _BATCH_ROWS)).tolist():
        first = batch * _BATCH_ROWS
        size = min(_BATCH_ROWS, rows - first)
        order[done : done + size] = first + random.permutation(size)
        done += size
    return order


class StreamSampler(Sampler[int]):
    """Row numbers of a whole run, in the order of the stream.

    Args:
        shards: rows of each shard.
        length: row numbers to give.
        seed: of the order.
        start: where a resumed run begins to read. The numbers before it are given as 0, without any work: who
            resumes counts them and looks at none.
    """

    def __init__(self, shards: Sequence[int], length: int, seed: int, start: int = 0):
        if sum(shards) < 1:
            raise ValueError("there are no rows to read")
        self.shards, self.length, self.seed, self.start = tuple(shards), length, seed, min(start, length)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from repeat(0, self.start)
        left = self.length - self.start
        if left == 0:
            return
        for rows in rows_from(self.shards, self.seed, self.start):
            yield from rows[:left].tolist()
            left -= len(rows)
            if left <= 0:
                return
