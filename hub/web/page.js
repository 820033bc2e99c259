"use strict";
// The first page: hierarchy, edges, outages, decisions, events.
function branch(node) {
  const item = element("li");
  item.append(element("span", node.level + " ", "level"));
  const label = element("span", node.name);
  if (node.level === "edge") {
    label.className = node.state === "online" ? "good" : "bad";
    item.append(label, element("span", " " + (node.quarantine ? "quarantine" : node.state), "level"));
  } else {
    item.append(label);
    if (node.edges) item.append(element("span", ` ${node.edges_online}/${node.edges}`, "level"));
  }
  if (node.children && node.children.length) {
    const list = element("ul");
    node.children.forEach((child) => list.append(branch(child)));
    item.append(list);
  }
  return item;
}

function showEdges(edges) {
  fill($("edges"), edges.map((edge) => {
    const number = (value) => element("td", value, "number");
    const streams = Object.values(edge.streams);
    const behind = streams.reduce((sum, stream) => sum + stream.behind, 0);
    const exact = streams.every((stream) => stream.mismatches === 0);
    const hours = edge.presence.outage_hours;
    const state = element("td", edge.quarantine ? "quarantine" : edge.state, edge.state === "online" && !edge.quarantine ? "good" : "bad");
    state.title = edge.quarantine || edge.reason;
    return [
      edge.edge, state, ago(edge.since_ms), ago(edge.last_seen_ms), number(edge.streams.decision.contiguous), number(edge.streams.telemetry.contiguous),
      number(behind), element("td", exact ? "chains agree" : "MISMATCH", exact ? "good" : "bad"),
      number(hours === undefined ? "" : Math.round(hours) + " h"), element("td", edge.presence.health || "", edge.presence.health === "ok" ? "good" : "bad"),
    ];
  }));
}

function showTimeline(edges, outages, hours) {
  const now = Date.now() + offset, start = now - hours * 3600000;
  $("timeline").replaceChildren(...edges.map((edge) => {
    const row = element("div", null, "row"), bar = element("div", null, "bar");
    for (const outage of outages.filter((one) => one.edge === edge.edge)) {
      const from = Math.max(outage.start_ms, start), to = outage.end_ms || now;
      if (to < start) continue;
      const mark = element("i");
      mark.style.setProperty("left", `min(${(100 * (from - start)) / (now - start)}%, 100% - 2px)`); // one that is just over is at the edge, and seen
      mark.style.setProperty("width", (100 * (to - from)) / (now - start) + "%");
      mark.title = `${new Date(outage.start_ms).toLocaleString()} for ${((to - outage.start_ms) / 1000).toFixed(1)} s: ${outage.reason}`;
      bar.append(mark);
    }
    row.append(element("span", edge.edge), bar);
    return row;
  }));
}

// Bodies are as the edge sent them: nothing in them is certain to be there.
function inWords(action) {
  if (!action || typeof action !== "object") return JSON.stringify(action);
  if (action.alert) return String(action.alert.text);
  return Object.entries(action).map(([kind, what]) => `${kind} ${what?.device} ${what?.name || JSON.stringify(what?.set)}`).join();
}

function showDecisions(decisions) {
  const wanted = $("filter").value.toLowerCase();
  const kept = decisions.filter((one) => !wanted || `${one.edge} ${one.body.rule} ${one.body.device}`.toLowerCase().includes(wanted));
  fill($("decisions"), kept.map((one) => {
    const body = one.body;
    const time = element("td", clock(one.dated_ms));
    time.title = `seq ${one.seq}, time quality ${one.dated_quality}` + (one.dated_ms === one.wall_ms ? "" : `; the edge wrote ${new Date(one.wall_ms).toISOString()} (${one.time_quality})`);
    const actions = Array.isArray(body.actions) ? body.actions.map(inWords) : [];
    return [
      time, one.edge, body.rule, body.device, element("td", body.outcome, body.outcome === "fired" ? "bad" : "good"), body.offline ? "alone" : "linked",
      element("td", JSON.stringify(body.inputs), "inputs"), actions.join("; "),
    ];
  }));
}

async function showFabric(status) {
  const hours = Number($("span").value);
  const [tree, edges, decisions, events, outages] = await Promise.all([
    get("api/v1/hierarchy"), get("api/v1/edges"), get("api/v1/decisions?limit=50"), get("api/v1/events?limit=30"), get("api/v1/outages?hours=" + hours),
  ]);
  $("summary").textContent = `${status.edges_online} of ${status.edges} edges online, ${status.counters.records_total || 0} records taken in, broker ${status.broker.kind}` +
    (status.problems.length ? ", " + status.problems.join("; ") : status.storage && status.storage.warning ? ", " + status.storage.warning : "");
  const list = element("ul");
  list.append(branch(tree));
  $("tree").replaceChildren(list);
  showEdges(edges);
  showTimeline(edges, outages, hours);
  showDecisions(decisions);
  fill($("events"), events.map((one) => [clock(one.dated_ms), one.edge, one.kind, element("td", JSON.stringify(one.body), "inputs")]));
}

$("span").addEventListener("change", refresh);
$("filter").addEventListener("input", refresh);
start(showFabric);
