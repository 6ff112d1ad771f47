"""What is to be read from the quality grid, in sentences whose figures come from its records."""

from __future__ import annotations

from benchmarks.grid import METHODS, RATES
from benchmarks.kept_gain import Records

GOAL = 0.9
CUT = ("0.5", (4, 2))
LESS = (1, 1)


def findings(records: Records) -> str:
    """A list for docs/transfer.md; 'not run' stands where a figure is missing."""

    def best(method: str, ratio: str = CUT[0], keep: tuple[int, int] | None = CUT[1]) -> str:
        found = records.outcome(method, ratio, keep)
        return "not run" if found is None else f"{found.mean:.0%}"

    def at(method: str, lr: float) -> str:
        kept = records.kept(records.cell(method, ratio=CUT[0], keep=CUT[1], lr=lr))
        return "not run" if kept is None else f"{kept[0]:.0%}"

    def loss(method: str, measured: str) -> str:
        found = records.loss(records.cell(method, ratio=CUT[0], keep=CUT[1], measured=measured))
        return "not run" if found is None else f"{found:.3f}"

    def minutes(method: str) -> str:
        found = records.outcome(method, *CUT)
        return "not run" if found is None else f"{found.seconds / 60:.1f}"

    low, high = RATES[:2]
    harmed = records.loss(records.cell("random", ratio=CUT[0], keep=LESS, lr=high))
    ruin = "not run" if harmed is None else f"{harmed:.1f}"
    plain, lower = at("refit", high), at("refit", low)
    items = [
        f"**Bits before cuts.** 4 bit without a cut keeps {best('nf4', '', None)}, with 0.3 cut besides "
        f"{best('taylor-nf4', '0.3')}: both take fewer bytes than a cut of 0.5 in 16 bit. Cut only what 4 bits leave "
        f"too large: 0.5 in 4 bit keeps {best('taylor-nf4')}.",
        f"**Calibrate on the text you train on.** The refit keeps {best('refit')} on half task text, "
        f"{best('refit-general')} on general text, and the same cut without a refit {at('structured', low)} (at lr "
        f"{low:g}, where the refit keeps {lower}). A random cut keeps {best('random')}.",
        f"**Choose what is cut by gradients.** `prune --score taylor`, the default, keeps {best('taylor')}, Wanda on "
        f"the same text {best('refit')}; with only the first and the last layer left whole {best('taylor', keep=LESS)} "
        f"and {best('refit', keep=LESS)}, and a random cut {best('random', keep=LESS)} (at lr {high:g} what was learnt "
        f"on it ruins the large model: loss {ruin}). It takes {minutes('taylor')} CPU minutes in place of "
        f"{minutes('refit')} (1.2 where it computes in bf16, which these runs did not). With "
        f"scales chosen on the large model (`recover --calibrate`, 32 rows) {best('taylor-calibrated')}.",
        f"**Train the small model at a higher rate than the large one.** From lr {low:g} to {high:g} the large model "
        f"gains nothing; the adapter from the small one goes from {lower} to {plain}.",
        f"**Distillation bought nothing here.** With 24,000 tokens of it, {at('distill', high)} are kept at lr "
        f"{high:g} and {at('distill', low)} at {low:g}. It makes the small model with its adapter better (loss "
        f"{loss('refit', 'small')} to {loss('distill', 'small')} at lr {low:g}) and the large model with the recovered "
        f"one worse ({loss('refit', 'large')} to {loss('distill', 'large')}). A likely reason: weights that move away "
        "from the large model's take the adapter with them. Far more tokens were not tried.",
        f"**Masks carry over best, and need no masked update.** Half of the single weights, which save memory only "
        f"where sparse formats are used, keep {best('unstructured', '0.5', None)} with the update masked and "
        f"{best('unstructured-plain', '0.5', None)} with a plain one (`train --unmasked-update`), 2:4 "
        f"{best('semi', '0.5', None)} and {best('semi-plain', '0.5', None)}. A plain step takes half the time.",
        f"**Smaller levers.** After Wanda, scales chosen on the large model keep {at('refit-calibrated', high)} where "
        f"plain recovery keeps {plain}, one seed each. LoRA in the whole layers alone keeps "
        f"{at('whole-layers', low)} (at lr {low:g}); 256 calibration windows in place of 64 keep "
        f"{at('refit-256', low)} in place of {lower}.",
        goal(records),
    ]
    return "\n".join(f"- {item}" for item in items)


def goal(records: Records) -> str:
    """How far the aim is: the best of what cuts half in 16 bit."""
    names = ("refit", "distill", "taylor", "taylor-calibrated", "refit-calibrated")
    outcomes = {name: found for name in names if (found := records.outcome(name, *CUT)) is not None}
    if not outcomes:
        return f"**The aim** is {GOAL:.0%} at ratio 0.5: not run."
    name = max(outcomes, key=lambda each: outcomes[each].mean)
    best, count = outcomes[name].mean, len(outcomes[name].seeds)
    verdict = "met" if best >= GOAL else f"missed by {100 * (GOAL - best):.1f} points"
    seeds = "one seed" if count == 1 else f"the mean of {count} seeds"
    return f"**The aim** of {GOAL:.0%} at ratio 0.5 in 16 bit is {verdict}: {METHODS[name].label}, {seeds}."
