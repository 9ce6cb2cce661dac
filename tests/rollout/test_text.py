"""Text that grows token by token, against the whole text decoded at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitae.rollout.text import GrowingText, cut_at_stop, first_stop


def decode(ids: list[int]) -> str:
    """Tokens are bytes, as in a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(text: str, *, stop: list[str]) -> tuple[list[str], int]:
    """The pieces shown, and how many bytes were read until it stopped."""
    growing = GrowingText(decode, stop=stop)
    pieces = []
    ids = list(text.encode())
    for count, token in enumerate(ids, 1):
        is_stopped = growing.add(token)
        pieces.append(growing.take(is_last=is_stopped or count == len(ids)))
        if is_stopped:
            return pieces, count
    return pieces, len(ids)


@given(
    st.text(alphabet="ab\u00e9\u6f22", max_size=30),
    st.lists(st.text(alphabet="ab\u6f22", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_before_the_first_stop_string(text: str, stop: list[str]):
    pieces, num_read = pieces_of(text, stop=stop)
    read = text.encode()[:num_read].decode()
    assert "".join(pieces) == cut_at_stop(read, stop)
    ended_by = [s for s in stop if read.endswith(s)]
    assert cut_at_stop(read, stop, keep=True) == read
    assert not ended_by or cut_at_stop(read + "x", stop, keep=True) == read
    first_complete = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
    assert read == text[:first_complete]


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    assert pieces_of("a</x", stop=["</y>"])[0] == ["a", "", "", "</x"]
    assert pieces_of("a</", stop=["</y>"])[0] == ["a", "", "</"]


def test_half_a_character_waits_for_the_other_half_and_is_shown_at_the_end():
    assert pieces_of("a\u00e9b", stop=[])[0] == ["a", "", "\u00e9", "b"]
    growing = GrowingText(decode)
    assert not growing.add("\u00e9".encode()[0])
    assert growing.take(is_last=False) == ""
    assert growing.take(is_last=True) == "\ufffd"


@given(
    st.text(alphabet="ab\u00e9\u6f22\U0001f600", max_size=30),
    st.lists(st.integers(1, 9), min_size=40, max_size=40),
)
def test_tokens_taken_several_at_a_time_give_the_same_text_and_show_whole_characters(
    text: str, counts: list[int]
):
    growing, ids, shown = GrowingText(decode), list(text.encode()), ""
    while ids:
        count = counts.pop(0)
        read, ids = ids[:count], ids[count:]
        for token in read:
            growing.add(token)
        shown += growing.take(is_last=False)
        whole = text.encode()[: len(text.encode()) - len(ids)]
        assert shown == whole.decode(errors="ignore")
    assert shown + growing.take(is_last=True) == text


def test_a_text_that_ends_within_a_character_says_so():
    growing = GrowingText(decode)
    for token in "ab\u6f22".encode()[:-1]:
        growing.add(token)
    assert growing.take(is_last=True) == "ab\ufffd"


def test_the_first_of_several_stop_strings_counts():
    assert first_stop("one two", ["two", "one"]) == 0
    assert first_stop("one two", ["three"]) is None
    assert cut_at_stop("one two", ["two", "three"]) == "one "
    assert cut_at_stop("one two", []) == "one two"


@pytest.mark.parametrize("stop", [[], ["</y>"]])
@pytest.mark.parametrize(
    "run", ["\ufffd".encode() * 500, b"\xff" * 1500], ids=["repeated by the model", "no text"]
)
def test_a_run_of_replacement_characters_is_shown_on_the_way_and_costs_no_more_the_longer_it_is(
    run: bytes, stop: list[str]
):
    longest = 0

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    growing, shown, ids = GrowingText(watched, stop=stop), "", [*b"ab", *run, *b"cd"]
    for number, token in enumerate(ids):
        growing.add(token)
        shown += growing.take(is_last=False)
        assert len(shown) >= len(decode(ids[: number + 1])) - 70
    assert shown + growing.take(is_last=True) == decode(ids)
    assert longest < 200
