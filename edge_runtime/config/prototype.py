"""The earlier prototype's YAML: loads; what has a meaning here is translated, the rest is named."""

from collections.abc import Callable
from typing import Any

MARKS = frozenset(("agent_id", "cluster_id", "edge_region", "cloud_endpoint", "cloud_token", "local_redis", "resource_limits", "edge_network"))
"""Keys that only the prototype had."""

_NO_EFFECT: dict[str, str] = {
    "sync_interval": "records are sent as they come",
    "local_redis": "the journal is SQLite and needs no server",
    "resource_limits": "limits are per queue and database; see journal.*",
    "local_decisions": "local decisions are always on",
    "edge_network": "networking comes with the network drivers",
    "performance": "queues and caches have fixed limits",
    "device": "the host's facts are probed",
    "workloads": "workload drivers read desired state",
    "security": "TLS is set by uplink.url, uplink.ca_file, uplink.cert_file",
    "policies": "placement policies live at the hub",
    "development": "there is no mock mode",
}
_MONITORING_NO_EFFECT = ("enable_metrics", "metrics_interval", "detailed_metrics", "health_check_interval", "health_timeout")
_THRESHOLDS = (
    ("cpu_alert_threshold", "cpu_ratio", 0.01), ("memory_alert_threshold", "memory_used_ratio", 0.01), ("disk_alert_threshold", "disk_used_ratio", 0.01),
    ("temperature_alert_threshold", "temperature_celsius", 1.0),
)
_KNOWN = ("agent_id", "cluster_id", "edge_region", "cloud_endpoint", "cloud_token", "offline_mode", "ai_inference", "health_port", "metrics_port", "monitoring", "logging", *_NO_EFFECT)


def is_prototype(data: dict[str, Any]) -> bool:
    """Whether a file is in the prototype's form."""
    return bool(MARKS & data.keys())


def translate(data: dict[str, Any], expand: Callable[[str, str], str]) -> tuple[dict[str, Any], list[str], list[tuple[str, str]]]:
    """The file in today's form.

    Args:
        expand: `${NAME}` in the text of a key, for what has to be read here.

    Returns:
        The translated data; warnings that name every key without effect; unknown keys with a remedy.
    """
    out: dict[str, Any] = {}
    warnings: list[str] = []
    unknown: list[tuple[str, str]] = []
    uplink: dict[str, Any] = {}
    for name, target in (("agent_id", "edge_id"), ("cluster_id", "site"), ("edge_region", "region")):
        if data.get(name):
            out[target] = data[name]
    endpoint = data.get("cloud_endpoint")
    if endpoint:
        endpoint = expand("cloud_endpoint", str(endpoint))
        address = endpoint.split("://")[-1]
        uplink["url"] = f"mqtt://{address}"
        warnings.append(f"cloud_endpoint: {endpoint} is taken as the MQTT broker {uplink['url']}")
    if data.get("cloud_token"):
        uplink["password"] = data["cloud_token"]
        uplink["username"] = data.get("agent_id", "edge")
    offline = data.get("offline_mode")
    if isinstance(offline, str):
        offline = {"true": True, "false": False}.get(expand("offline_mode", offline).lower(), offline)
    if offline is True:
        uplink["enabled"] = False
    elif offline is not None and not isinstance(offline, bool):
        unknown.append(("offline_mode", "use true or false"))
    if uplink:
        out["uplink"] = uplink
    port = data.get("health_port", data.get("metrics_port"))
    if port is not None:
        out["api"] = {"port": port}
        if data.get("metrics_port") not in (None, port):
            warnings.append(f"metrics_port: /metrics is served on health_port {port}")
    inference = data.get("ai_inference")
    if isinstance(inference, dict):
        models = inference.get("models")
        for model in models if isinstance(models, list) else ():
            warnings.append(f"ai_inference.models: {model.get('name', '?') if isinstance(model, dict) else model}: name a manifest under decisions.models to use a model")
        warnings.append("ai_inference: has no effect here: models are loaded when decisions.models names them")
    elif inference is not None and not isinstance(inference, bool):
        unknown.append(("ai_inference", "use true, false or a mapping"))
    _monitoring(data.get("monitoring"), out, warnings, unknown)
    _logging(data.get("logging"), out, warnings, unknown)
    for name, why in _NO_EFFECT.items():
        if name in data:
            warnings.append(f"{name}: has no effect here: {why}")
    for name in data:
        if name not in _KNOWN:
            import difflib

            near = difflib.get_close_matches(str(name), _KNOWN, n=1)
            unknown.append((str(name), f"did you mean {near[0]}?" if near else "remove it"))
    return out, warnings, unknown


def _monitoring(section: Any, out: dict[str, Any], warnings: list[str], unknown: list[tuple[str, str]]) -> None:
    if section is None:
        return
    if not isinstance(section, dict):
        unknown.append(("monitoring", "write `key: value` lines below it"))
        return
    rules = []
    for name, metric, factor in _THRESHOLDS:
        value = section.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            rules.append({
                "id": name.removesuffix("_threshold").replace("_", "-"), "on": {"device": "host", "metric": metric},
                "if": {"value": metric, "op": ">", "than": value * factor}, "for": "10s",
                "then": [{"alert": {"severity": "warning", "text": f"{metric} {{{metric}}} is over {value * factor:g}"}}],
            })
        elif value is not None:
            unknown.append((f"monitoring.{name}", "use a number"))
    if rules:
        out["decisions"] = {"rules": rules}
    known = {name for name, _, _ in _THRESHOLDS} | set(_MONITORING_NO_EFFECT)
    for name in section:
        if name in _MONITORING_NO_EFFECT:
            warnings.append(f"monitoring.{name}: has no effect here: metrics and health are always on")
        elif name not in known:
            import difflib

            near = difflib.get_close_matches(str(name), known, n=1)
            unknown.append((f"monitoring.{name}", f"did you mean monitoring.{near[0]}?" if near else "remove it"))


def _logging(section: Any, out: dict[str, Any], warnings: list[str], unknown: list[tuple[str, str]]) -> None:
    if section is None:
        return
    if not isinstance(section, dict):
        unknown.append(("logging", "write `key: value` lines below it"))
        return
    found: dict[str, Any] = {}
    level = str(section.get("level", "")).lower()
    if level:
        found["level"] = {"warn": "warning", "fatal": "error", "trace": "debug"}.get(level, level)
    if section.get("enable_json") is not None:
        found["format"] = "json" if section["enable_json"] else "text"
    if found:
        out["logging"] = found
    for name in section:
        if name in ("output", "file_path", "max_file_size_mb", "max_files"):
            warnings.append(f"logging.{name}: has no effect here: logs go to standard error, the service manager keeps them")
        elif name not in ("level", "enable_json"):
            unknown.append((f"logging.{name}", "use level or enable_json"))
