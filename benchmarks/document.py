"""Write the tables of docs/evidence.md, and of the callback's costs, from benchmarks/results.

What stands between ``<!-- NAME -->`` and ``<!-- end -->`` is made here, verdicts included; the rest
of a page is written by hand; of docs/evidence.md it holds no figures of results.

    python benchmarks/document.py                  # rewrite
    python benchmarks/document.py --check          # exit 1 where a page differs from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from _study import FORMATS, HERE, Row, interval, ratio, shown, table
from _training import SEVERAL

PAGES = [
    HERE.parent / "docs" / f"{name}.md"
    for name in ("evidence", "cost", "curvature", "training_mode")
]
Results = dict[str, Any]


def results(name: str) -> Results | None:
    """Results of a study; None where it has not been run as it is now."""
    file = HERE / "results" / f"{name}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"format": None}
    return found if found.get("format", 1) == FORMATS.get(name, 1) else None


def percent(value: Results, digits: int = 1) -> str:
    """An interval of shares in percent."""
    half = value["high"] - value["mean"]
    return f"{100 * value['mean']:.{digits}f} ± {100 * half:.{digits}f}"


def verdict(claim: str, worst: float, low: float, seen: str) -> str:
    """One line: what was asked, whether it holds, what was seen.

    Args:
        claim: what was asked.
        worst: by how much it is met at the worst place, on average over seeds; negative if not.
        low: the same at the lower end of the interval.
        seen: the figure.
    """
    word = "holds" if low >= 0 else "holds on average, within the spread of seeds"
    return f"- {claim}: **{word if worst >= 0 else 'does not hold'}**. {seen}"


def within_spread(claim: str, value: Results, least: float, seen: str) -> str:
    """One line: as `verdict`; what fails on average by less than seeds spread says so."""
    line = verdict(claim, *above(value, least), seen)
    if value["mean"] < least <= value["high"]:
        return line.replace("does not hold", "does not hold on average, within the spread of seeds")
    return line


def as_much(claim: str, value: Results, effect_is_clear: bool, seen: str) -> str:
    """One line: whether one effect is at least another, where both are there at all.

    Args:
        claim: what was asked.
        value: the difference of the effects.
        effect_is_clear: whether the first one is beyond chance.
        seen: the figure.
    """
    if value["low"] >= 0:
        word = "holds"
    elif value["high"] >= 0 and effect_is_clear:
        word = "holds within the spread of seeds"
    else:
        word = "does not hold"
    return f"- {claim}: **{word}**. {seen}"


def above(value: Results, least: float) -> tuple[float, float]:
    """By how much an interval is above a bound: its mean, and its lower end."""
    return value["mean"] - least, value["low"] - least


def below(value: Results, most: float) -> tuple[float, float]:
    """By how much an interval is below a bound: its mean, and its upper end."""
    return most - value["mean"], most - value["high"]


def pivot(rows: list[Row], line: Callable[[Row], str], column: Callable[[Row], str],
          cell: Callable[[Row], str], corner: str) -> str:  # fmt: skip
    """A table of rows."""
    of = {(line(r), column(r)): cell(r) for r in rows}
    lines, columns = (list(dict.fromkeys(key[i] for key in of)) for i in (0, 1))
    return table(lines, columns, lambda a, b: of.get((a, b), ""), corner)


def machine(found: Results) -> str:
    """What a study was run on."""
    options, on = found["options"], found["machine"]
    busy = f", load {on['load']:.0f} on {on['cores']} cores" if "load" in on else ""
    where = f" Settings: {', '.join(options['settings'])}." if "settings" in options else ""
    return (
        f"{options['seeds']} seeds; {on['device']}, {on['threads']} "
        f"thread{'s' if on['threads'] != 1 else ''}{busy}, torch {on['torch']}.{where}"
    )


def lds_scores(found: Results) -> str:
    """Score of every method."""
    rows = sorted(found["rows"], key=lambda r: (r["setting"], r["k"]))
    order = list(dict.fromkeys(r["method"] for r in found["rows"]))
    rows.sort(key=lambda r: order.index(r["method"]))
    columns = dict.fromkeys(
        f"{r['setting']}, k = {r['k']}" if r["k"] else r["setting"]
        for r in sorted(rows, key=lambda r: (r["setting"], r["k"]))
    )
    of = {
        (r["method"], f"{r['setting']}, k = {r['k']}" if r["k"] else r["setting"]): r for r in rows
    }
    return (
        f"{machine(found)} Score ± half the 95 % interval, and seconds from model to scores.\n\n"
        + table(
            order,
            list(columns),
            lambda m, c: (
                f"{shown(of[m, c]['lds'])}, {of[m, c]['seconds']:.2g} s" if (m, c) in of else ""
            ),
            "method",
        )
    )


def lds_equal_k(found: Results) -> str:
    """Ratios to Gaussian at equal k, and the verdict."""
    rows = {r["method"]: r["of_gaussian"] for r in found["equal_k"]}
    ours = {name: value for name, value in rows.items() if "dropout" in name}
    best = max(ours, key=lambda name: ours[name]["mean"])
    return "\n".join(
        [
            table(list(rows), ["of Gaussian"], lambda m, _: shown(rows[m]), "method"),
            "",
            verdict(
                "Best scheme at least 1.03 times Gaussian at equal k",
                *above(ours[best], 1.03),
                f"It is {best}, at {shown(ours[best])}.",
            ),
            within_spread(
                "The default at least 1.0 times Gaussian at equal k",
                ours["dropout"],
                1,
                f"{shown(ours['dropout'])}.",
            ),
        ]
    )


def gains(found: Results, end: str, scores: dict[str, str]) -> str:
    """Table of scores of methods whose names end so, over those of the methods without it.

    Args:
        found: the results.
        end: of the names.
        scores: the key of a score, by what its column is called beside the method.
    """
    of = {(r["method"], r["setting"], r["k"]): r for r in found["rows"]}
    cells: dict[str, dict[str, str]] = {}
    for (method, setting, k), row in of.items():
        plain = of.get((method.removesuffix(end), setting, k))
        if not method.endswith(end) or plain is None:
            continue
        line = cells.setdefault(f"{setting}, k = {k}", {})
        for name, key in scores.items():
            gain = ratio(row[key], plain[key])
            line[method.removesuffix(end) + name] = shown(interval(gain["values"]))
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    return table(list(cells), columns, lambda line, c: cells[line].get(c, ""), "setting")


def lds_curvature(found: Results) -> str:
    """What the curvature of losses does to the score, of that with TRAK's, by setting and k."""
    both = {", best damping": "lds", ", automatic damping": "auto"}
    return f"{machine(found)}\n\n" + gains(found, ", loss curvature", both)


def lds_checkpoints(found: Results) -> str:
    """What three checkpoints do to the score, of that with the last alone, by setting and k."""
    return gains(found, SEVERAL, {"": "lds"})


def lds_equal_time(found: Results) -> str:
    """Ratios at equal time, and the verdicts."""
    rows = found["equal_time_summary"]
    lines = [
        pivot(
            rows, lambda r: r["scheme"], lambda r: r["peer"], lambda r: shown(r["ratio"]), "scheme"
        ),
        "",
    ]
    for peers, least in (
        (("Gaussian",), 1.15),
        (("kronfluence EK-FAC",), 1.0),
        (("dattri TRAK", "dattri influence function"), 1.0),
    ):
        here = [r for r in rows if r["peer"] in peers]
        for peer in peers:
            of_peer = [r for r in here if r["peer"] == peer]
            if not of_peer:
                continue
            best = max(of_peer, key=lambda r: r["ratio"]["mean"])
            lines.append(
                verdict(
                    f"At least {least} times {peer} at equal time",
                    *above(best["ratio"], least),
                    f"Best is {best['scheme']}, at {shown(best['ratio'])}.",
                )
            )
    return "\n".join(lines)


def mislabel_auc(found: Results) -> str:
    """AUC of every method and setting."""
    k = found["options"]["proj_dim"]
    return f"{machine(found)} k = {k}. AUC ± half the 95 % interval.\n\n" + pivot(
        found["rows"],
        lambda r: r["method"],
        lambda r: f"{r['setting']}, {r['share']:.0%}",
        lambda r: shown(r["auc"]),
        "method",
    )


def mislabel_recall(found: Results) -> str:
    """Share of the flipped labels found by inspecting a fifth of the samples."""
    at = found["inspected"].index(0.2)
    return pivot(
        found["rows"],
        lambda r: r["method"],
        lambda r: f"{r['setting']}, {r['share']:.0%}",
        lambda r: shown(r["recall"][at]),
        "found in the first 20 %",
    )


def mislabel_verdict(found: Results) -> str:
    """Whether the claims on AUC and cost hold."""
    lines = []
    for peer in ("Gaussian", "no compression"):
        here = [r for r in found["compared"] if r["peer"] == peer and r["scheme"] == "dropout"]
        least = min(here, key=lambda r: r["difference"]["mean"])
        lines.append(
            verdict(
                f"AUC of the default within 0.01 of {peer}, or above",
                *above(least["difference"], -0.01),
                f"Largest shortfall {shown(least['difference'], 4)} "
                f"({least['setting']}, {least['share']:.0%}).",
            )
        )
    large = [r for r in found["cost"] if r["p"] > 10**6] or found["cost"]
    of = {fold: [r for r in large if r["method"] == f"dropout, fold {fold}"] for fold in (1, 16)}
    names = ", ".join(dict.fromkeys(r["setting"] for r in large))
    for fold, what in ((1, "pure dropout"), (16, "the default fold")):
        most = max(r["of_trak"] for r in of[fold])
        lines.append(
            verdict(
                f"Compressing finished gradients under 1 % of TRAK's gradient computer, {what}",
                0.01 - most,
                0.01 - most,
                f"At most {100 * most:.2f} % ({names}).",
            )
        )
    for rows, where in ((large, names), (found["cost"], "the study's small models as well")):
        most = max(r["added"] for r in rows if r["method"] == "dropout, fold 16")
        lines.append(
            verdict(
                "The package's own pipeline adds under 1 % to TRAK's gradient computer, the "
                f"default fold, {where}",
                0.01 - most,
                0.01 - most,
                f"At most {100 * most:+.0f} %.",
            )
        )
    most = max(r["of_ours"] for r in found["cost"] if r["method"] == "dropout, fold 1")
    lines.append(
        verdict(
            "Compressing finished gradients under 1 % of our own collecting, pure dropout, all "
            "models",
            0.01 - most,
            0.01 - most,
            f"At most {100 * most:.1f} %.",
        )
    )
    of_row = {
        f"{r['setting']}, p = {r['p'] / 1e6:.2g}M, batch of {r['batch']}: {r['method']}": r
        for r in found["cost"]
    }
    shares: dict[str, Callable[[Row], str]] = {
        "of TRAK's computer": lambda r: f"{100 * r['of_trak']:.2f} %",
        "own pipeline beyond it": lambda r: f"{100 * r['added']:+.0f} %",
        "of our collecting": lambda r: f"{100 * r['of_ours']:.2f} %",
    }
    lines += [
        "",
        table(list(of_row), list(shares), lambda n, c: shares[c](of_row[n]), "cost at k = "
              f"{found['options']['proj_dim']}"),
    ]  # fmt: skip
    return "\n".join(lines)


def retrain_loss(found: Results) -> str:
    """What removal adds to the loss of a group of targets, accuracy or perplexity beside it."""
    o = found["options"]
    parts = [
        f"{machine(found)} {o['groups']} groups of at most {o['size']} targets of one label, "
        f"scores of {o['trainings']} trainings, k = {o['proj_dim']}, {o['retrains']} "
        f"training{'s' if o['retrains'] > 1 else ''} for each group, share and seed."
    ]
    for setting in dict.fromkeys(r["setting"] for r in found["rows"]):
        here = [r for r in found["rows"] if r["setting"] == setting]
        other = "accuracy" if here[0]["accuracy"] else "perplexity"
        base = next(r for r in here if r["share"] == 0)
        parts += [
            "",
            pivot(
                [r for r in here if r["share"]],
                lambda r: r["method"],
                lambda r: f"{r['share']:.0%} removed",
                lambda r, o=other: f"{shown(r['effect'])}; {r[o]['mean']:.2f}",
                f"{setting}: loss added; {other}",
            ),
            "",
            f"Nothing removed: loss {base['loss']['mean']:.3f}, {other} {base[other]['mean']:.2f}.",
        ]
    return "\n".join(parts)


def retrain_verdict(found: Results) -> str:
    """Whether removal by our scores hurts as much as by Gaussian ones."""
    lines = []
    of = {
        (r["scheme"], r["peer"], r["setting"], r["share"]): r["effect"] for r in found["compared"]
    }
    schemes = dict.fromkeys(r["scheme"] for r in found["compared"])
    settings = list(dict.fromkeys(r["setting"] for r in found["rows"]))
    wholes = [*settings, None] if len(settings) > 1 else settings
    for scheme in schemes:
        for setting in wholes:
            where = setting or "all settings"
            floor = of.get((scheme, "random", setting, None))
            clear = floor is not None and floor["low"] > 0
            for peer, word in (
                ("random", "more than random"),
                ("random, same label", "more than random samples of the same label"),
                ("Gaussian", "at least as much as by Gaussian's"),
                (f"Gaussian{SEVERAL}", "at least as much as by Gaussian's with 3 checkpoints"),
            ):
                if peer.endswith(SEVERAL) and not scheme.endswith(SEVERAL):
                    continue  # three times the gradients
                value = of.get((scheme, peer, setting, None))
                if value is None:
                    continue
                claim = f"Removing by scores of {scheme} hurts {word}, {where}"
                seen = f"Difference in loss {shown(value)}."
                lines.append(
                    as_much(claim, value, clear, seen)
                    if peer.startswith("Gaussian")
                    else verdict(claim, *above(value, 0), seen)
                )
    return "\n".join(lines)


def crosssource_shares(found: Results) -> str:
    """Shares of top-1 and top-10."""
    of = {(r["method"], key): r[key] for r in found["rows"] for key in ("top1", "top10")}
    names = list(dict.fromkeys(name for name, _ in of))
    return (
        f"{machine(found)} k = {', '.join(map(str, found['options']['proj_dims']))}. "
        f"Sources: {', '.join(found['sources'])}. Percent of the first one, and the first ten, "
        "from the target's source.\n\n"
        + table(names, ["top1", "top10"], lambda m, c: percent(of[m, c]), "method")
    )


def crosssource_verdict(found: Results) -> str:
    """Whether the claims on the first one hold."""
    lines = []
    ends = ", normalized"
    for scheme in ("dropout", "dropout" + ends, "dropout" + SEVERAL, "dropout" + SEVERAL + ends):
        # Peers that have checkpoints and are normalized come as our own do.
        more, end = SEVERAL * (SEVERAL in scheme), ends * scheme.endswith(ends)
        for name in (f"Gaussian{more}{end}", f"own embeddings{more}", "MiniLM embeddings"):
            row = next(
                (r for r in found["compared"] if (r["scheme"], r["peer"]) == (scheme, name)), None
            )
            if row is None:
                continue
            lines.append(
                within_spread(
                    f"Top-1 share of {scheme} at least that of {name}",
                    row["top1"],
                    0,
                    f"Difference {percent(row['top1'])} points.",
                )
            )
    return "\n".join(lines)


def scale_points(found: Results) -> str:
    """Measured points beside the estimate."""
    rows = found["rows"]
    names = [f"{r['shape']}, n = {r['n']}, k = {r['k']}, T = {r['tokens']}" for r in rows]
    of = dict(zip(names, rows, strict=True))
    cells: dict[str, Callable[[Row], str]] = {
        "parameters": lambda r: f"{r['p'] / 1e6:.1f}M",
        "seconds": lambda r: shown(r["seconds"]),
        "of plain": lambda r: shown(r["of_plain"], 2),
        "estimate of measured": lambda r: f"{r['of_measured']:.2f}",
    }
    return f"{machine(found)}\n\n" + table(
        names, list(cells), lambda n, c: cells[c](of[n]), "shape"
    )


def scale_memory(found: Results) -> str:
    """Peak memory beside the estimate."""
    of = {f"{r['shape']}, batch of {r['batch']}, T = {r['tokens']}": r for r in found["memory"]}
    columns = {
        "MB of the process": "megabytes",
        "estimate": "predicted_megabytes",
        "MB of tensors": "tensor_megabytes",
        "estimate of tensors": "predicted_tensor_megabytes",
    }
    return table(list(of), list(columns), lambda n, c: f"{of[n][columns[c]]:.0f}", "shape")


def scale_verdict(found: Results) -> str:
    """Exponents and the estimate."""
    of = {(r["over"], r["of"]): r["exponent"] for r in found["exponents"]}
    lines = [
        verdict(
            f"At most linear in {name}",
            *below(of[name, "seconds"], 1.05),
            f"Exponent {shown(of[name, 'seconds'], 2)}.",
        )
        for name in ("n", "k")
        if (name, "seconds") in of
    ]
    lines.append(
        verdict(
            "In p no faster than the model's own backward",
            *below(of["p", "seconds"], of["p", "plain"]["mean"] + 0.02),
            f"Exponent {shown(of['p', 'seconds'], 2)}, of the plain step "
            f"{shown(of['p', 'plain'], 2)}.",
        )
    )
    times = [r["of_measured"] for r in [*found["rows"], *found["solving"]]]
    room = [r["predicted_megabytes"] / r["megabytes"] for r in found["memory"]]
    for what, shares in (("time", times), ("memory", room)):
        inside = sum(0.75 <= share <= 1.25 for share in shares)
        met = 0.0 if inside == len(shares) else -1.0
        lines.append(
            verdict(
                f"Estimated {what} within 25 % of measured",
                met,
                met,
                f"In {inside} of {len(shares)} points; from {min(shares):.2f} to "
                f"{max(shares):.2f} of measured.",
            )
        )
    return "\n".join(lines)


def compressing(found: Results) -> str:
    """Time, process memory and tensors of a batch's compressed gradients, of a plain step's."""
    shares = ("time", "of_plain"), ("process", "memory_of_plain"), ("tensors", "tensors_of_plain")
    of = {
        (r["setting"], r["method"]): r for r in found["rows"] if not r["method"].startswith("plain")
    }
    settings = list(dict.fromkeys(setting for setting, _ in of))
    columns = {f"{s}: {word}": (s, key) for s in settings for word, key in shares}

    def cell(method: str, column: str) -> str:
        setting, key = columns[column]
        value = of.get((setting, method), {}).get(key)
        return "" if value is None else f"{value:.2f}"

    names = list(dict.fromkeys(method for _, method in of))
    return f"{found['device']}, {found['threads']} threads, {found['dtype']}.\n\n" + table(
        names, list(columns), cell, "of a plain step"
    )


def collecting(found: Results) -> str:
    """What a collection costs, by model and projection, and whether it is what was asked."""
    rows = {f"{r['setting']}, {r['projection']}": r for r in found["rows"]}
    cells: dict[str, Callable[[Row], str]] = {
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M",
        "of a plain pass": lambda r: f"{r['ratio']:.2f}",
        "from ... to": lambda r: f"{r['lowest']:.2f} ... {r['highest']:.2f}",
        "processor time": lambda r: f"{r['cpu_ratio']:.2f}",
        "asked": lambda r: f"{r['most']:.2f}",
        "memory": lambda r: f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else "",
        "asked for memory": lambda r: f"{r['most_memory']:.2f}" if "most_memory" in r else "",
    }
    first = found["rows"][0]
    return (
        f"k = {first['proj_dim']}; {threads(found)}; medians of {len(first['ratios'])} rounds.\n\n"
        + table(list(rows), list(cells), lambda n, c: cells[c](rows[n]), "model")
    )


def epochs(found: Results) -> str:
    """What mode "training" adds to an epoch, by model and k, and whether it is what was asked."""
    rows = {f"{r['setting']}, k = {r['k']}, {r['scheme']}": r for r in found["rows"]}
    cells: dict[str, Callable[[Row], str]] = {
        "epoch with of without": lambda r: f"{r['ratio']:.3f}",
        "from ... to": lambda r: f"{r['lowest']:.3f} ... {r['highest']:.3f}",
        "processor time": lambda r: f"{r['cpu_ratio']:.3f}",
        "asked": lambda r: f"{r['most']:.2f}",
        "pairs": lambda r: str(r["epochs"]),
    }
    return f"{threads(found)}; medians of paired epochs.\n\n" + table(
        list(rows), list(cells), lambda n, c: cells[c](rows[n]), "model"
    )


def fidelity(key: str) -> Callable[[Results], str]:
    """How well scores along the run correlate with those of rows that keep every coordinate."""

    def made(found: Results) -> str:
        cells = {(r["method"], f"{r['setting']} {r['k']}"): r for r in found["rows"]}
        methods, columns = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
        return (
            f"{found['n']} training samples, {found['m']} targets, {found['epochs']} epochs; "
            f"{found['seeds']} seeds of the masks, 95 % intervals.\n\n"
            + table(methods, columns, lambda m, c: shown(cells[m, c][key]), "projection")
        )

    return made


def threads(found: Results) -> str:
    """What a measurement was made with."""
    count = found["threads"]
    return f"{count} thread{'s' if count != 1 else ''}, torch {found['torch']}"


def picture(name: str, what: str) -> tuple[str, Callable[[Results], str]]:
    """A block with the study's picture, once there is one."""
    return name, lambda found: f"![{what}](../benchmarks/results/{name}.png)"


BLOCKS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "lds scores": ("lds", lds_scores),
    "lds equal k": ("lds", lds_equal_k),
    "lds equal time": ("lds", lds_equal_time),
    "lds checkpoints": ("lds", lds_checkpoints),
    "mislabel auc": ("mislabel", mislabel_auc),
    "mislabel recall": ("mislabel", mislabel_recall),
    "mislabel verdict": ("mislabel", mislabel_verdict),
    "retrain loss": ("retrain", retrain_loss),
    "retrain verdict": ("retrain", retrain_verdict),
    "crosssource shares": ("crosssource", crosssource_shares),
    "crosssource verdict": ("crosssource", crosssource_verdict),
    "scale points": ("scale", scale_points),
    "scale memory": ("scale", scale_memory),
    "scale verdict": ("scale", scale_verdict),
    "curvature gain": ("lds", lds_curvature),
    "curvature on the larger cnn": ("lds_cnn", lds_curvature),
    "batch cost": ("featurize", compressing),
    "callback cost": ("callback", collecting),
    "training cost": ("training_mode", epochs),
    "trajectory scores": ("trajectory", fidelity("scores")),
    "trajectory self influence": ("trajectory", fidelity("self_influence")),
    "lds picture": picture("lds", "Score over time"),
    "mislabel picture": picture("mislabel", "Recall over the share inspected"),
    "retrain picture": picture("retrain", "Loss over the share removed"),
    "crosssource picture": picture("crosssource", "Shares from the same source"),
    "scale picture": picture("scale", "Time measured and estimated"),
}


def written(page: str) -> str:
    """The page with every block made anew."""

    def block(match: re.Match[str]) -> str:
        study, make = BLOCKS[match[1]]
        found = results(study)
        text = "Not yet run." if found is None else make(found)
        return f"<!-- {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> None:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    for page in PAGES:
        old = page.read_text()
        new = written(old)
        if not options.check:
            page.write_text(new)
            print(f"written to {page}")
        elif new != old:
            sys.exit(f"{page} is not what benchmarks/document.py makes of the results")


if __name__ == "__main__":
    main()
