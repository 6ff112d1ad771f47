"""project: what is refused, and what a dense adapter of the large model becomes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, cut_by_hand, leaves, random_kept

from loram.adapter import load_adapter
from loram.artifact import read_manifest
from loram.errors import InputError, KindError, MismatchError
from loram.options import ProjectOptions, RecoverOptions
from loram.pruning_map import read_map
from loram.stages.project import project
from loram.stages.recover import recover


@pytest.mark.parametrize("name", GROUPED)
def test_a_dense_large_adapter_is_cut_as_its_product_is(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    kept = random_kept(name, 6)
    small = write_small_folder(stock(name), kept, tmp_path / "small")
    large = write_adapter(stock(name), tmp_path / "large", list(leaves(name)), 3)
    result = project(ProjectOptions(adapter=str(large), small=str(small), out=str(tmp_path / "projected")))
    assert (result.modules, result.rank) == (3 * len(leaves(name)), 4)
    before, after = load_adapter(large), load_adapter(tmp_path / "projected")
    deltas = {f"{module}.weight": pair.b @ pair.a for module, pair in before.pairs.items()}
    for tensor, expected in cut_by_hand(name, deltas, kept).items():
        pair = after.pairs[tensor.removesuffix(".weight")]
        assert torch.allclose(pair.b @ pair.a, expected, atol=1e-6), tensor
    manifest = read_manifest(tmp_path / "projected")
    assert manifest is not None
    assert manifest.kind == "small-adapter"
    assert read_map(tmp_path / "projected").sha256 == read_map(small).sha256 == manifest.pruning_map_sha256


def test_what_does_not_belong_together_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    name = "llama-gqa"
    small = write_small_folder(stock(name), random_kept(name, 6), tmp_path / "small")
    on_small = write_adapter(small, tmp_path / "trained", list(leaves(name)))
    other = write_small_folder(stock("llama-mqa"), random_kept("llama-mqa", 6), tmp_path / "other")
    recover(RecoverOptions(adapter=str(on_small), small=str(small), out=str(tmp_path / "recovered")))
    project(ProjectOptions(adapter=str(tmp_path / "recovered"), small=str(small), out=str(tmp_path / "small-adapter")))

    def refused(error: type[Exception], message: str, adapter: Path, onto: Path) -> None:
        with pytest.raises(error, match=message):
            project(ProjectOptions(adapter=str(adapter), small=str(onto), out=str(tmp_path / "x")))
        assert not list(tmp_path.glob("x*"))

    refused(MismatchError, "updates a weight of shape", on_small, small)
    refused(MismatchError, "other weights; prune the adapter's own base", tmp_path / "recovered", other)
    refused(KindError, "is a small-adapter; `loram project` works on", tmp_path / "small-adapter", small)
    refused(KindError, "works on a small-model", tmp_path / "recovered", stock(name))
    refused(InputError, "does not exist", tmp_path / "gone", small)
