"""Benchmarks through lm-eval (the extra `loram[eval]`), on the model that is already in memory."""

from __future__ import annotations

from typing import Any

from loram.errors import OptionError


def run_tasks(model: Any, tokenizer: Any, names: tuple[str, ...], batch: int, limit: int | None) -> dict[str, Any]:
    """{task: {metric: value}} for each lm-eval task; lm-eval's own names of metrics are kept."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError(f"--tasks needs lm-eval ({error}); install it with `pip install 'loram[eval]'`") from error
    manager = TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise OptionError(f"--tasks names {', '.join(unknown)}, which lm-eval does not know; see `lm_eval ls tasks`")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(names),
        limit=limit,
        task_manager=manager,
    )
    return {task: numbers(values) for task, values in found["results"].items()}


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task that are numbers (lm-eval also gives an alias and N/A)."""
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
