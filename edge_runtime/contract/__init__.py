"""The contract: the words that edge, hub and devices share over MQTT. Pure; imports nothing but the standard library.

Needs of a broker no more than MQTT 3.1.1 (QoS 1, retained messages, Last Will). Where MQTT 5 is offered the session uses message
expiry, receive maximum and reason codes; meaning never depends on them. Payloads are JSON. `docs/mqtt-api.md` is generated from here
(`python -m edge_runtime.contract.apidoc`).
"""

from .errors import ContractError
from .limits import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION", "ContractError"]
