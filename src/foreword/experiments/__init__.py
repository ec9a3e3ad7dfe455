"""Studies: many runs described by a few files, made once each, on one machine or many.

plan       a folder of TOML files -> runs
grid       runs -> jobs with the address of their result
records    one result per address, whole or not at all
executors  in this process; `workers`: in several; `cluster`: on Ray
perform    what one run does
"""

from __future__ import annotations

from foreword.experiments.executors import execute
from foreword.experiments.grid import jobs_made_with, jobs_of, module_of
from foreword.experiments.plan import Run, Study, list_studies, load_study, select, settings
from foreword.experiments.records import Job, Outcome, other_results, read_record, read_result, state_of

__all__ = [
    "Job", "Outcome", "Run", "Study", "execute", "jobs_made_with", "jobs_of", "list_studies", "load_study", "module_of",
    "other_results", "read_record", "read_result", "select", "settings", "state_of",
]  # fmt: skip
