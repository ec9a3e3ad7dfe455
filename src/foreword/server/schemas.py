"""What clients may ask, field by field. A field that would change the answer and is not supported is refused by name.

Types are strict: "5" is no number, and 1.0 no whole one. NaN and infinity are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatRequest", "CompletionRequest", "DetokenizeRequest", "KNOWN_FIELDS", "PublishRequest", "TenantRequest",
    "TokenizeRequest",
]  # fmt: skip

_MOST_PROMPTS = 2048
_MOST_MESSAGES = 4096

# A limit of length, whichever, also has pydantic refuse halves of characters (lone surrogates), which JSON can hold.
Text = Annotated[str, Field(max_length=1 << 28)]

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]
Prompt = (
    Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=_MOST_PROMPTS)]
)
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=4)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Schema):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # has no effect


class _Sampled(_Schema):
    """What completions and chats have in common."""

    model: Name
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Bias | None = None
    # Beyond OpenAI's API, as other servers have them.
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = 0
    ignore_eos: bool | None = False
    # These change nothing of the answer.
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None


class CompletionRequest(_Sampled):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: Literal[""] | None = None


class TextPart(_Schema):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Schema):
    """The one format of answers."""

    type: Literal["text"]


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Accepted where they say what is the case anyway.
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class TokenizeRequest(_Schema):
    """`POST /tokenize`: a text or a conversation."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Schema):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class PublishRequest(_Schema):
    """`POST /admin/prefixes`: a folder on the server's disk becomes the next version of a name."""

    name: Name
    path: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    tenant: Annotated[str, Field(max_length=256)] = ""


class TenantRequest(_Schema):
    """`POST /admin/tenants`: a new tenant, or other limits for one; 0 is no limit."""

    name: Name
    requests_per_minute: Annotated[int, Field(ge=0, lt=1 << 31)] = 600
    concurrent: Annotated[int, Field(ge=0, lt=1 << 31)] = 32
    queued: Annotated[int, Field(ge=0, lt=1 << 31)] = 128


_ALL = (
    CompletionRequest, ChatRequest, Message, TextPart, TextFormat, StreamOptions, TokenizeRequest, DetokenizeRequest,
    PublishRequest, TenantRequest,
)  # fmt: skip
# Every name that a client can be told of in `param`; "path", "query" and so on are places, not names.
KNOWN_FIELDS = frozenset(name for schema in _ALL for name in schema.model_fields) | {"tenant", "model"}
