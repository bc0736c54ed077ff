"""Turn result files into Markdown tables: `python -m benchmarks.cpu.report benchmarks/results/cpu/*.json`.

Prints to stdout, or with `--into docs/performance.md` replaces what stands between the lines
`<!-- results:NAME -->` and `<!-- /results:NAME -->` of that page, NAME being the result file's stem.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from polybatch.bench import results


def markdown(content: dict[str, Any]) -> str:
    """The machine in one line, the table of all results, what was left out and why."""
    machine, limits = content["machine"], content["limits"]
    lines = [
        f"{machine['cpu']}, {machine['num_cores']} cores ({', '.join(machine['isa'])}), "
        f"{content['threads']} threads, {machine['memory_gib']:.0f} GiB, {content['created'][:10]}, "
        f"model {content['model']}."
    ]
    if limits is not None:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in limits["gflops"].items())
        lines.append(
            f"At best, with torch: {limits['read_gbs']:.0f} GB/s from memory; matmul GFLOP/s: {rates}."
        )
    lines += ["", f"`{content['command']}`", ""]
    lines += ["| " + " | ".join(results.HEADER) + " |", "|---" * len(results.HEADER) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in results.rows(content["results"])]
    versions = {result["engine"].split(":")[0]: result["version"] for result in content["results"]}
    lines += ["", "Versions: " + "; ".join(versions.values()) + "."]
    lines += [f"- {s['workload']} {s['engine']}: {s['reason']}" for s in content["skipped"]]
    return "\n".join(lines) + "\n"


def replace_section(page: str, name: str, text: str) -> str:
    """Put the text between the markers of a section. Raises ValueError where the page lacks them."""
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    if start not in page or end not in page:
        raise ValueError(f"the page has no lines {start} and {end}; add them where the table should stand")
    before, rest = page.split(start, 1)
    return f"{before}{start}\n\n{text}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path)
    arguments = parser.parse_args()
    for file in arguments.files:
        text = markdown(json.loads(file.read_text()))
        if arguments.into is None:
            sys.stdout.write(f"### {file.stem}\n\n{text}\n")
        else:
            arguments.into.write_text(replace_section(arguments.into.read_text(), file.stem, text))


if __name__ == "__main__":
    main()
