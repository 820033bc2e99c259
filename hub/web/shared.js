"use strict";
// What the pages share: the token, asking the API once a second, text that stays text. No framework, no build, nothing from other hosts.
const $ = (id) => document.getElementById(id);
const PERIOD_MS = 1000;
let token = new URLSearchParams(location.hash.slice(1)).get("token") || sessionStorage.getItem("token") || "";
if (location.hash.includes("token=")) history.replaceState(null, "", location.pathname);
let timer = 0;
let offset = 0; // the hub's clock minus this browser's

async function get(path) {
  const answer = await fetch(path, { headers: { Authorization: "Bearer " + token } });
  if (answer.status === 401) throw new Error("login");
  if (!answer.ok) throw new Error(path + ": " + answer.status);
  return answer.json();
}

function element(name, text, cls) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (cls) made.className = cls;
  return made;
}

function ago(ms) {
  return ms ? span((Date.now() + offset - ms) / 1000) : "never";
}

function span(seconds) {
  seconds = Math.max(0, seconds);
  if (seconds < 90) return Math.round(seconds) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  if (seconds < 172800) return (seconds / 3600).toFixed(1) + " h";
  return (seconds / 86400).toFixed(1) + " d";
}

function clock(ms) {
  return new Date(ms).toLocaleTimeString([], { hour12: false }) + "." + String(ms % 1000).padStart(3, "0");
}

function fill(table, rows) {
  const body = element("tbody");
  for (const cells of rows) {
    const row = element("tr");
    for (const cell of cells) row.append(cell instanceof Node ? cell : element("td", cell));
    body.append(row);
  }
  table.tBodies[0].replaceWith(body);
}

let show = null; // draws the page from what the API says; set by `start`

async function refresh() {
  clearTimeout(timer);
  let wait = PERIOD_MS;
  try {
    const status = await get("api/v1/status");
    offset = status.time_ms - Date.now();
    await show(status);
    sessionStorage.setItem("token", token);
    $("login").hidden = true; $("main").hidden = false; $("logout").hidden = false;
    $("hub-name").textContent = status.hub;
    document.body.dataset.refreshed = String(Number(document.body.dataset.refreshed || 0) + 1);
  } catch (error) {
    if (error.message === "login") {
      $("main").hidden = true; $("logout").hidden = true; $("login").hidden = false;
      $("login-error").textContent = token ? "This token is not valid." : "";
      $("summary").textContent = "not logged in";
      sessionStorage.removeItem("token");
      return;
    }
    $("summary").textContent = "the hub does not answer: " + error.message;
    wait = 3000;
  }
  timer = setTimeout(refresh, wait);
}

function start(draw) {
  show = draw;
  $("login").addEventListener("submit", (event) => { event.preventDefault(); token = $("token").value.trim(); refresh(); });
  $("logout").addEventListener("click", () => { clearTimeout(timer); token = ""; sessionStorage.removeItem("token"); refresh(); });
  refresh();
}
