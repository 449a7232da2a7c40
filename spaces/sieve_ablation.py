"""Is LoRA on the hot quarter of the experts as good as on all of them, and does it matter which ones (MoE-Sieve)?

    python -m search.run space=sieve_ablation                          embedded model and task, offline
    python -m search.run space=sieve_ablation dry_run=true             the rows and their parameters
    python -m search.run space=sieve_ablation model=allenai/OLMoE-1B-7B-0924 task=hellaswag space.recipe=paper \\
        recipe.rank=32 recipe.lora_alpha=64 recipe.lora_dropout=0.05 recipe.learning_rate=4e-4 recipe.epochs=3 \\
        recipe.batch_size=64

A table: every row is trained, none is searched, with 8 seeds as in the paper (`seeds=`), seed by seed. The last command
has the paper's recipe. `space.fraction=0.25` keeps the rows at that fraction, `recipe.NAME=` holds for all of them.

Knobs
    recipe      tuned (rank 4, lora_alpha 64, scaled rate 0.1) | paper (lora_alpha = 2·rank: 8, 16, 0.05)
    allocator   all | none (0 %: attention and router only) | sieve | random | greedy | coverage
    fraction    0.125 | 0.25 | 0.5 of each layer's experts (sieve, random) or of all experts (greedy)
    score       count (hot) | mass (sieve): by tokens routed to an expert, or by the sum of its gate weights
    share       0.25 | 0.5 | 0.75 (coverage): share of a layer's tokens that the kept experts take. Its cost follows
                from the data: published models need about a quarter of their experts for half of the tokens

Every seed of `random` draws its own experts, so that the row stands for random choice and not for one draw.

Comparisons: hot 25 % against all, as an equivalence test with the paper's margin of two points; hot 25 % against random
and greedy at the same number of experts (the paper's ablations), and against mass and coverage (ours).

Measured with the first command and seeds=5 (170 trainings), test accuracy, tuned / paper: none .354 / .273, random 25 %
.492 / .359, greedy 25 % .696 / .479, hot 25 % .707 / .507, mass 25 % .736 / .541, all .880 / .692. The hot quarter is
better than a random one (+.215, 95 % interval +.152 to +.278, and +.148, −.006 to +.302), it does not replace all
experts on this small model (−.173, −.299 to −.048, and −.186, −.265 to −.106), and greedy and mass cannot be told apart
from it. The tuned recipe is worth +.200 (+.009 to +.391) at the hot quarter, with half of the parameters.
"""

from __future__ import annotations

from typing import Any

from allocators.core.tables import Comparison, Published
from allocators.core.types import ModelShape, Point

from ._knobs import table_of_experts
from ._tables import recipe_of_row, tuned_against_paper, with_each_recipe

BASE = "moe"
TABLE = True
SEEDS = 8
ALLOCATORS = ("all", "none", "sieve", "random", "greedy", "coverage")
FRACTIONS = (0.125, 0.25, 0.5)

PAPER = "MoE-Sieve, arXiv:2603.24044"
ALL = {"allocator": "all"}
HOT = {"allocator": "sieve", "fraction": 0.25, "score": "count"}
RANDOM = {"allocator": "random", "fraction": 0.25}
GREEDY = {"allocator": "greedy", "fraction": 0.25}
PAPERS = {"recipe": "paper"}
OLMOE, QWEN = "OLMoE-1B-7B-0924", "Qwen1.5-MoE-A2.7B"

PUBLISHED = (
    Published(OLMOE, "spider", ALL | PAPERS, 0.396, PAPER),
    Published(OLMOE, "spider", HOT | PAPERS, 0.399, PAPER),
    Published(OLMOE, "gsm8k", ALL | PAPERS, 0.304, PAPER),
    Published(OLMOE, "gsm8k", HOT | PAPERS, 0.304, PAPER),
    Published(OLMOE, "gsm8k", RANDOM | PAPERS, 0.279, PAPER),
    Published(OLMOE, "hellaswag", ALL | PAPERS, 0.805, PAPER),
    Published(OLMOE, "hellaswag", HOT | PAPERS, 0.807, PAPER),
    Published(QWEN, "spider", ALL | PAPERS, 0.520, PAPER),
    Published(QWEN, "spider", HOT | PAPERS, 0.511, PAPER),
    Published(QWEN, "gsm8k", ALL | PAPERS, 0.590, PAPER),
    Published(QWEN, "gsm8k", HOT | PAPERS, 0.592, PAPER),
    Published(QWEN, "hellaswag", ALL | PAPERS, 0.885, PAPER),
    Published(QWEN, "hellaswag", HOT | PAPERS, 0.893, PAPER),
)

COMPARISONS = with_each_recipe(
    (
        Comparison("hot 25 % − all", HOT, ALL, "equal to within 2 points", PAPER, margin=0.02),
        Comparison("hot 25 % − random 25 %", HOT, RANDOM, "hot is about 2.5 points better", PAPER),
        Comparison("hot 25 % − greedy 25 %", HOT, GREEDY, "greedy is no better", PAPER),
        Comparison("hot 25 % − mass 25 %", HOT, HOT | {"score": "mass"}, "not in the paper", "here"),
        Comparison(
            "hot 25 % − coverage of half", HOT, {"allocator": "coverage", "share": 0.5}, "not in the paper", "here"
        ),
    )
) + tuned_against_paper({"hot 25 %": HOT, "all": ALL})


def suggest(trial: Any, shape: ModelShape) -> Point:
    """One row."""
    recipe = recipe_of_row(trial)
    allocator = trial.suggest_categorical("allocator", list(ALLOCATORS))
    return Point(allocator, table_of_experts(trial, allocator, FRACTIONS), recipe)
