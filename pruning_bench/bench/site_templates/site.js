// Joins the bundled libraries to the records of a page: Plotly draws, DataTables sorts and filters. Texts of entries
// reach the page as text nodes or through `plain`; nothing of an entry is ever read as markup.
"use strict";
const one = selector => document.querySelector(selector);
const page = one("#data") ? JSON.parse(one("#data").textContent) : {};
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const tints = 7;   // the colours --c0 to --c6 of the style sheet, after Okabe and Ito
const redraw = [];   // what to draw again when colours or widths change

// numbers

function short(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (Math.abs(x) >= size) return Number((x / (unit === "k" ? 1e3 : size)).toPrecision(digits)) + unit;
  return String(Number(x.toPrecision(digits)));
}

function duration(s) {
  if (s < 90) return short(s, 2) + " s";
  if (s < 5400) return short(s / 60, 2) + " min";
  return s < 172800 ? short(s / 3600, 2) + " h" : short(s / 86400, 2) + " days";
}

// the address: what is shown is kept behind the #, so that a link shows the same

function fromAddress() {
  let text = location.hash.slice(1);
  return text.includes("=") ? new URLSearchParams(text) : new URLSearchParams();
}

function toAddress(state) {
  const text = new URLSearchParams(Object.entries(state).filter(([, v]) => v !== "" && v !== null)).toString();
  if (text !== location.hash.slice(1)) history.replaceState(null, "", "#" + text);
}

function setField(field, value) {
  if (field.type === "checkbox") field.checked = value !== "no";
  else if (field.tagName !== "SELECT" || [...field.options].some(o => o.value === value)) field.value = value;
}

// plots

function layout(more) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { color: colour("ink"), size: innerWidth < 640 ? 11 : 13, family: "system-ui, DejaVu Sans, sans-serif" },
    margin: { l: 60, r: 20, t: 30, b: 50 }, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest };
}

const options = { displaylogo: false, responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

function logTicks([low, high]) {   // 1, 2 and 5 times powers of ten; `low` and `high` are logarithms
  const all = [];
  for (let k = Math.floor(low); k <= high; k++) for (const m of [1, 2, 5]) all.push(m * 10 ** k);
  const found = all.filter(v => Math.log10(v) >= low && Math.log10(v) <= high);
  const shown = found.length > 12 ? found.filter(v => Number.isInteger(Math.round(1e6 * Math.log10(v)) / 1e6)) : found;
  return { tickvals: shown, ticktext: shown.map(v => short(v)) };
}

function mark(r) {
  return (r.control ? "diamond" : "circle") + (r.verified ? "" : "-open");
}

function hover(r) {
  const lines = [`<b>${plain(r.label)}</b> at sparsity ${short(r.sparsity)}`, `${plain(r.metric)} ${short(r.value, 4)}`];
  if (r.low !== null) lines.push(`95 % interval ${short(r.low, 4)} to ${short(r.high, 4)}`);
  lines.push(`${r.seeds} seeds, ${plain(r.badge)}`);
  return lines.join("<br>");
}

const above = r => r.high === null ? null : r.high - r.value;
const below = r => r.low === null ? null : r.value - r.low;

function trace(rows, along, across, extra = {}) {
  const bars = { type: "data", symmetric: false, array: rows.map(above), arrayminus: rows.map(below), thickness: 1.5,
    width: 4, color: extra.line ? extra.line.color : colour("soft") + "aa" };
  const own = rows.map(r => colour(r.control ? "control" : "method"));
  return { type: "scatter", mode: "markers", x: rows.map(along), y: rows.map(across), text: rows.map(hover),
    hoverinfo: "text", [extra.flat ? "error_x" : "error_y"]: bars,
    marker: { symbol: rows.map(mark), size: rows.map(r => r.id === page.selected ? 16 : 10), opacity: 1,
      line: { width: 2, color: own }, color: own }, ...extra };
}

function qualityAxis(rows) {
  const values = rows.map(r => r.value), title = `${plain(rows[0].metric)}, ${rows[0].higher ? "higher" : "lower"} is better`;
  const wide = Math.min(...values) > 0 && Math.max(...values) > 4 * Math.min(...values) && !rows[0].higher;
  if (!wide) return { title: { text: title }, type: "linear", range: qualityRange(rows, false) };
  const range = qualityRange(rows, true);
  return { title: { text: title + ", logarithmic" }, type: "log", range, ...logTicks(range) };
}

function denseLine(rows, flat) {   // a line, and a band where entries trained their own dense model
  const all = rows.map(r => r.dense), low = Math.min(...all), high = Math.max(...all);
  const at = all.reduce((x, y) => x + y) / all.length, line = { color: colour("soft"), dash: "dash", width: 1.5 };
  const [v, w] = flat ? ["x", "y"] : ["y", "x"], across = { [w + "ref"]: "paper", [w + "0"]: 0, [w + "1"]: 1 };
  const range = high > low && innerWidth >= 640 ? ` (${short(low, 4)} to ${short(high, 4)})` : "";
  const text = (flat ? "dense " : "– – dense ") + short(at, 4) + range;
  const place = flat ? { x: at } : { xref: "paper", x: 0, xanchor: "left" };
  return { annotations: [{ text, yref: "paper", y: 1, yanchor: "bottom", ...place, showarrow: false, font: { color: colour("soft"), size: 12 } }],
    shapes: [{ type: "line", [v + "0"]: at, [v + "1"]: at, ...across, line },
      { type: "rect", [v + "0"]: low, [v + "1"]: high, ...across, line: { width: 0 }, fillcolor: colour("soft"), opacity: .15 }] };
}

function qualityRange(rows, log) {   // all means and the dense model; whiskers may double that, and are cut beyond
  const fit = v => log ? Math.log10(v) : v, keep = v => v !== null && (!log || v > 0);
  const means = rows.flatMap(r => [r.value, r.dense]).filter(keep).map(fit), ends = rows.flatMap(r => [r.low, r.high]).filter(keep).map(fit);
  const low = Math.min(...means), high = Math.max(...means), span = high - low || Math.abs(high) || 1;
  return [Math.max(low - .5 * span, Math.min(low, ...ends)) - .06 * span, Math.min(high + .5 * span, Math.max(high, ...ends)) + .06 * span];
}

function cutNote(rows, [low, high], log) {
  const fit = v => log ? (v > 0 ? Math.log10(v) : -Infinity) : v;
  const cut = rows.filter(r => r.low !== null && (fit(r.low) < low || fit(r.high) > high)).length;
  return cut ? `${cut} ${cut === 1 ? "interval reaches" : "intervals reach"} beyond the plot; the table has them. ` : "";
}

function drawDots(place, rows) {
  const quality = qualityAxis(rows), better = (a, b) => rows[0].higher ? a.value - b.value : b.value - a.value;
  const sorted = [...rows].sort(better), dense = denseLine(rows, true), log = quality.type === "log", range = quality.range, narrow = place.clientWidth < 560;
  const brief = r => narrow && r.control ? r.label.replace("control: ", "") : r.label;   // its mark says so already
  const cut = text => narrow && text.length > 20 ? text.slice(0, 19) + "…" : text;
  Plotly.react(place, [trace(sorted, r => r.value, (r, i) => i, { flat: true })], layout({
    height: 110 + 24 * sorted.length, xaxis: quality, shapes: dense.shapes,
    annotations: dense.annotations.map(a => ({ ...a, x: log ? Math.log10(a.x) : a.x })),
    yaxis: { tickvals: sorted.map((r, i) => i), ticktext: sorted.map(r => plain(cut(brief(r)))), range: [-.7, sorted.length - .3] }
  }), options);
  return cutNote(rows, range, log);
}

function spreadLabels(places, gap, top, bottom) {   // positions in pixels, at least `gap` apart, in the same order
  const order = places.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]), out = [];
  let last = top - gap;
  for (const [y, i] of order) out[i] = last = Math.max(y, last + gap);
  let limit = bottom + gap;
  for (const [, i] of [...order].reverse()) out[i] = limit = Math.min(out[i], limit - gap);
  return out;
}

function drawCurves(place, rows, along, title) {
  const curves = [...new Set(rows.map(r => r.entry))].map(k => rows.filter(r => r.entry === k).sort((a, b) => along(a) - along(b)));
  const last = c => c[c.length - 1].value, sign = rows[0].higher ? -1 : 1;
  const ends = rows.map(along), most = Math.max(...ends), reaches = c => along(c[c.length - 1]) >= most - .02 * (most - Math.min(...ends));
  curves.sort((a, b) => reaches(b) - reaches(a) || sign * (last(a) - last(b)));
  const quality = qualityAxis(rows), dense = denseLine(rows, false);
  const narrow = place.clientWidth < 560, height = narrow ? 420 : Math.max(440, 110 + 17 * curves.filter(reaches).length);
  const tint = i => i < tints ? colour("c" + i) : colour("soft");
  const dash = ["solid", "dash", "dot", "dashdot"];
  const traces = curves.map((c, i) => trace(c, along, r => r.value, {
    mode: c.length > 1 ? "lines+markers" : "markers",
    line: { color: tint(i), width: i < tints ? 2 : 1, dash: dash[Math.floor(i / tints) % 4] },
    marker: { symbol: c.map(mark), size: 9, opacity: 1, color: tint(i), line: { width: 2, color: tint(i) } } }));
  const scale = v => quality.type === "log" ? Math.log10(v) : v;
  const range = quality.range;
  const inner = height - 80, pixel = v => inner * (range[1] - scale(v)) / (range[1] - range[0]);
  const named = curves.filter(reaches), level = named.map(last).map(pixel), at = spreadLabels(level, 16, 0, inner);
  const labels = named.map((c, i) => ({ text: plain(c[0].label), x: along(c[c.length - 1]), y: scale(last(c)),
    ax: 18, ay: at[i] - level[i], xanchor: "left", showarrow: true, arrowhead: 0, arrowwidth: .6,
    arrowcolor: tint(i), font: { color: i < tints ? colour("ink") : colour("soft"), size: 12 } }));
  const xs = rows.map(along), wide = Math.max(...xs) - Math.min(...xs) || .1;
  const all = [...new Set(xs.map(x => Number(x.toFixed(2))))].sort((a, b) => b - a), levels = [];
  for (const x of all) if (!levels.length || levels[levels.length - 1] - x > .06 * wide) levels.push(x);   // the highest first
  const room = Math.max(...named.map(c => c[0].label.length)) * 7 + 30;
  const share = Math.min(.5, room / Math.max(300, place.clientWidth - 90));
  Plotly.react(place, traces, layout({ height, shapes: dense.shapes,
    xaxis: { title: { text: title }, ...(levels.length < 9 && !narrow ? { tickvals: levels } : {}), range: [Math.min(...xs) - .04 * wide, Math.max(...xs) + wide * (.03 + share / (1 - share))] },
    yaxis: quality, annotations: [...dense.annotations, ...(narrow ? [] : labels)] }), options);
  const hidden = narrow || labels.length === curves.length ? "" : "Names stand beside the curves that reach the highest sparsity: point at a mark for another. ";
  return cutNote(rows, range, quality.type === "log") + hidden + (narrow ? "Touch a point for its method; the table names them all." : "");
}

function placeLabels(points, boxes) {   // greedy: beside, above or below the point, or not at all
  const free = b => !boxes.some(o => b[0] < o[2] && b[2] > o[0] && b[1] < o[3] && b[3] > o[1]);
  return points.map(p => {
    const w = 6.6 * p.text.length + 6, beside = [[9, -8, "left"], [-9 - w, -8, "right"]], over = [[-w / 2, -26, "center"], [-w / 2, 10, "center"]];
    const spots = p.front ? [...over, ...beside] : [...beside, ...over];   // a front runs beside its marks
    for (const [dx, dy, anchor] of spots) {
      const box = [p.x + dx, p.y + dy, p.x + dx + w, p.y + dy + 16];
      if (box[0] < 0 || box[2] > p.limit || !free(box)) continue;
      boxes.push(box);
      return { dx: anchor === "left" ? 9 : anchor === "right" ? -9 : 0, dy: -(dy + 8), anchor };
    }
    return null;
  });
}

function drawScatter(place, rows, axis, title, many) {
  const quality = qualityAxis(rows), dense = denseLine(rows, false), height = 480;
  const xs = rows.map(r => r[axis]), log = Math.min(...xs) > 0 && Math.max(...xs) > 8 * Math.min(...xs);
  const groups = {};
  const front = r => (many ? r.wide_fronts : r.fronts).includes(axis);
  for (const r of rows.filter(front)) (groups[`${r.kind} ${r.steps}`] ??= []).push(r);
  const fronts = Object.values(groups).filter(g => g.length > 1).map(g => g.sort((a, b) => a[axis] - b[axis])).map(g => ({
    type: "scatter", mode: "lines", x: g.map(r => r[axis]), y: g.map(r => r.value), hoverinfo: "skip",
    line: { color: colour("front"), width: 2, shape: "hv" } }));
  const extra = axis !== "latency" ? {} : { error_x: { type: "data", symmetric: false, thickness: 1, width: 3, color: colour("soft"),
    array: rows.map(r => r.latency_high - r.latency), arrayminus: rows.map(r => r.latency - r.latency_low) } };
  const sx = v => log ? Math.log10(v) : v, sy = v => quality.type === "log" ? Math.log10(v) : v;
  const span = (values, pad) => { const lo = Math.min(...values), hi = Math.max(...values), d = (hi - lo || Math.abs(hi) || 1); return [lo - pad * d, hi + pad * d]; };
  const xr = span(xs.map(sx), .07), yr = quality.range;
  const width = Math.max(220, place.clientWidth - 90), inner = height - 80;
  const points = rows.map(r => ({ r, text: r.label + (many ? " " + short(r.sparsity) : ""), limit: width, front: front(r),
    x: width * (sx(r[axis]) - xr[0]) / (xr[1] - xr[0]), y: inner * (yr[1] - sy(r.value)) / (yr[1] - yr[0]) }));
  points.sort((a, b) => b.front - a.front || a.r.control - b.r.control);
  const boxes = points.map(p => [p.x - 6, p.y - 6, p.x + 6, p.y + 6]);
  const placed = placeLabels(points, boxes);
  const labels = points.flatMap((p, i) => placed[i] ? [{ text: plain(p.text), x: sx(p.r[axis]), y: sy(p.r.value), showarrow: false,
    xshift: placed[i].dx, yshift: placed[i].dy, xanchor: placed[i].anchor, font: { size: 12 } }] : []);
  Plotly.react(place, [...fronts, trace(rows, r => r[axis], r => r.value, extra)], layout({ height, shapes: dense.shapes,
    xaxis: { title: { text: title + (log ? ", logarithmic" : "") }, type: log ? "log" : "linear", range: xr, ...(log ? logTicks(xr) : {}) },
    yaxis: quality, annotations: [...dense.annotations, ...labels] }), options);
  const hidden = labels.length < points.length ? `${points.length - labels.length} labels would cover others: point at a mark, or see the table. ` : "";
  const bars = axis === "latency" ? "Marks are medians, bars reach from the least to the 90th percentile. " : "";
  return bars + cutNote(rows, yr, quality.type === "log") + (fronts.length ? "The line joins the rows that no comparable row beats. " : "") + hidden;
}

// the page of a task

const axisTitles = { removed: "achieved sparsity", macs: "MACs", left: "size left", latency: "latency, ms",
  seconds: "seconds of pruning and retraining", training_steps: "equivalent training steps" };

function sizeTitle(rows) {   // what "left" counts
  const kinds = new Set(rows.map(r => ["structure", "examples"].includes(r.kind) ? r.kind : "weights"));
  if (kinds.size > 1) return "parameters left; of unstructured rows those that are not zero";
  return { structure: "parameters left", examples: "share of the examples kept", weights: "parameters that are not zero" }[[...kinds][0]];
}

function drawTask(state, rows) {
  const place = one("#plot"), note = one("#note"), drawn = rows.filter(r => r.value !== null), said = [];
  if (drawn.length < rows.length) said.push(`${rows.length - drawn.length} rows without a result are only in the table.`);
  let axis = state.sparsity === "" && state.against === "method" ? "removed" : state.against;
  let points = axis === "method" ? drawn : drawn.filter(r => r[axis] !== null);
  if (points.length < drawn.length) said.push(`${drawn.length - points.length} rows have no ${axisTitles[axis].split(",")[0]}: not measured, or unstable.`);
  const xs = points.map(r => r[axis]), spread = Math.max(...xs) - Math.min(...xs) > .02 * Math.max(...xs);
  if (axis !== "method" && points.length && !spread) {
    said.push(`All ${points.length} rows have the same ${axisTitles[axis].split(",")[0]} within 2 % (${short(xs[0])}), so each method's quality is shown.`);
    axis = "method"; points = drawn;
  }
  if (axis !== state.against && state.against === "method" && points.length) said.push("All sparsities: quality against the achieved sparsity.");
  place.hidden = !points.length;
  if (!points.length) said.push("No row fits the choices above.");
  else if (axis === "method") said.push(drawDots(place, points));
  else if (axis === "removed") said.push(drawCurves(place, points, r => r.removed, axisTitles.removed));
  else said.push(drawScatter(place, points, axis, axis === "left" ? sizeTitle(points) : axisTitles[axis], state.sparsity === ""));
  if (points.some(r => !r.verified)) said.push("Hollow marks: nobody has made the entry again under today's code.");
  if (points.some(r => r.control)) said.push("Diamonds: controls.");
  note.textContent = said.filter(Boolean).join(" ");
}

function showYours(step) {
  for (const cell of document.querySelectorAll(".yours")) {
    const steps = cell.dataset.steps;
    cell.textContent = steps === "" ? "–" : (step > 0 ? "≈ " + duration(steps * step) : short(Number(steps)) + " steps");
  }
}

function startTask(table) {
  const form = one("#controls"), fields = form.elements, asked = fromAddress();
  const state = () => Object.fromEntries([...fields].filter(f => f.name).map(f => [f.name, f.type === "checkbox" ? (f.checked ? "" : "no") : f.value]));
  const fits = (r, s) => r.board === s.board && (s.sparsity === "" || r.sparsity === Number(s.sparsity)) && (s.badge === "" || r.badge === s.badge) && (s.kind === "" || r.kind === s.kind) && (s.controls !== "no" || !r.control);
  function usual(board) {
    const counts = {};
    for (const r of page.rows) if (r.board === board) counts[r.sparsity] = (counts[r.sparsity] ?? 0) + 1;
    return Object.keys(counts).sort((a, b) => counts[b] - counts[a] || b - a)[0];
  }
  function offer() {   // only sparsities that the board has
    const here = new Set(page.rows.filter(r => r.board === fields.board.value).map(r => String(r.sparsity)));
    for (const o of fields.sparsity.options) o.hidden = o.disabled = o.value !== "" && !here.has(o.value);
    if (fields.sparsity.selectedOptions[0]?.disabled) fields.sparsity.value = usual(fields.board.value);
  }
  DataTable.ext.search.push((settings, data, index) => settings.nTable.id !== "rows" || fits(page.rows[index], state()));
  function choose(row) {
    const found = row && page.rows.find(r => r.entry === row && fits(r, state()));
    page.selected = found ? found.id : null;
    for (const tr of document.querySelectorAll("#rows tbody tr")) tr.classList.toggle("selected-row", found && tr.dataset.id === String(found.id));
    return found;
  }
  function show(row = "") {
    offer(); table.draw(); showYours(Number(fields.step.value));
    const found = choose(row);
    drawTask(state(), page.rows.filter(r => fits(r, state())));
    toAddress({ ...state(), row });
    return found;
  }
  function read(params) {
    setField(fields.board, params.get("board") ?? page.start);
    setField(fields.sparsity, params.get("sparsity") ?? (params.has("board") ? "" : usual(fields.board.value)));
    for (const name of ["against", "kind", "badge", "step"]) setField(fields[name], params.get(name) ?? (name === "against" ? "method" : ""));
    setField(fields.controls, params.get("controls") ?? "");
    if (show(params.get("row") ?? "")) one("tr.selected-row").scrollIntoView({ block: "center" });
  }
  form.addEventListener("change", () => show());
  form.addEventListener("input", e => { if (e.target.name === "step") showYours(Number(e.target.value)); });
  form.addEventListener("submit", e => e.preventDefault());
  addEventListener("hashchange", () => { if (location.hash.includes("=")) read(fromAddress()); });
  redraw.push(() => drawTask(state(), page.rows.filter(r => fits(r, state()))));
  read(asked);
}

// the page of an entry

function drawStages() {
  const stages = ["dense", "after pruning", "after recovery"], names = Object.keys(page.stages);
  const traces = names.map((s, i) => ({ type: "scatter", mode: "lines+markers", x: stages, y: page.stages[s], connectgaps: false,
    line: { color: colour("c" + i % tints), width: 2, dash: ["solid", "dash", "dot"][Math.floor(i / tints) % 3] }, marker: { size: 9, symbol: i % 8 },
    name: "sparsity " + s, hovertemplate: "sparsity " + s + ", %{x}: %{y:.4g}<extra></extra>" }));
  const values = names.flatMap(s => page.stages[s]).filter(v => v !== null);
  const log = !page.higher && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values);
  Plotly.react(one("#stages"), traces, layout({ height: 320, showlegend: names.length > 1, legend: { orientation: "h", y: -.2 },
    xaxis: { type: "category" }, yaxis: { title: { text: plain(page.metric) + (log ? ", logarithmic" : "") }, type: log ? "log" : "linear" } }), options);
}

// the page that compares two methods

function difference(a, b) {   // a minus b, with its interval
  const p = page.pairs.find(p => p.a === a.id && p.b === b.id), q = p ? null : page.pairs.find(p => p.a === b.id && p.b === a.id);
  const flip = x => x === null ? null : -x;
  return p ?? (q ? { mean: -q.mean, low: flip(q.high), high: flip(q.low), by: q.by } : { mean: a.value - b.value, low: null, high: null, by: null });
}

function verdict(d, higher) {
  if (d.low === null) return "no interval";
  if (d.low <= 0 && d.high >= 0) return "not told apart";
  return (d.low > 0) === higher ? "A is better" : "B is better";
}

function startCompare() {
  const fields = one("#pair").elements, body = one("#differences tbody");
  function found() {
    const rows = k => page.rows.filter(r => r.entry === k && r.value !== null);
    return rows(fields.a.value).flatMap(a => rows(fields.b.value).filter(b => b.task === a.task && b.board === a.board && b.sparsity === a.sparsity)
      .map(b => ({ a, b, d: difference(a, b) })));
  }
  function draw(both) {
    const place = one("#plot");
    place.hidden = !both.length;
    if (!both.length) return;
    const part = ({ a, d }, x) => x === null ? null : 100 * x / Math.abs(a.dense) * (a.higher ? 1 : -1);
    const mean = both.map(r => part(r, r.d.mean)), ends = both.map(r => [part(r, r.d.low), part(r, r.d.high)].sort((x, y) => x - y));
    const narrow = place.clientWidth < 560, comma = narrow ? ",<br>" : ", ";
    const text = both.map(r => [r.a.task, `${r.a.board}, ${short(r.a.sparsity)}`].map(plain).join(comma));
    Plotly.react(place, [{ type: "scatter", mode: "markers", x: mean, y: both.map((r, i) => -i), text, hoverinfo: "x+text", marker: { size: 10, color: colour("method") },
      error_x: { type: "data", symmetric: false, thickness: 1.5, width: 4, color: colour("soft"),
        array: ends.map((e, i) => e[1] === null ? null : e[1] - mean[i]), arrayminus: ends.map((e, i) => e[0] === null ? null : mean[i] - e[0]) } }],
      layout({ height: 120 + (narrow ? 38 : 26) * both.length, yaxis: { tickvals: both.map((r, i) => -i), ticktext: text },
        xaxis: { title: { text: narrow ? "advantage of A, % of dense" : "advantage of A, in % of the dense model's result" } },
        shapes: [{ type: "line", x0: 0, x1: 0, yref: "paper", y0: 0, y1: 1, line: { color: colour("ink"), width: 1 } }] }), options);
  }
  function show() {
    const both = found();
    body.replaceChildren(...both.map(({ a, b, d }) => {
      const row = document.createElement("tr"), link = document.createElement("a");
      link.href = `tasks/${a.page}.html#${a.address}`; link.textContent = a.task;
      const cells = [link, a.board, short(a.sparsity), short(a.value, 4), short(b.value, 4), short(d.mean, 3),
        d.low === null ? "–" : `${short(d.low, 3)} to ${short(d.high, 3)}`, d.by ?? "–", verdict(d, a.higher), a.rank, b.rank];
      cells.forEach((c, i) => { const td = row.insertCell(); td.append(c); if (i < 2 || i === 7 || i === 8) td.className = "text"; });
      return row;
    }));
    one("#note").textContent = both.length ? `${both.length} ${both.length === 1 ? "row" : "rows"} in common.` : "These two were never measured on the same task, board and sparsity.";
    draw(both);
    toAddress({ a: fields.a.value, b: fields.b.value });
  }
  function read(asked) {
    for (const name of ["a", "b"]) setField(fields[name], asked.get(name) ?? page[name]);
    show();
  }
  one("#pair").addEventListener("change", show);
  addEventListener("hashchange", () => read(fromAddress()));
  redraw.push(() => draw(found()));
  read(fromAddress());
}

// every page

function startTable(place) {
  const value = x => x === "" ? null : Number(x);
  for (const [name, sign] of [["asc", 1], ["desc", -1]])   // what has no number comes last in both directions
    DataTable.ext.type.order["gap-last-" + name] = (x, y) => {
      const a = value(x), b = value(y);
      return a === null || b === null ? (a === null) - (b === null) : sign * (a - b);
    };
  const narrow = innerWidth < 640;
  return new DataTable(place, { paging: false, order: [], autoWidth: false, columnDefs: [
    { targets: "num", type: "gap-last" }, { targets: ["off", "more"], visible: false }, { targets: "wide", visible: !narrow }],
  layout: { topStart: place.querySelector("th.more") ? { buttons: [{ extend: "colvis", text: "Columns" }] } : null, topEnd: "search", bottomStart: "info" },
  language: { search: "Filter:", info: "_TOTAL_ rows", infoEmpty: "0 rows", infoFiltered: "of _MAX_" } });
}

one("#theme").addEventListener("click", () => {
  const dark = document.documentElement.classList.toggle("dark");
  try { localStorage.setItem("theme", dark ? "dark" : "light"); } catch { /* pages from a folder may have no storage */ }
  for (const again of redraw) again();
});

const place = one("#rows"), table = place && startTable(place);
if (one("#controls")) startTask(table);
else if (one(".yours")) showYours(0);
if (one("#stages")) { drawStages(); redraw.push(drawStages); }
if (one("#pair")) startCompare();
