"use strict";
// Before the page's own script, where `search.serve` shows it: carries orders, and loads the page again for new results.
const base = location.pathname.replace(/\/$/, "") + (/\/\d+\/?$/.test(location.pathname) ? "/" : "/0/");
async function carry(order) {
  try {
    const answer = await fetch(base + "order", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(order) });
    return answer.ok ? (await answer.json()).answer : "refused: " + await answer.text();
  } catch (error) {
    return "search.serve does not answer";
  }
}
window.typing = false;
setInterval(async () => {
  try {
    const answer = await fetch(base + "state");
    if (answer.ok && (await answer.json()).stamp !== "STAMP" && !window.typing) location.reload();
  } catch (error) { /* it ended; the page stays as it is */ }
}, 2000);
if (SEVERAL) addEventListener("DOMContentLoaded", () => {
  const link = document.createElement("a");
  link.href = "../";
  link.textContent = "all studies";
  document.getElementById("page").prepend(link);
});
