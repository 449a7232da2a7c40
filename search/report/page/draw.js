"use strict";
// What every page draws with: nodes, numbers, ticks, a tip at the pointer. Text goes in as text, never as markup.
const least = list => list.reduce((a, b) => a < b ? a : b, Infinity), most = list => list.reduce((a, b) => a > b ? a : b, -Infinity);  // Math.max takes no 100,000
const NS = "http://www.w3.org/2000/svg";
const fill = (node, attributes, children) => {
  for (const [key, value] of Object.entries(attributes || {}))
    key.startsWith("on") ? node.addEventListener(key.slice(2), value) : node.setAttribute(key, value);
  node.append(...children.flat().filter(c => c !== null && c !== undefined && c !== ""));
  return node;
};
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) => fill(document.createElementNS(NS, name), attributes, children);
const card = (title, ...children) => el("section", { class: "card" }, el("h2", {}, title), ...children);
const human = n => n >= 1e9 ? +(n / 1e9).toPrecision(3) + "B" : n >= 1e6 ? +(n / 1e6).toPrecision(3) + "M" : n >= 1e3 ? +(n / 1e3).toPrecision(3) + "k" : "" + n;
const three = x => x === null ? "" : x.toFixed(3);
const time = s => s < 60 ? Math.round(s) + " s" : Math.floor(s / 60) + ":" + String(Math.round(s % 60) % 60).padStart(2, "0");
const last = list => list[list.length - 1];

const tip = document.getElementById("tip");
const showTip = (event, lines) => {
  tip.replaceChildren(...lines.map((line, i) => el(i ? "div" : "b", {}, line)));
  tip.style.display = "block";
  const box = tip.getBoundingClientRect(), x = event.clientX || 0, y = event.clientY || 0;
  tip.style.left = Math.max(4, x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14) + "px";
  tip.style.top = Math.max(4, y + 14 + box.height > innerHeight ? y - box.height - 14 : y + 14) + "px";
};
const hideTip = () => { tip.style.display = "none"; };
const ticks = (low, high, wanted) => {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw), found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) found.push(t);
  return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
};
const logTicks = (low, high) => {
  const found = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d++)
    for (const m of [1, 2, 5]) if (m * 10 ** d >= low && m * 10 ** d <= high) found.push(m * 10 ** d);
  if (found.length < 2) return ticks(low, high, 4)[0];
  return found.length > 12 ? found.filter(t => Math.abs(Math.log10(t) - Math.round(Math.log10(t))) < 1e-9) : found;
};
const frame = (W, H, box, ys, decimals, y, label) => [
  ...ys.map(t => svg("line", { x1: box.l, x2: W - box.r, y1: y(t), y2: y(t), class: "axis" })),
  ...ys.map(t => svg("text", { x: box.l - 6, y: y(t) + 4, "text-anchor": "end" }, t.toFixed(decimals))),
  svg("text", { x: 12, y: box.t + (H - box.t - box.b) / 2, transform: `rotate(-90 12 ${box.t + (H - box.t - box.b) / 2})`, "text-anchor": "middle" }, label),
];

