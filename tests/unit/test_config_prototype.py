"""The earlier prototype's agent file: loads, what has a meaning is translated, what has none is named, what is unknown is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_runtime.config import ConfigError, LoadedConfig, load_config
from edge_runtime.config.prototype import _NO_EFFECT
from edge_runtime.decisions.rules import parse_rules

FILE = """
agent_id: edge-agent-7
cluster_id: edge-cluster-001
edge_region: us-west-2
cloud_endpoint: ${CLOUD_ENDPOINT:-localhost:8090}
cloud_token: ${CLOUD_TOKEN}
sync_interval: 30s
local_redis: {address: "localhost:6379", password: "", db: 1}
resource_limits: {max_memory_mb: 1024, max_cpu_cores: 2, max_storage_gb: 10}
offline_mode: false
local_decisions: true
health_port: 8080
metrics_port: 8081
edge_network: edge0
performance:
  max_cache_size_mb: 256
  cache_ttl: 300s
  gc_interval: 60s
  max_concurrent_tasks: 4
  task_timeout: 30s
  connection_pool_size: 10
  request_timeout: 15s
  retry_attempts: 3
  log_rotation_mb: 50
  metrics_retention_hours: 24
device: {type: gateway, architecture: arm64, gpu_acceleration: false, hardware_crypto: true}
workloads:
  containers: {enabled: true, runtime: containerd, max_containers: 20, default_memory_mb: 128, default_cpu_shares: 1024}
  vms: {enabled: true, hypervisor: firecracker, max_vms: 5, default_memory_mb: 256, default_vcpus: 1}
monitoring:
  enable_metrics: true
  metrics_interval: 10s
  detailed_metrics: false
  health_check_interval: 30s
  health_timeout: 5s
  cpu_alert_threshold: 80
  memory_alert_threshold: 85
  disk_alert_threshold: 90
  temperature_alert_threshold: 75
security: {enable_tls: true, cert_path: /etc/ssl, enable_rbac: true, admin_users: [admin], enable_audit: true, audit_log_path: /var/log/audit.log}
ai_inference:
  model_cache_size_mb: 200
  model_refresh_interval: 3600s
  max_inference_requests: 10
  inference_timeout: 5s
  confidence_threshold: 0.7
  models:
    - {name: workload-placement, version: v1.2, size_mb: 45, accuracy: 0.89}
    - {name: failure-prediction, version: v1.1, size_mb: 32, accuracy: 0.94}
    - {name: resource-optimization, version: v1.0, size_mb: 28, accuracy: 0.82}
policies:
  resource_allocation: {cpu_overcommit_ratio: 1.5, memory_overcommit_ratio: 1.2, prioritize_local_workloads: true}
  data_management: {local_cache_priority: high, sync_batch_size: 100, compress_sync_data: true}
  fault_tolerance: {max_retry_attempts: 3, retry_backoff_ms: 1000, failover_timeout: 30s}
logging: {level: info, output: file, file_path: /var/log/edge.log, max_file_size_mb: 100, max_files: 3, enable_json: true}
development: {enable_debug_endpoints: false, mock_cloud_connection: false, simulate_resource_constraints: false, test_mode: false}
"""


def load(tmp_path: Path, env: dict[str, str] | None = None, **changes: Any) -> LoadedConfig:
    data = {**yaml.safe_load(FILE), **changes}
    path = tmp_path / "edge-agent.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not ...}))
    return load_config(path, {"HOME": "/h", "CLOUD_TOKEN": "t0k", **(env or {})})


def refused(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **changes)
    return str(caught.value)


def test_what_has_a_meaning_is_translated(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(FILE)
    config = load_config(tmp_path / "file.yaml", {"HOME": "/h", "CLOUD_TOKEN": "t0k"}).config
    assert config == load(tmp_path).config
    assert (config.edge_id, config.site, config.region, config.node) == ("edge-agent-7", "edge-cluster-001", "us-west-2", "edge-agent-7")
    assert (config.uplink.url, config.uplink.username, config.uplink.password, config.uplink.enabled) == ("mqtt://localhost:8090", "edge-agent-7", "t0k", True)
    assert config.api.port == 8080 and (config.logging.level, config.logging.format) == ("info", "json")
    rules = {rule.id: rule for rule in parse_rules(config.decisions.rules).rules}
    assert {name: rule.condition.than for name, rule in rules.items()} == {"cpu-alert": 0.8, "memory-alert": 0.85, "disk-alert": 0.9, "temperature-alert": 75.0}  # type: ignore[union-attr]
    assert all(rule.device == "host" and rule.for_ms == 10_000 for rule in rules.values())


@pytest.mark.parametrize("endpoint", ["localhost:8091", "ws://localhost:8091", "${WHERE}", "${NOWHERE:-ws://localhost:8091}"])
def test_an_endpoint_is_taken_as_the_broker_whatever_its_scheme(tmp_path: Path, endpoint: str) -> None:
    loaded = load(tmp_path, {"WHERE": "wss://localhost:8091"}, cloud_endpoint=endpoint)
    assert loaded.config.uplink.url == "mqtt://localhost:8091"
    assert any(warning.startswith("cloud_endpoint:") and "mqtt://localhost:8091" in warning for warning in loaded.warnings)


def test_every_key_without_effect_is_named(tmp_path: Path) -> None:
    warnings = load(tmp_path).warnings
    named = {warning.partition(":")[0] for warning in warnings}
    data = yaml.safe_load(FILE)
    translated = {"agent_id", "cluster_id", "edge_region", "cloud_token", "offline_mode", "health_port"}
    assert named >= set(data) - translated - {"monitoring", "logging"}
    assert named >= {f"logging.{name}" for name in data["logging"] if name not in ("level", "enable_json")}
    assert named >= {f"monitoring.{name}" for name in data["monitoring"] if not name.endswith("_threshold")}
    assert not named & translated
    assert set(_NO_EFFECT) <= set(data)  # the file above has them all
    for model in data["ai_inference"]["models"]:
        assert any(model["name"] in warning for warning in warnings)


@pytest.mark.parametrize("value", [True, False, {"models": []}, {"models": 3}, {"models": [3]}, None])
def test_inference_is_a_boolean_or_a_mapping(tmp_path: Path, value: Any) -> None:
    assert load(tmp_path, ai_inference=value).config.decisions.models == ()
    assert "ai_inference" in refused(tmp_path, ai_inference="much")


def test_offline_mode_turns_the_uplink_off(tmp_path: Path) -> None:
    assert load(tmp_path, offline_mode=True).config.uplink.enabled is False
    assert load(tmp_path, offline_mode="${OFFLINE:-true}").config.uplink.enabled is False
    assert load(tmp_path, {"OFFLINE": "false"}, offline_mode="${OFFLINE:-true}").config.uplink.enabled is True


@pytest.mark.parametrize(("changes", "says"), [
    ({"clout_endpoint": "x"}, "clout_endpoint: is unknown; did you mean cloud_endpoint?"), ({"zzz": 1}, "zzz: is unknown; remove it"), ({"monitoring": {"cpu_alert_treshold": 3}}, "did you mean monitoring.cpu_alert_threshold?"),
    ({"monitoring": 3}, "monitoring"), ({"logging": {"colour": True}}, "logging.colour"), ({"logging": "info"}, "logging"), ({"logging": {"level": "loud"}}, "logging.level"), ({"health_port": "http"}, "api.port"),
    ({"agent_id": "a b"}, "edge_id"), ({"cloud_token": "${NO_SUCH}"}, "NO_SUCH"), ({"offline_mode": "sometimes"}, "offline_mode"),
    ({"monitoring": {"cpu_alert_threshold": "high"}}, "monitoring.cpu_alert_threshold"), ({"monitoring": {"cpu_alert_threshold": True}}, "monitoring.cpu_alert_threshold"),
])
def test_what_is_unknown_or_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert says in refused(tmp_path, **changes)


def test_only_the_health_port_serves(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert any(warning.startswith("metrics_port:") and "8080" in warning for warning in loaded.warnings)
    assert load(tmp_path, health_port=...).config.api.port == 8081
