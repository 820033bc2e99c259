"""The uplink: records up, receipts and desired state down. `backoff` and `lanes` are pure, `link` has the effects."""
