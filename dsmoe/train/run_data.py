"""The data of a run on this rank: prepared sources, loaders, and what a checkpoint records of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe.data import PreparedSource, TrainLoader, ValidationLoader
from dsmoe.parallel.groups import Groups
from dsmoe.plan.plan import Plan
from dsmoe.train.changed import Order
from dsmoe.train.evaluate import HeldOut, text_of


@dataclass(frozen=True)
class RunData:
    """The prepared sources of a run, and this rank's share of them."""

    sources: Sequence[PreparedSource]
    loader: TrainLoader
    held_out: Sequence[HeldOut]
    order: Order
    """In which order the run reads which text."""
    sequence_length: int
    """Tokens of a sequence."""

    @property
    def held_out_text(self) -> dict[str, str]:
        """The text that an evaluation reads of each source, in words."""
        return text_of(self.held_out, self.sequence_length)

    @property
    def held_out_digest(self) -> str:
        """A digest of the text that evaluations read: where it is the same, held-out losses compare."""
        evaluated = [
            (part.source.token_checksums.partition("/")[2], part.loader.num_sequences) for part in self.held_out
        ]
        return hashlib.sha256(json.dumps(evaluated).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest records of the text: `corpora`, `order` and `held_out`."""
        return {
            "corpora": {source.name: [source.train_tokens, source.train_bytes] for source in self.sources},
            "order": asdict(self.order),
            "held_out": self.held_out_digest,
        }


def load_data(plan: Plan, groups: Groups, sources: Sequence[PreparedSource]) -> RunData:
    """Open prepared sources for training and evaluation on this rank's share."""
    config, rank, degree = plan.config, groups.coordinate("data"), plan.topology.data
    return RunData(
        sources=sources,
        loader=TrainLoader(sources, config, rank, degree),
        held_out=[HeldOut(source, ValidationLoader(source, config, rank, degree)) for source in sources],
        order=Order.of_run(config, sources),
        sequence_length=config.train.sequence_length,
    )
