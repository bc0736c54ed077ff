"""Random numbers are a pure, well-spread function of their keys."""

from __future__ import annotations

import numpy as np

from polybatch.sampling.random import mix, mix_array, stream, uniforms


def test_mix_matches_the_published_splitmix64_sequence() -> None:
    # First outputs of SplitMix64 seeded with 1234567, from the reference implementation.
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(5)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423,
                4593380528125082431, 16408922859458223821]  # fmt: skip
    assert [mix(s) for s in states] == expected
    assert mix_array(np.array(states, dtype=np.uint64)).tolist() == expected


def test_uniforms_lie_in_the_unit_interval_and_are_flat() -> None:
    numbers = uniforms([stream(1, 0)] * 100_000, list(range(100_000)))
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    chi2 = float(((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum())
    assert chi2 < 110  # 63 degrees of freedom: beyond this once in 5,000 seeds


def test_seed_index_and_position_each_change_the_number() -> None:
    numbers = {
        float(uniforms([stream(seed, index)], [position])[0])
        for seed in (-1, 0, 1, 2**64 - 2)
        for index in range(3)
        for position in range(3)
    }
    assert len(numbers) == 36


def test_neighbouring_streams_are_uncorrelated() -> None:
    positions = list(range(20_000))
    a = uniforms([stream(7, 0)] * 20_000, positions)
    for other in (stream(7, 1), stream(8, 0)):
        assert abs(np.corrcoef(a, uniforms([other] * 20_000, positions))[0, 1]) < 0.03
