"""Rows, batches, epochs, ranks, replay, validation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svdtrain.data.errors import DataError
from svdtrain.data.shift import ShiftStream
from svdtrain.data.stream import (
    ReplayStream,
    TokenFiles,
    TokenStream,
    epoch_order,
    mixed_batch,
    to_device,
    validation_batches,
)

MakeFiles = Callable[..., TokenFiles]
BOS = 0
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def equal(first: tuple, second: tuple) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def targets_of(stream: TokenStream, positions: range) -> torch.Tensor:
    return stream.rows_seen(np.array(positions))[1]


class TestPacking:
    @same_folder
    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
        seq_len=st.integers(1, 25),
        shard_tokens=st.integers(1, 50),
    )
    def test_every_token_is_a_target_once(
        self, make_token_files: MakeFiles, lengths: list[int], seq_len: int, shard_tokens: int
    ) -> None:
        files = make_token_files(lengths, shard_tokens=shard_tokens)
        num_rows = files.num_rows(seq_len)
        inputs, targets = files.rows(range(num_rows), seq_len)
        expected = files.tokens(0, files.num_tokens).astype(np.int64)
        covered = targets.flatten().tolist()
        assert covered == expected[1 : 1 + num_rows * seq_len].tolist()
        assert 0 <= files.num_tokens - 1 - len(covered) < seq_len
        assert (inputs[:, 0] == BOS).all()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])

    def test_an_example_by_hand(self, make_token_files: MakeFiles) -> None:
        files = make_token_files([3, 6, 2])  # 0 1 2 | 0 4 5 6 7 8 | 0 10
        inputs, targets = files.rows([0, 1], 4)
        assert inputs.tolist() == [[0, 1, 2, 0], [0, 5, 6, 7]]
        assert targets.tolist() == [[1, 2, 0, 4], [5, 6, 7, 8]]
        assert files.num_rows(4) == 2
        assert files.document_starts().tolist() == [0, 3, 9]

    @same_folder
    @given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20), shard_tokens=st.integers(1, 30))
    def test_reading_across_shards(self, make_token_files: MakeFiles, lengths: list[int], shard_tokens: int) -> None:
        whole = make_token_files(lengths)
        expected = np.array(whole.tokens(0, whole.num_tokens))
        split = make_token_files(lengths, shard_tokens=shard_tokens)
        assert split.is_intact()
        for start in range(0, whole.num_tokens, 3):
            for stop in range(start, whole.num_tokens + 1, 5):
                assert split.tokens(start, stop).tolist() == expected[start:stop].tolist()
        assert split.document_starts().tolist() == np.flatnonzero(expected == BOS).tolist()


class TestPermutation:
    @given(num_rows=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64 - 1), epoch=st.integers(0, 10**6))
    def test_is_a_bijection_and_pure(self, num_rows: int, seed: int, epoch: int) -> None:
        order = epoch_order(num_rows, seed, epoch)
        assert np.array_equal(np.sort(order), np.arange(num_rows))
        assert np.array_equal(order, epoch_order(num_rows, seed, epoch))

    def test_differs_by_seed_and_epoch(self) -> None:
        orders = [epoch_order(100, seed, epoch).tolist() for seed in (0, 1, 2**40) for epoch in range(3)]
        assert len({tuple(order) for order in orders}) == 9

    def test_never_changes(self) -> None:
        """A run that resumes under another version of NumPy must see the same rows."""
        assert epoch_order(8, 1337, 0).tolist() == [6, 3, 1, 7, 5, 2, 0, 4]


class TestBatches:
    @pytest.fixture
    def stream(self, make_token_files: MakeFiles) -> TokenStream:
        files = make_token_files([7, 30, 1, 55, 12, 90, 3, 21, 40, 66, 15, 28] * 3, shard_tokens=100)
        return TokenStream(files, batch_size=12, seq_len=8, seed=5)

    def test_shapes(self, stream: TokenStream) -> None:
        inputs, targets = stream.batch(0)
        assert inputs.shape == targets.shape == (12, 8)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert (inputs[:, 0] == BOS).all()

    def test_any_order_of_steps_gives_the_same_batches(self, stream: TokenStream) -> None:
        straight = [stream.batch(step) for step in range(40)]
        for step in np.random.default_rng(0).permutation(40):
            assert equal(stream.batch(int(step)), straight[step])
        resumed = TokenStream(stream.files, batch_size=12, seq_len=8, seed=5)
        assert equal(resumed.batch(29), straight[29])

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
    def test_ranks_together_are_the_batch_of_one(self, stream: TokenStream, world_size: int) -> None:
        for step in (0, 3, 4, 31):
            parts = [stream.batch(step, rank, world_size) for rank in range(world_size)]
            joined = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            assert equal(joined, stream.batch(step))

    def test_each_epoch_has_every_row_once_in_a_new_order(self, stream: TokenStream) -> None:
        num_rows = stream.rows_per_epoch
        in_order = TokenStream(stream.files, batch_size=12, seq_len=8, seed=5, shuffle=False)
        expected = targets_of(in_order, range(num_rows)).tolist()
        epochs = [targets_of(stream, range(e * num_rows, (e + 1) * num_rows)).tolist() for e in range(3)]
        for rows in epochs:
            assert sorted(rows) == sorted(expected)
        assert epochs[0] != epochs[1] != epochs[2] != expected

    def test_batches_are_consecutive_rows_across_epochs(self, stream: TokenStream) -> None:
        seen = torch.cat([stream.batch(step)[1] for step in range(25)])
        assert torch.equal(seen, targets_of(stream, range(300)))
        assert stream.rows_per_epoch * 2 < 300  # so batches did reach into the next epoch
        assert stream.rows_per_epoch % 12 != 0

    def test_seed_decides(self, stream: TokenStream) -> None:
        other = TokenStream(stream.files, batch_size=12, seq_len=8, seed=6)
        assert not equal(other.batch(0), stream.batch(0))

    def test_epochs_are_counted(self, stream: TokenStream) -> None:
        num_rows = stream.rows_per_epoch
        assert stream.tokens_per_epoch == num_rows * 8
        assert [stream.epoch(step) for step in range(50)] == [step * 12 // num_rows for step in range(50)]
        assert stream.epoch(49) >= 4

    def test_first_rows_are_those_that_training_saw_first(self, stream: TokenStream) -> None:
        inputs, targets = stream.first_rows(30)
        seen = [stream.batch(step) for step in range(3)]
        assert torch.equal(targets, torch.cat([batch[1] for batch in seen])[:30])
        assert torch.equal(inputs, torch.cat([batch[0] for batch in seen])[:30])
        in_order = TokenStream(stream.files, batch_size=12, seq_len=8, seed=5, shuffle=False)
        assert equal(in_order.first_rows(5), stream.files.rows(range(5), 8))

    def test_wrong_use(self, stream: TokenStream) -> None:
        with pytest.raises(ValueError, match="12 does not divide by the number of ranks 5"):
            stream.batch(0, 0, 5)
        with pytest.raises(ValueError, match="num_rows must be from 1 to"):
            stream.first_rows(stream.rows_per_epoch + 1)
        with pytest.raises(ValueError, match="at least 1"):
            TokenStream(stream.files, batch_size=0, seq_len=8, seed=0)

    def test_too_little_text(self, make_token_files: MakeFiles) -> None:
        with pytest.raises(DataError, match="training text is too small: 20 tokens, but one batch takes 3 rows of 8"):
            TokenStream(make_token_files([20]), batch_size=3, seq_len=8, seed=0)
        files = make_token_files([20], split="val")
        with pytest.raises(DataError, match="validation text is too small: 20 tokens"):
            validation_batches(files, 3, 8, 1000)

    def test_one_batch_per_epoch_is_enough(self, make_token_files: MakeFiles) -> None:
        stream = TokenStream(make_token_files([25]), batch_size=3, seq_len=8, seed=0)
        assert sorted(stream.batch(0)[1].tolist()) == sorted(stream.batch(7)[1].tolist())


class TestReplay:
    @pytest.fixture
    def streams(self, make_token_files: MakeFiles) -> tuple[TokenStream, TokenStream]:
        files = make_token_files([17] * 60)
        return (
            TokenStream(files, batch_size=8, seq_len=8, seed=1),
            TokenStream(files, batch_size=4, seq_len=8, seed=2),
        )

    def test_without_a_share_it_is_the_plain_batch(self, streams: tuple[TokenStream, TokenStream]) -> None:
        for step in range(5):
            mixed = mixed_batch(streams[0], step, replay_share=0.0, replay_rows=4)
            assert equal(mixed, streams[0].batch(step))

    @pytest.mark.parametrize("share", [0.25, 0.3, 0.05, 1.0])
    def test_replaces_the_share_with_the_window_in_turn(
        self, streams: tuple[TokenStream, TokenStream], share: float
    ) -> None:
        stream, old = streams
        window = old.first_rows(5)[1]
        replayed = []
        for step in range(40):
            mixed = mixed_batch(stream, step, replay_share=share, replay_rows=5, replay=old)[1]
            changed = (mixed != stream.batch(step)[1]).any(dim=1)
            replayed += mixed[changed].tolist()
        # a replayed row may by chance equal the fresh one that it replaces, hence the slack of a few rows
        assert 0 <= int(40 * 8 * share) - len(replayed) <= 6
        assert {tuple(row) for row in replayed} <= {tuple(row) for row in window.tolist()}

    def test_in_turn_exactly(self, streams: tuple[TokenStream, TokenStream]) -> None:
        stream, old = streams
        rows = [mixed_batch(stream, s, replay_share=1.0, replay_rows=5, replay=old)[1] for s in range(3)]
        assert torch.equal(torch.cat(rows), old.first_rows(5)[1][torch.arange(24) % 5])

    def test_slots_are_spread_over_ranks(self, streams: tuple[TokenStream, TokenStream]) -> None:
        stream, old = streams
        for step in range(6):
            whole = mixed_batch(stream, step, replay_share=0.5, replay_rows=7, replay=old)
            parts = [
                mixed_batch(stream, step, replay_share=0.5, replay_rows=7, replay=old, rank=rank, world_size=4)
                for rank in range(4)
            ]
            assert equal((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), whole)
            fresh = [stream.batch(step, rank, 4) for rank in range(4)]
            changed = [int((part[1] != plain[1]).any(dim=1).sum()) for part, plain in zip(parts, fresh, strict=True)]
            assert max(changed) <= 1

    def test_wrong_use(self, streams: tuple[TokenStream, TokenStream]) -> None:
        stream, _ = streams
        with pytest.raises(ValueError, match=r"replay_share must lie in \[0, 1\]"):
            mixed_batch(stream, 0, replay_share=1.5, replay_rows=4)
        with pytest.raises(ValueError, match="replay_rows must be from 1"):
            mixed_batch(stream, 0, replay_share=0.5, replay_rows=0)
        longer = TokenStream(stream.files, batch_size=2, seq_len=9, seed=1)
        with pytest.raises(ValueError, match="make them equal"):
            mixed_batch(stream, 0, replay_share=0.5, replay_rows=4, replay=longer)


class TestValidation:
    def test_same_at_every_pass_and_spread_over_the_text(self, make_token_files: MakeFiles) -> None:
        files = make_token_files([50] * 40, split="val")  # 2000 tokens, 249 rows of 8
        batches = validation_batches(files, 4, 8, 32 * 10)
        first, second = list(batches), list(batches)
        assert len(batches) == len(first) == 10
        assert all(equal(a, b) for a, b in zip(first, second, strict=True))
        positions = [row for batch in batches.rows for row in batch]
        assert len(set(positions)) == 40
        assert positions == sorted(positions)
        assert positions[0] == 0
        assert positions[-1] >= 0.95 * 249

    def test_never_more_than_there_is_nor_less_than_one_batch(self, make_token_files: MakeFiles) -> None:
        files = make_token_files([50] * 4, split="val")  # 24 rows of 8
        everything = validation_batches(files, 8, 8, 10**9)
        assert sorted(row for batch in everything.rows for row in batch) == list(range(24))
        assert len(validation_batches(files, 8, 8, 1)) == 1

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_ranks_share_it(self, make_token_files: MakeFiles, world_size: int) -> None:
        files = make_token_files([50] * 10, split="val")
        whole = list(validation_batches(files, 4, 8, 200))
        parts = [list(validation_batches(files, 4, 8, 200, rank, world_size)) for rank in range(world_size)]
        for number, batch in enumerate(whole):
            joined = (
                torch.cat([part[number][0] for part in parts]),
                torch.cat([part[number][1] for part in parts]),
            )
            assert equal(joined, batch)


def test_to_device_on_the_cpu(make_token_files: MakeFiles) -> None:
    batch = make_token_files([30]).rows([0, 1], 8)
    assert equal(to_device(batch, "cpu"), batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_device_on_a_gpu(make_token_files: MakeFiles) -> None:
    batch = make_token_files([30]).rows([0, 1], 8)
    inputs, targets = to_device(batch, "cuda")
    assert inputs.is_cuda
    assert equal((inputs.cpu(), targets.cpu()), batch)


class TestReplayStream:
    def stream(self, make_token_files: MakeFiles) -> TokenStream:
        return TokenStream(make_token_files([400]), batch_size=8, seq_len=4, seed=0)

    def test_without_a_schedule_it_is_the_stream(self, make_token_files: MakeFiles) -> None:
        stream = self.stream(make_token_files)
        assert all(equal(ReplayStream(stream).batch(step), stream.batch(step)) for step in range(4))

    def test_it_replays_the_first_half_but_the_kept_out_rows_and_stops(self, make_token_files: MakeFiles) -> None:
        stream = self.stream(make_token_files)
        replaying = ReplayStream(stream)
        replaying.replay(6, 0.25, keep_out=3)
        replaying.replay(9, 0.0)
        old = {tuple(row.tolist()) for row in targets_of(stream, range(3, 24))}
        for step in range(12):
            plain, mixed = stream.batch(step)[1], replaying.batch(step)[1]
            changed = [tuple(row.tolist()) for row, was in zip(mixed, plain, strict=True) if not torch.equal(row, was)]
            assert len(changed) == (2 if 6 <= step < 9 else 0)
            assert set(changed) <= old

    def test_any_step_alone_and_any_ranks_give_the_same(self, make_token_files: MakeFiles) -> None:
        first, second = (ReplayStream(self.stream(make_token_files)) for _ in range(2))
        first.replay(2, 0.5)
        batches = [first.batch(step) for step in range(6)]
        second.schedule = list(first.schedule)
        assert equal(second.batch(5), batches[5])
        parts = [second.batch(4, rank, 4) for rank in range(4)]
        assert equal((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), batches[4])

    def test_nothing_seen_nothing_replayed(self, make_token_files: MakeFiles) -> None:
        stream = self.stream(make_token_files)
        replaying = ReplayStream(stream)
        replaying.replay(1, 0.5, keep_out=4)
        assert equal(replaying.batch(1), stream.batch(1))


class TestShiftStream:
    def streams(self, make_token_files: MakeFiles) -> tuple[TokenStream, TokenStream]:
        lengths = ([400], [3] * 100)  # no row of one is a row of the other
        texts = [TokenStream(make_token_files(n), batch_size=8, seq_len=4, seed=1) for n in lengths]
        return texts[0], texts[1]

    def test_abrupt(self, make_token_files: MakeFiles) -> None:
        before, after = self.streams(make_token_files)
        shift = ShiftStream(before, after, onset=3)
        assert all(equal(shift.batch(step), before.batch(step)) for step in range(3))
        assert all(equal(shift.batch(step), after.batch(step - 3)) for step in range(3, 8))
        assert equal(shift.first_rows(8), before.first_rows(8))

    def test_ramp_grows_evenly_and_uses_each_row_once(self, make_token_files: MakeFiles) -> None:
        before, after = self.streams(make_token_files)
        shift = ShiftStream(before, after, onset=2, ramp_steps=4)
        counts, used = [], []
        for step in range(9):
            mixed, plain = shift.batch(step)[1], before.batch(step)[1]
            new = [row for row, was in zip(mixed, plain, strict=True) if not torch.equal(row, was)]
            counts.append(len(new))
            used += new
        assert counts == [0, 0, 2, 4, 6, 8, 8, 8, 8]
        assert torch.equal(torch.stack(used), targets_of(after, range(len(used))))

    def test_ranks_make_up_the_batch(self, make_token_files: MakeFiles) -> None:
        before, after = self.streams(make_token_files)
        shift = ShiftStream(before, after, onset=0, ramp_steps=3)
        for step in range(4):
            parts = [shift.batch(step, rank, 4) for rank in range(4)]
            assert equal((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])), shift.batch(step))

    def test_unequal_shapes_are_refused(self, make_token_files: MakeFiles) -> None:
        before, _ = self.streams(make_token_files)
        with pytest.raises(ValueError, match="same batch size"):
            ShiftStream(before, TokenStream(before.files, batch_size=4, seq_len=4, seed=1), onset=0)
