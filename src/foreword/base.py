"""The base model: loaded, frozen, fingerprinted, with prefixes before its attention; it scores and generates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput
from transformers.utils.logging import disable_progress_bar

from foreword.attention import Attachment, attachment_of, check_prefix
from foreword.bank import PerRow
from foreword.errors import ConfigError, DataError, ModelNotFound, UnsupportedModel
from foreword.families import Family, family_of, position_limit
from foreword.fingerprint import fingerprint
from foreword.loss import completion_nats
from foreword.packaged import ensure_packaged, packaged_models
from foreword.prefix import Geometry, Prefix, Site, Sites
from foreword.streaming import Streamer, cut_at

__all__ = ["BaseModel", "Prefixes", "Reading", "Score", "pad_rows"]

Prefixes = Prefix | Sequence[Prefix | None] | None
# What a pass reads: the same sites in all rows, sites of each row's own (both differentiably), or finished prefixes.
Reading = Sites | PerRow | Prefixes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AUTO_CLASSES = {
    "decoder": transformers.AutoModelForCausalLM,
    "encoder": transformers.AutoModel,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
}


class Score(NamedTuple):
    """The cost of one completion: negative log-likelihood in nats and the number of its tokens."""

    nats: float
    tokens: int


class BaseModel:
    """A frozen pretrained model whose attention can read prefixes.

    Wraps a `transformers` model (`attach` is done here); `BaseModel.load` gets one by name. `geometry` says
    which sites it has, `fingerprint` which weights, `max_tokens` how many positions (None: no limit).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> base = BaseModel(LlamaForCausalLM(LlamaConfig(**sizes)))
    >>> base.family.kind, [str(site) for site in base.geometry], base.logits(torch.tensor([[1, 2, 3]])).shape
    ('decoder', ['decoder.0'], torch.Size([1, 3, 8]))
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = ""
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name or model.config.name_or_path or type(model).__name__
        self.attachment = attachment_of(model) or Attachment(model)
        self._tokenizer = tokenizer
        if tokenizer is not None and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> BaseModel:
        """Load a packaged base (`smollm2-135m`, `minilm`), a folder, or a Hugging Face model id.

        `dtype` is "auto" (as stored), "float32" or "bfloat16". Raises `ModelNotFound`,
        `UnsupportedModel` or `ConfigError`.
        """
        if dtype != "auto" and dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r}", f"auto, {', '.join(_DTYPES)}", "choose one of them")
        source = str(ensure_packaged(name, progress)) if name in packaged_models() else name
        if progress is not None:  # the caller draws bars; those of transformers would be a second set
            disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(source)
            family = family_of(config)
            loaded = _model_class(config, family).from_pretrained(
                source, dtype="auto" if dtype == "auto" else _DTYPES[dtype]
            )
        except (OSError, ValueError) as error:
            raise _not_found(name, error) from error
        tokenizer = None
        with contextlib.suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(source)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(cast(PreTrainedModel, loaded.to(device)), tokenizer, name)

    @property
    def family(self) -> Family:
        """What is special to this model's family."""
        return self.attachment.family

    @property
    def geometry(self) -> Geometry:
        """The sites of this model and the shapes of their keys and values."""
        return self.attachment.geometry

    @property
    def hidden_sizes(self) -> dict[Site, int]:
        """The width of what enters the attention at every site, which gates read."""
        return self.attachment.hidden_sizes

    @property
    def fingerprint(self) -> str:
        """The hash of this model's weights; see `foreword.fingerprint`."""
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.model.dtype

    @property
    def max_tokens(self) -> int | None:
        """Tokens of context; a prefix uses up none of them. None where positions are relative."""
        if self.family.positions == "relative":
            return None
        return position_limit(self.model.config)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text."""
        stored = self.model.generation_config
        ends = None if stored is None else stored.eos_token_id
        ends = self.model.config.eos_token_id if ends is None else ends
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; `ConfigError` if it has none."""
        if self._tokenizer is None:
            raise ConfigError(f"base model {self.name!r} has no tokenizer", "one", "pass BaseModel(model, tokenizer)")
        return self._tokenizer

    def encode(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and its completion, which ends with the end token.

        Decoders: one after the other, after the start token where the tokenizer has one. Encoder-decoders:
        the encoder's input and the decoder's targets.
        """
        tokenizer = self.tokenizer
        if self.family.kind == "encoder-decoder":
            return tokenizer(prompt)["input_ids"], tokenizer(text_target=completion)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        return self.encode_prompt(prompt), tokenizer(completion, add_special_tokens=False)["input_ids"] + end

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as the model wants to begin."""
        tokenizer = self.tokenizer
        if self.family.kind != "decoder":
            return cast("list[int]", tokenizer(prompt)["input_ids"])
        ids = cast("list[int]", tokenizer(prompt, add_special_tokens=False)["input_ids"])
        starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        return [tokenizer.bos_token_id, *ids] if starts else ids

    @torch.no_grad()
    def record(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        **inputs: Any,
    ) -> dict[Site, tuple[Tensor, Tensor]]:
        """The keys and values that a text has at every site, each `[batch, kv_heads, tokens, dim]`.

        `positions` int `[batch, tokens]` may be negative in rotary families. Other model inputs
        (`decoder_input_ids`, `pixel_values`) go through as they are.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        if self.family.kind != "encoder":
            given["use_cache"] = False
        with self.attachment.recording() as recorded:
            self.model(**given)
        return recorded

    @torch.no_grad()
    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prefixes: Prefixes = None, **inputs: Any
    ) -> Tensor:
        """What the model's head says, `[batch, tokens, vocab]` for language models.

        One prefix for all rows, or one each. A model without a head gives its last hidden state.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        with self.rows(prefixes, len(input_ids)) as ids:
            output: ModelOutput = self.model(prefix_ids=ids, **given)
        return cast(Tensor, output["logits"] if "logits" in output else output["last_hidden_state"])

    @contextlib.contextmanager
    def rows(self, prefixes: Prefixes, batch: int) -> Iterator[Tensor]:
        """Inside, the prefixes are resident, and the yielded `prefix_ids` `[batch]` name each row's."""
        each = _each(prefixes, batch)
        bank = self.attachment.bank
        added: dict[int, int] = {0: 0}
        names: list[str] = []
        try:
            for prefix in each:
                if prefix is not None and id(prefix) not in added:
                    check_prefix(self.attachment, prefix)
                    name = f"row:{id(prefix)}:{len(bank)}"
                    added[id(prefix)] = bank.add(name, prefix)
                    names.append(name)
            yield torch.tensor([0 if p is None else added[id(p)] for p in each], device=self.device)
        finally:
            for name in names:
                bank.remove(name)

    @contextlib.contextmanager
    def reading(self, read: Reading, batch: int) -> Iterator[dict[str, Tensor]]:
        """Inside, a forward pass with the yielded arguments reads sites (differentiably), a prefix, or one per row."""
        if isinstance(read, dict | PerRow):
            with self.attachment.bound(read):
                yield {}
        else:
            with self.rows(read, batch) as ids:
                yield {"prefix_ids": ids}

    def hidden_states(self, batch: dict[str, Tensor], read: Reading = None) -> Tensor:
        """An encoder's last hidden states `[batch, tokens, hidden]`, whether it has a head of its own or not.

        `batch` has `input_ids` and `attention_mask` `[batch, tokens]`; it may have `token_type_ids`. Differentiable in
        the sites that are read.
        """
        if self.family.kind != "encoder":
            raise UnsupportedModel(f"hidden states of {self.name!r}, a {self.family.kind}", "an encoder")
        batch = {name: value.to(self.device) for name, value in batch.items()}
        backbone = self.model.base_model
        with self.reading(read, len(batch["input_ids"])) as given:
            if backbone is self.model:
                return cast(Tensor, self.model(**batch, **given)["last_hidden_state"])
            seen: list[Tensor] = []
            first = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
            first[0, 0] = True  # a head over the vocabulary is not wanted and computed at one token only
            handles = [
                backbone.register_forward_hook(lambda _, __, output: seen.append(output[0])),
                # What was seen is the whole model's output: a sharded model waits for the gradient of that.
                self.model.register_forward_hook(lambda *_: seen[0], prepend=True),
            ]
            try:
                with self.logits_at(first):
                    return cast(Tensor, self.model(**batch, **given))
            finally:
                for handle in handles:
                    handle.remove()

    def completion_loss(self, batch: dict[str, Tensor], read: Reading) -> tuple[Tensor, int]:
        """Negative log-likelihood in nats, summed over completion tokens, and their number; differentiable in sites.

        `batch` has `input_ids`, `attention_mask` and `labels` `[batch, tokens]`, -100 outside the completion;
        rows are padded on the right. Logits are computed at completion tokens alone.
        """
        logits, targets, _ = self.completion_logits(batch, read)
        return completion_nats(logits, targets), len(targets)

    def completion_logits(self, batch: dict[str, Tensor], read: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[tokens, vocab]` at a batch's completion tokens, row after row; their targets and rows `[tokens]`.

        `batch` is as for `completion_loss`; differentiable in the sites that are read.
        """
        inputs, targets, wanted = self._split_labels(batch)
        with self.reading(read, len(wanted)) as given, self.logits_at(wanted):
            logits = self.model(**inputs, **given)["logits"].flatten(0, -2)
        return logits, targets[wanted], wanted.nonzero()[:, 0]

    def _split_labels(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Model inputs, the targets of every position, and which positions are wanted, each `[batch, tokens]`."""
        if self.family.kind == "encoder":
            raise UnsupportedModel(
                f"{self.name!r} is an encoder and writes no completions", "a decoder or encoder-decoder",
                "choose another base model",
            )  # fmt: skip
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch["labels"]
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        inputs["use_cache"] = False
        if self.family.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = self._shift_right(labels)
            return inputs, labels, labels != -100
        # Gates that read the prompt must not see what comes after it.
        inputs["prompt_mask"] = (labels == -100) & batch["attention_mask"].bool()
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return inputs, targets, targets != -100

    def _shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for these targets, as the model itself makes them."""
        maker = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if maker is not None:
            return cast(Tensor, maker(labels=labels))
        config = self.model.config
        start = labels.new_full((labels.shape[0], 1), config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)

    @contextlib.contextmanager
    def logits_at(self, wanted: Tensor) -> Iterator[None]:
        """Inside, the head is computed at the wanted positions alone: `[1, wanted, vocab]`."""

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][wanted][None], *args[1:])

        head: nn.Module | None = self.model.get_output_embeddings()
        if head is None:
            yield
            return
        handle = head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        prefixes: Prefixes = None,
        *,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Score]:
        """The cost of each completion after its prompt; `DataError` for a row that is too long."""
        if len(prompts) != len(completions) or batch_size < 1:
            raise ConfigError(
                f"{len(prompts)} prompts and {len(completions)} completions, batch_size {batch_size}",
                "as many of each, and a batch_size of at least 1",
            )
        encoded = [self.encode(*pair) for pair in zip(prompts, completions, strict=True)]
        limit, joint = self.max_tokens, self.family.kind == "decoder"
        for row, (prompt, completion) in enumerate(encoded):
            longest = len(prompt) + len(completion) if joint else max(len(prompt), len(completion))
            if limit is not None and longest > limit:
                raise DataError(f"row {row} has {longest} tokens", f"at most {limit}", "shorten it or leave it out")
        each = _each(prefixes, len(encoded))
        scores: list[Score] = []
        for start in range(0, len(encoded), batch_size):
            part = slice(start, start + batch_size)
            logits, targets, rows = self.completion_logits(self.collate(encoded[part]), each[part])
            nats = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            sums = torch.zeros(len(encoded[part]), device=nats.device).index_add_(0, rows, nats)
            counts = torch.bincount(rows, minlength=len(sums))
            scores += [Score(*pair) for pair in zip(sums.tolist(), counts.tolist(), strict=True)]
            if progress is not None:
                progress(len(scores), len(encoded))
        return scores

    def collate(self, encoded: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """Rows of (prompt ids, completion ids) as one batch, padded on the right, on the CPU."""
        pad = self.tokenizer.pad_token_id
        joint = self.family.kind == "decoder"
        inputs = [prompt + completion if joint else prompt for prompt, completion in encoded]
        labels = [[-100] * len(prompt) * joint + completion for prompt, completion in encoded]
        return {
            "input_ids": pad_rows(inputs, pad),
            "attention_mask": pad_rows([[1] * len(row) for row in inputs], 0),
            "labels": pad_rows(labels, -100),
        }

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        prefixes: Prefixes = None,
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        batch_size: int = 16,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Continue each prompt, read through one prefix for all or one each; the texts without their prompts.

        Greedy, sampled (`do_sample`, seeded) or by `num_beams` beams; ends at the end token, at any `stop`
        string (which is cut off), or after `max_new_tokens`. With `on_text` prompts run one by one and each
        piece of text is handed over as soon as it is there: `on_text(row, piece)`.
        """
        self._check_generation(num_beams, max_new_tokens, batch_size, stop, on_text)
        if do_sample and not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0):
            given = f"temperature {temperature}, top_p {top_p}, top_k {top_k}"
            raise ConfigError(given, "temperature above 0, top_p above 0 and at most 1, top_k of at least 0")
        each = _each(prefixes, len(prompts))
        encoded = [self.encode_prompt(prompt) for prompt in prompts]
        self._check_lengths(encoded, each, max_new_tokens)
        config = self._generation_config(
            max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=do_sample,
            **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if do_sample else {}),
        )  # fmt: skip
        extra: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}
        order = (
            sorted(range(len(encoded)), key=lambda row: -len(encoded[row])) if on_text is None else range(len(encoded))
        )
        size = batch_size if on_text is None else 1
        texts = [""] * len(encoded)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=do_sample):
            torch.manual_seed(seed) if do_sample else None
            for start in range(0, len(encoded), size):
                rows = list(order[start : start + size])
                if on_text is not None:
                    extra["streamer"] = Streamer(self.tokenizer, rows[0], stop, on_text)
                outputs = self._generate_rows([encoded[r] for r in rows], [each[r] for r in rows], config, extra)
                for row, ids in zip(rows, outputs, strict=True):
                    texts[row] = cut_at(self.tokenizer.decode(ids, skip_special_tokens=True), stop)
                if progress is not None:
                    progress(min(start + size, len(encoded)), len(encoded))
        return texts

    def _generate_rows(
        self, encoded: list[list[int]], prefixes: list[Prefix | None], config: GenerationConfig, extra: dict[str, Any]
    ) -> list[list[int]]:
        """New token ids of one batch; decoders are padded on the left."""
        joint = self.family.kind == "decoder"
        pad = self.tokenizer.pad_token_id
        ids = pad_rows(encoded, pad, left=joint).to(self.device)
        mask = pad_rows([[1] * len(row) for row in encoded], 0, left=joint).to(self.device)
        stored = self.model.generation_config
        with self.rows(prefixes, len(encoded)) as prefix_ids:
            self.model.generation_config = config  # `generate` fills what a configuration leaves open from this one
            try:
                output = self.model.generate(input_ids=ids, attention_mask=mask, prefix_ids=prefix_ids, **extra)
            finally:
                self.model.generation_config = stored
        return cast("list[list[int]]", output[:, ids.shape[1] if joint else 0 :].tolist())

    def _generation_config(self, **options: Any) -> GenerationConfig:
        """A configuration of our own, so that a model's stored sampling habits don't mix in."""
        stored, config = self.model.generation_config, self.model.config
        ends = stored.eos_token_id if stored.eos_token_id is not None else config.eos_token_id
        start = stored.decoder_start_token_id
        start = getattr(config, "decoder_start_token_id", None) if start is None else start
        return GenerationConfig(
            eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id, bos_token_id=stored.bos_token_id,
            decoder_start_token_id=start, forced_bos_token_id=stored.forced_bos_token_id,
            forced_eos_token_id=stored.forced_eos_token_id, **options,
        )  # fmt: skip

    def _check_generation(
        self, num_beams: int, max_new_tokens: int, batch_size: int, stop: Sequence[str], on_text: object
    ) -> None:
        if self.family.kind == "encoder":
            raise UnsupportedModel(
                f"{self.name!r} is an encoder and generates nothing", "a decoder or encoder-decoder",
                "choose another base model",
            )  # fmt: skip
        if min(num_beams, max_new_tokens, batch_size) < 1:
            given = f"num_beams {num_beams}, max_new_tokens {max_new_tokens}, batch_size {batch_size}"
            raise ConfigError(given, "at least 1 each")
        if not all(stop):
            raise ConfigError("an empty stop string", "text that ends the output", "leave it out")
        if on_text is not None and num_beams > 1:
            raise ConfigError("streaming with beams", "num_beams 1", "beams are known only at the end")

    def _check_lengths(self, encoded: list[list[int]], prefixes: list[Prefix | None], max_new_tokens: int) -> None:
        limit, joint = self.max_tokens, self.family.kind == "decoder"
        for row, (ids, prefix) in enumerate(zip(encoded, prefixes, strict=True)):
            if not ids:
                raise DataError(f"prompt {row} is empty", "at least one token")
            shift = prefix.position_offset if prefix is not None and self.family.positions == "learned" else 0
            longest = shift + len(ids) + max_new_tokens if joint else max(len(ids), max_new_tokens)
            if limit is not None and longest > limit:
                raise DataError(
                    f"prompt {row} has {len(ids)} tokens, {max_new_tokens} new ones are asked",
                    f"{limit - shift} tokens in all" if joint else f"at most {limit} of each",
                    "shorten the prompt or lower max_new_tokens",
                )  # fmt: skip


def _each(prefixes: Prefixes, rows: int) -> list[Prefix | None]:
    if prefixes is None or isinstance(prefixes, Prefix):
        return [prefixes] * rows
    if len(prefixes) != rows:
        raise ConfigError(f"{len(prefixes)} prefixes for {rows} rows", "one for each row, or a single one")
    return list(prefixes)


def pad_rows(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Rows of ids as one tensor `[rows, longest]`, filled up with `value`."""
    width = max(len(row) for row in rows)
    filler = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, filler, strict=True)])


def _model_class(config: Any, family: Family) -> Any:
    """The class that the model was saved as, if it writes text or has no head of its own; else the family's."""
    saved = getattr(transformers, (config.architectures or [""])[0], None)
    return saved if saved is not None else _AUTO_CLASSES[family.kind]


def _not_found(name: str, error: Exception) -> ModelNotFound:
    known = ", ".join(packaged_models())
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ModelNotFound(
        f"base model {name!r} cannot be loaded ({reason[:160]})",
        f"a packaged name ({known}), a folder, or a Hugging Face model id",
        "check the spelling and the network, or load from a folder",
    )
