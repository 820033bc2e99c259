"""The operating system's side: systemd notification and watchdog, facts about this process."""
