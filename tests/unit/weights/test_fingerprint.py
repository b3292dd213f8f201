"""What the checksum of a tensor notices, and what it does not."""

from __future__ import annotations

import torch

from sapo_ray.weights.fingerprint import checksum64


def words(count: int = 1000) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))


def test_every_bit_of_a_word_counts() -> None:
    before = words()
    for bit in range(64):
        after = before.clone()
        after[500] ^= -(2**63) if bit == 63 else 1 << bit
        assert checksum64(after) != checksum64(before), bit


def test_exchanged_words_are_noticed_within_a_block_and_across_blocks() -> None:
    before = words((1 << 18) + 10)
    for places in ([3, 7], [3, (1 << 18) + 3]):
        after = before.clone()
        after[places] = before[places[::-1]]
        assert checksum64(after) != checksum64(before)


def test_two_signs_that_both_change_at_the_top_of_a_word_are_what_it_cannot_see() -> None:
    assert checksum64(torch.tensor([1.0, 2.0, 1.0, -2.0])) == checksum64(torch.tensor([1.0, -2.0, 1.0, 2.0]))
    assert checksum64(torch.tensor([2.0, 1.0, -2.0, 1.0])) != checksum64(torch.tensor([-2.0, 1.0, 2.0, 1.0]))
