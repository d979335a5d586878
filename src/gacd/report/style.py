"""The style sheet of the report."""

CSS = """
:root {
  --paper: #faf8f4; --ink: #1c1b19; --quiet: #5f5c56; --line: #dcd8cf; --stripe: #f1eee7;
  --link: #0b5c8f; --good: #17693a; --bad: #a3211a; --open: #76560a; --card: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --ink: #e9e7e2; --quiet: #a9a69f; --line: #383a40; --stripe: #1e2024;
    --link: #86c1ee; --good: #7fd6a0; --bad: #ff9d94; --open: #e8c268; --card: #ffffff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 66rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.4rem); line-height: 1.15; margin: 0 0 1rem;
  letter-spacing: -0.015em; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .6rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.lead { font-size: 1.08rem; }
a { color: var(--link); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 1.2rem 0 0;
  padding: .7rem 0; border-block: 1px solid var(--line); }
nav a { display: inline-block; padding: .15rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 2.8rem; }
.scroll { overflow-x: auto; margin: 1rem 0 .6rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 .7rem .5rem; }
th, td { padding: .45rem .6rem; text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom;
  white-space: normal; }
tbody tr:nth-child(even) { background: var(--stripe); }
tbody tr + tr td { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; white-space: normal; min-width: min(11rem, 34vw);
  position: sticky; left: 0; background: var(--paper); }
td:last-child:not(.number) { white-space: normal; min-width: 9rem; }
tbody tr:nth-child(even) th { background: var(--stripe); }
tbody tr + tr th { border-top: 1px solid var(--line); }
.number { text-align: right; }
.aside { font-weight: 400; color: var(--quiet); font-size: .85em; }
.number .aside { display: block; }
.note, figcaption { color: var(--quiet); font-size: .9rem; margin: .3rem 0; max-width: 46rem; }
figure { margin: 1.4rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem; }
.card img { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: .6rem; }
.checks { list-style: none; padding: 0; margin: 1rem 0; border-top: 1px solid var(--line); }
.checks li { display: grid; grid-template-columns: 9rem 1fr; gap: 0 1rem; padding: .5rem .7rem;
  border-bottom: 1px solid var(--line); border-left: 4px solid; }
.checks .verdict { grid-row: span 2; }
.checks .name { color: var(--ink); font-weight: 600; }
.checks .text { grid-column: 2; color: var(--quiet); font-size: .93rem; }
.checks .good { border-left-color: var(--good); } .good .verdict { color: var(--good); }
.checks .bad { border-left-color: var(--bad); border-left-style: double; border-left-width: 6px; }
.bad .verdict { color: var(--bad); text-transform: uppercase; }
.checks .open { border-left-color: var(--open); border-left-style: dashed; }
.open .verdict { color: var(--open); }
footer { margin-top: 3.5rem; padding-top: 1.2rem; border-top: 1px solid var(--line);
  font-size: .9rem; color: var(--quiet); }
footer h2 { font-size: 1rem; color: var(--ink); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .6rem 1.6rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media (max-width: 640px) {
  body { padding: 1.6rem 1rem 3rem; }
  .card { padding: .4rem; }
  .card img { max-width: 26rem !important; }
  .checks li { grid-template-columns: 1fr; }
  .checks .text { grid-column: 1; }
  .aside { display: block; }
  caption span { display: inline-block; max-width: calc(100vw - 3.4rem); position: sticky;
    left: .7rem; }
  th, td { padding: .4rem .5rem; }
}
@media print { .scroll { overflow: visible; } nav { display: none; } }
"""
