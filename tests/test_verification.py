"""The numeric check on tied models: an update of the embedding counts, and not in the head. PEFT is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_models import map_for, write_adapter, write_small_folder
from stock_models import VARIANTS, make, random_kept, tokens

from loram.adapter import load_adapter
from loram.modeling import load_small
from loram.stages.recover import recover_adapter
from loram.verification import cut_model, identity_gap

TIED = [name for name, (_, changes) in VARIANTS.items() if changes.get("tie_word_embeddings")]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("name", TIED)
def test_an_update_of_one_side_of_tied_weights(
    name: str, target: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    kept = random_kept(name, 3)
    small = write_small_folder(stock(name), kept, tmp_path / "small")
    folder = write_adapter(small, tmp_path / "trained", [target, "down_proj"])
    adapter, pruning_map = load_adapter(folder), map_for(stock(name), kept)
    wide = recover_adapter(adapter, pruning_map, folder)
    assert identity_gap(str(stock(name)), pruning_map, (adapter, wide), tokens(9)) < 1e-5

    model = make(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ours = cut_model(model.config.to_dict(), pruning_map, state, adapter, None)
    usual = PeftModel.from_pretrained(load_small(small, dtype="fp32"), str(folder)).eval()
    with torch.no_grad():
        expected = usual(input_ids=tokens(9), use_cache=False).logits
        found = ours(input_ids=tokens(9), use_cache=False).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    pairs = {m: replace(p, scale=p.scale * (1 if "proj" in m else 3)) for m, p in wide.pairs.items()}
    wrong = replace(wide, pairs=pairs)
    assert identity_gap(str(stock(name)), pruning_map, (adapter, wrong), tokens(9)) > 1e-3
