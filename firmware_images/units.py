"""The systemd units of an image, and what it adds to those of others. Pure: texts; where each goes is in `contents`."""

from edge_runtime.updates import slots

from .layout import DATA, SITE, START_CODE, TOLD
from .recipes import Profile

TRIAL_DATA_WAIT_S = 900
"""Seconds that an image waits for the data partition where the boot loader counts its start; one that is kept waits longer (`contents.DATA_WAIT_S`). More than twice the longest wait that was seen."""

NO_DATA_PAUSE_S = 30
"""Seconds between the word that there is no data partition and the next start: to be read on the console."""

NO_DATA_MOST_S = 300
"""Longest that this may take, the reason's way to the boot partition with it: a disk that does not answer must not keep the device from its next start."""

LASTED_S = 300
"""Seconds after which a start counts as one that lasted; as long as an image on trial has for its proof."""

PROVISION = f"""[Unit]
Description=NovaCron: take over the configuration
RequiresMountsFor={DATA}
Before=novacron-edge.service

[Service]
Type=oneshot
RemainAfterExit=yes
ImportCredential=novacron.*
ExecStart=/usr/lib/novacron/provision
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

CONFIGURED = f"""[Unit]
Description=NovaCron: go back from a configuration with which the agent does not start
RequiresMountsFor={DATA}
After=novacron-edge.service novacron-provision.service
ConditionPathExists={DATA}/config/.before

[Service]
# Not oneshot: no start waits for it.
Type=exec
ExecStart=/usr/lib/novacron/configured
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

GROW = f"""[Unit]
Description=NovaCron: give the data partition the rest of the disk
RequiresMountsFor={DATA}

[Service]
# Not oneshot: no start waits for it.
Type=exec
ExecStart=/usr/lib/novacron/grow
IOSchedulingClass=idle
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

NO_LOGIN = """[Unit]
# There is no login on any console: say so on it and start again, which is also what a second slot needs.
[Service]
ExecStartPre=
ExecStart=
ExecStart=-/bin/sh -c 'echo "novacron: this start failed (above); starting again in 30 s" > /dev/console; busybox sleep 30; systemctl --force reboot'
"""

REPORT = f"""[Unit]
Description=NovaCron: tell the console how the start went
ConditionCredential=|novacron.report
ConditionPathExists=|{DATA}/config/report
After=novacron-edge.service

[Service]
Type=exec
ImportCredential=novacron.report
ExecStart=/usr/lib/novacron/report
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""


_LEAN_WALLS = """# What these forbid an agent cannot do that has no capability, none of their system calls (below) and no right to write to a file of the kernel's; each is some mounts, or a filter for each of three architectures, together an
# eighth of its start. In their place what the kernel shows is read-only as a whole. There are no homes.
ProtectKernelTunables=no
ProtectKernelModules=no
ProtectControlGroups=no
ProtectHome=no
ReadOnlyPaths=/proc/sys /sys
"""

_AGENT = f"""/usr/bin/python3 -I -S -B -OO -X no_debug_ranges -c "import sys; sys.path.append('{SITE}'); from edge_runtime import start_code; start_code.use('{START_CODE}'); from edge_runtime.cli import main; sys.exit(main())" """.rstrip()
"""How the agent is started: without `site`, which looks for packages where an image has none, and `runpy`, and from one file of byte code."""


def agent_drop_in(chosen: Profile) -> str:
    """What an image adds to the agent's unit.

    A wall around an agent that starts containers is one around them, so that there are no more of them than its own drop-in leaves: with ProtectHostname= none would start, with ProtectClock= none would be brought back from a
    checkpoint, and where anything of /proc is covered (ProtectKernelLogs=) the kernel lets no user namespace mount one.
    """
    return f"""[Unit]
# Without a configuration the device waits for one; the console says so.
ConditionPathExists={DATA}/config/edge.yaml
After=novacron-provision.service
StartLimitIntervalSec=0

[Service]
ExecStart=
ExecStart={_AGENT} run --config {DATA}/config/edge.yaml
Environment=PYTHONDONTWRITEBYTECODE=1
Environment=NOVACRON_EDGE__UPDATES__ENABLED=true
Environment=NOVACRON_TOLD={TOLD}
# A name of its own for a device whose configuration gives it none.
DynamicUser=no
User=novacron
StateDirectoryMode=0750
UMask=0027
MemoryMax={chosen.agent_memory_mib}M
OOMScoreAdjust=-900
# While the machine starts, what it is for comes first: what starts beside it (network, clock, names) can wait for the processor.
StartupCPUWeight=10000
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
{"" if "containers" in chosen.extra else _LEAN_WALLS}RestrictSUIDSGID=yes
RestrictRealtime=yes
RemoveIPC=yes
"""

UPDATE = f"""[Unit]
Description=NovaCron: put an update into the other slot
RequiresMountsFor={DATA}
After=novacron-provision.service
ConditionPathExists=|{DATA}/edge/updates/request.json
ConditionPathExists=|{DATA}/updates/trial.json
# At the first start: whether the firmware counts starts.
ConditionPathExists=|!{DATA}/updates/firmware.json
StartLimitIntervalSec=0

[Service]
# Not oneshot: no start waits for a download.
Type=exec
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates turn
Restart=on-failure
RestartSec=10
RestartSteps=6
RestartMaxDelaySec=10min
Nice=10
IOSchedulingClass=idle
MemoryMax=64M
TasksMax=16
OOMScoreAdjust=500
StateDirectory=novacron/updates
StateDirectoryMode=0755
RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
StandardOutput=journal+console
StandardError=journal+console
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
# It mounts the boot partition for itself, and reads what the agent asks for.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_READ_SEARCH
DevicePolicy=closed
DeviceAllow=block-* rw

[Install]
WantedBy=multi-user.target
"""

UPDATE_PATH = f"""[Unit]
Description=NovaCron: what the agent asks of the updater

[Path]
PathChanged={DATA}/edge/updates/request.json

[Install]
WantedBy=multi-user.target
"""

_UPDATES_FOLDER = """StateDirectory=novacron/updates
StateDirectoryMode=0755
"""

_MOUNTS_ESP = """RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
PrivateMounts=yes
StandardOutput=journal+console
StandardError=journal+console
"""
"""Of who mounts the boot partition for itself alone, and speaks on the console."""

NO_DATA = f"""[Unit]
Description=NovaCron: start again without the data partition
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
ConditionPathIsMountPoint=!{DATA}
# Each start of an image on trial is counted by the boot loader: it goes back by itself, whatever else is wrong with it. One that is kept tries again.
SuccessAction=reboot-force
FailureAction=reboot-force

[Service]
Type=oneshot
ExecStart=-/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates no-data
ExecStart=/usr/bin/busybox sleep {NO_DATA_PAUSE_S}
TimeoutStartSec={NO_DATA_MOST_S}
{_MOUNTS_ESP}"""

NO_DATA_TIMER = f"""[Unit]
Description=NovaCron: the longest wait of an image on trial for the data partition
DefaultDependencies=no
ConditionPathExists=/sys/firmware/efi/efivars/{slots.COUNTED_VARIABLE}

[Timer]
OnBootSec={TRIAL_DATA_WAIT_S}
AccuracySec=1

[Install]
WantedBy=sysinit.target
"""

DATA_DROP_IN = """[Unit]
# Also where what it needs fails or does not come in time.
OnFailure=novacron-no-data.service
"""

GATE = f"""[Unit]
Description=NovaCron: go back from an image that does not prove itself
# As its timer: default dependencies would have it wait for sysinit.target.
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
RequiresMountsFor={DATA}
ConditionPathExists={DATA}/updates/trial.json

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates gate
{_UPDATES_FOLDER}{_MOUNTS_ESP}"""

GATE_TIMER = """[Unit]
Description=NovaCron: look whether an image on trial has proven itself
# Also where the start gets stuck before the targets that a device is to reach.
DefaultDependencies=no

[Timer]
OnBootSec=30
OnUnitInactiveSec=15
AccuracySec=1

[Install]
WantedBy=sysinit.target
"""

LASTED = f"""[Unit]
Description=NovaCron: this start has lasted
RequiresMountsFor={DATA}

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates lasted
Nice=10
IOSchedulingClass=idle
MemoryMax=64M
{_UPDATES_FOLDER}{_MOUNTS_ESP}"""

LASTED_TIMER = f"""[Unit]
Description=NovaCron: after a while, this start has lasted

[Timer]
OnBootSec={LASTED_S}
AccuracySec=1

[Install]
WantedBy=timers.target
"""
