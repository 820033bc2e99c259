"use strict";
// The workloads page: a heat map of nodes, what waits and why, use over time, every workload.
const UNITS = { cpu: [1000, "CPU"], memory: [2 ** 30, "GiB"], disk: [2 ** 30, "GiB"], network: [1000, "Mbit/s"] };
const HISTORY_MS = 60000; // a new point comes once a minute
const NODES_SHOWN = 300; // rows that a browser draws every second without effort
const SVG = "http://www.w3.org/2000/svg";
let explained = "";
let history = { at: 0, hours: 0, points: [] };

function amount(name, value) {
  const [unit, word] = UNITS[name] || [1, ""];
  return (value / unit).toFixed(unit === 1 ? 0 : 1) + (word ? " " + word : "");
}

function heatCell(name, pair, reserved) {
  if (!pair || !pair[1]) return element("td", "", "heat");
  const share = pair[0] / pair[1];
  const cell = element("td", Math.round(100 * share) + " %", "heat");
  cell.style.setProperty("--share", Math.min(45, Math.max(0, 45 * share)) + "%");
  cell.title = `${name}: ${amount(name, pair[0])} of ${amount(name, pair[1])}` + (reserved ? `, ${amount(name, reserved)} reserved for jobs that start later` : "");
  return cell;
}

function gpuPair(node) {
  return node.gpus.length ? [node.gpus.reduce((sum, gpu) => sum + 1000 - gpu.free_milli, 0), 1000 * node.gpus.length] : null;
}

function showHeat(nodes) {
  const names = [...new Set(nodes.flatMap((node) => Object.keys(node.resources)))];
  const head = element("tr");
  for (const text of ["node", "kind", "state", ...names, "gpu", "workloads", "runs", "problem"]) head.append(element("th", text));
  $("heat").tHead.replaceChildren(head);
  fill($("heat"), nodes.map((node) => [
    node.node, node.kind, element("td", node.cordon ? `${node.status}, ${node.cordon}` : node.status, node.status === "up" && !node.cordon ? "good" : "bad"),
    ...names.map((name) => heatCell(name, node.resources[name], node.reserved[name])), heatCell("gpu", gpuPair(node)), element("td", node.workloads, "number"), node.runs.join(", "), element("td", node.problem, "bad"),
  ]));
}

function whyButton(name) {
  const cell = element("td"), button = element("button", name);
  button.type = "button";
  button.title = "why is it there, or nowhere?";
  button.addEventListener("click", () => { explained = name; refresh(); });
  cell.append(button);
  return cell;
}

function startCell(one) {
  if (one.planned_ms === null) return "";
  const cell = element("td", "in " + span((one.planned_ms - Date.now() - offset) / 1000) + " on " + [...new Set(one.planned_nodes)].join(", "), one.late_ms ? "bad" : "good");
  cell.title = new Date(one.planned_ms).toISOString() + (one.late_ms ? `, ${one.late_ms / 1000} s after its deadline` : "");
  return cell;
}

function showPending(pending) {
  fill($("pending"), pending.map((one) => [whyButton(one.workload), one.document.kind || "container", element("td", one.document.priority || 0, "number"), ago(one.created_ms), startCell(one),
    element("td", one.reason, one.planned_ms === null || one.late_ms ? "bad" : "soft")]));
}

function showAll(all) {
  const wanted = $("filter").value.toLowerCase();
  const kept = all.filter((one) => !wanted || `${one.workload} ${one.node}`.toLowerCase().includes(wanted));
  fill($("workloads"), kept.map((one) => [
    whyButton(one.workload), one.document.kind || "container", element("td", one.state, one.state === "placed" ? "good" : one.state === "failed" || one.state === "pending" ? "bad" : "soft"),
    one.node, one.said + (one.form ? ` as ${one.form}` : "") + (one.moved_from ? ` (moved by its site, from ${one.moved_from})` : ""), ago(one.since_ms || one.changed_ms), one.reason,
  ]));
}

function showMoves(all) {
  $("rebalance-section").hidden = !all.length;
  if (!all.length) return;
  const one = all[0];
  $("rebalance-text").textContent = `${one.id}: ${one.state}${one.nodes.length ? ", empties " + one.nodes.join(", ") : ""}. ${one.reason || one.text}`;
  fill($("rebalance"), one.steps.flatMap((step, number) => step.map((move) => [
    element("td", number + 1, "number"), move.workload, move.source, move.target, element("td", move.state, move.state === "done" ? "good" : "soft"), move.waits_for || "",
  ])));
}

async function showExplained() {
  $("explain").hidden = !explained;
  if (!explained) return;
  try {
    const said = await get(`api/v1/workloads/${encodeURIComponent(explained)}/explain`);
    $("explain-text").textContent = [`${said.workload}: ${said.state}${said.node ? " on " + said.node : ""}`, said.reason, said.summary, ...said.advice].filter(Boolean).join(". ");
    fill($("explain-nodes"), said.nodes.map((node) => [
      node.node, element("td", node.fits ? "yes" : "no", node.fits ? "good" : "bad"), element("td", node.score, "number"),
      node.why.join("; ") || Object.entries(node.parts).map(([name, part]) => `${name} ${part.score}*${part.weight}`).join(", "), node.remedy.join("; "),
    ]));
  } catch (error) {
    if (error.message === "login") throw error;
    explained = ""; // it was forgotten meanwhile
    $("explain").hidden = true;
  }
}

function curve(name, points, pick, from, to) {
  const row = element("div", null, "curve");
  const shares = points.map((point) => [point.minute, pick(point)]).filter(([, pair]) => pair && pair[1]).map(([minute, pair]) => [minute, pair[0] / pair[1]]);
  const drawing = document.createElementNS(SVG, "svg"), line = document.createElementNS(SVG, "polyline");
  drawing.setAttribute("viewBox", "0 0 1000 100");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `${name} in use over time`);
  line.setAttribute("points", shares.map(([minute, share]) => `${(1000 * (minute - from)) / Math.max(1, to - from)},${100 - 100 * Math.min(1, share)}`).join(" "));
  drawing.append(line);
  row.append(element("span", name), drawing, element("span", shares.length ? Math.round(100 * shares[shares.length - 1][1]) + " %" : "", "number"));
  return row;
}

function showUse(points, hours) {
  const to = Math.floor((Date.now() + offset) / 60000), from = to - 60 * hours;
  const names = [...new Set(points.flatMap((point) => Object.keys(point.resources)))];
  const curves = names.map((name) => curve(name, points, (point) => point.resources[name], from, to));
  if (points.some((point) => point.gpu_milli[1])) curves.push(curve("gpu", points, (point) => point.gpu_milli, from, to));
  $("use").replaceChildren(...(curves.length ? curves : [element("p", "nothing yet: a point is kept every minute", "soft")]));
}

async function showWorkloads(status) {
  const hours = Number($("span").value);
  if (history.hours !== hours || Date.now() - history.at > HISTORY_MS || !history.points.length) {
    history = { at: Date.now(), hours, points: (await get("api/v1/scheduler?hours=" + hours)).history };
  }
  const [nodes, pending, all, scheduler, moves] = await Promise.all([get("api/v1/nodes?limit=" + NODES_SHOWN), get("api/v1/workloads?state=pending"), get("api/v1/workloads?limit=200"), get("api/v1/scheduler?hours=0"),
    get("api/v1/rebalance")]);
  const now = scheduler.now;
  $("summary").textContent = `${now.nodes.up} of ${now.nodes.up + now.nodes.silent} nodes up, ${now.workloads.placed} workloads placed, ${now.workloads.pending} waiting` +
    (scheduler.decision_ms.p99 === null ? "" : `, 99 of 100 decisions within ${scheduler.decision_ms.p99} ms`) + (status.problems.length ? ", " + status.problems.join("; ") : "");
  showHeat(nodes);
  showPending(pending);
  showMoves(moves);
  showAll(all);
  showUse(history.points, hours);
  await showExplained();
}

$("span").addEventListener("change", refresh);
$("filter").addEventListener("input", refresh);
start(showWorkloads);
