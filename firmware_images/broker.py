"""What an image with a broker has for it: its configuration, its unit, and the scripts that let the devices of a site in. Pure: texts; where each goes is in `contents`."""

from .layout import BROKER_FILES, DATA, ESP_NAME
from .scripts import TELL

PORT = 1883
"""Of loopback: for the agent and whatever else runs on the gateway."""

DEVICES_PORT = 8883
"""Of the network, with TLS: for devices."""

PASSWORDS, CERTIFICATE, KEY, RIGHTS = BROKER_FILES

KEPT = f"{DATA}/config/broker"
"""What was given for it last, whole."""

READY = "/run/novacron-broker"
"""What it reads, as its own user."""

STATE = f"{DATA}/mosquitto"

SCRIPTS = "/usr/lib/novacron"

AGENT = "novacron-agent"
"""The agent's user, with all rights; its password is made anew at each boot."""

AGENT_ENVIRONMENT = "/run/novacron-bus.env"
"""What the agent's unit gets of it, root's alone."""

CONFIGURATION = f"""# Nobody gets in without a password, and there is no default one. {SCRIPTS}/broker-ready makes the agent's, and adds a listener for devices where the gateway has passwords and a certificate.
# Without per_listener_settings: with it, 2.0.21 acknowledges and drops what comes for a client that it knows from its file alone, as it has no listener.
allow_anonymous false
password_file {READY}/{PASSWORDS}
acl_file {READY}/{RIGHTS}
persistence true
persistence_location {STATE}/
autosave_interval 60
persistent_client_expiration 7d
# A message of the contract and its frame; as much of them as the unit's memory holds.
max_packet_size 300000
max_inflight_messages 200
max_queued_messages 20000
max_queued_bytes 16777216
set_tcp_nodelay true
log_dest stderr
listener {PORT} 127.0.0.1
include_dir {READY}
"""

OWN_RIGHTS = "".join(f"pattern {right} novacron/1/device/%u/{what}\n" for right, names in (("write", ("register", "telemetry", "reported", "result")), ("read", ("command", "desired"))) for what in names)
"""What a device may do where nothing else is given: speak for the device of its user's name, and hear what that is told."""

TAKE = f"""#!/bin/sh
# At each boot: what is given for devices' way to the broker, as credentials (novacron.{PASSWORDS}, ...) or in the folder novacron of the boot partition, is checked and taken over as a whole where it differs from what is kept.
# By themselves, as a site gets more devices in the course of time: none of them touches the agent's own.
set -u
umask 077
{TELL}kept={KEPT} new={DATA}/config/.broker
busybox rm -rf $new
busybox mkdir -p $new
from="${{CREDENTIALS_DIRECTORY:-/nonexistent}}" prefix=novacron. mounted=
given() {{
  for name in {" ".join(BROKER_FILES)}; do [ -e "$from/$prefix$name" ] && return 0; done
  return 1
}}
if ! given; then
  from=/run/novacron-broker-esp prefix=
  busybox mkdir -p $from
  /usr/bin/mount -o ro,nodev,nosuid,noexec PARTLABEL={ESP_NAME} $from && mounted=$from && from=$from/novacron
fi
if given; then
  for name in {" ".join(BROKER_FILES)}; do
    if [ -e "$from/$prefix$name" ]; then busybox cp "$from/$prefix$name" $new/$name || exit 1; fi
  done
fi
[ -z "$mounted" ] || umount $mounted
why() {{
  for name in {PASSWORDS} {CERTIFICATE} {KEY}; do
    if [ ! -s $new/$name ]; then echo "there is no $name beside the others"; return; fi
  done
  # mosquitto passes over what it cannot read, and the device would be locked out with no word.
  if busybox grep -q '^{AGENT}:' $new/{PASSWORDS}; then echo "{PASSWORDS} names {AGENT}, which is the agent's"; return; fi
  if busybox grep -Evq '^([^:[:space:]]+:\\$[67]\\$[^:[:space:]]+)?$' $new/{PASSWORDS}; then echo "{PASSWORDS} has a line that mosquitto_passwd did not write"; return; fi
  public="$(openssl x509 -noout -pubkey -in $new/{CERTIFICATE} 2> /dev/null)"
  if [ -z "$public" ]; then echo "{CERTIFICATE} is no certificate (PEM)"; return; fi
  if [ "$(openssl pkey -pubout -passin pass: -in $new/{KEY} 2> /dev/null)" != "$public" ]; then echo "{KEY} is not the key (PEM, without a password) of {CERTIFICATE}"; return; fi
  if [ -e $new/{RIGHTS} ] && busybox grep -Evq '^(#.*|(user|topic|pattern) .+)?$' $new/{RIGHTS}; then echo "{RIGHTS} has a line that begins with none of user, topic, pattern, #"; fi
}}
if [ -n "$(busybox ls $new)" ] && ! busybox diff -r $new $kept > /dev/null 2>&1; then
  problem="$(why)"
  if [ -n "$problem" ]; then
    echo "novacron: what is given for the broker cannot be used: $problem. Nothing of it was taken over."
    tell broker refused "$problem"
  else
    # A power cut in between: it is given again at the next boot.
    busybox sync
    busybox rm -rf $kept && busybox mv $new $kept && busybox sync && echo "novacron: the broker's passwords and certificate taken over." && tell broker taken ""
  fi
fi
busybox rm -rf $new
[ -e $kept/{PASSWORDS} ] || echo "novacron: no device reaches the broker over the network: it was given no passwords and no certificate ({PASSWORDS}, {CERTIFICATE}, {KEY})."
exit 0
"""

MAKE_READY = f"""#!/bin/sh
# As root, before each start of the broker: what it lets in by, put where its own user reads it and nobody else.
set -eu
umask 077
busybox rm -f {READY}/*
if [ -e {KEPT}/{PASSWORDS} ]; then
  for name in {PASSWORDS} {CERTIFICATE} {KEY}; do busybox cp {KEPT}/$name {READY}/$name; done
else
  : > {READY}/{PASSWORDS}
fi
if [ -e {KEPT}/{RIGHTS} ]; then
  busybox cp {KEPT}/{RIGHTS} {READY}/{RIGHTS}
else
  echo '{OWN_RIGHTS}' > {READY}/{RIGHTS}
fi
echo '
user {AGENT}
topic readwrite #' >> {READY}/{RIGHTS}
# The same until the next boot: the agent that runs has it. Where its bus is another broker, it has that one's.
if [ ! -s {AGENT_ENVIRONMENT} ] && busybox grep -Eq '"bus": [{{][^}}]*"url": "mqtt://(127[.]|localhost)' {DATA}/config/edge.yaml.json; then
  echo "NOVACRON_EDGE__BUS__USERNAME={AGENT}
NOVACRON_EDGE__BUS__PASSWORD=$(busybox head -c 16 /dev/urandom | busybox hexdump -ve '1/1 "%02x"')" > {AGENT_ENVIRONMENT}
fi
if [ -s {AGENT_ENVIRONMENT} ]; then
  . {AGENT_ENVIRONMENT}
  export NOVACRON_EDGE__BUS__USERNAME NOVACRON_EDGE__BUS__PASSWORD
  mosquitto_passwd -b {READY}/{PASSWORDS} {AGENT} "$NOVACRON_EDGE__BUS__PASSWORD"
fi
busybox chown -R mosquitto:mosquitto {READY}
# A broker that has kept nothing would acknowledge what devices say before the agent is there, and have nobody to give it to.
if [ ! -s {STATE}/mosquitto.db ] && [ -s {AGENT_ENVIRONMENT} ]; then
  # It is not the unit's own, which says when it is ready; and there is no way to it yet but the agent's.
  unset NOTIFY_SOCKET
  /usr/sbin/mosquitto -c /etc/mosquitto/novacron.conf &
  python3 -OO -m edge_runtime.bus_place --config {DATA}/config/edge.yaml || true
  # Ended in order it writes down what it has.
  kill $! && wait $! || true
fi
if [ -e {READY}/{CERTIFICATE} ]; then
  # A user is one device with one connection: by another's name of client it would take over what is kept for that, the agent's too.
  echo 'listener {DEVICES_PORT}
certfile {READY}/{CERTIFICATE}
keyfile {READY}/{KEY}
use_username_as_clientid true' > {READY}/devices.conf
  busybox chown mosquitto:mosquitto {READY}/devices.conf
fi
"""

ENDED = f"""#!/bin/sh
# After each end of the broker. It ends with an error of its own, and at once each time, where it cannot read what it kept: then it has to begin without. What had its place there the agent knows too.
if [ "${{SERVICE_RESULT:-}}" = exit-code ] && [ -e {STATE}/mosquitto.db ]; then
  busybox mv {STATE}/mosquitto.db {STATE}/mosquitto.db.damaged
  echo "novacron: the broker ended with status ${{EXIT_STATUS:-}}; what it kept is set aside as mosquitto.db.damaged"
fi
exit 0
"""

UNIT = f"""[Unit]
Description=NovaCron: the local broker
RequiresMountsFor={DATA}
After=novacron-provision.service
Before=novacron-edge.service
# Nobody comes to start it anew.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStartPre=+{SCRIPTS}/broker-ready
ExecStart=/usr/sbin/mosquitto -c /etc/mosquitto/novacron.conf
ExecStopPost={SCRIPTS}/broker-ended
Restart=always
RestartSec=1
User=mosquitto
RuntimeDirectory={READY.removeprefix("/run/")}
RuntimeDirectoryMode=0700
StateDirectory={STATE.removeprefix("/var/lib/")}
StateDirectoryMode=0700
MemoryMax=64M
TasksMax=16
LimitNOFILE=4096
# Without it no device's command is carried out, and no reading comes in.
OOMScoreAdjust=-800
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
SystemCallArchitectures=native
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"""

AGENT_DROP_IN = f"""[Service]
EnvironmentFile=-{AGENT_ENVIRONMENT}
"""

PROVISION_DROP_IN = f"""[Service]
ExecStart={SCRIPTS}/broker-take
"""
"""After the configuration's own turn, and as it before the updater's, which mounts the boot partition too."""
