"""The page's style sheet: light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

# Told apart by people with colour-blindness too (hue and lightness both change); at least 4.5:1 on their paper.
LIGHT = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#4b5563")
DARK = ("#6cb2ff", "#ff9d5c", "#6fd08c", "#c79bff", "#e3c04f", "#5fd3e6", "#ff8fc0", "#b4bcc8")


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{index}: {colour};" for index, colour in enumerate(colours))


def _series(index: int) -> str:
    colour = f"var(--s{index})"
    return (
        f".line.s{index} {{ stroke: {colour}; }} .band.s{index}, .dot.s{index} {{ fill: {colour}; }} "
        f".key.s{index} {{ color: {colour}; }}\n"
    )


CSS = (
    f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)}
  --paper: #ffffff; --ink: #1d2129; --soft: #5b6472; --line: #d9dde3; --card: #f6f7f9; --event: #d6336c;
  --link: #0b57a4; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)}
  --paper: #14171c; --ink: #e6e9ee; --soft: #9aa4b2; --line: #333a45; --card: #1b2027; --event: #ff7aa8;
  --link: #7cb8ff; }} }}
"""
    + "".join(_series(index) for index in range(len(LIGHT)))
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .15rem; }
p { margin: .3rem 0; }
.soft, figcaption p { color: var(--soft); font-size: .88rem; }
a { color: var(--link); }
.grid { display: grid; gap: 1rem; align-items: start; margin-top: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; padding: .8rem; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .y-tick, svg .row-name, svg .level-name { text-anchor: end; }
svg .x-tick, svg .x-name, svg .y-name { text-anchor: middle; }
svg text.row-name { font-size: 9px; }
svg text.x-name, svg text.y-name { fill: var(--ink); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.layer { fill: none; stroke-width: 1.1; opacity: .85; }
.dashed { stroke-dasharray: 5 4; }
.band { opacity: .18; stroke: none; }
path.grid { stroke: var(--line); fill: none; }
.axis { stroke: var(--soft); fill: none; }
.level { stroke: var(--soft); stroke-dasharray: 2 3; fill: none; }
.event { stroke: var(--event); opacity: .45; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .3rem 0 0; padding: 0;
  font-size: .85rem; }
.key { display: inline-block; width: 1.4em; border-top: 3px solid; margin-right: .4em; vertical-align: middle; }
.key.dashed { border-top-style: dashed; }
.key.event-key { color: var(--event); }
.scale { display: flex; gap: .5rem; align-items: center; font-size: .85rem; }
.ramp { flex: 0 1 10rem; height: .8em; border-radius: 2px;
  background: linear-gradient(90deg, #440154, #365c8d, #1fa187, #a0da39, #fde725); }
.download { float: right; font-size: .8rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; }
caption { text-align: left; color: var(--soft); }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.CRITICAL { color: var(--event); font-weight: 600; }
.WARNING { color: var(--s4); font-weight: 600; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  font-size: .8rem; }
@media (max-width: 620px) {
  body { padding: .6rem .7rem 2rem; }
  figure { padding: .6rem; }
  svg text { font-size: 14px; }
  svg text.row-name { font-size: 11px; }
}
@media print { figure { break-inside: avoid; } details { display: none; } }
"""
)
