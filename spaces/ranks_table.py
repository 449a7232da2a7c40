"""At equal parameters, which rule places LoRA rank best, and is any of them better than chance?

    python -m search.run space=ranks_table model=tiny-dense                            embedded model, offline
    python -m search.run space=ranks_table model=tiny-moe                              the same on an MoE model
    python -m search.run space=ranks_table model=tiny-dense dry_run=true               the rows and their parameters
    python -m search.run space=ranks_table model=HuggingFaceTB/SmolLM2-135M task=arc_easy

A table: every row is trained, none is searched, with 5 seeds (`seeds=`), seed by seed, and one recipe: rank 4,
lora_alpha 64, scaled rate 0.1. Every row has the parameters of rank 4 on every matrix, but for a rest below the price
of one rank; domlora, and kappatune as it is published, are smaller by construction. `space=ranks` searches knobs and
recipe as well.

Knobs
    allocator   uniform_ranks | random_ranks | stratified_ranks (the controls) | sensitivity_ranks | hill_ranks | hilo |
                kappatune | spectrum | dmole | aletheia | domlora | eva | plop
    share       1 | 0.5 | 0.2 (random_ranks, stratified_ranks): 1 has ranks of all sizes on all matrices, the others one
                rank on that share of the matrices, as the rules have that choose matrices
    beta        0.5 | 1 (sensitivity_ranks; 1 is the paper's)
    pattern     2468 | 8642 (hilo)
    equal       parameters | rank (kappatune): rank 4 on the chosen matrices, as published, which is a fifth of the
                parameters
    number      1 | 8 (domlora): matrices with rank 4 each
    order       lowest | highest (plop): the three types of matrices that answer least to the task's tokens, or, as the
                paper's control, those that answer most

Other settings are the papers': β = 2.5 for hill_ranks, half of the matrices for spectrum and dmole, half of the layers
for aletheia, a fifth of the matrices for kappatune, ρ = 2 for eva, three types of matrices for plop. Every seed of a
random row draws its own ranks, so that the row stands for chance and not for one draw.

Comparisons: every rule with uniform_ranks, and with random_ranks and stratified_ranks at its own share.

Measured with five seeds (test accuracy): uniform .674 on tiny-dense and .875 on
tiny-moe; no rule is above it by more than noise. hilo 2468 .687 and .839, eva .674 and .723, aletheia .667 and .386,
hilo 8642 .634 and .633, spectrum .579 and .406, kappatune .543 and .540, plop .607 and .513, dmole .508 and .818,
sensitivity β 1 .506 and .806, hill uniform and .869, random .697 and .675, stratified .634 and .712. Intervals, and
what the rules make a model forget, stand in docs/comparisons.md, and the same table of SmolLM2-135M with five seeds,
where no rule is above uniform by more than noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocators.core.tables import Comparison
from allocators.core.types import TRANSFERABLE, ModelShape, Point

BASE = "any"
TABLE = True
SEEDS = 5
ALLOCATORS = (
    *("uniform_ranks", "random_ranks", "stratified_ranks", "sensitivity_ranks", "hill_ranks", "hilo"),
    *("kappatune", "spectrum", "dmole", "aletheia", "domlora", "eva", "plop"),
)

UNIFORM = {"allocator": "uniform_ranks"}
# name, row, the share of the matrices that it adapts, what is claimed, source
_RULES: tuple[tuple[str, Mapping[str, Any], float, str, str], ...] = (
    ("sensitivity β=1", {"allocator": "sensitivity_ranks", "beta": 1.0}, 1.0, "equal", "FIM-LoRA, arXiv:2605.16800"),
    ("sensitivity β=0.5", {"allocator": "sensitivity_ranks", "beta": 0.5}, 1.0, "not published", "here"),
    ("hill", {"allocator": "hill_ranks"}, 1.0, "better", "AlphaLoRA's metric, arXiv:2410.10054"),
    ("HILO-2468", {"pattern": "2468"}, 1.0, "upper layers need more", "HILO, arXiv:2502.03884"),
    ("HILO-8642", {"pattern": "8642"}, 1.0, "lower layers need less", "HILO, arXiv:2502.03884"),
    ("Spectrum", {"allocator": "spectrum"}, 0.5, "better", "Spectrum, arXiv:2406.06623"),
    ("D-MoLE", {"allocator": "dmole"}, 0.5, "better", "D-MoLE, arXiv:2506.11672"),
    ("Aletheia", {"allocator": "aletheia"}, 0.5, "as good, and faster", "Aletheia, arXiv:2604.15351"),
    (
        "KappaTune",
        {"allocator": "kappatune", "equal": "parameters"},
        0.2,
        "forgets less",
        "KappaTune, arXiv:2506.16289",
    ),
    (
        "KappaTune at rank 4",
        {"equal": "rank"},
        0.2,
        "forgets less, with fewer parameters",
        "KappaTune, arXiv:2506.16289",
    ),
    ("DomLoRA, 1 matrix", {"number": 1}, 1.0, "better, with fewer parameters", "DomLoRA, arXiv:2605.06183"),
    ("DomLoRA, 8 matrices", {"number": 8}, 1.0, "better, with fewer parameters", "DomLoRA, arXiv:2605.06183"),
    ("EVA", {"allocator": "eva"}, 1.0, "better", "EVA, arXiv:2410.07170"),
    ("PLoP", {"order": "lowest"}, 0.5, "better", "PLoP, arXiv:2506.20629"),
    ("PLoP's inverse", {"order": "highest"}, 0.5, "worse", "PLoP, arXiv:2506.20629"),
)


def _control(allocator: str, share: float) -> dict[str, Any]:
    return {"allocator": allocator, "share": share}


COMPARISONS = (
    Comparison("random − uniform", _control("random_ranks", 1.0), UNIFORM, "no difference is expected", "control"),
    Comparison("stratified − uniform", _control("stratified_ranks", 1.0), UNIFORM, "better than guided", "control"),
    *(
        Comparison(f"{name} − {against.partition('_')[0]}", row, second, claim, source)
        for name, row, share, claim, source in _RULES
        for against, second in (
            ("uniform_ranks", UNIFORM),
            ("random_ranks", _control("random_ranks", share)),
            ("stratified_ranks", _control("stratified_ranks", share)),
        )
    ),
)


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row: a rule, and those of its knobs that the table varies."""
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    knobs: dict[str, Any] = {}
    match allocator:
        case "random_ranks" | "stratified_ranks":
            share = trial.suggest_categorical("share", [1.0, 0.5, 0.2])
            knobs = {"draw": "each"} | ({"share": share} if share < 1 else {})
        case "sensitivity_ranks":
            knobs = {"beta": trial.suggest_categorical("beta", [0.5, 1.0])}
        case "hill_ranks":
            knobs = {"beta": 2.5}
        case "hilo":
            knobs = {"pattern": trial.suggest_categorical("pattern", ["2468", "8642"])}
        case "spectrum" | "dmole" | "aletheia":
            knobs = {"share": 0.5}
        case "kappatune":
            equal = trial.suggest_categorical("equal", ["parameters", "rank"])
            knobs = {"share": 0.2} | ({"equal": equal} if equal == "rank" else {})
        case "eva":
            knobs = {"rho": 2.0}
        case "plop":
            knobs = {"types": 3, "order": trial.suggest_categorical("order", ["lowest", "highest"])}
        case "domlora":
            knobs = {"number": trial.suggest_categorical("number", [1, 8])}
    return Point(allocator, knobs, dict(TRANSFERABLE))
