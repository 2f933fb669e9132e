"""Prints one table of the results of the channel and layer schedules for every family of timm models.

python tests/benchmarks/channels.py --markdown > channels.md
python tests/benchmarks/layers.py --markdown > layers.md
python tests/benchmarks/coverage.py channels.md layers.md
"""

import sys
from pathlib import Path


def rows(path: str) -> dict[str, dict[str, str]]:
    """Return the rows of a Markdown table by their first column."""
    lines = [line for line in Path(path).read_text().splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


def main() -> None:
    """Print the table."""
    channels, layers = rows(sys.argv[1]), rows(sys.argv[2])
    print("| family | channels, of | MACs left at half the width | layers, of | blocks | MACs in blocks |")
    print("|---|---|---|---|---|---|")
    for family in sorted(channels.keys() | layers.keys()):
        narrow, shallow = channels.get(family, {}), layers.get(family, {})
        works = shallow.get("result", "").startswith("works")
        blocks = int(shallow.get("modules") or 0) + int(shallow.get("branches") or 0) if works else "none"
        narrower = narrow.get("result", "not tried")
        print(
            f"| {family} | {narrow.get('variant', '-')} | "
            f"{narrow.get('MACs left') if narrower == 'works' else narrower} | "
            f"{shallow.get('variant', '-') if works else '-'} | {blocks} | "
            f"{shallow.get('MACs in blocks', '-') if works else '-'} |"
        )


if __name__ == "__main__":
    main()
