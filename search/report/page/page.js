const S = JSON.parse(document.getElementById("study").textContent);
// Points come as columns (`packed` in __init__.py): what many of them share is said once.
const named = (names, values) => Object.fromEntries(names.map((name, i) => [name, values[i]]));
const runOf = values => { const r = named(S.fields.runs, values); r.rungs = r.rungs.map(g => named(S.fields.rungs, g)); return r; };
S.points = (({ count, columns }) => {
  const entries = Object.entries(columns), [plain, recipe] = [false, true].map(is => entries.filter(([name]) => name.startsWith("recipe.") === is));
  const at = (c, i) => c.each ? c.each[i] : c.of[c.at ? c.at[i] : 0];
  return Array.from({ length: count }, (_, i) => {
    const p = { recipe: {} };
    for (const [name, c] of plain) p[name] = at(c, i);
    for (const [name, c] of recipe) p.recipe[name.slice(7)] = at(c, i);
    p.runs = p.runs.map(runOf);
    p.label = [[p.allocator, ...Object.entries(p.knobs).map(([k, v]) => k + "=" + v)].join(" "), ...S.settings.map(s => s + " " + p.recipe[s])].join(", ");
    return p;
  });
})(S.points);
const both = S.splits.includes("test"), split = S.splits[0];
const near = (value, error) => three(value) + (error === null ? "" : " ± " + three(error));
const accuracy = p => p.accuracy === null ? p.status : near(p.accuracy, p.stderr);
const accuracies = p => [split + " " + accuracy(p), both && p.test !== null ? "test " + near(p.test, p.test_stderr) : ""].filter(t => t);
const colour = p => S.colours[p.allocator] || "#888";


// A point that was stopped early is drawn hollow at its last accuracy: trained less than its rivals, so not on the front.
// The others stand at their test accuracy, or fainter at their validation accuracy where only others were tested.
const height = p => p.test !== null ? p.test : p.accuracy !== null ? p.accuracy : p.status === "stopped" ? p.runs[0].accuracy : null;
const error = p => (p.test !== null ? p.test_stderr : p.stderr) || 0;
const faint = p => both && p.test === null;
const drawn = S.points.filter(p => height(p) !== null);
const front = drawn.filter(p => p.front).sort((a, b) => a.params - b.params);
const steps = front.filter(p => p.step);
const SINGLY = 1500;  // points that are drawn one by one
const PAGE = 200;  // rows of the table that are shown at first, and more at every wish
const OTHERS = 300;  // points whose curves are drawn behind those of the chosen one
const hidden = new Set();  // rules that are filtered out
const seen = list => hidden.size ? list.filter(p => !hidden.has(p.allocator)) : list;
let held = null;  // whose allocation stands beside that of the chosen point
let chosen = S.points.find(p => p.knee) || last(steps) || last(front) || drawn[0] || S.points[0] || null;

const id = p => p.digest.slice(0, 8), signed = v => (v < 0 ? "" : "+") + three(v);
const describe = p => [
  id(p) + "  " + p.label + (p.knee ? " (knee)" : ""),
  p.size + " trainable parameters, " + p.amount,
  ...(p.accuracy === null && height(p) !== null ? [split + " " + three(height(p)) + " when it was stopped"] : accuracies(p)),
  p.forgotten === null ? "" : `forgotten ${signed(p.forgotten)} nats a token` + (p.spares ? ": on the front for forgetting less" : ""),
  p.front && p.test !== null && !p.step && !p.spares ? "on the test split another point of the front beats it" : "",
  p.seeds + (p.seeds === 1 ? " seed" : " seeds") + (p.spread === null ? "" : ", standard deviation " + three(p.spread)),
  p.chance ? "better than the next smaller point of the front with probability " + p.chance : "",
].filter(line => line);

function scatter() {
  const W = 700, H = 430, box = { l: 52, r: 14, t: 10, b: 42 };
  const sizes = drawn.map(p => Math.max(p.params, 1)), low = least(sizes) / 1.2, high = most(sizes) * 1.2;
  const base = S.untrained ? [(both && S.untrained.test || S.untrained).accuracy] : [];
  const tops = drawn.map(p => height(p) + (p.front ? error(p) : 0)).concat(base), floors = drawn.map(p => height(p) - (p.front ? error(p) : 0)).concat(base);
  const gap = (most(tops) - least(floors)) * 0.06 || 0.05, y0 = least(floors) - gap, y1 = most(tops) + gap;
  const x = v => box.l + (Math.log(Math.max(v, 1)) - Math.log(low)) / (Math.log(high) - Math.log(low)) * (W - box.l - box.r);
  const y = v => H - box.b - (v - y0) / (y1 - y0) * (H - box.t - box.b);
  const [ys, decimals] = ticks(y0, y1, 6);
  const step = steps.map((p, i) => (i ? `H${x(p.params)}V${y(height(p))}` : `M${x(p.params)} ${y(height(p))}`)).join("") + `H${W - box.r}`;
  const edge = (side, backwards) => (backwards ? [...steps].reverse() : steps).map((p, i) => {
    const at = y(height(p) + side * error(p)), next = x(backwards ? p.params : steps[i + 1] ? steps[i + 1].params : 0);
    return backwards ? `V${at}H${next}` : (i ? "" : `M${x(p.params)} `) + (i ? "V" : "") + at + `H${steps[i + 1] ? next : W - box.r}`;
  }).join("");
  const band = steps.some(error) ? edge(1, false) + edge(-1, true) + "Z" : null;
  const at = p => [x(p.params), y(height(p))], diamond = ([cx, cy], r) => `M${cx} ${cy - r}L${cx + r} ${cy}L${cx} ${cy + r}L${cx - r} ${cy}Z`;
  const dot = p => svg(p.spares ? "path" : "circle", {
    ...(p.spares ? { d: diamond(at(p), 8) } : { cx: at(p)[0], cy: at(p)[1], r: p.front ? 6.5 : 4.5 }),
    class: "dot", tabindex: 0, role: "button", "aria-label": describe(p).join(", "),
    fill: p.accuracy === null ? "none" : colour(p), stroke: p.front ? "var(--ink)" : p.accuracy === null ? colour(p) : "none",
    "stroke-width": 1.3, "fill-opacity": p.front || p === chosen ? 1 : 0.65, opacity: faint(p) ? 0.4 : 1,
    onmousemove: e => showTip(e, describe(p)), onmouseleave: hideTip, onclick: () => choose(p), onkeydown: e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(p); } },
  });
  // Of many points those beside the front are one path a colour, and the nearest one to the pointer is meant.
  const many = drawn.length > SINGLY, shown = seen(drawn), alone = many ? shown.filter(p => p.front) : shown, crowd = many ? shown.filter(p => !p.front) : [];
  const groups = new Map();
  for (const p of crowd) {
    const key = (p.accuracy === null ? "stopped" : colour(p)) + (faint(p) ? " faint" : "");
    groups.set(key, (groups.get(key) || "") + `M${x(p.params).toFixed(1)} ${y(height(p)).toFixed(1)}h0`);
  }
  const cloud = [...groups].map(([key, d]) => svg("path", { d, fill: "none", stroke: key.startsWith("stopped") ? "var(--soft)" : key.split(" ")[0], "stroke-width": key.startsWith("stopped") ? 3 : 6, "stroke-linecap": "round", "stroke-opacity": key.endsWith("faint") ? 0.25 : 0.5 }));
  const meant = e => {
    const area = e.currentTarget.getBoundingClientRect(), px = (e.clientX - area.left) / area.width * W, py = (e.clientY - area.top) / area.height * H;
    const far = p => (x(p.params) - px) ** 2 + (y(height(p)) - py) ** 2;
    const best = crowd.reduce((a, b) => a && far(a) <= far(b) ? a : b, null);
    return best && far(best) < 64 ? best : null;
  };
  const pointer = many ? {
    onmousemove: e => { if (e.target.classList.contains("dot")) return; const p = meant(e); p ? showTip(e, describe(p)) : hideTip(); },
    onmouseleave: hideTip, onclick: e => { if (e.target.classList.contains("dot")) return; const p = meant(e); if (p) choose(p); },
  } : {};
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": "accuracy against trainable parameters", ...pointer },
    ...frame(W, H, box, ys, decimals, y, both ? "accuracy on the test split" : split === "accuracy" ? split : "accuracy on the validation split"),
    ...logTicks(low, high).map(t => svg("text", { x: x(t), y: H - box.b + 18, "text-anchor": "middle" }, human(t))),
    svg("text", { x: (W + box.l) / 2, y: H - 6, "text-anchor": "middle" }, "trainable parameters (log scale)"),
    band ? svg("path", { d: band, fill: "var(--soft)", "fill-opacity": 0.13 }) : null,
    ...base.flatMap(v => [svg("line", { x1: box.l, x2: W - box.r, y1: y(v), y2: y(v), stroke: "var(--soft)", "stroke-dasharray": "4 3" }), svg("text", { x: W - box.r, y: y(v) - 4, "text-anchor": "end" }, "untrained")]),
    steps.length ? svg("path", { d: step, fill: "none", stroke: "var(--soft)", "stroke-width": 1.3 }) : null,
    ...front.filter(error).map(p => svg("line", { x1: x(p.params), x2: x(p.params), y1: y(height(p) - error(p)), y2: y(height(p) + error(p)), stroke: "var(--soft)" })),
    drawn.includes(chosen) ? svg("circle", { cx: x(chosen.params), cy: y(height(chosen)), r: 12, fill: "none", stroke: "var(--mark)", "stroke-width": 2.5 }) : null,
    ...cloud, ...alone.map(dot));
}

function legend() {
  const names = [...new Set(drawn.map(p => p.allocator))];
  return el("div", { class: "legend small soft" },
    names.map(n => el("button", { class: "rule", "aria-pressed": "" + !hidden.has(n), title: "show or hide the points of this rule", onclick: () => { hidden.has(n) ? hidden.delete(n) : hidden.add(n); draw(); } }, el("i", { style: `background:${S.colours[n] || "#888"}` }), n)),
    steps.some(error) ? el("span", {}, "band: ± one standard error") : null,
    drawn.some(faint) ? el("span", {}, "fainter: not evaluated on the test split, drawn by validation accuracy") : null,
    drawn.some(p => p.accuracy === null) ? el("span", {}, "hollow: stopped early") : null,
    front.some(p => p.spares) ? el("span", {}, "diamond: on the front because it forgets less") : null);
}

function curves(key, label) {
  const runs = p => p.runs.map(r => r.rungs.filter(g => g[key] !== null && g[key] !== undefined)).filter(g => g.length);
  const every = Math.ceil(S.points.length / OTHERS), others = S.points.filter((p, i) => p !== chosen && i % every === 0);
  const all = [...others, ...(chosen ? [chosen] : [])].flatMap(runs);
  if (!all.length) return null;
  const W = 340, H = 190, box = { l: 46, r: 8, t: 8, b: 34 };
  const xs = all.flat().map(g => g.tokens), vs = all.flat().map(g => g[key]);
  const gap = (most(vs) - least(vs)) * 0.06 || 0.05, y0 = least(vs) - gap, y1 = most(vs) + gap, x1 = Math.max(most(xs), 1);
  const x = v => box.l + v / x1 * (W - box.l - box.r), y = v => H - box.b - (v - y0) / (y1 - y0) * (H - box.t - box.b);
  const [ys, decimals] = ticks(y0, y1, 4);
  const line = (g, mine) => [
    svg("polyline", { points: g.map(r => `${x(r.tokens)},${y(r[key])}`).join(" "), fill: "none", stroke: mine ? "var(--mark)" : "var(--line)", "stroke-width": mine ? 2.4 : 1 }),
    ...(mine ? g.map(r => svg("circle", { cx: x(r.tokens), cy: y(r[key]), r: 3, fill: "var(--mark)", onmousemove: e => showTip(e, [`${label} ${three(r[key])}`, `step ${r.step}, ${human(r.tokens)} tokens`]), onmouseleave: hideTip })) : []),
  ];
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, "aria-label": `${label} at rungs` },
    ...frame(W, H, box, ys, decimals, y, label),
    ...ticks(0, x1, 6)[0].map(t => svg("text", { x: x(t), y: H - box.b + 16, "text-anchor": "middle" }, human(t))),
    svg("text", { x: (W + box.l) / 2, y: H - 4, "text-anchor": "middle" }, "trained tokens"),
    ...others.flatMap(runs).flatMap(g => line(g, false)), ...(chosen ? runs(chosen).flatMap(g => line(g, true)) : []));
}

function allocation(p) {
  const M = p.ranks ? S.rank_map : S.map, columns = Math.max(0, ...M.exists.flat().map(c => c + 1));
  const cell = Math.max(3, Math.min(18, Math.floor(1000 / Math.max(columns, 1)))), rowHeight = M.rows.length > 40 ? 9 : Math.max(cell, 13);
  const l = 78, W = l + columns * cell + 60, H = M.rows.length * rowHeight + 24;
  const value = p.cells.map(row => [...row].map(c => c.charCodeAt(0) - 48)), top = Math.max(1, ...value.map(row => Math.max(0, ...row)));
  const nodes = [];
  M.rows.forEach((row, r) => {
    const total = value[r].reduce((sum, v) => sum + v, 0);
    if (rowHeight >= 13 || r % 2 === 0) nodes.push(  // every second name where the rows are lower than the letters
      svg("text", { x: l - 6, y: r * rowHeight + rowHeight / 2 + 4, "text-anchor": "end" }, row),
      svg("text", { x: l + columns * cell + 6, y: r * rowHeight + rowHeight / 2 + 4 }, M.across === "expert" ? `${total}/${M.exists[r].length}` : "" + total));
    for (const c of M.exists[r]) {
      const v = value[r][c];
      nodes.push(svg("rect", { x: l + c * cell, y: r * rowHeight, width: cell - (cell > 5 ? 1 : 0), height: rowHeight - 1, fill: v ? "var(--mark)" : "var(--empty)", "fill-opacity": v ? 0.25 + 0.75 * v / top : 1,
        onmousemove: e => showTip(e, [`${row}, ${M.across} ${c}`, p.ranks ? `rank ${v}` : M.across === "expert" ? (v ? "adapted" : "not adapted") : `${v} experts`]), onmouseleave: hideTip }));
    }
  });
  const every = Math.ceil(24 / cell);
  for (let c = 0; c < columns; c += every) nodes.push(svg("text", { x: l + (c + 0.5) * cell, y: H - 8, "text-anchor": "middle" }, "" + c));
  nodes.push(svg("text", { x: l - 6, y: H - 8, "text-anchor": "end" }, M.across));
  return el("div", { class: "scroll" }, svg("svg", { viewBox: `0 0 ${W} ${H}`, style: `width:${W}px;max-width:none`, "aria-label": "allocation" }, ...nodes));
}

// Shares as horizontal bars with a whisker of one standard deviation.
function bars(rows) {
  const W = 700, high = 26, box = { l: 190, r: 90, t: 4, b: 24 }, H = box.t + rows.length * high + box.b;
  const top = Math.max(0.1, ...rows.map(([, v, e]) => v + e)), x = v => box.l + v / top * (W - box.l - box.r);
  const [marks] = ticks(0, top, 5), percent = v => Math.round(100 * v) + " %";
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, style: "max-width:760px;margin-bottom:12px", role: "img", "aria-label": rows.map(([name, v, e]) => `${name} ${percent(v)} ± ${percent(e)}`).join(", ") },
    ...marks.map(t => svg("line", { x1: x(t), x2: x(t), y1: box.t, y2: H - box.b, class: "axis" })),
    ...marks.map(t => svg("text", { x: x(t), y: H - 8, "text-anchor": "middle" }, percent(t))),
    ...rows.flatMap(([name, v, e], i) => {
      const y = box.t + (i + 0.5) * high;
      return [
        svg("text", { x: box.l - 8, y: y + 4, "text-anchor": "end" }, name),
        svg("rect", { x: box.l, y: y - 8, width: Math.max(x(v) - box.l, 1), height: 16, rx: 2, fill: "var(--mark)" }),
        svg("line", { x1: x(Math.max(v - e, 0)), x2: x(v + e), y1: y, y2: y, stroke: "var(--ink)", "stroke-width": 1.2 }),
        svg("text", { x: x(v + e) + 8, y: y + 4 }, `${percent(v)} ± ${percent(e)}`),
      ];
    }));
}
const section = s => el("section", { class: "card" }, el("details", { class: "folded" }, el("summary", {}, el("h2", {}, s.title)), s.bars.length ? bars(s.bars) : null, el("div", { class: "scroll" }, el("table", {},
  el("thead", {}, el("tr", {}, s.head.map(h => el("th", {}, h)))),
  el("tbody", {}, s.rows.map(row => el("tr", {}, row.map(cell => el("td", { class: cell.length > 40 ? "wrap" : "" }, cell))))))),
  ...s.notes.map(n => el("div", { class: "small soft", style: "margin-top:6px" }, n))));
const pairs = (entries) => el("table", {}, el("tbody", {}, entries.map(([k, v]) => el("tr", {}, el("td", { class: "soft" }, k), el("td", { class: "wrap" }, v)))));
const copy = text => el("pre", {}, text);

function details(p) {
  return [
    el("div", {}, el("span", { class: "key" }, id(p)), "  ", el("b", {}, p.label), p.knee ? " · knee" : p.front ? " · on the front" : ""),
    el("div", { class: "soft" }, `${p.size} (${p.params.toLocaleString("en")}) trainable parameters · ${p.accuracy === null && height(p) !== null ? split + " " + three(height(p)) + " when stopped" : accuracies(p).join(", ")}`),
    el("div", { class: "scroll" }, el("table", { style: "margin-top:8px" },
      el("thead", {}, el("tr", {}, ["seed", "status", ...S.splits, "time", "tokens", "memory"].map(t => el("th", {}, t)))),
      el("tbody", {}, p.runs.map(r => el("tr", {}, el("td", {}, "" + r.seed), el("td", {}, r.status), el("td", {}, three(r.accuracy)), ...(both ? [el("td", {}, three(r.test))] : []), el("td", {}, time(r.seconds)), el("td", {}, human(r.tokens)), el("td", {}, r.memory ? +(r.memory / 2 ** 30).toPrecision(3) + " GiB" : "")))))),
    ...p.runs.filter(r => r.message).map(r => el("div", { class: "small soft" }, `seed ${r.seed}: ${r.message}`)),
    el("button", { id: "hold", onclick: () => { held = held === p ? null : p; draw(); } }, held === p ? "Compare no more" : "Compare its allocation with another point's"),
    ask ? another(p) : null,
    curves("accuracy", "accuracy"), curves("loss", "loss"),
    el("details", {}, el("summary", {}, "recipe"), pairs(Object.entries(p.recipe))),
    el("div", { style: "margin-top:10px" }, el("b", {}, "Load it")),
    p.load ? copy(p.load + "\n\n# as a folder with a model card; format=adapter, merged or peft\n" + p.export) : el("div", { class: "small soft" }, p.accuracy === null ? "It has no adapter: no run of it ran to its end." : "Its adapter was not kept: keep=all keeps those of points that leave the front."),
  ];
}

// Area below the front in decades of parameters times accuracy, above the untrained base (else the least accurate point)
// and up to the largest point, after each point in the order of their first trainings.
function volumes() {
  const measured = S.points.filter(p => p.accuracy !== null && p.params > 0);
  if (measured.length < 2) return [];
  const floor = S.untrained ? S.untrained.accuracy : least(measured.map(p => p.accuracy)), right = Math.log10(most(measured.map(p => p.params)));
  const step = [];  // members of the front so far, ascending in both
  let area = 0;
  return measured.map(p => {
    const x = Math.log10(p.params), y = p.accuracy;
    let at = step.findIndex(([sx]) => sx > x);
    if (at < 0) at = step.length;
    const before = at ? step[at - 1][1] : floor;
    if (y > before) {
      let from = x, height = before, to = at;
      for (; to < step.length && step[to][1] <= y; to++) { area += (step[to][0] - from) * (y - height); [from, height] = step[to]; }
      area += ((to < step.length ? step[to][0] : right) - from) * (y - height);
      const start = at && step[at - 1][0] === x ? at - 1 : at;
      step.splice(start, to - start, [x, y]);
    }
    return area;
  });
}
function history() {
  const areas = volumes();
  if (!areas.length) return null;
  const W = 560, H = 230, box = { l: 52, r: 12, t: 10, b: 36 }, top = most(areas) * 1.05 || 1;
  const x = n => box.l + n / Math.max(areas.length - 1, 1) * (W - box.l - box.r), y = v => H - box.b - v / top * (H - box.t - box.b);
  const [ys, decimals] = ticks(0, top, 4);
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `hypervolume of the front after each of ${areas.length} points, ${areas[areas.length - 1].toFixed(3)} in the end` },
    ...frame(W, H, box, ys, decimals, y, S.of_three ? "hypervolume of accuracy and parameters" : "hypervolume"),
    ...ticks(1, Math.max(areas.length, 2), 6)[0].filter(t => Number.isInteger(t) && t >= 1).map(t => svg("text", { x: x(t - 1), y: H - box.b + 16, "text-anchor": "middle" }, "" + t)),
    svg("text", { x: (W + box.l) / 2, y: H - 4, "text-anchor": "middle" }, "points"),
    svg("path", { class: "history", d: areas.map((v, n) => `${n ? "H" : "M"}${x(n).toFixed(1)}${n ? "V" : " "}${y(v).toFixed(1)}`).join(""), fill: "none", stroke: "var(--mark)", "stroke-width": 2 }));
}

// One axis a setting, one line a point: what accurate points have in common, and what they cost.
const LINES = 400;
function parallel() {
  const points = seen(drawn), value = text => text === undefined || text === "" || isNaN(text) ? text : +text;
  const axes = [
    ["rule", p => p.allocator], ...S.knobs.map(k => [k, p => value(p.knobs[k])]), ...S.settings.filter(s => !S.knobs.includes(s)).map(s => [s, p => value(p.recipe[s])]),
    ["parameters", p => Math.max(p.params, 1)], ...(S.forgets ? [["forgotten", p => p.forgotten === null ? undefined : p.forgotten]] : []), [split, height],
  ].map(([name, of]) => {
    const values = points.map(of).filter(v => v !== undefined), numeric = values.length > 0 && values.every(v => typeof v === "number");
    if (!numeric) { const names = [...new Set(values.map(String))].sort(); return { name, of, at: v => names.length < 2 ? 0.5 : names.indexOf(String(v)) / (names.length - 1), marks: names.length > 12 ? [] : names.map(n => [n, n]) }; }
    const low = least(values), high = most(values), log = low > 0 && high / low >= 10, f = log ? Math.log : v => v;
    return { name, of, at: v => high === low ? 0.5 : (f(v) - f(low)) / (f(high) - f(low)), marks: (high === low ? [low] : [low, high]).map(v => [v, Math.abs(v) >= 1000 ? human(v) : "" + +v.toPrecision(3)]) };
  }).filter(a => a.name === "rule" || points.some(p => a.of(p) !== undefined));
  if (points.length < 2) return null;
  const W = Math.max(560, axes.length * 92), H = 260, top = 30, bottom = H - 14, x = i => 60 + i / (axes.length - 1) * (W - 120), y = (a, v) => bottom - a.at(v) * (bottom - top);
  const every = Math.ceil(points.length / LINES), shown = points.filter((p, i) => i % every === 0 || p.front || p === chosen).sort((a, b) => (a === chosen) - (b === chosen) || a.front - b.front);
  const line = p => svg("path", {
    class: "line", d: axes.map((a, i) => [i, a.of(p), a]).filter(([, v]) => v !== undefined).map(([i, v, a], n) => `${n ? "L" : "M"}${x(i).toFixed(1)} ${y(a, v).toFixed(1)}`).join(""), fill: "none",
    stroke: p === chosen ? "var(--mark)" : colour(p), "stroke-width": p === chosen ? 3 : p.front ? 1.8 : 1, "stroke-opacity": p.front || p === chosen ? 0.95 : 0.28,
    onmousemove: e => showTip(e, describe(p)), onmouseleave: hideTip, onclick: () => choose(p),
  });
  return el("div", { class: "scroll" }, svg("svg", { viewBox: `0 0 ${W} ${H}`, style: `width:${W}px;max-width:none`, role: "img", "aria-label": "every point as a line over " + axes.map(a => a.name).join(", ") },
    ...axes.flatMap((a, i) => [svg("line", { x1: x(i), x2: x(i), y1: top, y2: bottom, class: "axis" }), svg("text", { x: x(i), y: 14, "text-anchor": "middle" }, a.name)]),
    ...shown.map(line),
    ...axes.flatMap((a, i) => a.marks.map(([v, text]) => svg("text", { x: x(i) + 4, y: y(a, v) + 4, class: "halo" }, text.length > 18 ? text.slice(0, 17) + "…" : text)))));
}

// The form and the buttons that ask the driver for something; `search.serve` brings the function that carries it there.
const ask = typeof carry === "function" && S.live && S.live.runs ? carry : null;
function asking(label, order) {
  const answer = el("span", { class: "small soft", role: "status" });
  return el("span", {}, el("button", { onclick: async e => { e.target.disabled = true; answer.replaceChildren(" " + await ask(order())); e.target.disabled = false; } }, label), answer);
}
function another(p) {
  const fields = Object.entries(S.asked && S.asked[p.digest] || {}).map(([name, v]) => [name, el("input", { value: "" + v, "aria-label": name, oninput: () => { window.typing = true; } })]);
  const more = el("input", { placeholder: "name=value …", "aria-label": "more knobs", style: "width:180px", oninput: () => { window.typing = true; } });
  const read = text => { const t = text.trim(); return t === "true" ? true : t === "false" ? false : t !== "" && !isNaN(t) ? +t : t; };
  const point = () => Object.fromEntries([...fields.filter(([, f]) => f.value.trim() !== "").map(([name, f]) => [name, read(f.value)]), ...more.value.split(/\s+/).filter(w => w.includes("=")).map(w => [w.slice(0, w.indexOf("=")), read(w.slice(w.indexOf("=") + 1))])]);
  return el("details", { id: "another" }, el("summary", {}, "Also try a point like this one"), el("div", { class: "fields" }, fields.map(([name, f]) => el("label", {}, el("span", { class: "small soft" }, name), f)), el("label", {}, el("span", { class: "small soft" }, "other knobs"), more)),
    asking("Try it", () => ({ do: "try", point: point() })), el("div", { class: "small soft" }, "An empty field leaves its knob out. The driver checks the point, as it checks space.NAME=, and trains it next."));
}
function runningNow() {
  if (!S.live || !S.live.runs) return null;
  const rows = S.running.map(r => el("tr", {}, el("td", { class: "key" }, r.digest.slice(0, 8)), el("td", { class: "num" }, r.size), el("td", {}, r.accuracy === null ? r.status === "lost" ? "lost, to be trained again" : "…" : `${three(r.accuracy)} at step ${r.step}`), el("td", { class: "wrap" }, r.label), ask ? el("td", {}, asking("Stop", () => ({ do: "stop", digest: r.digest }))) : null));
  return card("Running now", rows.length ? el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, rows))) : "Nothing is training at this moment.",
    ask ? el("div", { style: "margin-top:10px" }, asking("End the study after what runs", () => ({ do: "end" }))) : null);
}
function ordered() {
  return S.orders.length ? card("Asked of the driver", el("table", {}, el("tbody", {}, [...S.orders].reverse().map(o => el("tr", {}, el("td", { class: "wrap" }, o.what), el("td", { class: "wrap" }, o.answer)))))) : null;
}

let order = { key: "params", up: true }, rows = PAGE;
function table() {
  const columns = [
    ["id", id], ["params", p => p.params, p => p.size], [split, p => p.accuracy !== null ? p.accuracy : height(p) === null ? "" : height(p), p => p.accuracy !== null ? accuracy(p) : three(height(p))],
    ["", p => p.knee ? "knee" : p.front ? "front" : ""], ["allocator", p => p.allocator],
    ...S.knobs.map(k => [k, p => k in p.knobs ? (isNaN(p.knobs[k]) ? p.knobs[k] : +p.knobs[k]) : ""]),
    ...S.settings.map(s => [s, p => isNaN(p.recipe[s]) ? p.recipe[s] : +p.recipe[s]]),
    ["experts", p => p.experts, p => p.ranks ? p.amount : "" + p.experts],
    ...(both ? [["test", p => p.test === null ? "" : p.test, p => p.test === null ? "" : near(p.test, p.test_stderr)]] : []),
    ...(S.forgets ? [["forgotten", p => p.forgotten === null ? "" : p.forgotten, p => p.forgotten === null ? "" : signed(p.forgotten)]] : []),
    ["seeds", p => p.seeds], ...(S.points.some(p => p.spread !== null) ? [["s.d.", p => p.spread === null ? "" : p.spread, p => three(p.spread)]] : []),
    ["status", p => p.status], ["time", p => p.runs.reduce((s, r) => s + r.seconds, 0), p => time(p.runs.reduce((s, r) => s + r.seconds, 0))], ["message", p => p.runs.map(r => r.message).filter(m => m).join("; ")],
  ];
  const value = (columns.find(c => c[0] === order.key) || columns[0])[1];
  const compare = (a, b) => {
    const [u, v] = [value(a), value(b)];
    if (u === "" || v === "") return (u === "") - (v === "");  // empty last, whichever way
    return (typeof u === "number" && typeof v === "number" ? u - v : String(u).localeCompare(String(v))) * (order.up ? 1 : -1);
  };
  const numbers = new Set(columns.filter(c => c[0] && S.points.every(p => { const v = c[1](p); return v === "" || typeof v === "number"; })));
  const numeric = c => numbers.has(c), sorted = [...seen(S.points)].sort(compare), left = sorted.length - rows;
  return el("div", {}, el("table", { id: "table" },
    el("thead", {}, el("tr", {}, columns.map(c => el("th", { class: numeric(c) ? "num" : "", tabindex: 0, "aria-sort": order.key === c[0] ? (order.up ? "ascending" : "descending") : "none",
      onclick: () => { order = { key: c[0], up: order.key === c[0] ? !order.up : true }; draw(); }, onkeydown: e => { if (e.key === "Enter") e.target.click(); } },
      (c[0] || "front") + (order.key === c[0] ? (order.up ? " ▲" : " ▼") : ""))))),
    el("tbody", {}, sorted.slice(0, rows).map(p => el("tr", { class: p === chosen ? "chosen" : "", onclick: () => choose(p) },
      columns.map(c => el("td", { class: c[0] === "message" ? "wrap" : numeric(c) ? "num" : "" }, "" + (c[2] || c[1])(p))))))),
    left > 0 ? el("button", { onclick: () => { rows += PAGE; slots.table.replaceChildren(table()); } }, `${Math.min(left, PAGE)} more of ${left.toLocaleString("en")}`) : null);
}

function under() {
  const answer = el("span", {});
  const parse = text => { const m = /^\s*([\d.,]+)\s*([kKmMbB]?)\s*$/.exec(text); return m ? parseFloat(m[1].replace(/,/g, "")) * { "": 1, k: 1e3, m: 1e6, b: 1e9 }[m[2].toLowerCase()] : NaN; };
  const field = el("input", { placeholder: "e.g. " + human(front.length ? front[Math.floor(front.length / 2)].params : 1e6), "aria-label": "parameter budget", oninput: () => {
    const limit = parse(field.value), best = last(front.filter(p => !p.spares && p.params <= limit));
    answer.replaceChildren(isNaN(limit) ? "" : best ? `${best.label}: ${accuracies(best).join(", ")}, ${best.size}` : "no point is that small");
    if (best) choose(best);
  } });
  return el("div", { style: "margin-top:10px" }, "Best under ", field, " trainable parameters: ", answer);
}

const list = sentences => el("ul", {}, sentences.map(s => el("li", {}, s)));
// Of two allocations the places that both adapt, and those that one does.
function inCommon(a, b) {
  if (a.ranks !== b.ranks) return "One gives ranks, the other experts.";
  let both = 0, first = 0, second = 0;
  a.cells.forEach((row, r) => [...row].forEach((c, i) => { const u = c !== "0", v = (b.cells[r] || "")[i] !== "0"; both += u && v; first += u && !v; second += v && !u; }));
  return `${both} places in both, ${first} only in ${id(a)}, ${second} only in ${id(b)}`;
}
const slots = { legend: el("div"), lines: el("div"), chart: el("div"), details: el("div"), map: el("div"), table: el("div", { class: "scroll" }) };
function draw() {
  const focus = document.activeElement && document.activeElement.getAttribute("aria-label");
  if (drawn.length) slots.chart.replaceChildren(scatter());
  if (chosen) {
    slots.details.replaceChildren(...details(chosen).filter(n => n));
    const what = p => `${id(p)} ${p.label}: ${p.amount}; ${p.ranks ? "darker: a higher rank (of a stack of experts the mean)" : S.map.across === "expert" ? "coloured: LoRA on this expert" : "darker: more LoRA experts"}`;
    const maps = held && held !== chosen ? [held, chosen] : [chosen];
    slots.map.replaceChildren(...(maps.length > 1 ? [el("div", { id: "shared", style: "margin-bottom:8px" }, inCommon(held, chosen))] : []),
      el("div", { class: maps.length > 1 ? "beside" : "" }, maps.map(p => el("div", {}, el("div", { class: "soft small", style: "margin-bottom:8px" }, what(p)), allocation(p)))));
  }
  slots.table.replaceChildren(table());
  slots.legend.replaceChildren(legend());
  slots.lines.replaceChildren(parallel() || "");
  if (focus) for (const node of slots.chart.querySelectorAll(".dot")) if (node.getAttribute("aria-label") === focus) node.focus({ preventScroll: true });
}
function choose(p) { chosen = p; location.hash = p.digest; draw(); }

const words = card("In words", list(S.headlines), front.length ? under() : null, S.words.length ? el("details", {}, el("summary", {}, `${S.words.length} more sentences`), list(S.words)) : null);
const linked = S.points.find(p => "#" + p.digest === location.hash);
if (linked) chosen = linked;
fill(document.getElementById("page"), {}, [
  el("h1", {}, S.name),
  S.live ? el("div", { id: "live", class: "small" }, S.live.runs ? `This study is running: as of ${S.live.at}.` : `No driver is at work on this study: as of ${S.live.at}.`) : null,
  el("div", { class: "soft small" }, `started ${S.started}` + (S.resumed.length ? `, resumed ${S.resumed.length === 1 ? "once" : S.resumed.length + " times, last"} ${last(S.resumed)}` : "")),
  chosen ? el("div", { class: "two" },
    el("div", { style: "min-width:0" },
      drawn.length ? card("Accuracy against trainable parameters", slots.chart, slots.legend, el("div", { class: "soft small" }, "Hover for a point's settings, click to choose it; click a rule to hide its points.")) : null,
      words,
      card("Where the chosen point's experts are", slots.map)),
    card("The chosen point", slots.details)) : null,
  chosen ? null : words,
  runningNow(), ordered(),
  chosen ? el("div", { class: "halves" }, card("How the front grew", history() || "After two points."), card("All points, setting by setting", slots.lines)) : null,
  ...S.sections.map(section),
  S.points.length ? card("All points", slots.table) : null,
  S.answered.length ? card("Answered without training", el("table", {}, el("tbody", {}, S.answered.map(a => el("tr", {}, el("td", {}, a.reason), el("td", { class: "num" }, "" + a.count), el("td", { class: "wrap" }, a.messages.join("; "))))))) : null,
  card("Run it again", el("div", { class: "small soft" }, "The same command resumes this study; in another folder (storage=) it repeats it."), S.command ? copy(S.command) : null,
    el("details", {}, el("summary", {}, "all settings"), pairs(Object.entries(S.config).map(([k, v]) => [k, typeof v === "string" ? v : JSON.stringify(v)]))),
    el("details", {}, el("summary", {}, "versions"), pairs(Object.entries(S.versions)))),
]);
draw();
// A page in a file cannot ask whether there is a newer one: it loads itself again, unless somebody reads what is folded.
if (S.live && S.live.runs && !S.live.served) setInterval(() => { if (!document.querySelector("details[open]")) location.reload(); }, 10000);
