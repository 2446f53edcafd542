"""How a page looks: light or dark as the reader has it, light on paper; narrow windows scroll drawings by themselves.

Colours were chosen so that text has a contrast of at least 4.5 to its background, and bars of 3; none says anything
that text does not say.
"""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1a1d21; --faint: #59636e; --rule: #d8dde3; --raised: #f4f6f8;
  --blue: #2a6db0; --orange: #b8500a; --shade: #fbe9dc; --good: #1a7040; --bad: #b3261e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e7e9eb; --faint: #a0aab4; --rule: #31383f; --raised: #1e2327;
    --blue: #6ba8e6; --orange: #f0924f; --shade: #3a2618; --good: #63c58c; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 64rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.25rem; font-size: 1.2rem; }
p { margin: 0.25rem 0 0.75rem; max-width: 46rem; overflow-wrap: anywhere; }
.when, .aside, caption, dt { color: var(--faint); }
.result { margin: 1rem 0; padding: 0.5rem 0.9rem; border-left: 4px solid; background: var(--raised); max-width: none; }
.good { border-color: var(--good); }
.good strong { color: var(--good); }
.bad { border-color: var(--bad); }
.bad strong { color: var(--bad); }
.result pre { margin: 0.4rem 0 0; font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; }
.result ul { margin: 0.4rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 1rem 0; }
dl div { flex: 1 1 8rem; max-width: 16rem; padding: 0.6rem 0.9rem; border: 1px solid var(--rule); border-radius: 6px; }
dt { font-size: 0.875rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; margin: 0.5rem 0 1rem; }
svg { display: block; width: 100%; min-width: 44rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .faint { fill: var(--faint); font-size: 12px; }
svg .blue { fill: var(--blue); }
svg .orange { fill: var(--orange); }
svg .shade { fill: var(--shade); }
svg .rule { fill: none; stroke: var(--rule); }
svg .level { fill: none; stroke: var(--ink); stroke-dasharray: 5 4; }
.key { display: inline-block; width: 0.75em; height: 0.75em; margin: 0 0.15em 0 0.5em; border-radius: 2px; }
.key.blue { background: var(--blue); }
.key.orange { background: var(--orange); }
.key.shade { background: var(--shade); border: 1px solid var(--orange); }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 0.25rem; }
th, td { padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
footer { margin-top: 3rem; color: var(--faint); font-size: 0.875rem; }
@media print {
  @page { margin: 15mm; }
  body { padding: 0; font-size: 10pt; max-width: none; }
  .wide { overflow: visible; }
  svg { min-width: 0; }
  table { font-size: 8pt; }
  dl div { flex-basis: 5rem; }
  dd { font-size: 13pt; }
  svg, dl, tr, .result { break-inside: avoid; }
  h2, h2 + p, caption { break-after: avoid; }
  svg, .key, .result { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
