"""The stream: file order over shard borders, every token once, resumable at any token, honest about its end."""

import json

import numpy as np
import pytest

from senano_jax.data.shards import HEADER_BYTES, write_shard
from senano_jax.data.stream import (
    SequenceSource,
    TokenStream,
    require_tokens,
    validation_sequences,
)
from senano_jax.errors import UserError

SIZES = (57, 23, 101)  # tokens a shard: no multiple of any sequence length below
TOTAL = sum(SIZES)


@pytest.fixture
def corpus(tmp_path):
    """Three shards and their concatenation; every token is distinct, so a shifted read cannot pass."""
    tokens = np.arange(1000, 1000 + TOTAL)
    paths = []
    for k, piece in enumerate(np.split(tokens, np.cumsum(SIZES)[:-1])):
        paths.append(tmp_path / f"t_{k:06d}.bin")
        write_shard(paths[-1], piece)
    return paths, tokens


def overwrite_token(path, position, value):
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 2 * position)
        file.write(int(value).to_bytes(2, "little"))


@pytest.mark.parametrize("start", [0, 1, 56, 57, 79, 80, 175])
@pytest.mark.parametrize("seq_len", [1, 5, 16, 22])
def test_records_are_the_concatenation_in_file_order(corpus, seq_len, start):
    paths, tokens = corpus
    source = SequenceSource(paths, seq_len, start)
    assert len(source) == (TOTAL - 1 - start) // seq_len  # only the last partial sequence is left over
    for k in range(len(source)):
        first = start + k * seq_len
        np.testing.assert_array_equal(source[k], tokens[first : first + seq_len + 1])
        assert source[k].dtype == np.int32
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_shard_shorter_than_one_sequence_is_refused_by_name(corpus):
    paths, _ = corpus
    SequenceSource(paths, 22)
    with pytest.raises(UserError, match=f"^{paths[1]} is shorter than one sequence: it holds 23 tokens"):
        SequenceSource(paths, 23)


def test_batches_tile_the_stream(corpus):
    paths, tokens = corpus
    batches = list(TokenStream(paths, 5, 4))
    assert len(batches) == (TOTAL - 1) // 20
    for k, batch in enumerate(batches):
        assert (batch.first_token, batch.end_token) == (20 * k, 20 * k + 20)
        assert batch.tokens.shape == (4, 6)
        np.testing.assert_array_equal(batch.tokens[:, :-1].ravel(), tokens[20 * k : 20 * k + 20])
        np.testing.assert_array_equal(batch.tokens[:, 1:].ravel(), tokens[20 * k + 1 : 20 * k + 21])


@pytest.mark.parametrize("process_count", [2, 3, 6])
@pytest.mark.parametrize("discard_tokens", [0, 7])
def test_process_slices_side_by_side_are_the_global_batch(corpus, process_count, discard_tokens):
    paths, _ = corpus
    whole = list(TokenStream(paths, 4, 6, discard_tokens=discard_tokens))
    parts = [
        list(TokenStream(paths, 4, 6, process_index=p, process_count=process_count, discard_tokens=discard_tokens))
        for p in range(process_count)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[k].tokens for part in parts]), batch.tokens)
        assert {(part[k].first_token, part[k].end_token) for part in parts} == {(batch.first_token, batch.end_token)}


def test_an_uneven_share_is_refused(corpus):
    with pytest.raises(UserError, match=r"6 sequences a batch .* 4 processes"):
        TokenStream(corpus[0], 4, 6, process_count=4)


@pytest.mark.parametrize("discard_tokens", [0, 3, 10])
def test_a_saved_state_resumes_at_the_same_token_wherever_it_is_saved(corpus, discard_tokens):
    """With tokens read ahead at every save: the batches after the save are those that never stopping would give."""
    paths, _ = corpus
    uninterrupted = list(TokenStream(paths, 5, 2, discard_tokens=discard_tokens))
    for saved_after in range(len(uninterrupted) + 1):
        stream = TokenStream(paths, 5, 2, discard_tokens=discard_tokens)
        for _ in range(saved_after):
            next(stream)
        state = json.loads(json.dumps(stream.get_state()))
        rest = list(stream)

        fresh = TokenStream(paths, 5, 2, discard_tokens=discard_tokens)
        next(fresh)
        fresh.set_state(state)
        for batches in (rest, list(fresh)):
            assert len(batches) == len(uninterrupted) - saved_after
            for batch, expected in zip(batches, uninterrupted[saved_after:]):
                assert batch.first_token == expected.first_token
                np.testing.assert_array_equal(batch.tokens, expected.tokens)


def test_the_state_is_in_tokens_so_that_length_and_batch_may_change(corpus):
    paths, tokens = corpus
    stream = TokenStream(paths, 7, 3)
    next(stream)
    state = stream.get_state()
    assert state == {"next_token": 21}
    wider = TokenStream(paths, 11, 2)
    wider.set_state(state)
    batch = next(wider)
    assert (batch.first_token, batch.end_token) == (21, 43)
    np.testing.assert_array_equal(batch.tokens[:, :-1].ravel(), tokens[21:43])
    assert wider.get_state() == {"next_token": 43}


@pytest.mark.parametrize("start_token", [1, 13, 57, TOTAL - 11])
def test_a_start_anywhere(corpus, start_token):
    paths, tokens = corpus
    batch = next(TokenStream(paths, 5, 2, start_token=start_token))
    assert batch.first_token == start_token
    np.testing.assert_array_equal(batch.tokens[:, :-1].ravel(), tokens[start_token : start_token + 10])


@pytest.mark.parametrize("start_token", [TOTAL - 10, TOTAL - 1])
def test_a_stream_at_its_end_stops_at_once(corpus, start_token):
    assert list(TokenStream(corpus[0], 5, 2, start_token=start_token)) == []


@pytest.mark.parametrize("next_token", [-1, TOTAL])
def test_a_position_that_the_shards_lack_is_refused(corpus, next_token):
    with pytest.raises(UserError, match=f"token {next_token} of shards that hold {TOTAL}"):
        TokenStream(corpus[0], 5, 2).set_state({"next_token": next_token})


def test_discarding_skips_tokens_after_every_batch(corpus):
    paths, tokens = corpus
    batches = list(TokenStream(paths, 5, 2, discard_tokens=7))
    assert [batch.first_token for batch in batches] == list(range(0, TOTAL - 10, 17))
    for batch in batches:
        np.testing.assert_array_equal(batch.tokens[:, :-1].ravel(), tokens[batch.first_token : batch.first_token + 10])


def test_a_foreign_token_surfaces_from_the_thread_and_is_never_skipped(corpus):
    paths, _ = corpus
    overwrite_token(paths[1], 4, 50257)  # stream position 61: in the batch that begins at 60
    stream = TokenStream(paths, 5, 2)
    for _ in range(6):
        next(stream)
    for _ in range(2):
        with pytest.raises(UserError, match=f"^{paths[1]} holds 50257 at token 4,"):
            next(stream)
        assert stream.get_state() == {"next_token": 60}


def test_the_last_token_of_the_vocabulary_is_read(corpus):
    paths, _ = corpus
    overwrite_token(paths[0], 3, 50256)
    assert next(TokenStream(paths, 5, 2)).tokens[0, 3] == 50256


def test_the_stream_gives_all_whole_sequences(corpus):
    paths, _ = corpus
    for seq_len in (1, 4, 5, 18, 20):
        given = sum(batch.tokens[:, 1:].size for batch in TokenStream(paths, seq_len, 1))
        assert given == (TOTAL - 1) // seq_len * seq_len


def test_more_tokens_than_there_are_is_refused_with_the_shards_it_takes(corpus):
    paths, _ = corpus
    require_tokens("t_*.bin", paths, TOTAL - 1, 22)  # n tokens take n + 1: the last target
    with pytest.raises(UserError, match=r"'t_\*\.bin' matches 3 shards with 181 tokens, the run needs 182 .* 2 "):
        require_tokens("t_*.bin", paths, TOTAL, 22)
    with pytest.raises(UserError, match=r"never repeated: give it 10 shards of 101 tokens"):
        require_tokens("t_*.bin", paths, 1009, 22)


def test_validation_is_the_first_tokens_in_order(corpus):
    paths, tokens = corpus
    sequences = validation_sequences("t_*.bin", paths, 60, 20)
    assert sequences.shape == (3, 21)
    np.testing.assert_array_equal(sequences[:, :-1].ravel(), tokens[:60])
    np.testing.assert_array_equal(sequences[:, 1:].ravel(), tokens[1:61])


def test_validation_refuses_what_is_not_whole_or_not_there(corpus):
    paths, _ = corpus
    with pytest.raises(UserError, match=r"--data.val-tokens 61 is not a multiple of --data.val-seq-len 20: use 60"):
        validation_sequences("t_*.bin", paths, 61, 20)
    assert len(validation_sequences("t_*.bin", paths, 180, 20)) == 9
    with pytest.raises(UserError, match=r"holds 181 tokens, --data.val-tokens 200 .* use --data.val-tokens 180"):
        validation_sequences("t_*.bin", paths, 200, 20)


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("discard_tokens", [0, 3])
def test_batches_may_change_their_size_and_length(corpus, process_count, discard_tokens):
    """Every token once, in order, over all borders and wherever the stream is saved; the oracle counts by hand."""
    paths, tokens = corpus
    sizes = [(5, 2)] * 3 + [(4, 6)] * 2 + [(4, 2)] + [(18, 2)] + [(1, 8)]  # tokens of a sequence, sequences
    for saved_before in range(len(sizes)):
        streams = [
            TokenStream(paths, *sizes[0], process_index=p, process_count=process_count, discard_tokens=discard_tokens)
            for p in range(process_count)
        ]
        first = 0
        for step, (seq_len, sequences) in enumerate(sizes):
            if step == saved_before:
                state = json.loads(json.dumps(streams[0].get_state()))
                streams = [
                    TokenStream(
                        paths,
                        seq_len,
                        sequences,
                        process_index=p,
                        process_count=process_count,
                        discard_tokens=discard_tokens,
                        start_token=state["next_token"],
                    )
                    for p in range(process_count)
                ]
            for stream in streams:
                stream.resize(seq_len, sequences)
            batches = [next(stream) for stream in streams]
            given = np.concatenate([batch.tokens for batch in batches])
            end = first + seq_len * sequences
            assert {(batch.first_token, batch.end_token) for batch in batches} == {(first, end)}
            assert given.shape == (sequences, seq_len + 1)
            np.testing.assert_array_equal(given[:, :-1].ravel(), tokens[first:end])
            np.testing.assert_array_equal(given[:, 1:].ravel(), tokens[first + 1 : end + 1])
            first = end + discard_tokens


def test_an_uneven_share_of_a_later_batch_is_refused(corpus):
    stream = TokenStream(corpus[0], 5, 2, process_count=2)
    with pytest.raises(UserError, match=r"3 sequences a batch .* 2 processes"):
        stream.resize(5, 3)


def test_a_shard_too_short_for_the_longest_sequence_is_refused_before_training(corpus):
    with pytest.raises(UserError, match=f"^{corpus[0][1]} is shorter than one sequence: it holds 23 tokens"):
        require_tokens("t_*.bin", corpus[0], 100, 23)
