"""Draws the pictures of docs/images:  python docs/site/pictures.py. They follow the reader's light or dark scheme."""

from __future__ import annotations

from pathlib import Path

HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2933; text-anchor: middle;
       dominant-baseline: central }}
.small {{ font-size: 11.5px; fill: #52606d }} .left {{ text-anchor: start }} .bold {{ font-weight: 600 }}
.box {{ fill: #f5f7fa; stroke: #7b8794 }} .cell {{ fill: #ffffff; stroke: #cbd2d9 }}
.one {{ fill: #2b7bba }} .two {{ fill: #d9761a }} .three {{ fill: #3d9150 }} .four {{ fill: #8c5fbf }}
.pale {{ fill-opacity: .25 }}
.line {{ fill: none; stroke: #7b8794; stroke-width: 1.4; marker-end: url(#arrow) }} .head {{ fill: #7b8794 }}
.line.one {{ stroke: #2b7bba }} .line.two {{ stroke: #d9761a }} .line.three {{ stroke: #3d9150 }}
.line.four {{ stroke: #8c5fbf }} .line[class] {{ fill: none }} text.name {{ fill: #ffffff; font-size: 11.5px }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #e4e7eb }} .small {{ fill: #b8c1cc }} .box {{ fill: #2a303b }}
  .cell {{ fill: #1f242c; stroke: #4a5462 }} .pale {{ fill-opacity: .4 }}
}}
</style>
<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="head" d="M0,0.5 L8,4 L0,7.5 z"/></marker></defs>
"""
COLOURS = ("one", "two", "three", "four")


class Picture:
    def __init__(self, name: str, width: int, height: int, title: str) -> None:
        self._path = Path(__file__).parents[1] / "images" / f"{name}.svg"
        self._parts = [HEAD.format(width=width, height=height, title=title)]

    def rect(self, x: float, y: float, width: float, height: float, kind: str = "box", radius: int = 6) -> None:
        self._parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"/>\n'
        )

    def circle(self, x: float, y: float, radius: int, kind: str) -> None:
        self._parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius}"/>\n')

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self._parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>\n')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, kind: str = "") -> None:
        """Leaves and arrives level."""
        middle = (x + to_x) / 2
        self._parts.append(
            f'<path class="line {kind}" d="M{x:g},{y:g} C{middle:g},{y:g} {middle:g},{to_y:g} {to_x:g},{to_y:g}"/>\n'
        )

    def save(self) -> None:
        self._path.write_text("".join(self._parts) + "</svg>\n", encoding="utf-8")


def product_keys() -> None:
    picture = Picture("product-keys", 806, 330, "How product keys find the experts of a token")
    picture.rect(10, 146, 80, 46)
    picture.text(50, 162, "token x")
    picture.text(50, 178, "[d]", "small")
    picture.text(196, 169, "query of one head", "small")
    for y, name, half in ((96, "q₁", "first half"), (202, "q₂", "second half")):
        picture.rect(150, y, 92, 40)
        picture.text(196, y + 13, name)
        picture.text(196, y + 28, half, "small")
        picture.arrow(90, 169, 149, y + 20)
    left, top, cell, root = 340, 60, 22, 8
    rows, columns, chosen = (2, 5), (1, 6), ((2, 6), (5, 1))
    side = root * cell
    for number in range(root):
        picture.rect(left - 34, top + number * cell, 24, cell - 2, "one" if number in rows else "cell", 3)
        picture.rect(left + number * cell, top + side + 8, cell - 2, 24, "two" if number in columns else "cell", 3)
    for number in rows:
        picture.rect(left - 3, top + number * cell - 2, side + 4, cell + 2, "one pale", 4)
    for number in columns:
        picture.rect(left + number * cell - 2, top - 3, cell + 2, side + 4, "two pale", 4)
    for row in range(root):
        for column in range(root):
            picked = (row, column) in chosen
            x, y = left + column * cell + 10, top + row * cell + 10
            picture.circle(x, y, 7 if picked else 5, "three" if picked else "cell")
    picture.arrow(242, 116, left - 37, 116)
    picture.arrow(242, 222, left - 4, top + side + 20)
    picture.text(left - 40, top - 16, "√N sub-keys c: top k", "small")
    picture.text(left + side / 2, top + side + 48, "√N sub-keys c′: top k", "small")
    picture.text(left + side / 2, top + side + 70, "k × k sums: top k, the head's experts (a, b)", "small")
    table, width = 600, 90
    for x, name in ((table, "down"), (table + width + 14, "up")):
        picture.text(x + width / 2, top - 18, name)
        picture.rect(x, top, width, side, "cell", 4)
        for row, column in chosen:
            picture.rect(x, top + (row * root + column) / root**2 * side, width, 5, "three", 1)
    for row, column in chosen:
        y = top + (row * root + column) / root**2 * side + 2.5
        picture.arrow(left + column * cell + 18, top + row * cell + 10, table - 2, y, "three")
    picture.text(table + width + 7, top + side + 20, "two tables of N rows, d wide", "small")
    picture.text(table + width + 7, top + side + 48, "y = Σ g · act(down · x) · up", "bold")
    picture.save()


def exchange() -> None:
    picture = Picture("exchange", 820, 372, "Dispatch and combine over two ranks")
    tops = (50, 210)
    for rank, (y, experts) in enumerate(zip(tops, ("first half", "second half"))):
        picture.rect(10, y, 170, 124)
        picture.text(95, y + 17, f"rank {rank}: its tokens", "bold")
        for line, words in enumerate(("queries,", "product keys,", "gates")):
            picture.text(22, y + 54 + 16 * line, words, "small left")
        picture.rect(330, y, 220, 124)
        picture.text(440, y + 17, f"rank {rank}: {experts} of N", "bold")
        picture.text(440, y + 58, "a = down · x")
        picture.text(440, y + 80, "Σ g · act(a) · up")
        picture.text(440, y + 106, "of its own experts only", "small")
        picture.rect(700, y, 110, 124)
        picture.text(755, y + 17, f"rank {rank}", "bold")
        picture.text(755, y + 108, "adds up", "small")
    hits = ((0, 1), (0,), (1,), (0, 1))  # the ranks where each token has experts
    arrived = [0, 0]
    for token, (colour, owners) in enumerate(zip(COLOURS, hits)):
        y = tops[token // 2] + 48 + token % 2 * 36
        for owner in owners:
            port = tops[owner] + 44 + 28 * arrived[owner]
            arrived[owner] += 1
            picture.arrow(164, y, 328, port, colour)
            picture.arrow(551, port, 740, y - 4, colour)
        for x, height in ((150, y), (755, y - 4)):
            picture.circle(x, height, 13, colour)
            picture.text(x, height, f"t{'₁₂₃₄'[token]}", "name")
    picture.text(255, 20, "dispatch", "bold")
    picture.text(255, 36, "all-to-all: tokens, picks, gates", "small")
    picture.text(625, 20, "combine", "bold")
    picture.text(625, 36, "all-to-all: sums", "small")
    picture.text(
        410, 356, "A token travels once to each rank that it hits, however many of its experts live there.", "small"
    )
    picture.save()


def grid() -> None:
    """KB a token: benchmarks/exchange.py, counted for 8 ranks (docs/measurements/exchange.json)."""
    picture = Picture("grid", 820, 366, "A table as a grid of row and column shards")
    shapes = (
        ("rows only: 8 × 1", 8, 1, 58.7, 0),
        ("grid: 2 × 4", 2, 4, 15.1, 9.2),
        ("columns only: 1 × 8", 1, 8, 7.2, 21.5),
    )
    top, width, height = 66, 200, 192
    for place, (name, rows, columns, between, inside) in enumerate(shapes):
        left = 60 + 258 * place
        middle = left + width / 2
        picture.text(middle, 20, name, "bold")
        picture.text(middle, 50, "d", "small")
        for rank in range(rows * columns):
            row, column = divmod(rank, columns)
            x, y = left + column * width / columns, top + row * height / rows
            picture.rect(x + 1, y + 1, width / columns - 2, height / rows - 2, f"{COLOURS[rank % 4]} pale", 3)
            picture.text(x + width / columns / 2, y + height / rows / 2, str(rank))
        picture.text(middle, top + height + 22, f"{between + inside:.1f} KB a token", "bold")
        picture.text(middle, top + height + 42, f"{between} to the owners and back", "small")
        picture.text(middle, top + height + 58, f"{inside} between the columns", "small")
    picture.text(46, top + height / 2, "N", "small")
    picture.text(
        410,
        top + height + 90,
        "One table over 8 ranks. Bytes of a token and layer, forward and backward: d = 1024, 128 picks, bfloat16.",
        "small",
    )
    picture.save()


if __name__ == "__main__":
    product_keys()
    exchange()
    grid()
