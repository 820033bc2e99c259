"use strict";
// The transfers page: what moves between migration workers, how far it is and how long that was expected to take.
const SILENT_MS = 60000; // a worker asks every twenty seconds at the latest

function bytes(value) {
  if (!value) return "";
  const power = Math.min(4, Math.floor(Math.log2(value) / 10));
  return (value / 2 ** (10 * power)).toFixed(power ? 1 : 0) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
}

function farCell(one) {
  const length = one.progress.length;
  if (!length) return element("td", "", "heat");
  const share = Math.min(1, one.progress.moved_bytes / length);
  const cell = element("td", Math.round(100 * share) + " %" + (one.progress.passes > 1 ? `, pass ${one.progress.passes}` : ""), "heat");
  cell.style.setProperty("--share", 45 * share + "%");
  return cell;
}

function expected(one) {
  const said = one.prediction;
  if (!said.estimated_duration_seconds) return "";
  const cell = element("td", span(said.estimated_duration_seconds) + (said.confidence ? `, ${said.low_seconds.toFixed(1)} to ${said.high_seconds.toFixed(1)} s in ${Math.round(100 * said.confidence)} %` : ""), "soft");
  cell.title = said.reason || `ratio ${said.expected_compression_ratio.toFixed(1)}, ${said.recommended_streams} streams`;
  return cell;
}

start(async () => {
  const [transfers, workers, moves] = await Promise.all([get("api/v1/transfers?limit=200"), get("api/v1/migration-workers"), get("api/v1/moves?limit=100")]);
  fill($("moves"), moves.map((one) => [
    one.workload, one.source, one.target, element("td", one.state === "running" ? one.step : one.state, one.state === "done" ? "good" : one.state === "failed" ? "bad" : "soft"),
    element("td", bytes(one.bytes || one.needs_bytes), "number"), farCell(one), expected(one), ago(one.changed_ms), one.reason || one.problem || one.why_still || one.why,
  ]));
  fill($("transfers"), transfers.map((one) => [
    one.id, `${one.document.source.worker}: ${one.document.source.path}`, `${one.document.destination.worker}: ${one.document.destination.path}`,
    element("td", one.state, one.state === "done" ? "good" : one.state === "failed" ? "bad" : "soft"), element("td", bytes(one.progress.length), "number"), farCell(one),
    element("td", bytes(one.progress.wire_bytes), "number"), expected(one), ago(one.changed_ms), one.waits_for || one.reason,
  ]));
  fill($("workers"), workers.map((one) => [
    one.worker, element("td", ago(one.seen_ms), one.silent_ms > SILENT_MS ? "bad" : "good"), element("td", one.cpus, "number"), one.gpu || "none", element("td", bytes(one.free_bytes), "number"), element("td", one.slots, "number"),
  ]));
  const moving = transfers.filter((one) => one.state === "moving").length;
  $("summary").textContent = `${moving} of ${transfers.length} transfers under way, ${workers.length} workers`;
});
