"""Micro-batches for one data rank: the same ones over all ranks, however many ranks there are.

Shape suffixes: B sequences per micro-batch, S train.sequence_length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dsmoe.config.schema import Config
from dsmoe.data.cache import PreparedSource
from dsmoe.data.order import Mixture


class TrainLoader:
    """The training micro-batches of one data rank.

    A sequence is S + 1 tokens of a source's `train.bin`; neighbours overlap by one token, so that every token but the
    first is a target exactly once per epoch (less than S tokens at the end of the file are never read). A step's global
    batch is cut into micro-batches, which are dealt to the ranks in turn: which ones exist does not depend on the
    number of ranks. There is no state: resuming is asking for another step.

    Reads are synchronous: a micro-batch is a few pages of a memory-mapped file.

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
        self._tokens = [source.train for source in sources]
        self._lengths = [_num_sequences(source.train_tokens, train.sequence_length) for source in sources]
        self._mixture = Mixture(self._lengths, [source.weight for source in sources], config.data.seed)

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """Yield this rank's micro-batches of the 0-based `step`, each `[B, S + 1]` int64, as many as on every rank."""
        sources, sequences = self._mixture.locate(step * self._batch_sequences, self._batch_sequences)
        first, stride = self._rank * self._micro_batch_size, self._degree * self._micro_batch_size
        for start in range(first, self._batch_sequences, stride):
            rows = slice(start, start + self._micro_batch_size)
            yield _read([self._tokens[source] for source in sources[rows]], sequences[rows], self._sequence_length)

    def epochs(self, step: int) -> dict[str, float]:
        """Tell how often each source has been read through before the 0-based `step`."""
        counts = self._mixture.counts(step * self._batch_sequences)
        return {name: float(counts[i] / self._lengths[i]) for i, name in enumerate(self._names)}


class ValidationLoader:
    """One data rank's share of an evaluation of one source.

    Evaluates min(all, `train.eval_batches` x `train.micro_batch_size`) sequences of `validation.bin`, evenly spaced,
    whatever the number of ranks. Every rank yields equally many micro-batches, because the model's collectives need all
    ranks; rows that only fill up have weight 0.

    Args:
        source: from `prepare`.
        config: reads `train.eval_batches`, `train.micro_batch_size` and `train.sequence_length`.
        data_rank: this rank's number in its data group.
        data_degree: ranks in the data group.
    """

    def __init__(self, source: PreparedSource, config: Config, data_rank: int, data_degree: int):
        assert 0 <= data_rank < data_degree
        self._tokens = source.validation
        self._sequence_length = config.train.sequence_length
        self._micro_batch_size = config.train.micro_batch_size
        available = _num_sequences(source.validation_tokens, self._sequence_length)
        wanted = min(available, config.train.eval_batches * self._micro_batch_size)
        self._sequences = np.arange(wanted) * available // wanted
        self._rank = data_rank
        self._degree = data_degree

    def __len__(self) -> int:
        """Count the micro-batches, the same number on every rank."""
        return -(-len(self._sequences) // (self._micro_batch_size * self._degree))

    def sequences(self) -> np.ndarray:
        """All sequences of the evaluation, of every rank, `[N, S + 1]` int64."""
        return _read([self._tokens] * len(self._sequences), self._sequences, self._sequence_length).numpy()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield tokens `[B, S + 1]` int64 and weights `[B]` float32: 1 for a sequence that counts, 0 for filling."""
        for turn in range(len(self)):
            first = (turn * self._degree + self._rank) * self._micro_batch_size
            rows = np.arange(first, first + self._micro_batch_size)
            weight = torch.from_numpy((rows < len(self._sequences)).astype(np.float32))
            sequences = self._sequences[np.minimum(rows, len(self._sequences) - 1)]
            yield _read([self._tokens] * len(rows), sequences, self._sequence_length), weight


def _num_sequences(tokens: int, sequence_length: int) -> int:
    return (tokens - 1) // sequence_length


def _read(tokens: Sequence[np.ndarray], sequences: np.ndarray, sequence_length: int) -> torch.Tensor:
    """Row i is sequence `sequences[i]` of the token file `tokens[i]`, `[B, S + 1]` int64."""
    batch = np.empty((len(tokens), sequence_length + 1), dtype=np.int64)
    for row, (file, sequence) in enumerate(zip(tokens, sequences.tolist(), strict=True)):
        batch[row] = file[sequence * sequence_length : (sequence + 1) * sequence_length + 1]
    return torch.from_numpy(batch)
