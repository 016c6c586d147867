"""The page's style sheet: light and dark, screen and paper."""

STYLE = """
:root {
  --back: #f7f7f5; --card: #ffffff; --ink: #1c1f23; --soft: #5a626c; --line: #dcdfe3;
  --accent: #2f5fb3; --warn: #9a4a00; --rest: #e6e8eb;
  --c0: #2f5fb3; --c1: #d9822b; --c2: #3f8f5b; --c3: #b0413e; --c4: #7a5ea8;
  --c5: #1f9bab; --c6: #c25d9c; --c7: #8a7a2f; --c8: #6b7683; --c9: #a3ad36; --c10: #4a4f57;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15181c; --card: #1e2227; --ink: #e8eaed; --soft: #a2abb6; --line: #343a42;
    --accent: #7fa8f0; --warn: #f0a45d; --rest: #2c3138;
    --c0: #6f9bea; --c1: #f0a45d; --c2: #68bd86; --c3: #e47a75; --c4: #ab92d8;
    --c5: #55c5d4; --c6: #e08cc0; --c7: #c4b25a; --c8: #9aa5b2; --c9: #c8d25f; --c10: #c9ced6;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body {
  margin: 0 auto; max-width: 1240px; padding: 24px 28px 48px; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 25px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; }
* + h2 { margin-top: 18px; }
p { margin: 6px 0; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; max-width: 95ch; }
section, .tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
section { margin-top: 16px; padding: 16px 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin-top: 16px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; }
.tile span { display: block; font-size: 13px; color: var(--soft); }
.warn b { color: var(--warn); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 4px 10px 4px 0; vertical-align: middle; font-weight: 400; }
thead th { color: var(--soft); font-size: 13px; border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.name, pre, code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: 13px; overflow-wrap: anywhere; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 6px; margin: 6px 0;
  padding: 10px 12px; white-space: pre-wrap; }
svg { display: block; width: 100%; }
.stack { height: 26px; border-radius: 4px; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 8px 14px; align-items: center;
  margin-bottom: 12px; font-size: 13px; }
.chart { height: 40px; }
.kinds td { width: 27%; padding-right: 18px; }
.kinds td span { font-size: 13px; font-variant-numeric: tabular-nums; }
.kinds th small { display: block; color: var(--soft); }
.rest { fill: var(--rest); }
.axis { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.column { fill: var(--c0); } .level { fill: var(--c1); } .gap .column { fill: var(--c2); }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px;
  vertical-align: -1px; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.changed { font-weight: 650; }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; }
details > table { font-size: 13px; margin-top: 6px; }
ul { margin: 4px 0; padding-left: 20px; }
li { overflow-wrap: anywhere; }
@media (max-width: 860px) { .two { grid-template-columns: 1fr; } body { padding: 14px; } }
@media print { body { max-width: none; } section { break-inside: avoid; } }
""" + "".join(
    f".c{number} {{ fill: var(--c{number}); background: var(--c{number}); }}\n"
    for number in range(11)
)
