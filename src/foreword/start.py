"""What a run starts from, beside a new prefix: another prefix or its birth, learned lengths, learned gates.

Each may be the folder of several seeds; a run with a seed then starts from the folder of that seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foreword.base import BaseModel
from foreword.begin import begin_module
from foreword.config import TrainConfig
from foreword.errors import ConfigError
from foreword.prefix import Prefix
from foreword.probe import Probe, beside, probe, saved_probe
from foreword.prune import lengths_from, rewound, start_gates_from, with_lengths
from foreword.runs import find_prefix
from foreword.tasks import Task, drawn

__all__ = ["RETRAIN", "Start", "drawn_as", "of_seed", "seeds_in"]

Progress = Callable[[int, int], None]

RETRAIN = ("continue", "rewind")


@dataclass(frozen=True)
class Start:
    """Where a run starts: all paths are prefix folders, run folders, or folders of several seeds.

    `prefix` is trained further (`retrain` continue) or from its slots as they were born (`rewind`). `lengths` gives the
    lengths of a new prefix by the ratio of its gates (PT-2* of APT, arXiv 2305.15212), `gates` the gates to begin with.
    """

    prefix: Path | None = None
    retrain: str = "continue"
    lengths: Path | None = None
    gates: Path | None = None

    def __post_init__(self) -> None:
        if self.retrain not in RETRAIN:
            raise ConfigError(f"retrain {self.retrain!r}", " or ".join(RETRAIN), "choose one of them")
        if self.retrain != "continue" and self.prefix is None:
            raise ConfigError("retrain 'rewind' without a prefix", "a prefix to start from", "name it with --from")
        if self.prefix is not None and (self.lengths or self.gates):
            raise ConfigError(
                "a prefix to start from, and lengths or gates of another", "one of both", "leave one of them out"
            )

    def load(self, base: BaseModel, task: Task, config: TrainConfig, progress: Progress | None = None) -> Prefix | None:
        """The prefix that training begins with, None for an ordinary new one.

        Lengths are read off a probe of the run: the one that is kept beside it, else a new one on the dev rows of this
        task. Raises what loading, probing and cutting raise.
        """
        if self.prefix is not None:
            prefix = Prefix.load(find_prefix(of_seed(self.prefix, config.seed)), base)
            return prefix if self.retrain == "continue" else rewound(base, prefix)
        if self.lengths is None and self.gates is None:
            return None
        cut = None
        if self.lengths is not None:
            found = _probe_of(base, of_seed(self.lengths, config.seed), task, config, progress)
            born = begin_module(base, None, task, config)
            cut = with_lengths(born.prefix, lengths_from(found.scores("gates"), born.prefix.length), by="gates")
        if self.gates is None:
            return cut
        module = begin_module(base, cut, task, config)
        start_gates_from(module, Prefix.load(find_prefix(of_seed(self.gates, config.seed)), base))
        return module.fold(keep_training_state=True)


def seeds_in(path: Path) -> list[int]:
    """The seeds in a folder of several, in order; none for the folder of one run or prefix."""
    names = [each.name.removeprefix("seed") for each in path.glob("seed[0-9]*") if each.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def drawn_as(prefix: Prefix, task: Task) -> Task:
    """The task with the rows that a prefix was trained and selected on: drawn again where it was trained on a few."""
    return drawn(task, prefix.metadata.get("training") or {})


def of_seed(path: Path, seed: int) -> Path:
    """The folder of a seed, where `path` is one of several seeds; else `path` itself."""
    own = path / f"seed{seed}"
    if not own.is_dir() and seeds_in(path):
        raise ConfigError(f"no seed {seed} in {path}", "a folder of that seed", "train it, or choose other seeds")
    return own if own.is_dir() else path


def _probe_of(base: BaseModel, path: Path, task: Task, config: TrainConfig, progress: Progress | None) -> Probe:
    """What is known of the gates of a run."""
    prefix = Prefix.load(find_prefix(path), base)
    kept = saved_probe(beside(path, "probe"), prefix, task.name, "dev")
    if kept is not None:
        return kept
    return probe(base, prefix, drawn_as(prefix, task), limit=config.dev_limit or None, progress=progress)
