"""One endless, shuffled, resumable stream of samples out of a mixture, divided over ranks.

The order is a permutation of the whole mixture per epoch, from the seed alone. Rank r of R takes every R-th place. The
position is one number that all ranks share, so a run may go on with another number of ranks. Samples are decoded a
little ahead by threads (Pillow and zlib let go of the interpreter's lock) and handed out in order, one for each place:
what cannot be read is an `Unusable`, and whoever trains counts or refuses it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.train.data.mixture import Mixture, Source
from nvila.train.samples import Sample, Unusable


def read(source: Source, index: int) -> Sample | Unusable:
    """One sample. Raises only `Unavailable`: for a decoder that is not installed, which no other sample has either."""
    try:
        return source.load(index)
    except Unavailable:
        raise
    except (InvalidRequest, NotFound) as error:
        reason = error.message
    except OSError as error:  # the disk or network file system, not the data: the same sample may be well later
        reason = f"cannot be read: {error.strerror}"
    except Exception as error:  # what a decoder makes of hostile bytes must not end a run after hours
        reason = f"{type(error).__name__}: {error}"
    return Unusable(where=source.where(index), reason=reason)


class SampleStream:
    """Implements `SampleSource`.

    `limit`: stop after so many places of this rank; None never stops. `is_shuffled` False keeps the files' order.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        is_shuffled: bool = True,
        limit: int | None = None,
        threads: int = 4,
    ) -> None:
        assert 0 <= rank < ranks, (rank, ranks)
        self.mixture = mixture
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._is_shuffled = is_shuffled
        self._limit, self._threads = limit, threads
        self._position = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return -(-len(self.mixture) // self._ranks)

    @property
    def epoch(self) -> float:
        """How often the mixture has been gone through."""
        return self._position / len(self.mixture)

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "seed": self._seed, "samples": len(self.mixture)}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises `InvalidRequest` when the state is of another mixture or seed: the order would be another."""
        for name, here in (("samples", len(self.mixture)), ("seed", self._seed)):
            if state[name] != here:
                raise InvalidRequest(f"the saved position is of data with {name} {state[name]}; here it is {here}")
        self._position = int(state["position"])

    def __iter__(self) -> Iterator[Sample | Unusable]:
        ahead: deque[tuple[int, Future[Sample | Unusable]]] = deque()
        place, end = self._position, self._end()
        with ThreadPoolExecutor(self._threads, "nvila-data") as pool:
            try:
                while True:
                    while len(ahead) < 2 * self._threads and (end is None or place < end):
                        ahead.append((place, pool.submit(self._load, place)))
                        place += self._ranks
                    if not ahead:
                        return
                    taken, future = ahead.popleft()
                    sample = future.result()
                    self._position = taken + self._ranks
                    yield sample
            finally:
                for _, future in ahead:
                    future.cancel()

    def _end(self) -> int | None:
        return None if self._limit is None else self._limit * self._ranks

    def _load(self, place: int) -> Sample | Unusable:
        epoch, within = divmod(place + self._rank, len(self.mixture))
        return read(*self.mixture.locate(int(self._permutation(epoch)[within])))

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Of one epoch; the last one asked for is kept. Threads may compute it twice, never wrongly."""
        known = self._order
        if known is None or known[0] != epoch:
            order = np.arange(len(self.mixture), dtype=np.int64)
            if self._is_shuffled:
                np.random.Generator(np.random.PCG64([self._seed, epoch])).shuffle(order)
            known = self._order = (epoch, order)
        return known[1]
