"""Exact counts of the lowest, ties and all, against a stable sort; and the streamed one against the whole."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loram.errors import OptionError
from loram.families.sparsity import Sparsity, parse_sparsity
from loram.pruning.lowest import lowest_elements, lowest_of_groups, lowest_per_row, mark_lowest, nth_lowest
from loram.pruning.magnitude import MAGNITUDE
from loram.pruning.threshold import smallest
from loram.pruning.wanda import WANDA


def by_sorting(scores: Tensor, count: int) -> Tensor:
    """The first `count` of a stable sort, row by row: among equals the first."""
    order = torch.argsort(scores, dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.data())
def test_lowest_per_row_is_a_stable_sort(seed: int, rows: int, columns: int, values: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, columns))
    scores = torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    assert torch.equal(lowest_per_row(scores, count), by_sorting(scores, count))


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 16), (2, 5)])
def test_groups_are_sorted_one_by_one(keep: int, group: int) -> None:
    scores = torch.randint(0, 5, (group * 6, 7), generator=torch.Generator().manual_seed(keep)).float()
    found = lowest_of_groups(scores, group - keep, group)
    pieces = scores.T.reshape(-1, group)
    assert torch.equal(found.T.reshape(-1, group), by_sorting(pieces, group - keep))


@pytest.mark.parametrize("members", range(1, 9))
def test_the_nth_lowest_is_that_of_a_sort(members: int) -> None:
    scores = torch.randint(0, 6, (members, 500), generator=torch.Generator().manual_seed(members)).float()
    for count in range(1, members + 1):
        assert torch.equal(nth_lowest(scores.unbind(), count), scores.sort(0).values[count - 1])


@pytest.mark.parametrize(("count", "group"), [(2, 4), (4, 8), (2, 5), (7, 12)])
@pytest.mark.parametrize("values", [3, 1 << 20])  # ties nearly everywhere, and none
def test_marks_are_numbers_with_exact_counts(count: int, group: int, values: int) -> None:
    scores = torch.randint(0, values, (group, 40), generator=torch.Generator().manual_seed(group)).float()
    marks = torch.full_like(scores, float("nan"))
    mark_lowest(scores, count, marks)
    assert torch.equal(marks, by_sorting(scores.T, count).T.float())


@pytest.mark.parametrize("ratio", ["0.5", "0.55", "1/3", "0.99", "0.01"])
def test_wanda_takes_the_same_number_from_every_row(ratio: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(11, 37, generator=generator), torch.rand(37, generator=generator)
    sparsity = Sparsity(Fraction(ratio))
    gone = lowest_elements(WANDA.element(weight, norms), sparsity)
    assert gone.sum(1).tolist() == [int(37 * Fraction(ratio))] * 11
    # A row's own scale means nothing, and neither does one scale for all inputs.
    scaled = weight * torch.tensor([2.0**n for n in range(11)])[:, None]
    assert torch.equal(gone, lowest_elements(WANDA.element(scaled, norms * 4), sparsity))
    # With equal inputs it is magnitude, row by row.
    plain = lowest_elements(WANDA.element(weight, torch.ones(37)), sparsity)
    assert torch.equal(plain, lowest_elements(MAGNITUDE.element(weight, norms), sparsity))


def test_a_louder_input_only_brings_its_own_column_back() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, norms = torch.randn(20, 16, generator=generator), torch.rand(16, generator=generator) + 0.5
    sparsity = Sparsity(Fraction(1, 2))
    before = lowest_elements(WANDA.element(weight, norms), sparsity)
    norms[5] *= 3
    after = lowest_elements(WANDA.element(weight, norms), sparsity)
    back, gone = before & ~after, after & ~before
    assert int(back[:, 5].sum()) > 0
    assert not back[:, [c for c in range(16) if c != 5]].any()
    assert not gone[:, 5].any()


def test_ties_do_not_change_a_count() -> None:
    """De-quantized weights have a handful of values; a threshold would take all or none of one."""
    weight = torch.randint(-2, 3, (6, 64), generator=torch.Generator().manual_seed(1)).float() / 4
    assert lowest_elements(weight.abs(), Sparsity(Fraction(1, 2))).sum(1).tolist() == [32] * 6
    assert lowest_elements(torch.ones(6, 64), parse_sparsity("2:4")).reshape(-1, 4).sum(1).unique().tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 100, 331, 700])
def test_the_smallest_of_a_weight_from_tiles(dtype: torch.dtype, count: int) -> None:
    weight = torch.randn(100, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[3] = weight[50].neg()
    weight[60:64] = 0
    calls: list[int] = []

    def tiles() -> Iterator[Tensor]:
        calls.append(1)
        yield from weight.split(13)

    found = torch.cat(list(smallest(tiles, count)))
    assert torch.equal(found.reshape(1, -1), by_sorting(weight.abs().reshape(1, -1), count))
    assert len(calls) == (1 + weight.element_size() // 2 if count else 1)


@pytest.mark.parametrize("text", ["2:4", " 1 : 4", "4:8"])
def test_patterns(text: str) -> None:
    sparsity = parse_sparsity(text)
    keep, group = (int(part) for part in text.split(":"))
    assert (sparsity.keep, sparsity.group, sparsity.removed(group * 3)) == (keep, group, 3 * (group - keep))
    sparsity.check_width("x", group * 5)
    with pytest.raises(
        OptionError, match=rf"--pattern {keep}:{group} does not divide a.b, which has {group + 1} input"
    ):
        sparsity.check_width("a.b", group + 1)


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "0:4", "4:4", "5:4", "-1:4", "2:4:8", "a:b", "2.0:4", "²:4"])
def test_impossible_patterns(text: str) -> None:
    with pytest.raises(OptionError, match="--pattern"):
        parse_sparsity(text)
