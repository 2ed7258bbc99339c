// Layers and KV heads of a per-head cache over time: a map each, a row a layer or head, shaded by tokens. The same rules as `view_heads.py`.
const STEPS = 9, ROW = 10, GAP = 6;
function lastRow(rows, at) {
  let low = 0, high = rows.length;
  while (low < high) { const middle = (low + high) >> 1; if (rows[middle][0] <= at) low = middle + 1; else high = middle; }
  return low ? rows[low - 1] : null;
}
const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
function heldAt(heads, layer, at) {
  const row = lastRow(heads.held[layer], at) || new Array(heads.kv_heads + 1).fill(0), counts = row.slice(1), cells = heads.layer_cells[layer];
  const fits = heads.shared ? Math.floor((counts.length * cells - counts.reduce((a, b) => a + b, 0)) / counts.length) : cells - Math.max(...counts);
  return counts.map((count) => count + Math.max(0, Math.min(at - row[0], fits)));
}
function budgetsAt(heads, layer, at) {
  const row = lastRow(heads.budgets[layer], at);
  return row ? row.slice(1) : null;
}
function heatScale(heads) {
  let low = Infinity, high = 0;
  for (const of of [heads.held, heads.budgets]) for (const layer of of) for (const row of layer) for (let i = 1; i < row.length; i++) { low = Math.min(low, row[i]); high = Math.max(high, row[i]); }
  if (low === Infinity) { low = Math.min(...heads.layer_cells); high = Math.max(...heads.layer_cells); }
  low = Math.min(low, Math.floor((high * 4) / 5)); // next to equal numbers shall look so
  return { low, high, level: (v) => (v < low ? 0 : high === low ? STEPS : Math.min(STEPS, 1 + Math.floor(((v - low) * STEPS) / (high - low)))) };
}
// [from, to, level] of one row: what stayed at each selection, until the next; before the first one everything there is.
function heatRuns(problem, scale, layer, pick, budgets) {
  const heads = problem.heads, rows = (budgets ? heads.budgets : heads.held)[layer], cells = heads.layer_cells[layer], runs = [];
  const add = (from, to, level) => {
    const last = runs[runs.length - 1];
    if (from >= to) return;
    if (last && last[2] === level) last[1] = to; else runs.push([from, to, level]);
  };
  const first = rows.length ? rows[0][0] : problem.tokens;
  if (budgets) add(0, first, scale.level(cells));
  else {
    let at = 0;
    for (let k = 0; k <= STEPS && at < first; k++) {
      const up = Math.ceil(scale.low + (k * (scale.high - scale.low)) / STEPS), to = up >= cells ? first : Math.min(first, up);
      add(at, to, scale.level(Math.min(at, cells)));
      at = Math.max(at, to);
    }
    add(at, first, scale.level(Math.min(at, cells)));
  }
  rows.forEach((row, i) => add(row[0], i + 1 < rows.length ? rows[i + 1][0] : problem.tokens, scale.level(pick(row))));
  return runs;
}
function heatRows(heads, each) {
  const rows = [];
  let y = 0;
  heads.layer_cells.forEach((_, layer) => {
    if (!each) { rows.push({ layer, head: null, y, pick: (row) => mean(row.slice(1)) }); y += ROW; return; }
    for (let head = 0; head < heads.kv_heads; head++) { rows.push({ layer, head, y, pick: (row) => row[head + 1] }); y += ROW; }
    y += GAP;
  });
  return { rows, height: y - (each ? GAP : 0) };
}
const rowText = (row) => `layer ${row.layer}` + (row.head === null ? "" : `, head ${row.head}`);
function heatMap(problem, scale, each, state) {
  const { rows, height } = heatRows(problem.heads, each), pixels = Math.max(3, Math.min(22, 620 / rows.length)), unit = pixels / ROW;
  const area = make("div", { class: "area", tabindex: 0, role: "group", "aria-label": (each ? "KV heads" : "Layers") + ": the arrow keys move over the map" });
  place(area, { height: height * unit + "px" });
  const svg = canvas(problem.tokens, height), mark = make("div", { class: "mark" }), thin = pixels > 6 ? 1 : 0;
  const byLayer = each && pixels < 13, inLayer = byLayer ? problem.heads.kv_heads * ROW : ROW, labelled = Math.ceil(13 / ((inLayer + (byLayer ? GAP : 0)) * unit));
  const paint = () => {
    const paths = new Map();
    for (const row of rows) for (const [from, to, level] of heatRuns(problem, scale, row.layer, row.pick, each && state.budgets)) paths.set(level, (paths.get(level) || "") + box(from, to, row.y, ROW - thin));
    svg.replaceChildren(...[...paths].map(([level, d]) => draw("path", { class: "h" + level, d })));
  };
  paint();
  rows.forEach((row, i) => {
    const at = row.y + inLayer / 2;
    if (byLayer ? row.head > 0 || row.layer % labelled : i % labelled) return;
    const wide = each && !byLayer ? (row.head === 0 ? `layer ${row.layer}, head 0` : `head ${row.head}`) : `layer ${row.layer}`;
    const short = each && !byLayer ? `${row.layer}.${row.head}` : String(row.layer);
    area.append(place(make("span", { class: "tick row-name" }, make("span", { class: "wide" }, wide), make("span", { class: "short" }, short)), { top: at * unit + "px" }));
    if (!each || row.head === 0) area.append(place(make("span", { class: "tick cells-name wide" }, n(problem.heads.layer_cells[row.layer])), { top: at * unit + "px" }));
  });
  for (const v of nice(problem.tokens)) area.append(place(make("span", { class: "tick x" }, n(v)), { left: (100 * v) / problem.tokens + "%" }));
  const choose = (row) => { state.row = row; state.show(); };
  area.append(svg, mark);
  area.addEventListener("pointermove", (event) => {
    const at = (event.clientY - area.getBoundingClientRect().top) / unit;
    choose(rows.findLast((row) => row.y <= at) || rows[0]);
    point(area, event);
  });
  area.addEventListener("keydown", (event) => {
    const now = rows.findIndex((row) => state.row && row.layer === state.row.layer && row.head === state.row.head), step = Math.max(1, Math.round(problem.tokens / 100));
    const to = { ArrowDown: now + 1, ArrowUp: now - 1 }[event.key], move = { ArrowLeft: -step, ArrowRight: step }[event.key];
    if (to !== undefined || move) event.preventDefault();
    if (to !== undefined) choose(rows[Math.max(0, Math.min(rows.length - 1, to))]);
    if (move) cursor(shown.at + move);
  });
  const follow = (row) => { mark.hidden = !row || (row.head === null) === each; if (!mark.hidden) place(mark, { top: row.y * unit + "px", height: ROW * unit + "px" }); };
  return { node: make("div", { class: "plot map" }, area), paint, follow };
}
function heatLegend(scale) {
  const bar = make("div", { class: "bar", role: "img", "aria-label": `shades from ${n(scale.low)} to ${n(scale.high)} tokens, darker or brighter is more` });
  const add = (level, text) => { const svg = canvas(10, 10); svg.append(draw("path", { class: "h" + level, d: box(0, 10, 0, 10) })); bar.append(make("span", null, svg, text)); };
  add(0, "filling");
  if (scale.low === scale.high) add(STEPS, n(scale.low));
  else for (let k = 0; k < STEPS; k++) add(k + 1, n(scale.low + Math.ceil((k * (scale.high - scale.low)) / STEPS)) + (k === STEPS - 1 ? `\u2013${n(scale.high)}` : ""));
  return make("div", { class: "heat-legend" }, make("span", { class: "muted" }, "Tokens, from:"), bar);
}
function heatTable(problem, at) {
  const { heads } = problem, cell = (text, tag) => make(tag || "td", tag ? { scope: "col" } : null, text), names = heads.layer_cells.map((_, layer) => layer);
  const head = make("tr", null, ...["layer", "cells a head", ...Array.from({ length: heads.kv_heads }, (_, i) => `head ${i}`)].map((text) => cell(text, "th")));
  return make("table", null, head, ...names.map((layer) => {
    const budgets = budgetsAt(heads, layer, at);
    return make("tr", null, ...[String(layer), n(heads.layer_cells[layer]), ...heldAt(heads, layer, at).map((held, i) => n(held) + (budgets ? ` of ${n(budgets[i])}` : ""))].map((text) => cell(text)));
  }));
}
function heatSection(problem) {
  const { heads } = problem, scale = heatScale(heads), state = { row: null, budgets: false }, readout = make("p", { class: "readout muted" });
  const layers = heatMap(problem, scale, false, state), each = heads.kv_heads > 1 ? heatMap(problem, scale, true, state) : null;
  const inside = make("div", { class: "scroll" }), details = make("details", null, make("summary", null, "The same as numbers, at the place of the cursor"), inside);
  state.show = () => {
    const at = shown.at, row = state.row || { layer: 0, head: null }, held = heldAt(heads, row.layer, at), budgets = budgetsAt(heads, row.layer, at);
    const one = row.head === null ? `${n(mean(held))} tokens in each KV head on average` : `${n(held[row.head])} tokens` + (budgets ? `; at a selection it may keep ${n(budgets[row.head])}` : "");
    readout.textContent = `After ${n(at)} tokens, ${rowText(row)}: ${one}. Cells of the layer: ${n(heads.layer_cells[row.layer])} a head` + (heads.shared ? " on average; they share them." : ".");
    layers.follow(state.row);
    if (each) each.follow(state.row);
    if (details.open) inside.replaceChildren(heatTable(problem, at));
  };
  details.addEventListener("toggle", state.show);
  problem.followHeads = state.show;
  const of = heads.kv_heads > 1 ? `, the mean of ${heads.kv_heads} KV heads` : "";
  const parts = [make("h3", null, `Layers: tokens kept${of}`, make("span", { class: "wide" }, "; at the right the layer's cells a head")), layers.node];
  if (each) {
    const choice = make("select", { "aria-label": "What the map of heads shows" }, make("option", { value: "" }, "tokens kept"), make("option", { value: "1" }, "budgets: what each may keep"));
    choice.addEventListener("change", () => { state.budgets = Boolean(choice.value); each.paint(); });
    parts.push(make("h3", null, "KV heads: ", heads.budgets.some((rows) => rows.length) ? choice : "tokens kept"), each.node);
  }
  const back = heads.recalls ? ` and ${n(heads.recalled_cells)} filled again from storage` : "";
  return make("section", { id: "heads", "aria-label": "Layers and heads" }, make("h2", null, "What each layer and head kept"),
    make("p", { class: "muted" }, `When a layer is full, tokens leave it: ${plural(heads.selections, "selection")} freed ${plural(heads.freed_cells, "cell")} of single heads${back}. A shade is what stayed at the last selection; until the next one a head gains a token with every token of the text, which the numbers below the maps include. Filling: everything is kept so far. Layers and heads count from 0. Point at a map, or press Tab and the arrow keys.`),
    heatLegend(scale), ...parts, readout, details);
}
