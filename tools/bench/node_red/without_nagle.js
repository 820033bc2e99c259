// Loaded with `node -r`: every TCP socket without Nagle's algorithm. Node-RED's MQTT client leaves it on and has no setting for it.
const net = require("net");
const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...args) {
  const made = connect.apply(this, args);
  this.setNoDelay(true);
  return made;
};
