// Draws the pictures of report.html from DATA, and lists the greetings.
const COLOURS = ["#777f8c", "#2f6fb4", "#c2571a", "#2c8a57", "#8a4fa3", "#a3861c", "#c23b6e", "#2a9aa8"];
const NAMES = Object.keys(DATA.policies), colour = Object.fromEntries(NAMES.map((n, i) => [n, COLOURS[i % COLOURS.length]]));
const CHINESE = {language: "语言质量", creativity: "创意", emotion: "情感共鸣", culture: "文化得体", richness: "内容充实"};
const W = 440, H = 290, EDGE = {left: 46, right: 14, top: 12, bottom: 40};
const percent = x => (100 * x).toFixed(0) + "%";

function element(parent, tag, attributes = {}, text) {
  const made = parent.namespaceURI.endsWith("svg") || tag === "svg"
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function canvas(id) {
  const figure = document.getElementById(id);
  figure.querySelector("svg")?.remove();
  const title = figure.querySelector("figcaption").firstChild.textContent.trim();
  return element(figure, "svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
}

function nothing(id, why) { element(canvas(id), "text", {x: W / 2, y: H / 2, "text-anchor": "middle", class: "soft"}, why); }

function ticks(lo, hi, most = 5) {
  const rough = (hi - lo) / most || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * unit).find(k => k >= rough), found = [];
  // Multiples, not a running sum: rounding would label the axis -5.55e-17 instead of 0.
  for (let n = Math.ceil(lo / step - 1e-9); n * step <= hi + step * 1e-9; n++) found.push(+(n * step).toPrecision(6));
  return found;
}

const short = x => Math.abs(x) >= 1e6 ? +(x / 1e6).toPrecision(3) + "M" : Math.abs(x) >= 1e4 ? +(x / 1e3).toPrecision(3) + "k" : String(x);

// Axes with labels; returns the functions from figures to places.
function axes(svg, xs, ys, {xlabel = "", ylabel = "", xshow = short, yshow = short} = {}) {
  const x = v => EDGE.left + (v - xs[0]) / (xs[1] - xs[0] || 1) * (W - EDGE.left - EDGE.right);
  const y = v => H - EDGE.bottom - (v - ys[0]) / (ys[1] - ys[0] || 1) * (H - EDGE.top - EDGE.bottom);
  for (const t of ticks(...ys)) {
    element(svg, "line", {x1: EDGE.left, x2: W - EDGE.right, y1: y(t), y2: y(t), class: "grid"});
    element(svg, "text", {x: EDGE.left - 6, y: y(t) + 4, "text-anchor": "end", class: "soft"}, yshow(t));
  }
  for (const t of ticks(...xs)) element(svg, "text", {x: x(t), y: H - EDGE.bottom + 16, "text-anchor": "middle", class: "soft"}, xshow(t));
  element(svg, "text", {x: (W + EDGE.left) / 2, y: H - 6, "text-anchor": "middle"}, xlabel);
  element(svg, "text", {x: 12, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${H / 2})`}, ylabel);
  return [x, y];
}

const path = points => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function excellence() {
  const svg = canvas("excellence"), row = (H - 50) / NAMES.length;
  const x = v => 110 + v * (W - 130);
  for (const t of [0, .25, .5, .75, 1]) {
    element(svg, "line", {x1: x(t), x2: x(t), y1: 10, y2: H - 36, class: "grid"});
    element(svg, "text", {x: x(t), y: H - 16, "text-anchor": "middle", class: "soft"}, percent(t));
  }
  NAMES.forEach((name, i) => {
    const y = 14 + row * (i + .5), p = DATA.policies[name];
    element(svg, "text", {x: 102, y: y + 4, "text-anchor": "end"}, name.length > 14 ? name.slice(0, 13) + "…" : name);
    [[p.excellence, -6, colour[name]], [p.excellence_at_equal_length, 6, "white"]].forEach(([r, dy, fill]) => {
      if (!r || !r.n) return;
      element(svg, "line", {x1: x(r.lo), x2: x(r.hi), y1: y + dy, y2: y + dy, stroke: colour[name], "stroke-width": 2});
      const dot = element(svg, "circle", {cx: x(r.value), cy: y + dy, r: 4.5, fill, stroke: colour[name], "stroke-width": 2});
      element(dot, "title", {}, `${name}: ${percent(r.value)} [${percent(r.lo)}, ${percent(r.hi)}]`);
    });
  });
}

function variety() {
  const graded = NAMES.filter(name => DATA.policies[name].excellence.n);
  if (!graded.length) return nothing("variety", "nothing was graded");
  const xs = graded.map(name => DATA.policies[name].distinct_2), ys = graded.map(name => DATA.policies[name].excellence);
  const room = .15 * (Math.max(...xs) - Math.min(...xs)) || .05;
  const [lo, hi] = [Math.min(...ys.map(r => r.lo)), Math.max(...ys.map(r => r.hi))];
  const svg = canvas("variety"), [x, y] = axes(svg, [Math.min(...xs) - room, Math.max(...xs) + 2 * room], [lo, hi + .05], {xlabel: "distinct-2", ylabel: "excellence", yshow: percent});
  graded.forEach((name, i) => {
    element(svg, "line", {x1: x(xs[i]), x2: x(xs[i]), y1: y(ys[i].lo), y2: y(ys[i].hi), stroke: colour[name], "stroke-opacity": .5, "stroke-width": 2});
    const dot = element(svg, "circle", {cx: x(xs[i]), cy: y(ys[i].value), r: 5, fill: colour[name]});
    element(dot, "title", {}, `${name}: excellence ${percent(ys[i].value)}, distinct-2 ${xs[i].toFixed(3)}`);
  });
}

function radar() {
  const svg = canvas("radar"), n = DATA.dimensions.length, R = H / 2 - 26, cx = W / 2, cy = H / 2 + 18;
  const at = (i, grade) => [cx + Math.sin(2 * Math.PI * i / n) * R * (grade - 1) / 2, cy - Math.cos(2 * Math.PI * i / n) * R * (grade - 1) / 2];
  for (const grade of [1.5, 2, 2.5, 3]) {
    element(svg, "path", {d: path(DATA.dimensions.map((_, i) => at(i, grade))) + "Z", class: "grid"});
    element(svg, "text", {x: cx + 4, y: at(0, grade)[1] + 12, class: "soft"}, grade);
  }
  DATA.dimensions.forEach((name, i) => {
    const [x, y] = at(i, 3.25), side = Math.abs(x - cx) < 5 ? "middle" : x > cx ? "start" : "end";
    element(svg, "line", {x1: cx, y1: cy, x2: at(i, 3)[0], y2: at(i, 3)[1], class: "grid"});
    element(svg, "text", {x, y: y - 3, "text-anchor": side}, name);
    element(svg, "text", {x, y: y + 11, "text-anchor": side, class: "soft"}, CHINESE[name]);
  });
  for (const name of NAMES) {
    const d = path(DATA.dimensions.map((dimension, i) => at(i, DATA.policies[name].dimensions[dimension] || 1))) + "Z";
    element(svg, "path", {d, fill: colour[name], "fill-opacity": .08, stroke: colour[name], "stroke-width": 2});
  }
}

function matrix() {
  const wins = DATA.wins.judged || {};
  if (!Object.keys(wins).length) return nothing("matrix", "no greetings were compared in pairs");
  const svg = canvas("matrix"), left = 100, top = 44, w = (W - left - 6) / NAMES.length, h = (H - top - 6) / NAMES.length;
  const cut = name => name.length * 7 > w + 8 && NAMES.length > 4 ? name.slice(0, Math.floor(w / 7)) + "…" : name;
  NAMES.forEach((a, i) => {
    element(svg, "text", {x: left - 8, y: top + h * (i + .5) + 4, "text-anchor": "end"}, a.length > 13 ? a.slice(0, 12) + "…" : a);
    element(svg, "text", {x: left + w * (i + .5), y: top - 10, "text-anchor": "middle"}, cut(a));
    NAMES.forEach((b, j) => {
      const r = (wins[a] || {})[b], fill = !r ? "#f1f1f3" : r.value >= .5 ? `rgba(44,138,87,${.1 + 1.4 * (r.value - .5)})` : `rgba(194,87,26,${.1 + 1.4 * (.5 - r.value)})`;
      element(svg, "rect", {x: left + w * j + 1, y: top + h * i + 1, width: w - 2, height: h - 2, fill});
      if (!r) return;
      element(svg, "text", {x: left + w * (j + .5), y: top + h * (i + .5) + (h > 40 ? 0 : 4), "text-anchor": "middle"}, percent(r.value));
      if (h > 40) element(svg, "text", {x: left + w * (j + .5), y: top + h * (i + .5) + 15, "text-anchor": "middle", class: "soft", style: "font-size:9.5px"}, `${percent(r.lo)}–${percent(r.hi)}`);
    });
  });
}

function costCurve() {
  const routes = Object.entries(DATA.cost), unit = document.querySelector("#cost-curve select").value;
  if (!routes.length) return nothing("cost-curve", "needs the summaries of steps 01 to 04");
  const most = Math.max(...routes.flatMap(([, points]) => points.map(p => p.cost[unit])));
  if (!most) return nothing("cost-curve", unit === "money" ? "no prices were given (--price-in, --price-out)" : "nothing was spent");
  const highest = Math.max(...routes.flatMap(([, points]) => points.map(p => p.excellence.hi)));
  const svg = canvas("cost-curve"), [x, y] = axes(svg, [0, most * 1.03], [0, Math.min(1, highest * 1.1)], {xlabel: unit, ylabel: "excellence", yshow: percent});
  routes.forEach(([route, points], i) => {
    const tint = colour[points.at(-1).at], rollout = p => p.at.includes("%");
    element(svg, "path", {d: path(points.map(p => [x(p.cost[unit]), y(p.excellence.value)])), fill: "none", stroke: tint, "stroke-width": 2});
    for (const p of points) {
      const place = x(p.cost[unit]);
      element(svg, "line", {x1: place, x2: place, y1: y(p.excellence.lo), y2: y(p.excellence.hi), stroke: tint, "stroke-opacity": .45});
      const dot = element(svg, "circle", {cx: place, cy: y(p.excellence.value), r: 4, fill: rollout(p) ? "white" : tint, stroke: tint, "stroke-width": 2});
      element(dot, "title", {}, `${route}, ${p.at}: ${percent(p.excellence.value)} after ${short(Math.round(p.cost[unit]))} ${unit}`);
    }
    element(svg, "text", {x: EDGE.left + 10, y: 24 + 16 * i, style: `fill:${tint};font-weight:600`}, `${route}: ${points.at(-1).at}`);
  });
  element(svg, "text", {x: EDGE.left + 10, y: 24 + 16 * routes.length, class: "soft"}, "● held-out queries  ○ rollouts");
}

function training() {
  const curves = Object.entries(DATA.training).filter(([, rows]) => rows.length);
  if (!curves.length) return nothing("training", "no GRPO run in this folder");
  const rewards = curves.flatMap(([, rows]) => rows.map(r => r[1])).filter(v => v !== null);
  const steps = Math.max(...curves.flatMap(([, rows]) => rows.map(r => r[0])));
  const lo = Math.min(0, ...rewards), hi = Math.max(...rewards);
  const svg = canvas("training"), [x, y] = axes(svg, [0, steps], [lo, hi + (hi - lo) * .15], {xlabel: "step", ylabel: "mean reward"});
  curves.forEach(([reward, rows], i) => {
    const tint = colour["grpo_" + reward] || COLOURS[i + 2];
    element(svg, "path", {d: path(rows.filter(r => r[1] !== null).map(r => [x(r[0]), y(r[1])])), fill: "none", stroke: tint, "stroke-width": 2});
    element(svg, "text", {x: EDGE.left + 10, y: 24 + 16 * i, style: `fill:${tint};font-weight:600`}, reward === "rm" ? "reward model: standard deviations" : "judge: share accepted");
  });
}

function scatter() {
  if (!DATA.lengths.length) return nothing("scatter", "nothing was graded");
  const longest = DATA.lengths.map(r => r[1]).sort((a, b) => a - b)[Math.floor(DATA.lengths.length * .995)];
  const svg = canvas("scatter"), [x, y] = axes(svg, [0, longest], [1, 3.05], {xlabel: "characters", ylabel: "weighted mean of the grades"});
  const every = Math.ceil(DATA.lengths.length / 3000);
  DATA.lengths.forEach(([name, length, quality], i) => {
    if (i % every || length > longest) return;
    element(svg, "circle", {cx: x(length).toFixed(1), cy: (y(quality) + (i * 7 % 9 - 4) * .5).toFixed(1), r: 1.8, fill: colour[name], "fill-opacity": .45});
  });
  element(svg, "line", {x1: EDGE.left, x2: W - EDGE.right, y1: y(DATA.excellent), y2: y(DATA.excellent), stroke: "black", "stroke-dasharray": "3 3"});
}

function samples(shown) {
  const wanted = document.getElementById("filter").value.trim(), list = document.getElementById("samples");
  const hits = Object.entries(DATA.samples).filter(([query, answers]) => query.includes(wanted) || Object.values(answers).some(a => a[0].includes(wanted)));
  list.replaceChildren();
  for (const [query, answers] of hits.slice(0, shown)) {
    const section = element(list, "section", {class: "sample"});
    element(section, "h3", {}, query);
    const row = element(section, "div", {class: "answers"});
    for (const [name, [text, quality, excellent]] of Object.entries(answers)) {
      const box = element(row, "div", {style: `border-left-color:${colour[name]}`});
      element(box, "b", {}, `${name}${quality === null ? " · not graded" : ` · ${quality.toFixed(2)}${excellent ? " excellent" : ""}`}`);
      box.append(text);
    }
  }
  document.getElementById("count").textContent = `${hits.length} of ${Object.keys(DATA.samples).length} queries`;
  document.getElementById("more").hidden = hits.length <= shown;
  document.getElementById("more").onclick = () => samples(shown + 40);
}

// Tables come from report.md: intervals go below their figure, and a wide table scrolls by itself.
for (const table of document.querySelectorAll("table")) {
  const scroll = document.createElement("div");
  scroll.className = "scroll"; scroll.tabIndex = 0;
  table.replaceWith(scroll); scroll.append(table);
  for (const cell of table.querySelectorAll("td")) {
    const parts = cell.textContent.match(/^(.*?) (\[.*)$/);
    if (parts && cell.cellIndex) { cell.textContent = parts[1]; element(cell, "small", {}, parts[2]); }
  }
}
const key = document.querySelector(".key");
for (const name of NAMES) { const item = element(key, "span"); element(item, "i", {style: `background:${colour[name]}`}); item.append(name); }
for (const draw of [excellence, variety, radar, matrix, costCurve, training, scatter]) draw();
document.querySelector("#cost-curve select").addEventListener("change", costCurve);
document.getElementById("filter").addEventListener("input", () => samples(20));
samples(20);
