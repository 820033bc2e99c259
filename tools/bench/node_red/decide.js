// The function node: the benchmark's rule (a threshold and the autoencoder's error), then a command. `journal` in the global context, where
// the run sets it, is a file that each decision is appended to and made durable in before the command goes out.
const values = msg.payload;
if (!(values.cpu_ratio > 0)) return null;
const model = global.get("model");
const x = [];
for (const input of model.inputs) {
  let value = values[input.name];
  if (typeof value !== "number") return null;
  if (input.transform === "log1p") value = Math.log1p(Math.max(0, value));
  x.push((value - input.mean) / input.scale);
}
let y = x;
for (const layer of model.layers) {
  const made = [];
  for (let row = 0; row < layer.weights.length; row++) {
    let total = layer.bias[row];
    const weights = layer.weights[row];
    for (let column = 0; column < weights.length; column++) total += weights[column] * y[column];
    made.push(layer.activation === "relu" ? Math.max(0, total) : layer.activation === "tanh" ? Math.tanh(total) : total);
  }
  y = made;
}
let error = 0;
for (let index = 0; index < x.length; index++) error += (x[index] - y[index]) ** 2;
error /= x.length;
if (!(error >= 0)) return null;
const seq = (context.get("seq") || 0) + 1;
context.set("seq", seq);
const now = Date.now();
const command = { id: "node-red." + seq, name: "act", args: { n: values.n }, expires_ms: now + 60000 };
const journal = global.get("journal");
if (journal) {
  const fs = global.get("fs");
  fs.writeSync(journal, JSON.stringify({ seq, wall_ms: now, rule: "bench", inputs: values, model: error, actions: [command] }) + "\n");
  fs.fdatasyncSync(journal);
}
return { topic: "novacron/1/device/bench/command", payload: command, qos: 1 };
