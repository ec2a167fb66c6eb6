"""docs/layouts.md, made from the measured rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ring_train.plan.coverage import kind_name

HEAD = """\
# Layouts that have been compared with one rank

Written by `make test-layouts`; do not edit. Every row is a run of the tiny hybrid model (lightning
and softmax layers, MoE with shared expert, MTP) on forked gloo ranks in fp32: 16 rows of 16 tokens,
two documents each, cut at odd places. Compared with one rank: each loss (relative error at most
1e-6), each gradient by logical name (||g - ref|| / ||ref|| at most 1e-5), tokens per expert and
every expert bias after its update (equal bit for bit). Routing margins of the batch are above 2e-5,
so no rounding can change a choice. `tests/layouts/matrix.py` makes the list;
`tests/layouts/test_mutants.py` shows that the comparison notices what it should (list below).

What is *covered* is the kind, the set of degrees above 1, not the size; a flag is covered in a
kind when it was compared in it. Anything else is refused by the plan, with the nearest covered kind
named, unless `parallel.allow_uncertified=true`, which the `config.yaml` of every checkpoint
records. Nothing here has run on a GPU: NCCL, CUDA kernels and bf16 are not part of this table.

Variants: `plain` has no flag and one MTP depth; `full` has the distributed optimizer, overlapped
gradient reduction and parameter gathering in many buckets, full recomputation, two MTP depths and
padded rows, and is compared after an update, whose gradient norm is compared too (1e-5);
`selective` has the distributed optimizer, recomputation of every module that can be, and no MTP;
`v1` is `full` with the first generation (softmax router, balance loss, normalised head, no MTP),
compared after an update of weights and of expert loads.
"""


def write_page(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the page of a whole table, the list of mutants left as it is."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows.values():
        kinds.setdefault(row["features"].kind, []).append(row)
    worst_loss = max(row["loss_error"] for row in rows.values())
    worst_gradient = max(row["gradient_error"] for row in rows.values())
    lines = [
        HEAD,
        f"{len(rows)} layouts of {len(kinds)} kinds; largest loss error {worst_loss:.1e}, largest "
        f"gradient error {worst_gradient:.1e}.",
        "",
        "| layout | ranks | kind | loss error | gradient error | of |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['layout'].num_ranks} | `{kind_name(row['features'].kind)}` "
            f"| {row['loss_error']:.1e} | {row['gradient_error']:.1e} | {row['parameter']} |"
        )
    path.write_text("\n".join(lines) + "\n\n" + mutants_part(path), encoding="ascii")


MUTANTS_HEAD = "## Mutants"


def mutants_part(path: Path) -> str:
    """Return the part of the page that the mutation test writes."""
    if not path.exists():
        return ""
    _, head, rest = path.read_text(encoding="ascii").partition(MUTANTS_HEAD)
    return head + rest


def write_mutants(path: Path, noticed: dict[Any, str]) -> None:
    """Write the list of mutants and by what each was noticed, the table left as it is."""
    table, _, _ = path.read_text(encoding="ascii").partition(MUTANTS_HEAD)
    caught = sum(how != "-" for how in noticed.values())
    lines = [
        f"{MUTANTS_HEAD}\n",
        "Faults put into the running code (`tests/layouts/mutants.py`), and which of the compared "
        f"figures differ. {caught} of {len(noticed)} are noticed.\n",
        "| fault | layout | noticed by |",
        "|---|---|---|",
    ]
    lines += [
        f"| {mutant.fault} | {mutant.layout.name} | {how} |" for mutant, how in noticed.items()
    ]
    path.write_text(table + "\n".join(lines) + "\n", encoding="ascii")
