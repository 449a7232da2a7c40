"""The results tables of README and docs, written from docs/results/: one JSON a study, with what it follows from.

    python -m search.report studies/ranks_table-tiny-moe-default results=docs/results/ranks_table-tiny-moe.json
    python -m tests.tables                # writes each table between `<!-- table: NAME -->` and `<!-- end of table -->`

The first command writes a study's file (`search/report/summary/`), the second all tables. `tests/test_tables.py` says
that documents and files agree, so that a number of a table is changed by a study and by nothing else.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from allocators.core import words
from search.report.uncertainty import Paired, holm, paired
from search.text import human
from tests import ROOT

FOLDER = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
LEVEL = 0.05
RECIPES = ("tuned", "paper")


@dataclass(frozen=True)
class Settings:
    """The keys of the command line."""

    check: bool = words.key(False, "write nothing: only name the pages whose tables differ")


# --- a study's file


@dataclass(frozen=True)
class Row:
    """A point of a study; accuracy is that on the test split."""

    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """As comparisons name it."""
        return str(self.data["id"])

    @property
    def accuracies(self) -> dict[int, float]:
        """By seed."""
        return {int(seed): accuracy for seed, accuracy in (self.data["test"] or self.data["accuracy"]).items()}

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracies.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 for one."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else 0.0

    @property
    def size(self) -> int:
        """Trainable parameters; where every seed draws its own, their mean."""
        size = self.data["trainable_params"]
        return round(statistics.fmean(size.values())) if isinstance(size, dict) else int(size)

    @property
    def forgotten(self) -> dict[int, float]:
        """By seed, nats a token."""
        return {int(seed): lost for seed, lost in self.data["forgotten"].items()}

    @property
    def matrices(self) -> int:
        """How many have a rank; where every seed draws its own, their mean."""
        count = self.data["matrices"]
        return round(statistics.fmean(count.values())) if isinstance(count, dict) else int(count)


@dataclass(frozen=True)
class Study:
    """What a file of docs/results/ says."""

    data: Mapping[str, Any]

    @property
    def rows(self) -> list[Row]:
        """All points."""
        return [Row(row) for row in self.data["rows"]]

    def of(self, **asked: object) -> list[Row]:
        """The rows that a space was asked for in these words."""
        return [row for row in self.rows if any(asked.items() <= one.items() for one in row.data["asked"])]

    def row(self, **asked: object) -> Row:
        """The one row of these words. Raises ValueError where there is none, or several."""
        (row,) = self.of(**asked)
        return row

    def comparison(self, name: str) -> Mapping[str, Any]:
        """A comparison of the study's table. Raises ValueError where it has none of that name."""
        (one,) = (one for one in self.data["comparisons"] if one["name"] == name)
        return dict(one)

    @property
    def certain(self) -> set[str]:
        """Names of the comparisons that stay below .05 corrected for the number of all of them (Holm)."""
        tested = [one for one in self.data["comparisons"] if one.get("p") is not None]
        corrected = holm([one["p"] for one in tested])
        return {one["name"] for one, p in zip(tested, corrected, strict=True) if p < LEVEL}


@cache
def study(name: str) -> Study:
    """The study of docs/results/NAME.json. Raises OSError where there is none."""
    return Study(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


# --- how numbers are written


def plain(value: float, digits: int = 3) -> str:
    """`.674`"""
    return f"{value:.{digits}f}".removeprefix("0")


def signed(value: float, digits: int = 3) -> str:
    """`+.023`, `−.116`"""
    return re.sub(r"(?<=[+-])0\.", ".", f"{value:+.{digits}f}").replace("-", "−")


def spread(row: Row) -> str:
    """`.674 ± .057`"""
    return f"{plain(row.mean)} ± {plain(row.spread)}"


def difference(one: Mapping[str, Any] | Paired, *, bold: bool = False, digits: int = 3) -> str:
    """`+.193 (+.167 to +.219)`; nothing where both rows are one allocation."""
    values = one if isinstance(one, Mapping) else vars(one)
    if values.get("difference") is None:
        return ""
    size, low, high = (signed(values[name], digits) for name in ("difference", "low", "high"))
    text = f"{size} ({low} to {high})"
    return f"**{text}**" if bold else text


def tested(of: Study, comparison: str) -> str:
    """A comparison's difference, bold where it stays below .05 corrected; nothing where none is named."""
    return difference(of.comparison(comparison), bold=comparison in of.certain) if comparison else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


# --- the tables

RANKS: Mapping[str, tuple[Mapping[str, object], str]] = {
    "`uniform_ranks`": ({"allocator": "uniform_ranks"}, ""),
    "`random_ranks` on all": ({"allocator": "random_ranks", "share": 1.0}, "random − uniform"),
    "`random_ranks` on half": ({"allocator": "random_ranks", "share": 0.5}, ""),
    "`random_ranks` on a fifth": ({"allocator": "random_ranks", "share": 0.2}, ""),
    "`stratified_ranks` on all": ({"allocator": "stratified_ranks", "share": 1.0}, "stratified − uniform"),
    "`stratified_ranks` on half": ({"allocator": "stratified_ranks", "share": 0.5}, ""),
    "`stratified_ranks` on a fifth": ({"allocator": "stratified_ranks", "share": 0.2}, ""),
    "`hilo` 2468": ({"pattern": "2468"}, "HILO-2468 − uniform"),
    "`hill_ranks`": ({"allocator": "hill_ranks"}, "hill − uniform"),
    "`aletheia`, half": ({"allocator": "aletheia"}, "Aletheia − uniform"),
    "`eva`, ρ 2": ({"allocator": "eva"}, "EVA − uniform"),
    "`hilo` 8642": ({"pattern": "8642"}, "HILO-8642 − uniform"),
    "`spectrum`, half": ({"allocator": "spectrum"}, "Spectrum − uniform"),
    "`sensitivity_ranks`, β 0.5": ({"beta": 0.5}, "sensitivity β=0.5 − uniform"),
    "`sensitivity_ranks`, β 1": ({"beta": 1.0}, "sensitivity β=1 − uniform"),
    "`kappatune`, a fifth": ({"equal": "parameters"}, "KappaTune − uniform"),
    "`kappatune` as published": ({"equal": "rank"}, "KappaTune at rank 4 − uniform"),
    "`plop`, three types": ({"order": "lowest"}, "PLoP − uniform"),
    "`plop`, its inverse": ({"order": "highest"}, "PLoP's inverse − uniform"),
    "`dmole`, half": ({"allocator": "dmole"}, "D-MoLE − uniform"),
    "`domlora`, eight matrices": ({"number": 8}, "DomLoRA, 8 matrices − uniform"),
    "`domlora`, one matrix": ({"number": 1}, "DomLoRA, 1 matrix − uniform"),
}


def ranks() -> list[str]:
    """Rules for ranks on both models, and their difference from uniform."""
    models = [study("ranks_table-tiny-dense"), study("ranks_table-tiny-moe")]
    rows = []
    for name, (asked, comparison) in RANKS.items():
        cells = [name]
        for model in models:
            row, uniform = model.row(**asked), model.row(allocator="uniform_ranks")
            if row.id == uniform.id and comparison:
                cells += ["is uniform", ""]
                continue
            share = row.size / uniform.size  # of a random row no seed draws quite the same number
            cells += [
                spread(row) + (f" ({share:.1%})".replace("%", " %") if share < 0.9 else ""),
                tested(model, comparison),
            ]
        rows.append(cells)
    return table(("rule", "tiny-dense", "− uniform", "tiny-moe", "− uniform"), rows)


def smollm2_ranks() -> list[str]:
    """Rules for ranks on SmolLM2-135M, best first."""
    of = study("ranks_table-smollm2-135m")
    rows = [(of.row(**asked), name, comparison) for name, (asked, comparison) in RANKS.items()]
    cells = (
        [name, human(row.size), spread(row) + seeds_short_of(of, row), tested(of, comparison)]
        for row, name, comparison in sorted(rows, key=lambda each: -each[0].mean)
    )
    return table(("rule", "parameters", "accuracy", "− uniform"), cells)


def seeds_short_of(of: Study, row: Row) -> str:
    """` (2 seeds)` where others have more."""
    return "" if len(row.accuracies) == len(of.data["seeds"]) else f" ({len(row.accuracies)} seeds)"


FORGETTING = (  # the names of `RANKS` that are shown, uniform first
    *("`uniform_ranks`", "`eva`, ρ 2", "`plop`, three types", "`hilo` 2468", "`hill_ranks`", "`random_ranks` on all"),
    *("`stratified_ranks` on all", "`random_ranks` on a fifth", "`kappatune`, a fifth", "`kappatune` as published"),
    *("`aletheia`, half", "`spectrum`, half", "`hilo` 8642", "`dmole`, half", "`sensitivity_ranks`, β 1"),
    "`domlora`, one matrix",
)


def forgetting() -> list[str]:
    """What rules for ranks made both models forget, nats a token, and the difference from uniform."""
    models = [study("ranks_table-tiny-dense"), study("ranks_table-tiny-moe")]
    rows = []
    for name in FORGETTING:
        asked, cells = RANKS[name][0], list[str]()
        chosen = [model.row(**asked) for model in models]
        for model, row in zip(models, chosen, strict=True):
            uniform = model.row(allocator="uniform_ranks")
            if row.id == uniform.id and name != FORGETTING[0]:
                cells += ["is uniform", ""]
                continue
            lost = list(row.forgotten.values())
            cells.append(f"{plain(statistics.fmean(lost), 2)} ± {plain(statistics.stdev(lost), 2)}")
            pair = None if row.id == uniform.id else paired(row.forgotten, uniform.forgotten)
            cells.append("" if pair is None else difference(pair, digits=2))
        rows.append([name, " / ".join(f"{row.matrices}" for row in chosen), *cells])
    return table(("rule", "matrices adapted", "tiny-dense", "− uniform", "tiny-moe", "− uniform"), rows)


def sieve_rows() -> list[str]:
    """Ways to choose the same number of experts."""
    of = study("sieve_ablation-tiny-moe")
    choices = {
        "hot": {"allocator": "sieve", "score": "count"},
        "mass": {"allocator": "sieve", "score": "mass"},
        "greedy": {"allocator": "greedy"},
        "random": {"allocator": "random"},
    }
    rows = [
        [
            f"{100 * fraction:g} % of the experts",
            *(
                plain(of.row(recipe=recipe, fraction=fraction, **c).mean)
                for recipe in RECIPES
                for c in choices.values()
            ),
        ]
        for fraction in (0.125, 0.25, 0.5)
    ]
    first, *others = choices
    return table(("", *(name for recipe in RECIPES for name in (f"{recipe}: {first}", *others))), rows)


def with_both_recipes(name: str, names: Iterable[str]) -> list[list[str]]:
    """Comparisons of a study, a column a recipe."""
    of = study(name)
    return [[one, *(difference(of.comparison(f"{one}, {recipe}")) for recipe in RECIPES)] for one in names]


def sieve_comparisons() -> list[str]:
    """The paper's comparisons and ours, paired."""
    against = ("random 25 %", "all", "greedy 25 %", "mass 25 %", "coverage of half")
    rows = with_both_recipes("sieve_ablation-tiny-moe", [f"hot 25 % − {other}" for other in against])
    return table(("paired over seeds", *RECIPES), rows)


def alphalora_rows() -> list[str]:
    """Metrics, uniform and MoLA at three budgets."""
    of, budgets = study("alphalora_table-tiny-dense"), (2.5, 5, 7)
    rules = {
        "stable_rank": {"metric": "stable_rank"},
        "uniform": {"allocator": "uniform"},
        "hill": {"metric": "hill"},
        "MoLA (1234, 2468, 4-6-8-10)": {"allocator": "mola"},
        "alpha_hat": {"metric": "alpha_hat"},
    }
    rows = []
    for name, asked in rules.items():
        cells = [name]
        for recipe in RECIPES:
            for each in budgets:
                row = of.row(recipe=recipe, experts_per_layer=each, **asked)
                same = of.row(recipe=recipe, experts_per_layer=each, allocator="uniform").id == row.id
                cells.append("" if same and name != "uniform" else spread(row))
        rows.append(cells)
    heads = [f"{recipe}: {budgets[0]}" if each == budgets[0] else f"{each}" for recipe in RECIPES for each in budgets]
    return table(("experts a layer", *heads), rows)


def smoe_rows() -> list[str]:
    """LoRA-SMoE's two strategies and uniform at four retentions."""
    of = study("smoe_table-tiny-dense")
    rules = {"S": {"strategy": "S"}, "U": {"strategy": "U"}, "uniform": {"allocator": "uniform"}}
    rows = [
        [f"{100 * n:g} %", *(spread(of.row(recipe=r, retention=n, **rule)) for r in RECIPES for rule in rules.values())]
        for n in (0.4, 0.6, 0.8, 1.0)
    ]
    first, *others = rules
    return table(("retention", *(name for recipe in RECIPES for name in (f"{recipe}: {first}", *others))), rows)


def smoe_comparisons() -> list[str]:
    """The paper's comparisons at its retention."""
    rows = with_both_recipes(
        "smoe_table-tiny-dense", [f"{one}, 60 %" for one in ("S − uniform", "U − uniform", "S − U")]
    )
    return table(("paired over seeds", *RECIPES), rows)


def dense_rows() -> list[str]:
    """Every rule for LoRA experts of a dense model at one number of parameters, and its difference from uniform."""
    of = study("dense_table-tiny-dense")
    rules = dense_rules() | {"uniform, and alphalora hill, which rounds to it": ({"allocator": "uniform"}, "")}
    head = ("five experts a layer", "tuned", "− uniform", "paper", "− uniform")
    return table(head, ([name, *cells] for name, _, *cells in best_first(of, rules, RECIPES)))


def smollm2_rows() -> list[str]:
    """The same on SmolLM2-135M with one recipe."""
    rules = dense_rules() | {
        "uniform": ({"allocator": "uniform"}, ""),
        "alphalora hill": ({"metric": "hill"}, "alphalora hill − uniform"),
    }
    head = ("allocator", "parameters", "accuracy", "− uniform")
    return table(head, best_first(study("dense_table-smollm2-135m"), rules, RECIPES[:1]))


def best_first(
    of: Study, rules: Mapping[str, tuple[Mapping[str, Any], str]], recipes: Sequence[str]
) -> list[list[str]]:
    """Name, parameters, accuracy and difference from uniform with every recipe, sorted by that of the first."""
    rows = []
    for name, (asked, comparison) in rules.items():
        first, cells = of.row(recipe=recipes[0], **asked), []
        for recipe in recipes:
            cells += [spread(of.row(recipe=recipe, **asked)), tested(of, comparison and f"{comparison}, {recipe}")]
        rows.append((first.mean, [name, f"{first.size / 1e6:.2f} M", *cells]))
    return [cells for _, cells in sorted(rows, key=lambda row: -row[0])]


def dense_rules() -> dict[str, tuple[dict[str, Any], str]]:
    """By name, what a rule's row was asked for, and what its difference from uniform is called."""
    return {
        "alphalora stable_rank": ({"metric": "stable_rank"}, "alphalora stable_rank − uniform"),
        "sensitivity, β 0.5": ({"allocator": "sensitivity"}, "sensitivity − uniform"),
        "MoLA-8642": ({"pattern": "8642"}, "MoLA-8642 − uniform"),
        "random, drawn anew by each seed": ({"allocator": "random"}, "random − uniform"),
        "MoLA-2468": ({"pattern": "2468"}, "MoLA-2468 − uniform"),
        "alphalora alpha_hat": ({"metric": "alpha_hat"}, "alphalora alpha_hat − uniform"),
        "LoRA-SMoE S": ({"strategy": "S"}, "lora_smoe S − uniform"),
        "LoRA-SMoE U": ({"strategy": "U"}, "lora_smoe U − uniform"),
    }


def tiny_moe_sizes() -> list[str]:
    """What more experts buy on tiny-moe, hot and random, at one recipe."""
    of = study("moe_grid-tiny-moe")
    recipe = {"rank": 4, "scaled_rate": 0.1}
    none, every = (of.row(allocator=name, **recipe) for name in ("none", "all"))
    rows = [["no expert", f"{none.size:,}", plain(none.mean), ""]]
    for one in (16, 8, 4, 2):
        hot, chance = (of.row(allocator=name, fraction=1 / one, **recipe) for name in ("sieve", "random"))
        rows.append([f"1/{one} of the experts", f"{hot.size:,}", plain(hot.mean), plain(chance.mean)])
    rows.append(["all", f"{every.size:,}", plain(every.mean), ""])
    return table(("LoRA on attention and router, and on", "parameters", "hot", "random"), rows)


def cuts() -> list[str]:
    """An adapter of rank 16 cut to shares of its energy."""
    of = study("all-rank16-tiny-moe")
    whole, rows = of.row(allocator="all"), []
    for energy in (0.5, 0.7, 0.9, 0.99):
        cut = of.of(energy=energy)
        by_seed = {seed: accuracy for row in cut for seed, accuracy in row.accuracies.items()}
        size, loss = statistics.fmean(row.size for row in cut), paired(by_seed, whole.accuracies)
        assert loss is not None
        assert loss.spread is not None
        mean = f"{plain(statistics.fmean(by_seed.values()))} ± {plain(statistics.stdev(by_seed.values()))}"
        error = plain(loss.spread / loss.n**0.5)
        share = f"{100 * size / whole.size:.1f} %"
        rows.append([f"{energy:g}".lstrip("0"), kilo(size), share, mean, signed(loss.difference), error])
    head = ("energy", "parameters", "of the whole", "test, mean ± s.d.", "cut − uncut, paired", "standard error")
    return table(head, rows)


def kilo(size: float) -> str:
    """`17.83 k`"""
    return f"{human(size)[:-1]} {human(size)[-1]}"


def demo() -> list[str]:
    """The front that `make demo` ends with."""
    of = study("sieve-tiny-moe")
    by_id = {row.id: row for row in of.rows}
    rows = []
    for name in of.data["front"]:
        row = by_id[name].data
        recipe, size = row["recipe"], human(row["trainable_params"])
        (validation,), (test,) = row["accuracy"].values(), row["test"].values()
        rows.append(
            [
                f"{size} (the knee)" if name == of.data["knee"] else size,
                f"{plain(validation)} ± {plain(row['stderr']['accuracy'])}",
                f"{plain(test)} ± {plain(row['stderr']['test'])}",
                rule_in_words(row["allocator"], row["knobs"]),
                f"{recipe['rank']}",
                f"{recipe['lora_alpha']:g}",
                plain(recipe["scaled_rate"]),
            ]
        )
    head = ("trainable parameters", "validation", "test", "allocation", "rank", "lora_alpha", "scaled rate")
    return table(head, rows)


def rule_in_words(allocator: str, knobs: Mapping[str, Any]) -> str:
    """A rule of an MoE model as a sentence would have it."""
    names = {"count": "tokens", "token": "tokens", "mass": "gate mass", "gate": "gate mass"}
    what = names.get(str(knobs.get("score")), str(knobs.get("score")))
    match allocator:
        case "none":
            return "no expert (attention and router only)"
        case "all":
            return "all experts"
        case "coverage":
            return f"coverage of {100 * knobs['share']:.3g} % of the {what}"
        case "esft":
            return f"esft, {100 * knobs['p']:.3g} % of each layer's {what}"
        case "greedy":
            return f"greedy, {100 * knobs['fraction']:.3g} % of all experts"
        case "sieve":
            return f"sieve, {100 * knobs['fraction']:.3g} % of each layer"
        case _:
            return f"{allocator}, {100 * knobs['fraction']:.3g} %"


TABLES: Mapping[str, tuple[tuple[str, ...], Callable[[], list[str]]]] = {
    "demo": (("sieve-tiny-moe",), demo),
    "ranks": (("ranks_table-tiny-dense", "ranks_table-tiny-moe"), ranks),
    "smollm2-ranks": (("ranks_table-smollm2-135m",), smollm2_ranks),
    "forgetting": (("ranks_table-tiny-dense", "ranks_table-tiny-moe"), forgetting),
    "sieve-rows": (("sieve_ablation-tiny-moe",), sieve_rows),
    "sieve-comparisons": (("sieve_ablation-tiny-moe",), sieve_comparisons),
    "alphalora-rows": (("alphalora_table-tiny-dense",), alphalora_rows),
    "smoe-rows": (("smoe_table-tiny-dense",), smoe_rows),
    "smoe-comparisons": (("smoe_table-tiny-dense",), smoe_comparisons),
    "dense-rows": (("dense_table-tiny-dense",), dense_rows),
    "smollm2-rows": (("dense_table-smollm2-135m",), smollm2_rows),
    "tiny-moe-sizes": (("moe_grid-tiny-moe",), tiny_moe_sizes),
    "cuts": (("all-rank16-tiny-moe",), cuts),
}


def filled(page: str) -> str:
    """A page with its tables as the files have them. Raises KeyError for a name that is none."""
    return BLOCK.sub(lambda found: found[1] + "\n".join(TABLES[found[2]][1]()) + "\n" + found[4], page)


# --- the numbers of a study, for sentences beside its tables


def numbers(name: str) -> Iterator[float]:
    """Every mean, spread, difference and interval that the file has or that follows from a row alone."""
    of = study(name)
    for row in of.rows:
        yield from (row.mean, row.spread)
    for one in of.data["comparisons"]:
        yield from (one[key] for key in ("difference", "low", "high") if one.get(key) is not None)
    for base in (of.data["untrained"] or {}).values():
        yield from base.values()
    for sentence in of.data["said"]:
        yield from (float(number) for number in re.findall(r"(?<![\d.])[+-]?0\.\d+", sentence))


def main(argv: list[str]) -> None:
    """Names the pages whose tables differ from the studies' files, and writes them."""
    if words.asks_for_help(argv):
        print((__doc__ or "").strip(), "", "keys:", *words.help_of(Settings), sep="\n")
        return
    settings = words.parse(argv, Settings)
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := filled(old)) != old:
            print(page.relative_to(ROOT))
            if not settings.check:
                page.write_text(new, encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """Names of a page's tables, in order."""
    return [found[2] for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    words.run(main)
