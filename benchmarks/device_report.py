"""The JSON files of ``device.sh`` as Markdown: ``python benchmarks/device_report.py OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("error: which folder? python benchmarks/device_report.py OUT")
    folder = Path(sys.argv[1])
    sections = {
        "contract": contract, "equality": equality, "speed": speed, "runs": runs, "graphs": graphs, "rows": rows,
    }  # fmt: skip
    for piece, section in sections.items():
        path = folder / f"{piece}.json"
        print(f"\n### {piece}\n")
        if not path.is_file():
            print("not run")
            continue
        content = json.loads(path.read_text())
        if content.get("done"):
            print("{device}, torch {torch}, Python {python}, {seconds} s\n".format(**content))
        else:
            print("cut off; what was there by then:\n")
        section(content)


def table(header, rows) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def contract(content) -> None:
    """Passed and failed tests by class; each failure with its first line."""
    classes = content["classes"]
    failed = sum(len(c["failed"]) for c in classes.values())
    passed = sum(c["passed"] for c in classes.values())
    print(f"{passed} tests passed, {failed} failed, in {len(classes)} test classes.\n")
    for name, entry in sorted(classes.items()):
        for failure in entry["failed"]:
            print(f"- {name}.{failure['test']}: {first_line(failure['message'])}")


def equality(content) -> None:
    rows = []
    for name, row in content["models"].items():
        if "error" in row:
            rows.append([name, "**error**", row["error"], "", ""])
            continue
        rows.append([
            name if row["passed"] else f"**{name}**", f"{row['logit_difference']:.1e}", f"{row['equal_lists']:.2f}",
            f"{row['bf16_logit_difference']:.1e}", f"{row['bf16_equal_lists']:.2f}",
        ])  # fmt: skip
    table(["model", "CPU − device, logits", "same lists", "fp32 − bf16, logits", "same lists"], rows)


def speed(content) -> None:
    """Requests per second by batch and precision, memory of the largest batch, ratios to PRM + score."""
    rates = ", ".join(f"{p} {rate:.0f} TFLOP/s" for p, rate in content["matmul_tflops"].items())
    loader = ", ".join(f"{rate:,.0f} at {batch}" for batch, rate in content["loader_requests_per_second"].items())
    print(f"d = {content['embedding_size']}, {content['candidates']} candidates. Matmul: {rates}. Requests/s from the "
          f"candidate table to the device: {loader}.\n")  # fmt: skip
    cells = {(r["model"], r["batch"], r["precision"]): r for r in content["rows"]}
    columns = sorted({(batch, precision) for _, batch, precision in cells})
    header = ["requests/s", *(f"{batch} {precision}" for batch, precision in columns), "GiB", "× PRM + score"]
    rows = []
    for model in dict.fromkeys(model for model, _, _ in cells):
        found = [cells.get((model, *column)) for column in columns]
        values = [f"{r['requests_per_second']:,.0f}" if r and "error" not in r else "error" if r else "" for r in found]
        memory = max((r.get("memory_mib") or 0 for r in found if r), default=0) / 1024
        ratios = []
        for column, row in zip(columns, found):
            base = cells.get(("PRM + score", *column))
            if row and base and "error" not in row and "error" not in base:
                ratios.append(row["milliseconds"] / base["milliseconds"])
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}" if ratios else ""
        rows.append([model, *values, f"{memory:.1f}", spread])
    table(header, rows)
    for row in content["rows"]:
        if "error" in row:
            print(f"\n- {row['model']}, batch {row['batch']}, {row['precision']}: {first_line(row['error'])}")
    if content.get("skipped"):
        print(f"\nno time for {len(content['skipped'])} of the combinations")


def runs(content) -> None:
    rows = []
    for name, row in content["runs"].items():
        if "error" in row:
            rows.append([name, "**error**", row["error"], "", ""])
            continue
        ndcg = next((f"{k} {v:.4f}" for k, v in row["test"].items() if k.startswith("ndcg@6")), "")
        apart = "metrics {largest_metric_difference:.1e}, losses {largest_loss_difference:.1e} apart".format(**row)
        times = f"{row['seconds_per_epoch']:.2f}", f"{row['seconds']:.0f}"
        rows.append([name, ndcg, *times, "equal" if row["equal"] else apart])
    table(["run", "test", "s per epoch", "s in all", "interrupted and resumed"], rows)


def graphs(content) -> None:
    rows = [
        [r["batch"], r["variant"], f"{r['milliseconds']:.2f}" if "milliseconds" in r else first_line(r["error"]),
         f"{r['preparation_seconds']:.1f}" if "preparation_seconds" in r else ""]
        for r in content["steps"]
    ]  # fmt: skip
    table(["batch", "PRM step", "ms", "preparation, s"], rows)


def rows(content) -> None:
    """How many runs of each plan were made, and what failed."""
    for plan, lines in content["plans"].items():
        failed = [line for line in lines if line["error"]]
        print(f"{plan}: {len(lines) - len(failed)} runs")
        for line in failed:
            print(f"- {line['setting']} | {line['row']} | {line['seed']}: {first_line(line['error'])}")


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    main()
