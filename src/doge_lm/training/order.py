"""The order in which a run reads its data: a function of the seed alone.

The rows of a run are one endless stream: a random permutation of all rows of the set, then another, and so on.
Step s takes the rows s·n to (s+1)·n of the stream, n being `sequences_per_step`. So neither the size of a
micro-batch, nor the number of devices, nor an interruption changes which rows a step is trained on; every row is
read as often as any other, give or take one; and the rows over after an epoch's last whole step open the next one.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def permutation(rows: int, seed: int, number: int) -> np.ndarray:
    """The `number`-th permutation of the stream (from 0).

    By NumPy's legacy generator, whose stream is guaranteed never to change: a run resumed with another version of
    NumPy goes on in the same order.
    """
    return np.random.RandomState([seed, number]).permutation(rows)


class StreamSampler(Sampler[int]):
    """Row indices of a whole run, `length` of them, in the order of the stream."""

    def __init__(self, rows: int, length: int, seed: int):
        if rows < 1:
            raise ValueError("there are no rows to read")
        self.rows, self.length, self.seed = rows, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.length, self.rows):
            order = permutation(self.rows, self.seed, start // self.rows)
            yield from order[: self.length - start].tolist()
