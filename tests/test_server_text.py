"""Text of a server: tokens to characters as they come, stop strings that never show, tokens by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from foreword.base import BaseModel
from foreword.errors import DataError
from foreword.server.text import Codec, Detokenizer, StopStrings
from foreword.streaming import cut_at
from tiny import VOCAB, tiny_base, tiny_model, tiny_tokenizer


def spoilt_bytes_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: words begin with ▁, characters that are no tokens are written as rows of byte tokens."""
    words = ["<pad>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁ab", "é", "�"]
    vocabulary = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE({word: k for k, word in enumerate(vocabulary)}, [("▁", "a")], byte_fallback=True, unk_token="<pad>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["byte-level", "byte fallback"])
def codec(request: pytest.FixtureRequest) -> Codec:
    tokenizer = tiny_tokenizer() if request.param == "byte-level" else spoilt_bytes_tokenizer()
    return Codec(BaseModel(tiny_model("llama"), tokenizer, "tiny"))


def grown(codec: Codec, ids: list[int]) -> list[str]:
    detokenizer = codec.detokenizer()
    return [*map(detokenizer.push, ids), detokenizer.flush()]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_text_that_grows_is_the_text_decoded_at_once(codec: Codec, ids: list[int]) -> None:
    assert "".join(grown(codec, ids)) == codec.decode(ids)


@given(
    ids=st.lists(
        st.sampled_from([3, 4, 6, 9, 10 + 0xE4, 10 + 0xB8, 10 + 0xAD, 10 + 0xF0, 0x80, 0xC3, 250]), max_size=60
    )
)
def test_torn_characters_are_as_when_decoded_at_once(codec: Codec, ids: list[int]) -> None:
    assert "".join(grown(codec, ids)) == codec.decode(ids)


@given(text=texts)
def test_whole_characters_come_whole_and_soon(codec: Codec, text: str) -> None:
    ids = codec.encode(text, special=False)
    pieces = grown(codec, ids)
    assert "".join(pieces) == codec.decode(ids)
    assert all("�" not in piece for piece in pieces) or "�" in codec.decode(ids)


def test_emoji_are_held_until_all_their_bytes_are_there() -> None:
    codec = Codec(tiny_base("llama"))
    pieces = grown(codec, codec.encode("a🙂b", special=False))
    assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]


def test_bytes_that_never_become_a_character_cost_no_more_the_more_they_are() -> None:
    codec = Codec(tiny_base("llama"))
    (torn,) = [token for token in range(VOCAB) if codec.piece(token)[1] == b"\x80"]
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return codec.decode(ids)

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.push(torn) for _ in range(2000)) + detokenizer.flush()
    assert text == codec.decode([torn] * 2000)
    assert max(decoded) < 12


@given(
    text=st.text("abcd", max_size=30),
    stop=st.lists(st.text("abcd", min_size=1, max_size=4), max_size=4),
    data=st.data(),
)
def test_cut_in_pieces_is_cut_at_once(text: str, stop: list[str], data: st.DataObject) -> None:
    ends = StopStrings(stop)
    shown, rest = "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += ends.push(rest[:size])
        rest = rest[size:]
        assert cut_at(text, stop).startswith(shown)  # nothing that is shown has to be taken back
    shown += ends.flush()
    assert shown == cut_at(text, stop)
    assert ends.stopped == (shown != text)


def test_no_more_is_held_back_than_could_become_a_stop_string() -> None:
    ends = StopStrings(["\n\n", "END"])
    assert [ends.push(piece) for piece in ("a\n", "b", "EN", "d", "E")] == ["a", "\nb", "", "ENd", ""]
    assert ends.flush() == "E" and not ends.stopped


def test_an_earlier_stop_string_wins_also_if_it_is_whole_later() -> None:
    for pieces in (["abc", "d"], ["abcd"], ["a", "b", "c", "d"]):
        ends = StopStrings(["bc", "abcd"])
        assert "".join(map(ends.push, pieces)) + ends.flush() == "" and ends.stopped


def test_a_token_by_itself_is_its_text_and_its_bytes(codec: Codec) -> None:
    ids = codec.encode("a ab é🙂 漢", special=False)
    assert b"".join(codec.piece(token)[1] for token in ids).decode().strip() == "a ab é🙂 漢"
    for token in range(codec.vocabulary_size):
        text, raw = codec.piece(token)
        if text.startswith("bytes:"):
            assert text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        else:
            assert text.encode() == raw
    names = [codec.piece(token)[0] for token in codec._byte_ids]
    assert len(names) == len(set(names))


def test_special_tokens_have_a_name_and_no_text() -> None:
    codec = Codec(tiny_base("llama"))
    assert codec.piece(2) == ("</s>", b"</s>")
    assert "".join(grown(codec, [35, 2, 35])) == codec.decode([35, 2, 35]) == "AA"


def test_chats_need_a_template() -> None:
    base = BaseModel(tiny_model("llama"), tiny_tokenizer_with("{{ raise_exception('system first') }}"), "tiny")
    with pytest.raises(DataError, match="system first"):
        Codec(base).encode_chat([{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match="no chat template"):
        Codec(tiny_base("llama")).encode_chat([{"role": "user", "content": "x"}])


def tiny_tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer()._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_says_how_a_conversation_is_read() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    codec = Codec(BaseModel(tiny_model("llama"), tiny_tokenizer_with(template), "tiny"))
    ids = codec.encode_chat([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}])
    assert codec.decode(ids) == "[user]Hi.[assistant]Ho.>"
