// Several studies on one pair of axes, and what each has at equal parameters.
const S = JSON.parse(document.getElementById("study").textContent);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b6d00", "#888888"];
const studies = S.studies.filter(s => !s.error && s.front.length), colour = s => COLOURS[s.number % COLOURS.length];
function fronts() {
  const W = 900, H = 430, box = { l: 52, r: 14, t: 10, b: 42 }, points = studies.flatMap(s => s.front);
  const sizes = points.map(p => Math.max(p.params, 1)), low = least(sizes) / 1.2, high = most(sizes) * 1.2;
  const tops = points.map(p => p.accuracy + p.stderr), floors = points.map(p => p.accuracy - p.stderr), gap = (most(tops) - least(floors)) * 0.06 || 0.05;
  const y0 = least(floors) - gap, y1 = most(tops) + gap, [ys, decimals] = ticks(y0, y1, 6);
  const x = v => box.l + (Math.log(Math.max(v, 1)) - Math.log(low)) / (Math.log(high) - Math.log(low)) * (W - box.l - box.r), y = v => H - box.b - (v - y0) / (y1 - y0) * (H - box.t - box.b);
  return svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "fronts of " + studies.map(s => s.name).join(", ") }, ...frame(W, H, box, ys, decimals, y, "accuracy"),
    ...logTicks(low, high).map(t => svg("text", { x: x(t), y: H - box.b + 18, "text-anchor": "middle" }, human(t))), svg("text", { x: (W + box.l) / 2, y: H - 6, "text-anchor": "middle" }, "trainable parameters (log scale)"),
    ...studies.flatMap(s => [
      svg("path", { class: "front", d: s.front.filter(p => !p.spares).map((p, i) => `${i ? "H" : "M"}${x(p.params)}${i ? "V" : " "}${y(p.accuracy)}`).join("") + `H${W - box.r}`, fill: "none", stroke: colour(s), "stroke-width": 2 }),
      ...s.front.flatMap(p => [svg("line", { x1: x(p.params), x2: x(p.params), y1: y(p.accuracy - p.stderr), y2: y(p.accuracy + p.stderr), stroke: colour(s), "stroke-opacity": 0.5 }),
        svg("circle", { class: "dot", cx: x(p.params), cy: y(p.accuracy), r: 5, fill: colour(s), onmousemove: e => showTip(e, [s.name, `${p.id}  ${p.label}${p.knee ? " (knee)" : ""}`, `${p.size} trainable parameters, ${p.text}` + (p.forgotten ? `, forgotten ${p.forgotten}` : "")]), onmouseleave: hideTip })]),
    ]));
}
const row = s => el("tr", {}, el("td", {}, el("span", { class: "legend" }, el("i", { style: `background:${colour(s)}` })), el("a", { href: s.number + "/" }, s.name)), ...(s.error ? [el("td", { class: "wrap", colspan: S.budgets.length + 2 }, s.error)] : [el("td", { class: "num" }, "" + s.points), el("td", {}, s.split), ...s.at.map(t => el("td", { class: "num" }, t)), ...(s.at.length ? [] : [el("td", {}, "no finished point yet")])]));
fill(document.getElementById("page"), {}, [
  el("h1", {}, "Studies side by side"),
  studies.length ? card("Their fronts", fronts(), S.comparable ? null : el("div", { class: "small soft" }, "These studies answer different questions: their fronts say how far training goes in each, and their accuracies cannot be compared.")) : null,
  card("The best accuracy under equal budgets of trainable parameters", el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["study", "points", "accuracy on", ...S.budgets].map(t => el("th", {}, t)))), el("tbody", {}, S.studies.map(row))))),
]);
setInterval(() => location.reload(), 10000);
