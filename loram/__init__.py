"""loram: train LoRA on a small, pruned copy of a large language model, and carry the adapter back to it.

The functions here are the stages of the command line, with the same options as keyword arguments:

    import loram

    small = loram.prune("meta-llama/Llama-2-13b-hf", out="small", ratio=0.65, calibration="my.jsonl")
    trained = loram.train(small.path, data="my.jsonl", out="adapter-small")
    adapter = loram.recover(trained.path, out="adapter")

Each returns a small dataclass that prints well. Importing loram is cheap: torch is imported by the first call.
"""

from __future__ import annotations

import logging
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from loram.version import __version__

# peft imports bitsandbytes wherever it is installed, and on CPUs with AVX512-BF16 that asks for a package whose kernel
# only runs on the packed weights that loram never lets it make (quantization/loading.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

if TYPE_CHECKING:
    import inspect

    from loram.modeling import load_small, register
    from loram.progress import Progress
    from loram.results import StageResult

    class StageFunction(Protocol):
        """A stage as a Python function: positional inputs in their order, options by keyword."""

        __signature__: inspect.Signature

        def __call__(self, *inputs: str | PathLike[str], progress: Progress = ..., **options: Any) -> StageResult: ...

    plan: StageFunction
    prune: StageFunction
    align: StageFunction
    quantize: StageFunction
    train: StageFunction
    recover: StageFunction
    project: StageFunction
    verify: StageFunction
    merge: StageFunction
    push: StageFunction
    evaluate: StageFunction
    preview: StageFunction
    run: StageFunction
    demo: StageFunction
    init: StageFunction

__all__ = [
    "__version__",
    "align",
    "demo",
    "evaluate",
    "init",
    "load_small",
    "merge",
    "plan",
    "preview",
    "project",
    "prune",
    "push",
    "quantize",
    "recover",
    "register",
    "run",
    "train",
    "verify",
]


# A function must not be named as a built-in one (eval), nor as a package (loram.data).
STAGE_NAMES = {"evaluate": "eval", "preview": "data"}


def __getattr__(name: str) -> Any:
    """Make a public name when it is first used, so that `import loram` stays cheap."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'loram' has no attribute {name!r}")
    if name in ("load_small", "register"):
        from loram import modeling

        value = getattr(modeling, name)
    else:
        from loram.stages import python_function

        value = python_function(name, STAGE_NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether they have been used already or not."""
    return sorted({*globals(), *__all__})
