"""Text to ids and back, the layout of the ids, and the file format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdtrain.data import tokenizer as tokenizer_module
from svdtrain.data.errors import DataError
from svdtrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer

TEXTS = [
    "the matrix of the gradient, the rank of the matrix; naïve Ωμέγα 🙂 12345\n" * 20,
    "def f(x):\n    return x\n" * 30,
]
TRAINED = Tokenizer.train(iter(TEXTS), 300)
BYTES = Tokenizer.byte_level()
TOKENIZERS = {"trained": TRAINED, "bytes": BYTES}
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(text=any_text | st.text(st.sampled_from(" \n\r\tthemarix1🙂'"), max_size=200))
def test_round_trip_and_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer.ranks) for token in ids)
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_ids_have_nanochats_layout() -> None:
    assert TRAINED.vocab_size == 300
    assert TRAINED.ranks[:256] == [bytes([value]) for value in range(256)]
    assert TRAINED.special_ids == {
        "<|bos|>": 291,
        "<|user_start|>": 292,
        "<|user_end|>": 293,
        "<|assistant_start|>": 294,
        "<|assistant_end|>": 295,
        "<|python_start|>": 296,
        "<|python_end|>": 297,
        "<|output_start|>": 298,
        "<|output_end|>": 299,
    }
    assert TRAINED.bos_id == 291
    assert TRAINED.decode([TRAINED.bos_id]) == "<|bos|>"


def test_numbers_are_cut_every_two_digits() -> None:
    numbers = Tokenizer.train(iter(["1234567 " * 200]), 268)
    tokens = [numbers.decode([token]) for token in numbers.encode("1234567")]
    assert tokens == ["12", "34", "56", "7"]


def test_training_finds_the_most_frequent_pairs_and_is_repeatable() -> None:
    assert Tokenizer.train(iter(["abc ab xab cd"]), 266).ranks[256:] == [b"ab"]
    assert len(TRAINED.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    assert Tokenizer.train(iter(TEXTS), 300).fingerprint() == TRAINED.fingerprint()
    assert Tokenizer.train(iter(TEXTS), 299).fingerprint() != TRAINED.fingerprint()


def test_names_of_special_tokens_in_the_text_are_text() -> None:
    ids = TRAINED.encode("<|bos|> <|user_end|>")
    assert max(ids) < TRAINED.bos_id


def test_batches_equal_single_texts() -> None:
    texts = [*TEXTS, "", "one"]
    assert TRAINED.encode_batch(texts, 2) == [TRAINED.encode(text) for text in texts]
    assert TRAINED.encode_batch([], 2) == []


def test_white_space_without_end_does_not_overflow() -> None:
    text = " " * 1_200_000
    assert BYTES.decode(BYTES.encode_batch([text], 1)[0]) == text


def test_long_texts_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_PIECE_CHARACTERS", 7)
    text = "the matrix 🙂 of the gradient"
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert TRAINED.encode_batch([text, "the"], 2) == [TRAINED.encode(text), TRAINED.encode("the")]


def test_byte_level() -> None:
    assert BYTES.vocab_size == 256 + len(SPECIAL_TOKENS) == 265
    assert BYTES.encode("aé") == [97, 0xC3, 0xA9]
    assert BYTES.decode([0xC3]) == "\ufffd"


def test_token_bytes() -> None:
    lengths = TRAINED.token_bytes()
    assert lengths.dtype == torch.int32
    assert lengths.shape == (300,)
    assert lengths[:256].tolist() == [1] * 256
    assert (lengths[256:291] >= 2).all()
    assert lengths[291:].tolist() == [0] * 9


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so() -> None:
    with pytest.warns(UserWarning, match="too small for 4096 tokens: the vocabulary has 2"):
        small = Tokenizer.train(iter(["hello hello hello"]), 4096)
    assert 265 < small.vocab_size < 300
    assert small.decode(small.encode("hello")) == "hello"


def test_no_text_at_all_gives_bytes() -> None:
    with pytest.warns(UserWarning, match="the vocabulary has 265"):
        assert Tokenizer.train(iter([]), 300).fingerprint() == BYTES.fingerprint()


def test_rustbpe_missing_gives_bytes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.warns(UserWarning, match="pip install rustbpe"):
        assert Tokenizer.train(iter(TEXTS), 300).fingerprint() == BYTES.fingerprint()


def test_vocabulary_without_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="at least 265, got 264"):
        Tokenizer.train(iter(TEXTS), 264)


class TestFile:
    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        TRAINED.save(tmp_path / "new" / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "new" / "tokenizer.json")
        assert loaded.fingerprint() == TRAINED.fingerprint()
        assert loaded.encode(TEXTS[0]) == TRAINED.encode(TEXTS[0])
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content["ranks"].pop(),
            lambda content: content["ranks"].__setitem__(270, "not base64!"),
            lambda content: content["ranks"].__setitem__(270, content["ranks"][271]),
            lambda content: content["ranks"].__setitem__(270, 5),
            lambda content: content.pop("pattern"),
            lambda content: content.update(pattern="("),
            lambda content: content.update(special_tokens=["<|bos|>"]),
            lambda content: content.update(special_tokens=[]),
            lambda content: content.update(format="other"),
        ],
    )
    def test_damage_is_one_clear_line(self, tmp_path: Path, damage) -> None:
        path = tmp_path / "tokenizer.json"
        TRAINED.save(path)
        content = json.loads(path.read_text())
        damage(content)
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="not an intact tokenizer file"):
            Tokenizer.load(path)

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\x00\xff"])
    def test_other_files(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "tokenizer.json"
        path.write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match="not an intact tokenizer file"):
            Tokenizer.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="cannot read the tokenizer"):
            Tokenizer.load(tmp_path / "none.json")
