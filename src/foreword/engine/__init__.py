"""Many prefixes at once on one frozen decoder: continuous batching, exact and isolated. No HTTP and no text here."""

from foreword.engine.engine import Engine, EngineOptions
from foreword.engine.request import Event, Finished, Request, Sampling, Token
from foreword.engine.runner import EngineRunner, EngineStats, Ticket
from foreword.engine.tiers import BankStats, PrefixSource
from foreword.errors import EngineStopped, QueueFull

__all__ = [
    "BankStats", "Engine", "EngineOptions", "EngineRunner", "EngineStats", "EngineStopped", "Event", "Finished",
    "PrefixSource", "QueueFull", "Request", "Sampling", "Ticket", "Token",
]  # fmt: skip
