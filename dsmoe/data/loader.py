"""Loaders of micro-batches for one data rank: over all ranks the same micro-batches, however many ranks there are.

Shape suffixes: B sequences per micro-batch, S train.sequence_length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dsmoe.config.schema import Config
from dsmoe.data.checksummed_files import TokenFile
from dsmoe.data.prepared_source import PreparedSource, Sequences
from dsmoe.data.sampling_order import Mixture
from dsmoe.plan.batch import eval_sequences


class TrainLoader:
    """The training micro-batches of one data rank.

    Trains on all sequences of each source's `train.bin` (`Sequences`) except text that another source holds out: every
    token but the first is a target exactly once per epoch. Each step's global batch is cut into micro-batches, which
    are dealt to the ranks in turn, so the micro-batches do not depend on the number of ranks. Stateless: to resume, ask
    for a later step. With 4 sequences a step and micro-batches of 1:

        step 0: samples 0 1 2 3     1 rank: [0] [1] [2] [3]     2 ranks: rank 0 [0] [2], rank 1 [1] [3]
        step 1: samples 4 5 6 7     1 rank: [4] [5] [6] [7]     2 ranks: rank 0 [4] [6], rank 1 [5] [7]

    Reads are synchronous: a micro-batch is a few times 64 KiB of a file, each verified when it is read.

    Args:
        sources: from `prepare`.
        config: reads `train.batch_tokens`, `train.sequence_length`, `train.micro_batch_size` and `data.seed`.
        data_rank: this rank's number in its data group.
        data_degree: ranks in the data group.
    """

    def __init__(self, sources: Sequence[PreparedSource], config: Config, data_rank: int, data_degree: int):
        assert 0 <= data_rank < data_degree
        train = config.train
        self._sequence_length = train.sequence_length
        self._micro_batch_size = train.micro_batch_size
        unit = train.sequence_length * train.micro_batch_size * data_degree
        assert train.batch_tokens % unit == 0  # checked when the config was loaded
        self._batch_sequences = train.batch_tokens // train.sequence_length
        self._rank = data_rank
        self._degree = data_degree
        self._names = [source.name for source in sources]
        self._tokens = [source.train_file for source in sources]
        self._sequences = [train_sequences(source, config) for source in sources]
        self._mixture = mixture(sources, config)

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """Yield this rank's micro-batches of the 0-based `step`, each `[B, S + 1]` int64, as many as on every rank."""
        sources, sequences = self._mixture.locate(step * self._batch_sequences, self._batch_sequences)
        first, stride = self._rank * self._micro_batch_size, self._degree * self._micro_batch_size
        for start in range(first, self._batch_sequences, stride):
            rows = slice(start, start + self._micro_batch_size)
            places = [self._sequences[s].place(n) for s, n in zip(sources[rows], sequences[rows], strict=True)]
            yield _read([self._tokens[source] for source in sources[rows]], places, self._sequence_length)

    def epochs(self, step: int) -> dict[str, float]:
        """Return how many times each source has been read through before the 0-based `step`."""
        counts = self._mixture.counts(step * self._batch_sequences)
        return {name: float(counts[i] / len(self._sequences[i])) for i, name in enumerate(self._names)}


def train_sequences(source: PreparedSource, config: Config) -> Sequences:
    """Return the sequences of a source that are trained on."""
    return Sequences(source.train_tokens, config.train.sequence_length, source.left_out)


def mixture(sources: Sequence[PreparedSource], config: Config) -> Mixture:
    """Return the order in which the sequences of all sources are trained on."""
    return Mixture(
        [len(train_sequences(source, config)) for source in sources],
        [source.weight for source in sources],
        config.data.seed,
        [source.name for source in sources],
    )


class ValidationLoader:
    """The validation micro-batches of one data rank, for one source.

    Evaluates min(all, `eval_sequences(config)`) sequences of `validation.bin`, evenly spaced, whatever the number of
    ranks and the micro-batch. Every rank yields equally many micro-batches, because the model's collectives need all
    ranks; rows that only fill up have weight 0. 5 sequences on 2 ranks with micro-batches of 2:

        rank 0    [0 1] [4 4]    weights [1 1] [1 0]
        rank 1    [2 3] [4 4]    weights [1 1] [0 0]

    Args:
        source: from `prepare`.
        config: reads `train.eval_sequences`, `train.micro_batch_size` and `train.sequence_length`.
        data_rank: this rank's number in its data group.
        data_degree: ranks in the data group.
    """

    def __init__(self, source: PreparedSource, config: Config, data_rank: int, data_degree: int):
        assert 0 <= data_rank < data_degree
        self._tokens = source.validation_file
        self._sequence_length = config.train.sequence_length
        self._micro_batch_size = config.train.micro_batch_size
        available = len(Sequences(source.validation_tokens, self._sequence_length))
        wanted = min(available, eval_sequences(config))
        self._sequences = np.arange(wanted) * available // wanted
        self._rank = data_rank
        self._degree = data_degree

    @property
    def num_sequences(self) -> int:
        """The number of sequences of the evaluation over all ranks."""
        return len(self._sequences)

    def __len__(self) -> int:
        """Return the number of micro-batches, the same on every rank."""
        return -(-len(self._sequences) // (self._micro_batch_size * self._degree))

    def sequences(self) -> np.ndarray:
        """Return the sequences of the evaluation of all ranks, `[N, S + 1]` int64."""
        return _read([self._tokens] * len(self._sequences), self._sequences, self._sequence_length).numpy()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield tokens `[B, S + 1]` int64 and weights `[B]` float32: 1 for a sequence that counts, 0 for a filler."""
        for turn in range(len(self)):
            first = (turn * self._degree + self._rank) * self._micro_batch_size
            rows = np.arange(first, first + self._micro_batch_size)
            weight = torch.from_numpy((rows < len(self._sequences)).astype(np.float32))
            sequences = self._sequences[np.minimum(rows, len(self._sequences) - 1)]
            yield _read([self._tokens] * len(rows), sequences, self._sequence_length), weight


def _read(tokens: Sequence[TokenFile], places: Sequence[int] | np.ndarray, sequence_length: int) -> torch.Tensor:
    """Read one sequence per row, the one at `places[i]` of the token file `tokens[i]`, `[B, S + 1]` int64."""
    batch = np.empty((len(tokens), sequence_length + 1), dtype=np.int64)
    for row, (file, place) in enumerate(zip(tokens, map(int, places), strict=True)):
        batch[row] = file.read(place * sequence_length, (place + 1) * sequence_length + 1)
    return torch.from_numpy(batch)
