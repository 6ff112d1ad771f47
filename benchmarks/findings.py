"""What is to be read from the quality grid, in sentences whose figures come from its records."""

from __future__ import annotations

from benchmarks.grid import METHODS, RATES
from benchmarks.kept_gain import Records

GOAL = 0.9
HALF, DEEP = "0.5", "0.7"
FIRST, LESS = (4, 2), (1, 1)
CUT = (HALF, FIRST)
LOW, HIGH = RATES[:2]
NOT_RUN = "not run"
AIMED = ("refit", "distill", "taylor", "taylor-calibrated", "refit-calibrated", "block", "sequential", "taylor-block")
"""Ways to make a small model of half the size in 16 bit."""


class Figures:
    """Figures of the records as they stand in a sentence; 'not run' where one is missing."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def best(self, method: str, ratio: str = HALF, keep: tuple[int, int] | None = FIRST) -> str:
        """Kept gain at the best rate, over the seeds."""
        found = self.records.outcome(method, ratio, keep)
        return NOT_RUN if found is None else f"{found.mean:.0%}"

    def whole(self, method: str, ratio: str = HALF) -> str:
        """The same of a method that leaves no layers whole."""
        return self.best(method, ratio, None)

    def saved(self, method: str, ratio: str = HALF, keep: tuple[int, int] | None = FIRST) -> str:
        """How many times fewer bytes the weights take."""
        found = self.records.outcome(method, ratio, keep)
        return NOT_RUN if found is None else f"{found.bytes_reduction:.2f}"

    def at(self, method: str, lr: float) -> str:
        """Kept gain of the first seed at one rate."""
        kept = self.records.kept(self.records.cell(method, ratio=HALF, keep=FIRST, lr=lr))
        return NOT_RUN if kept is None else f"{kept[0]:.0%}"

    def loss(self, method: str, measured: str) -> str:
        """Held-out loss at the first rate, of the small or the large model."""
        found = self.records.loss(self.records.cell(method, ratio=HALF, keep=FIRST, measured=measured))
        return NOT_RUN if found is None else f"{found:.3f}"

    def harm(self, method: str) -> str:
        """Held-out loss at the second rate with the first and the last layer whole, where training does harm."""
        found = self.records.loss(self.records.cell(method, ratio=HALF, keep=LESS, lr=HIGH))
        return NOT_RUN if found is None else f"{found:.1f}"

    def minutes(self, method: str) -> str:
        """CPU minutes that the small model takes to make."""
        found = self.records.outcome(method, *CUT)
        return NOT_RUN if found is None else f"{found.seconds / 60:.1f}"


def findings(records: Records) -> str:
    """A list for docs/transfer.md."""
    figures = Figures(records)
    items = [*cutting(figures), *repairing(figures), *training(figures), goal(records)]
    return "\n".join(f"- {item}" for item in items)


def cutting(of: Figures) -> list[str]:
    """What is cut, and by which text and score."""
    return [
        f"**Bits before cuts.** 4 bit without a cut keeps {of.whole('nf4', '')}, with 0.3 cut besides "
        f"{of.best('taylor-nf4', '0.3')}: both take fewer bytes than a cut of 0.5 in 16 bit. Cut only what 4 bits "
        f"leave too large: 0.5 in 4 bit keeps {of.best('taylor-nf4')}.",
        f"**Calibrate on the text you train on.** The refit keeps {of.best('refit')} on half task text, "
        f"{of.best('refit-general')} on general text, and the same cut without a refit {of.at('structured', LOW)} (at "
        f"lr {LOW:g}, where the refit keeps {of.at('refit', LOW)}). A random cut keeps {of.best('random')}.",
        f"**Choose what is cut by gradients.** `prune --score taylor`, the default, keeps {of.best('taylor')}, Wanda "
        f"on the same text {of.best('refit')}; with only the first and the last layer left whole "
        f"{of.best('taylor', keep=LESS)} and {of.best('refit', keep=LESS)}, and a random cut "
        f"{of.best('random', keep=LESS)} (at lr {HIGH:g} what was learnt on it ruins the large model: loss "
        f"{of.harm('random')}). It takes {of.minutes('taylor')} CPU minutes in place of {of.minutes('refit')} (1.2 "
        f"where it computes in bf16, which the oldest of these runs did not). With scales chosen on the large model "
        f"(`recover --calibrate`, 32 rows) {of.best('taylor-calibrated')}.",
        f"**Masks carry over best, and need no masked update.** Half of the single weights, which save memory only "
        f"where sparse formats are used, keep {of.whole('unstructured')} with the update masked and "
        f"{of.whole('unstructured-plain')} with a plain one (`train --unmasked-update`), 2:4 {of.whole('semi')} and "
        f"{of.whole('semi-plain')}. A plain step takes half the time. Repaired layer by layer, 2:4 under the mask "
        f"keeps {of.whole('semi-block')}.",
    ]


def repairing(of: Figures) -> list[str]:
    """What `align` is worth."""
    return [
        f"**Repair layer by layer, most where the cut did most damage.** `align --method block` takes a random cut "
        f"from {of.at('random', HIGH)} to {of.at('random-block', HIGH)}, one by Wanda from {of.best('refit')} to "
        f"{of.best('block')}, one by Taylor from {of.best('taylor')} to {of.best('taylor-block')}, and that one in 4 "
        f"bit from {of.best('taylor-nf4')} to {of.best('taylor-block-nf4')}; at ratio 0.7 from "
        f"{of.best('taylor', DEEP)} to {of.best('taylor-block', DEEP)}. Pruning and repair take "
        f"{of.minutes('taylor-block')} CPU minutes. `align --method refit --refit-all` does as much after Wanda "
        f"({of.best('sequential')}; after Taylor {of.best('taylor-sequential')}). Four times the steps keep "
        f"{of.best('taylor-block-192')}; on general text alone they keep {of.best('taylor-block-general')}.",
        f"**Distillation bought nothing here, and next tokens did harm.** With 24,000 tokens of distillation "
        f"{of.at('distill', HIGH)} are kept at lr {HIGH:g} and {of.at('distill', LOW)} at {LOW:g}, and "
        f"{of.best('distill-task')} on task text alone. It makes the small model with its adapter better (loss "
        f"{of.loss('refit', 'small')} to {of.loss('distill', 'small')} at lr {LOW:g}) and the large model with the "
        f"recovered one worse ({of.loss('refit', 'large')} to {of.loss('distill', 'large')}). `align --method lm "
        f"--scope lora` on the same text leaves {of.best('lm-lora')}: the small model has then learnt the task, and "
        "LoRA on it learns little that the large model lacks. Weights that move away from the large model's take the "
        "adapter with them. Far more tokens were not tried.",
    ]


def training(of: Figures) -> list[str]:
    """How the adapter is trained and carried over."""
    plain, lower = of.at("refit", HIGH), of.at("refit", LOW)
    return [
        f"**Train the small model at a higher rate than the large one.** From lr {LOW:g} to {HIGH:g} the large model "
        f"gains nothing; the adapter from the small one goes from {lower} to {plain}.",
        f"**A few steps on the large model itself** (`run --touch-up 8`, one layer in memory) take the adapter of a "
        f"Taylor cut from {of.best('taylor')} to {of.best('taylor-touched')}, at ratio 0.7 from "
        f"{of.best('taylor', DEEP)} to {of.best('taylor-touched', DEEP)}, and after repair layer by layer to "
        f"{of.best('taylor-block-touched', DEEP)}. The control: these 8 steps alone, at the best of two rates, keep "
        f"{of.whole('touch-alone', '')} of what 32 gain here, and after a random cut {of.best('random-touched')}. So "
        "they add to a good adapter, and stand in for a bad one. Their rate, a quarter of the small model's, was the "
        "best of four tries.",
        f"**Stopping by the large model's loss** (`--recover-eval 8 --patience 9 --stop-on large`, on rows of its own) "
        f"keeps {of.best('taylor-stopped')} after Taylor, where nothing had to be stopped. Where training on a random "
        f"cut ruins the large model (loss {of.harm('random')}, first and last layer whole) it ends at "
        f"{of.harm('random-stopped')}, which is still harm.",
        f"**Smaller levers.** After Wanda, scales chosen on the large model keep {of.at('refit-calibrated', HIGH)} "
        f"where plain recovery keeps {plain}, one seed each. LoRA in the whole layers alone keeps "
        f"{of.at('whole-layers', LOW)} (at lr {LOW:g}); 256 calibration windows in place of 64 keep "
        f"{of.at('refit-256', LOW)} in place of {lower}.",
    ]


def goal(records: Records) -> str:
    """How far the aim is: the best of what cuts half in 16 bit."""
    outcomes = {name: found for name in AIMED if (found := records.outcome(name, *CUT)) is not None}
    if not outcomes:
        return f"**The aim** is {GOAL:.0%} at ratio 0.5: not run."
    name = max(outcomes, key=lambda each: outcomes[each].mean)
    best, count = outcomes[name].mean, len(outcomes[name].seeds)
    verdict = "met" if best >= GOAL else f"missed by {100 * (GOAL - best):.1f} points"
    seeds = "one seed" if count == 1 else f"the mean of {count} seeds"
    return f"**The aim** of {GOAL:.0%} at ratio 0.5 in 16 bit is {verdict}: {METHODS[name].label}, {seeds}."


def elsewhere(gemma: Records, qwen: Records, arc_easy: Records) -> str:
    """What other families and another task add, a small model of which most are embeddings among them."""
    of, second, other = Figures(gemma), Figures(qwen), Figures(arc_easy)
    repaired = of.best("taylor-block")
    mended = "" if repaired == NOT_RUN else f" ({repaired} where it is repaired layer by layer as well)"
    return (
        f"**Other families give the same order, and other figures.** Qwen2.5-Coder 0.5B, with 14 query heads on two kv "
        f"heads, keeps {second.whole('nf4', '')} in 4 bit with nothing cut, {second.best('taylor')} after a cut by "
        f"Taylor and {second.best('random')} after a random one: the aim that SmolLM2 meets is missed there. Gemma 3 "
        f"270M keeps {of.whole('nf4', '')} in 4 bit with nothing cut, "
        f"{of.best('taylor')} after a cut by Taylor{mended} and {of.best('random')} after a random one. Five eighths "
        "of its parameters are embeddings, and its single kv head leaves attention whole: the cut takes "
        f"{of.saved('taylor')} times fewer bytes, 4 bit {of.saved('nf4', '', None)} times. Such a model is not one to "
        f"cut. On ARC-Easy, whose answers are some 7 tokens, 4 bit keeps {other.whole('nf4', '')}, the cut by Taylor "
        f"{other.best('taylor')}, a random one {other.best('random')}."
    )
