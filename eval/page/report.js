"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const identities = new Map(DATA.manifests.map((manifest) => [manifest, JSON.parse(manifest.identity)]));
const SVG = ["svg", "g", "path", "line", "text", "circle"];
const $ = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const label = (method) => DATA.methods[method] || method;
const shown = (x) => (typeof x === "number" && !Number.isInteger(x) ? String(+x.toPrecision(5)) : String(x));

/** An element with attributes and children; a string becomes text, never markup. */
function make(tag, attributes = {}, ...children) {
  const found = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}

// --- Likelihood trend -------------------------------------------------------------------------------------------

const WIDTH = 460, HEIGHT = 270, LEFT = 52, RIGHT = 10, TOP = 24, BOTTOM = 34;
const folders = unique(DATA.trend.map((run) => run.folder));
const methods = [...Object.keys(DATA.methods), ...unique(DATA.trend.map((run) => run.method))]
  .filter((method, i, all) => all.indexOf(method) === i && DATA.trend.some((run) => run.method === method));
const usual = ["dpo", "nca_pair", "infonca", "nca"].filter((method) => methods.includes(method));

const color = (method) => DATA.colors[method] || "#000";
const dashes = (method) => DATA.dashes[method] || [];

function swatch(stroke, dash) {
  return make("svg", { width: 26, height: 10 },
    make("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke, "stroke-width": 2.5, "stroke-dasharray": dash.join(" ") }));
}

function addControls() {
  for (const method of methods) {
    const box = make("input", { type: "checkbox", name: "method", value: method });
    box.checked = !usual.length || usual.includes(method);
    $("methods").append(make("label", {}, box, " ", swatch(color(method), dashes(method)), " ", label(method)));
  }
  for (const seed of unique(DATA.trend.map((run) => run.seed)).sort((a, b) => a - b)) {
    const box = make("input", { type: "checkbox", name: "seed", value: seed });
    box.checked = true;
    $("seeds").append(make("label", {}, box, " ", String(seed)));
  }
  if (folders.length > 1) {
    const select = make("select", { id: "folder" }, ...folders.map((folder) => make("option", { value: folder }, folder)));
    $("controls").append(make("fieldset", {}, make("legend", {}, "folder"), select));
  }
  $("controls").addEventListener("change", drawTrend);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

const checked = (name) => [...document.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value);

/** The mean of several lines at the x of the first, with straight lines between measurements. */
function mean(lines) {
  const at = (points, x) => {
    const after = points.findIndex((point) => point.x >= x - 1e-9);
    if (after < 0) return points[points.length - 1].y;
    if (after === 0) return points[0].y;
    const [a, b] = [points[after - 1], points[after]];
    return a.y + ((b.y - a.y) * (x - a.x)) / (b.x - a.x);
  };
  return lines[0].map(({ x }) => ({ x, y: lines.reduce((sum, points) => sum + at(points, x), 0) / lines.length }));
}

/** What is to be drawn: panels with lines; a line has a name, a look and the points of its seeds. */
function panels() {
  const folder = folders.length > 1 ? $("folder").value : folders[0];
  const quantity = $("quantity").value + $("tokens").value, split = $("split").value;
  const [chosen, seeds] = [checked("method"), checked("seed")];
  const runs = DATA.trend.filter((run) => run.folder === folder && run.split === split);
  const regimes = unique([...DATA.regimes, ...runs.map((run) => run.regime)])
    .filter((regime) => runs.some((run) => run.regime === regime));
  const line = (regime, method, side, name, stroke, dash) => {
    const own = runs.filter((run) => run.regime === regime && run.method === method && seeds.includes(String(run.seed)));
    const lines = own.filter((run) => run.series[side] && run.series[side][quantity]).map((run) =>
      run.series[side][quantity].map((y, i) => ({ x: run.steps[i] / Math.max(run.steps[run.steps.length - 1], 1), y, run, i, name })));
    return lines.length ? [{ name, stroke, dash, lines }] : [];
  };
  const found = [];
  if ($("sides").value === "sides") {
    for (const side of ["chosen", "rejected"]) {
      for (const regime of regimes) {
        const lines = methods.filter((method) => chosen.includes(method)).flatMap((method) =>
          line(regime, method, side, label(method), color(method), dashes(method)));
        if ($("paper").checked && quantity === "r") {
          for (const [key, points] of Object.entries(DATA.paper)) {
            const [method, of] = key.split("/");
            if (of === side) {
              const name = `${label(method)}, paper (7B)`;
              lines.push({ name, stroke: color(method), dash: method === "dpo" ? [2, 3] : [6, 2, 2, 2, 2, 2], lines: [points.map(([x, y]) => ({ x, y, name }))] });
            }
          }
        }
        found.push({ title: `${side}, ${regime}`, row: side, lines });
      }
    }
  } else {
    const ranks = unique(runs.flatMap((run) => Object.keys(run.series))).filter((side) => side.startsWith("rank")).sort();
    const looks = [["#00224e", []], ["#575d6d", [8, 3]], ["#8a8678", [6, 2, 2, 2]], ["#d0b541", [2, 2]]];
    for (const regime of regimes) {
      for (const method of methods.filter((name) => chosen.includes(name))) {
        const lines = ranks.flatMap((rank, i) => line(regime, method, rank, i ? rank : `${rank} (best)`, ...looks[i % 4]));
        if (lines.length) found.push({ title: `${label(method)}, ${regime}`, row: "ranks", lines });
      }
    }
  }
  return { found, unit: DATA.units[quantity] };
}

function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const marks = [];
  for (let n = Math.ceil(low / step); n * step <= high + 1e-12; n++) marks.push(+(n * step).toPrecision(6));
  return marks;
}

function drawPanel(panel, [low, high], unit) {
  const px = (x) => LEFT + x * (WIDTH - LEFT - RIGHT);
  const py = (y) => TOP + ((high - y) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${panel.title}: ${unit}` });
  svg.append(make("text", { class: "title", x: LEFT, y: 13 }, panel.title));
  for (const mark of ticks(low, high)) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(mark), y2: py(mark), stroke: mark === 0 ? "#18181b" : "#e4e4e7" }));
    svg.append(make("text", { x: LEFT - 6, y: py(mark) + 4, "text-anchor": "end" }, String(mark)));
  }
  for (const mark of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(make("text", { x: px(mark), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(mark)));
  }
  svg.append(make("text", { x: px(0.5), y: HEIGHT - 3, "text-anchor": "middle" }, "share of training"));
  svg.append(make("text", { transform: `translate(11 ${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, unit));
  const points = [];
  for (const { name, stroke, dash, lines } of panel.lines) {
    const path = (of, width, opacity) => make("path", {
      d: of.map(({ x, y }, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join(""), fill: "none", stroke,
      "stroke-width": width, "stroke-opacity": opacity, "stroke-dasharray": dash.join(" "), "data-line": name,
    });
    if (lines.length > 1) lines.forEach((of) => svg.append(path(of, 1, 0.4)));
    svg.append(path(lines.length > 1 ? mean(lines) : lines[0], 2.4, 1));
    lines.flat().forEach((point) => points.push({ ...point, left: px(point.x), top: py(point.y) }));
  }
  const ring = make("circle", { r: 5, fill: "none", stroke: "#18181b", "stroke-width": 1.5, visibility: "hidden" });
  svg.append(ring);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const far = ({ left, top }) => Math.hypot(left - x, top - y);
    const point = points.reduce((best, next) => (best === null || far(next) < far(best) ? next : best), null);
    return point && far(point) < 40 ? point : null;
  };
  const leave = () => { $("tooltip").hidden = true; ring.setAttribute("visibility", "hidden"); };
  svg.addEventListener("mousemove", (event) => {
    const point = nearest(event);
    if (point === null) return leave();
    ring.setAttribute("cx", point.left);
    ring.setAttribute("cy", point.top);
    ring.setAttribute("visibility", "visible");
    const lines = [`${point.name}: ${shown(point.y)}`];
    if (point.run) {
      const { seed, steps, kl, accuracy, prompts } = point.run;
      lines.push(`seed ${seed}, step ${steps[point.i]}, ${prompts ?? "?"} prompts`);
      if (accuracy[point.i] != null) lines.push(`accuracy ${shown(accuracy[point.i])}`);
      if (kl[point.i] != null) lines.push(`KL ${shown(kl[point.i])} nats a response`);
      lines.push("click for its record");
    }
    const tip = $("tooltip");
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
  svg.addEventListener("mouseleave", leave);
  svg.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point && point.run) show([`t${DATA.trend.indexOf(point.run)}`]);
  });
  return svg;
}

function drawTrend() {
  const perToken = $("tokens").value !== "";
  $("paper").disabled = $("quantity").value !== "r" || perToken || $("sides").value !== "sides";
  const { found, unit } = panels(), ranges = {};
  for (const panel of found) {
    const values = panel.lines.flatMap((line) => line.lines.flat().map((point) => point.y));
    const [low, high] = ranges[panel.row] || [Infinity, -Infinity];
    ranges[panel.row] = [Math.min(low, ...values), Math.max(high, ...values)];
  }
  const known = methods.map(label), lines = found.flatMap((panel) => panel.lines).filter(({ name }) => !known.includes(name));
  $("legend").replaceChildren(...unique(lines.map(({ name }) => name)).map((name) => {
    const { stroke, dash } = lines.find((line) => line.name === name);
    return make("span", {}, swatch(stroke, dash), " ", name);
  }));
  $("plots").replaceChildren(...found.map((panel) => {
    const [low, high] = ranges[panel.row].every(Number.isFinite) ? ranges[panel.row] : [-1, 1];
    const margin = 0.05 * (high - low) || 0.5;
    return drawPanel(panel, [low - margin, high + margin], unit);
  }));
  if (!found.length) $("plots").append(make("p", { class: "note" }, "no trend records for this choice"));
}

// --- From a cell to its records, manifests and commands ---------------------------------------------------------

const byHash = new Map(DATA.manifests.map((manifest) => [manifest.hash, manifest]));
const byOutput = new Map(DATA.manifests.flatMap((manifest) =>
  Object.values(identities.get(manifest).outputs || {}).map((digest) => [digest, manifest])));

/** The manifests whose outputs one was made from, by content: those before it, nearest first. */
function before(manifest) {
  const found = [];
  for (let next = [manifest]; next.length; ) {
    const { settings = {}, inputs = {} } = identities.get(next.shift());
    for (const digest of [settings.policy, settings.model, ...Object.values(inputs)]) {
      const made = byOutput.get(digest);
      if (made && made !== manifest && !found.includes(made)) {
        found.push(made);
        next.push(made);
      }
    }
  }
  return found;
}

function commandOf(manifest, title) {
  const link = make("a", { href: `#manifest=${manifest.hash}` }, manifest.hash.slice(0, 12));
  const commit = manifest.commit ? `commit ${manifest.commit.slice(0, 12)}${manifest.dirty ? " (changed files)" : ""}` : "commit unknown";
  return make("div", {}, `${title}, manifest `, link, `, ${commit}:`, make("pre", {}, String(manifest.command)));
}

function commands(record, title) {
  const own = byHash.get(record.manifest);
  if (!own) return [make("p", { class: "note" }, `manifest ${record.manifest}: not among manifests.jsonl`)];
  const earlier = before(own), found = [commandOf(own, title)];
  if (earlier.length) {
    found.push(make("details", {}, make("summary", {}, `the ${earlier.length} stages before it, nearest first`),
      ...earlier.map((manifest) => commandOf(manifest, manifest.stage))));
  }
  return found;
}

const fields = (record, names) => make("table", {}, ...names.map((name) => make("tr", {}, make("th", {}, name), make("td", {}, shown(record[name])))));
const file = (record, name) => (record.folder === "." ? name : `${record.folder}/${name}`);

function detail(reference) {
  const [kind, key] = [reference[0], reference.slice(1)];
  if (kind === "m" && byHash.has(key)) return make("article", {}, commandOf(byHash.get(key), byHash.get(key).stage || "made by"));
  if (kind === "s" && DATA.scores[key]) {
    const score = DATA.scores[key];
    return make("article", {}, make("h3", {}, `${file(score, "scores.jsonl")}, line ${score.line}`),
      fields(score, ["policy", "seed", "benchmark", "metric", "decoding", "value", "low", "high", "n", "judge"]),
      ...commands(score, "answers by"));
  }
  if (kind === "t" && DATA.trend[key]) {
    const run = DATA.trend[key], last = run.steps.length - 1, values = {};
    for (const side of ["chosen", "rejected"]) values[`${side} log-ratio`] = run.series[side]?.log_ratio?.[last] ?? "-";
    const record = { ...run, ...values, step: run.steps[last], kl: run.kl[last] ?? "-", accuracy: run.accuracy[last] ?? "-" };
    return make("article", {}, make("h3", {}, `${file(run, "trend.jsonl")}, line ${run.lines[last]} (last of ${run.lines.length})`),
      fields(record, ["policy", "seed", "split", "step", "kl", "accuracy", ...Object.keys(values)]), ...commands(run, "trained by"));
  }
  return make("article", {}, `no such record: ${reference}`);
}

function show(references) {
  $("detail").replaceChildren(make("h3", {}, `${references.length} record${references.length > 1 ? "s" : ""} behind this number`),
    ...references.map(detail));
  $("panel").hidden = false;
  $("panel").scrollTop = 0;
}

function hide() {
  $("panel").hidden = true;
  document.querySelectorAll("td.shown").forEach((cell) => cell.classList.remove("shown"));
}

function openCell(cell) {
  hide();
  cell.classList.add("shown");
  show(cell.dataset.records.split(" "));
}

document.addEventListener("click", (event) => {
  const cell = event.target.closest("td[data-records]");
  if (cell) openCell(cell);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (event.key === "Enter" && event.target.matches("td[data-records]")) openCell(event.target);
});
$("close").addEventListener("click", hide);

// --- Records and manifests --------------------------------------------------------------------------------------

const COLUMNS = ["policy", "seed", "benchmark", "metric", "decoding", "value", "low", "high", "n", "judge"];
const FILTERS = ["folder", "policy", "benchmark", "metric", "decoding", "seed"], MOST = 200;

function addFilters() {
  for (const name of FILTERS) {
    const values = unique(DATA.scores.map((score) => String(score[name])));
    if (values.length < 2) continue;
    const select = make("select", { name, "aria-label": name }, make("option", { value: "" }, `any ${name}`),
      ...values.map((value) => make("option", { value }, value)));
    $("filters").append(select);
  }
  $("filters").addEventListener("change", listScores);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
}

function listScores() {
  const wanted = [...$("filters").elements].filter((select) => select.value !== "");
  const found = DATA.scores.map((score, i) => [score, i]).filter(([score]) => wanted.every((select) => String(score[select.name]) === select.value));
  $("found").textContent = `${found.length} records${found.length > MOST ? `, the first ${MOST} shown` : ""}; click a value for its command`;
  const head = make("thead", {}, make("tr", {}, ...COLUMNS.map((name) => make("th", {}, name))));
  const rows = found.slice(0, MOST).map(([score, i]) => make("tr", {}, ...COLUMNS.map((name) =>
    make("td", name === "value" ? { "data-records": `s${i}`, tabindex: 0 } : {}, shown(score[name])))));
  $("scores").replaceChildren(head, make("tbody", {}, ...rows));
}

function listManifests() {
  const words = $("search").value.trim().toLowerCase();
  const found = DATA.manifests.filter((m) => [m.hash, m.stage, m.policy, m.command].join(" ").toLowerCase().includes(words));
  $("manifest-list").replaceChildren(...found.map((manifest) => {
    const entry = make("details", { id: `manifest=${manifest.hash}` },
      make("summary", {}, make("code", {}, manifest.hash.slice(0, 12)), ` seed ${manifest.seed}, ${manifest.stage}`));
    entry.addEventListener("toggle", () => {
      if (entry.open && entry.children.length === 1) {
        entry.append(commandOf(manifest, "made by"), `SHA-256 of its identity: ${manifest.hash}`, make("pre", { class: "identity" }, manifest.identity));
      }
    });
    return entry;
  }));
}

function openManifest() {
  const hash = decodeURIComponent(location.hash.slice(1));
  if (!hash.startsWith("manifest=")) return;
  hide();
  $("search").value = "";
  listManifests();
  const entry = $(hash);
  if (entry) {
    entry.open = true;
    entry.scrollIntoView();
  }
}

addControls();
addFilters();
listScores();
listManifests();
drawTrend();
document.querySelectorAll("td[data-records]").forEach((cell) => cell.setAttribute("tabindex", 0));
$("search").addEventListener("input", listManifests);
addEventListener("hashchange", openManifest);
openManifest();
